"""What `transformers` makes of an exported folder, against what nmoe makes of the weights it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.effects.checkpoint.hf_export import Source
from nmoe.effects.terminal import say
from nmoe.errors import InputError, pip_install
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.model import hf, model
from nmoe.pure.model.ops import environment

TOKENS = 64
"""Positions of the text that is compared; a model of fewer reads fewer."""

TOLERANCE = 1e-3
"""Largest difference of a logit over the largest logit: fp32 gives 1e-6 to 1e-5, a wrong weight 1e-1 and more."""

CHOICES = 0.01
"""Share of the choices of experts that may differ: two scores that differ in the last bit only are rare."""


@attrs.frozen(kw_only=True)
class Difference:
    """Logits of the two, over the largest logit."""

    forced: float  # both send every token to the experts that theirs chose
    natural: float
    choices: float  # share of the choices of experts that differ


def verify(folder: Path, source: Source) -> None:
    """Print how far the logits of the folder are from those of the source.

    Raises:  InputError when `transformers` is not installed, does not find all tensors, or differs by more than
             rounding.
    """
    comparison = compare(folder, source, load(folder, torch.float32))
    say(
        f"transformers, fp32, {TOKENS} tokens: logits differ by {comparison.natural:.1e} of the largest, by "
        f"{comparison.forced:.1e} with the same experts; {comparison.choices:.2%} of the choices of experts differ"
    )
    if (
        not max(comparison.forced, comparison.natural if not comparison.choices else 0.0) <= TOLERANCE
        or comparison.choices > CHOICES
    ):
        raise InputError(
            f"--verify: expected logits within {TOLERANCE:.0e} of the largest and {CHOICES:.0%} of the choices, got "
            "more; report it with the config; --no-verify writes the folder all the same"
        )


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Their model of a folder, on the CPU; code in the folder is not run.

    Raises:  InputError when `transformers` is not installed, or does not find every tensor and no other.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(
            f'--verify: expected the extra `hf` for "transformers", got {error}; install it with: '
            f"{pip_install('hf')}; or pass --no-verify"
        ) from error
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model_class: Any = getattr(transformers, architecture)
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, about = model_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        if bar:
            logging.enable_progress_bar()
    config = network.config
    further = range(config.num_hidden_layers, config.num_hidden_layers + getattr(config, "num_nextn_predict_layers", 0))
    ahead = tuple(f"model.layers.{layer}." for layer in further)  # they leave multi-token prediction out
    if wrong := [
        f"{kind} {name}"
        for kind, names in about.items()
        for name in sorted(map(str, names))
        if kind != "unexpected_keys" or not name.startswith(ahead)
    ]:
        raise InputError(
            *(f"--verify: expected every tensor and no other, got {problem}; report it" for problem in wrong)
        )
    return network.eval()


def compare(folder: Path, source: Source, network: Any) -> Difference:
    """How far apart the logits of random tokens are."""
    c = source.model
    dtype = network.lm_head.weight.dtype
    leaves = {path: torch.empty(shape, dtype=dtype) for path, (_, shape) in source.formats.items()}
    for part in hf.parts(c):
        row = leaves[part.path] if part.index is None else leaves[part.path][part.index]
        tensor = next(source.read((part,)))
        # a product that the forward pass rounds to the stored format
        row.copy_(tensor * c.embedding_scale if part.path == "embed" else tensor)
    c = attrs.evolve(c, embedding_scale=1.0)
    bias = leaves[hf.ROUTER_BIAS]
    params = tree.map(lambda path, _: leaves[path], model.specs(c))
    length = min(TOKENS, c.max_positions)
    tokens = torch.randint(c.vocab_size, (1, length), generator=Key(0).fold("verify").generator())
    env = environment(c, length)
    with torch.no_grad(), _recorded(network) as choices:
        theirs = network(tokens).logits

    def ours(routing: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.no_grad():
            hidden, report = model.forward(params, tokens, bias, env, c, routing=routing)
            return hidden @ params.head * c.logit_scale, tuple(layer.expert for layer in report.routing)

    largest = theirs.abs().max()
    natural, chosen = ours()
    forced, _ = ours(tuple(choices))
    same = [
        (mine.sort().values == right.sort().values).double().mean() for mine, right in zip(chosen, choices, strict=True)
    ]
    return Difference(
        forced=float((forced - theirs).abs().max() / largest),
        natural=float((natural - theirs).abs().max() / largest),
        choices=1 - float(torch.stack(same).mean()) if same else 0.0,
    )


@contextmanager
def _recorded(network: Any) -> Iterator[list[Tensor]]:
    """The experts that each layer of their model chooses in the block, [N K] i64 a layer."""
    choices: list[Tensor] = []
    layers = [layer.mlp.experts for layer in network.model.layers if hasattr(layer.mlp, "experts")]
    hooks = [moe.register_forward_pre_hook(lambda _, given: choices.append(given[1])) for moe in layers]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()
