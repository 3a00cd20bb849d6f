"""Memory that nobody wrote is full of what shows: NaN, or the largest integer, wherever a test allocates.

Zeros, or what an earlier test left, hide an element that a kernel forgot. Torch's own switch for that
(`torch.utils.deterministic.fill_uninitialized_memory`) also exchanges algorithms for deterministic ones, and would hide
on a GPU what the tests are to see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

UNINITIALIZED = (
    *((torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")),
    *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
)
"""Functions whose result has values of nobody."""


def poison_everything_(patch: pytest.MonkeyPatch) -> None:
    """Fill with poison what any thread allocates uninitialized, until `patch` is undone.

    Writes:  torch, through `patch`.
    """
    # On its first use a device context keeps a set of torch's constructors for good: it must hold the real ones, or
    # `with torch.device("meta")` allocates on the CPU for the rest of the process.
    with torch.device("meta"):
        torch.empty(0)
    for place, name in UNINITIALIZED:
        patch.setattr(place, name, _poisoned(getattr(place, name)))


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(allocate)
    def poisoned(*arguments: Any, **named: Any) -> Any:
        made = allocate(*arguments, **named)
        # what a compiler traces (fake and functional tensors) is its own: poison there would be a part of the program
        return poison_(made) if type(made) is Tensor and not torch.compiler.is_compiling() else made

    return poisoned


def poison_(x: Tensor) -> Tensor:
    """`x`, full of NaN, or of the largest integer of its type, or of True.

    Writes:  x.
    """
    x.detach().fill_(poison(x.dtype))
    return x


def poison(dtype: torch.dtype) -> float:
    """Value of an element that nobody wrote."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max
