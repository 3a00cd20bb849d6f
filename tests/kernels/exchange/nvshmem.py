"""Experts as anybody would write them first: one plain MLP an expert over its own rows. An oracle, and countable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmoe.pure.model.experts import Rows, mlp, swiglu


def experts_by_segment(rows: Rows, up: Tensor, down: Tensor, bias: Any = (), activate: Any = swiglu) -> Tensor:
    segments = rows.x.index_select(0, rows.source).split(rows.count.tolist())
    biases = bias if isinstance(bias, Tensor) else up.new_zeros(len(up), *up.shape[2:])
    return torch.cat(
        [
            mlp(x, first, second, lambda h, shift=shift: activate(h + shift))
            for x, first, second, shift in zip(segments, up, down, biases, strict=True)
        ]
    )
