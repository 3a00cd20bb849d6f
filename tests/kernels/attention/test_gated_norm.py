"""The head norm under its gate, in the interpreter: the pure form's numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nmoe.effects.kernels.attention.gated_norm import gated_norm
from nmoe.pure.model.attention import kda as pure
from nmoe.pure.model.norm import rms_norm
from tests.kernels.truth import check, graded, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 17, 1, 16), (1, 11, 3, 64)], ids=str)
def test_it_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One row, one block and more; gates that let nothing and all through."""
    gate = normal(*shape, seed=1, dtype=dtype)
    gate[..., 0], gate[..., 1] = -60, 60
    inputs, pulls = [normal(*shape, dtype=dtype), normal(shape[-1], seed=2), gate], [normal(*shape, seed=3)]
    ours, plain = (partial(which, norm=rms_norm, eps=1e-6) for which in (gated_norm, pure.gated_norm))
    found, allowed, right = (
        graded(which, inputs, pulls, as_) for which, as_ in ((ours, None), (plain, None), (plain, torch.float64))
    )
    check(found, allowed, right)
