"""The short convolutions in the interpreter: the pure form's numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.attention import convolve as kernel
from nmoe.pure.model.attention import kda as pure
from tests.kernels.attention.test_mla import starts
from tests.kernels.truth import check, graded, normal

TILE = attrs.evolve(kernel.TILE, tokens=8)
HEADS, C = 1, 16


def operands(batch: int, positions: int, taps: int, *, before: bool = False) -> list[Tensor]:
    given = [normal(batch, positions, 3 * HEADS * C), normal(3, HEADS, C, taps, seed=1)]
    return [*given, *([normal(batch, taps - 1, 3 * HEADS * C, seed=2)] if before else [])]


def compare(inputs: list[Tensor], start: Tensor | tuple[()], dtype: torch.dtype = torch.float32) -> None:
    """Against fp64, beside the pure form; taps stay in fp32."""
    batch, positions, _ = inputs[0].shape
    pulls = [normal(batch, positions, HEADS, C, seed=seed) for seed in (3, 4, 5)]
    inputs = [x if at == 1 else x.to(dtype) for at, x in enumerate(inputs)]

    def run(which: Callable[..., Any], x: Tensor, taps: Tensor, *before: Tensor) -> Any:
        return which(x, taps, start, *before)

    ours = graded(partial(run, partial(kernel.convolve_heads, tile=TILE)), inputs, pulls)
    plain = graded(partial(run, pure.convolve_heads), inputs, pulls)
    right = graded(partial(run, pure.convolve_heads), inputs, pulls, torch.float64)
    steps = [torch.finfo(dtype).eps / torch.finfo(x.dtype).eps for x in ours]
    for each in zip(ours, plain, right, steps, strict=True):
        check(*([x] for x in each[:3]), steps=each[3])


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("positions", [1, 3, 8, 9])
def test_lengths_and_taps(positions: int, taps: int) -> None:
    """Rows of one token, shorter than the taps, of one block, of one block and one, of several."""
    compare(operands(1, positions, taps), ())


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("lengths", [[1] * 19, [8, 8], [3, 9, 1, 2], []], ids=str)
def test_documents(lengths: list[int], before: bool) -> None:
    """With bounds at the blocks' and beside them; the first goes on from what was before the row."""
    compare(operands(2, 19, 4, before=before), starts(19, lengths, [7, 2]))


def test_what_was_before_the_row() -> None:
    compare(operands(1, 11, 4, before=True), ())
    compare(operands(1, 1, 4, before=True), ())


def test_half_precision_and_several_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.HEADS", 2)
    compare(operands(1, 13, 4), starts(13, [5, 4]), torch.float16)


def test_the_three_are_views_of_one_tensor() -> None:
    x, taps = operands(1, 5, 4)
    assert len({each.untyped_storage().data_ptr() for each in kernel.convolve_heads(x, taps, tile=TILE)}) == 1
