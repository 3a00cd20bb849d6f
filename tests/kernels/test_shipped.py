"""What ships, compiled ahead of time for both targets: no spills, no atomics, 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels import aot, shipped
from tests.kernels.aot import Compiled, Request

QUICK: dict[str, Callable[[], Request]] = {
    "loss": lambda: shipped.loss(True),
    "add, norm": lambda: shipped.norm("forward", True, 2048),
    "add, norm: backward": lambda: shipped.norm("backward", True, 2048),
    "swiglu: backward": lambda: shipped.gate("backward"),
    "adamw": lambda: shipped.update("bf16", "bf16", "fp32"),
    "adamw: fp32 gradient": lambda: shipped.update("bf16", "fp32", "bf16"),
    "muon: ahead": lambda: shipped.ahead("fp32", "bf16"),
    "muon: value": lambda: shipped.moved("bf16"),
    "global norm": lambda: shipped.square_sum("bf16"),
    "choice": lambda: shipped.choice(64, 6),
}
"""The kernels of a step, at their usual sizes."""

REST: dict[str, Callable[[], Request]] = {
    "loss: evaluation": lambda: shipped.loss(False),
    "norm": lambda: shipped.norm("forward", False, 2048),
    "norm: backward": lambda: shipped.norm("backward", False, 2048),
    "norm: backward of three readers": lambda: shipped.norm("backward", True, 2048, 3),
    "norm of 7168": lambda: shipped.norm("backward", True, 7168),
    "norm of 1536": lambda: shipped.norm("backward", True, 1536),
    "norm of 512": lambda: shipped.norm("backward", False, 512),
    "swiglu": lambda: shipped.gate("forward"),
    "adamw: nothing cleared": lambda: shipped.update("bf16", "fp32", "bf16", clear=False),
    "adamw: fp32": lambda: shipped.update("fp32", "fp32", "fp32"),
    "adamw: bf16": lambda: shipped.update("bf16", "bf16", "bf16"),
    "adamw: fp32 gradient and moments": lambda: shipped.update("bf16", "fp32", "fp32"),
    "adamw: fp32 with bf16 gradient": lambda: shipped.update("fp32", "bf16", "fp32"),
    "adamw: fp32 with bf16 moments": lambda: shipped.update("fp32", "fp32", "bf16"),
    "adamw: fp32 with bf16 gradient and moments": lambda: shipped.update("fp32", "bf16", "bf16"),
    "adamw: beyond 2^31 elements": lambda: shipped.update("bf16", "bf16", "bf16", "i64"),
    "muon: ahead of bf16": lambda: shipped.ahead("bf16", "bf16"),
    "muon: ahead with fp32 moments": lambda: shipped.ahead("fp32", "fp32"),
    "muon: ahead of bf16 with fp32 moments": lambda: shipped.ahead("bf16", "fp32"),
    "muon: nothing cleared": lambda: shipped.ahead("fp32", "bf16", clear=False),
    "choice of 256": lambda: shipped.choice(256, 8),
    "global norm: fp32": lambda: shipped.square_sum("fp32"),
    "sum of two ranks": lambda: shipped.reduced("bf16", (2,)),
    "sum of two ranks: fp32": lambda: shipped.reduced("fp32", (2,)),
    "sum of eight ranks": lambda: shipped.reduced("bf16", (2, 2, 2)),
    "sum of eight ranks: fp32": lambda: shipped.reduced("fp32", (2, 2, 2)),
    "sum of twelve ranks": lambda: shipped.reduced("bf16", (2, 2, 3)),
}
"""Their variants."""

SPILLS = {"loss": 8}
"""Spill instructions that are allowed: the loss with 8,192 logits at once has 5 and is faster so, docs/log.md."""

WIDE = {"choice": 1}
"""Accesses of 16 bytes at least, where it is not two: this kernel reads a row once, and writes few numbers."""

SCALARS = 6
"""Loads and stores that are not of arrays: a target, a loss, a factor, a partial sum."""

NARROW = {"choice of 256": 8}
"""More of them: the choices of a row are found one after another, and stored so."""


def problems(chosen: dict[str, Callable[[], Request]], factory: pytest.TempPathFactory) -> list[str]:
    compiled = aot.compile_all([each() for each in chosen.values()], factory.mktemp("triton"))
    assert len(compiled) == len(aot.TARGETS) * len(chosen)
    return [
        f"{name}: {problem}"
        for name, each in zip(list(chosen) * len(aot.TARGETS), compiled, strict=True)
        for problem in (
            *each.problems(spills=SPILLS.get(name, 0)),
            *slow(each, WIDE.get(name, 2), NARROW.get(name, SCALARS)),
        )
    ]


def slow(each: Compiled, wide: int, narrow: int) -> list[str]:
    """Why a kernel that only moves memory would not reach its bandwidth."""
    found: list[str] = []
    if each.narrow > narrow:
        found.append(f"{each.narrow} accesses below 16 bytes, limit {narrow}")
    if each.wide < wide:
        found.append(f"{each.wide} accesses of 16 bytes, at least {wide}")
    if each.atomics or each.scratch:
        found.append(f"{each.atomics} atomics, {each.scratch} bytes of scratch; neither is wanted")
    return [f"{each.kernel} on sm_{each.target}: {problem}" for problem in found]


def test_kernels_of_a_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert problems(QUICK, tmp_path_factory) == []


@pytest.mark.long
def test_their_variants(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert problems(REST, tmp_path_factory) == []
