"""Kernels have first derivatives alone; a second one is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of a `torch.autograd.Function` whose kernels nothing differentiates.

    Torch's `once_differentiable` refuses later and not always: where the incoming gradient requires none, as that of a
    loss, it hands back gradients without a graph, and a sum with others drops the second derivative without a word.

    Raises:  RuntimeError for create_graph=True, which is what enables gradients in a backward pass.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{backward.__qualname__.removesuffix('.backward')}: expected a first derivative, got "
                "create_graph=True; this op has no second one: use `nmoe.reference` for it"
            )
        return backward(ctx, *gradients)

    return checked
