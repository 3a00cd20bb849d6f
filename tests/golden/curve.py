"""Twenty steps of a small model on fixed data, as exact numbers.

`tests/golden/test_curve.py` runs this in a process of its own, with an environment that keeps the CPU's libraries to
code which is the same on every x86-64 machine, and says how to write `curve.json` anew.
"""

from __future__ import annotations

import hashlib
import json

import attrs
import numpy as np
import torch

from nmoe.effects.data.loader import open_stream
from nmoe.effects.device.process import Runtime
from nmoe.effects.train.build import fresh
from nmoe.effects.train.step import make_step
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.data.stages import single_source
from nmoe.pure.model.blueprint import make_blueprint
from tests.effects.train.tiny import tiny

STEPS = 20


@attrs.frozen(kw_only=True, eq=False)
class Tokens:
    """A split in memory."""

    where: str = "golden"
    tokens: tuple[np.ndarray, ...]
    num_tokens: int


def text(vocab_size: int) -> Tokens:
    """A learnable stream: each token depends on the one before it and a slow counter; integers only."""
    stream = [1]
    for index in range(1, 4000):
        stream.append((stream[-1] * 5 + index // 7 + 3) % vocab_size)
    return Tokens(tokens=(np.array(stream, dtype=np.uint16),), num_tokens=len(stream))


def curve(compute: str) -> dict[str, object]:
    """Digest of the initial values, loss and gradient norm of every step, digest of the final values."""
    torch.set_num_threads(1)
    config = tiny(compute=compute, batch_size=4, microbatch_size=2, lr=3e-3, steps=STEPS, q_lora_rank=12)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    blueprint = make_blueprint(config)
    state, env = fresh(config, blueprint, rt)
    source = text(config.model.vocab_size)
    windows = (source.num_tokens - 1) // config.train.sequence_length
    read = open_stream(
        [source],
        single_source(windows, 4 * STEPS, content=""),
        batch_size=4,
        microbatch_size=2,
        sequence_length=config.train.sequence_length,
        rank=0,
        world=1,
        key=Key(config.run.seed).fold("data"),
    )

    def digest() -> str:
        values = [leaf for _, leaf in tree.leaves((state.params, state.router_bias))]
        whole = b"".join(value.detach().contiguous().view(torch.uint8).numpy().tobytes() for value in values)
        return hashlib.sha256(whole).hexdigest()

    initial = digest()
    step = make_step(config, blueprint, env, rt, mark=lambda name: None)
    losses: list[str] = []
    norms: list[str] = []
    for _ in range(STEPS):
        state, metrics = step(state, read(state.cursor))
        losses.append(float(metrics.loss).hex())
        norms.append(float(metrics.grad_norm).hex())
    return {"initial": initial, "loss": losses, "grad_norm": norms, "final": digest()}


if __name__ == "__main__":
    print(json.dumps({compute: curve(compute) for compute in ("fp32", "bf16")}, indent=1))
