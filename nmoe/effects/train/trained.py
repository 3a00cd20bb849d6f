"""A trained model in a script: `nmoe.load`.

B = texts, T = tokens of a text, V = ids of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
from torch import Tensor

from nmoe.config.sections import Model
from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import weights
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.data.tokenizer import Tokenizer, encoding
from nmoe.effects.record import address
from nmoe.effects.record.names import WEIGHTS
from nmoe.effects.train.generate import Network, open_network
from nmoe.pure.model import model
from nmoe.pure.model.model import Transformer


@attrs.frozen(kw_only=True, eq=False)
class Trained:
    """A model with what it takes to use it."""

    folder: Path  # of the run
    checkpoint: Path | None  # that its parameters are of; None: of weights.safetensors
    tokenizer: Tokenizer
    network: Network

    @property
    def config(self) -> Model:
        """The table `model` of the run's config."""
        return self.network.config

    @property
    def params(self) -> Transformer:
        """The parameters, a tree of tensors; `nmoe.tree.leaves` lists them by path."""
        return self.network.params

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each of `tokens`.

        tokens   [B T] i64   at most `config.max_positions`, on the device of the parameters
        returns  [B T V] f32
        """
        n = self.network
        hidden, _ = model.forward(n.params, tokens, n.router_bias, n.env, n.config)
        return (hidden @ n.params.head)[..., : n.vocab_size].float() * n.config.logit_scale

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return encoding(self.tokenizer).encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return encoding(self.tokenizer).decode(list(ids))


def load(run: str | Path, *, root: str | Path = address.ROOT, device: str | None = None) -> Trained:
    """A trained model: of a run its weights file, or its newest checkpoint while it has none; or of one checkpoint.

    run      name of a run under `root`, path of a run, of a checkpoint, or of what `nmoe import hf` wrote
    device   "cuda", "cpu", or None: the GPU if torch finds one

    Raises:  InputError when there is none, it is damaged, or the device cannot run it.
    """
    path = address.find(str(run), Path(root))
    checkpoint = manifests.find(path)
    folder = path if checkpoint is None else checkpoint.parent.parent
    if checkpoint is None and not files.is_file(folder / WEIGHTS):
        checkpoint = weights.checkpoint_of(Disk(), folder)
    network, tokenizer = open_network(folder, device, checkpoint)
    return Trained(folder=folder, checkpoint=checkpoint, tokenizer=tokenizer, network=network)
