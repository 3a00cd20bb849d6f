"""Experts as anybody would write them first: one plain MLP an expert over its own rows. An oracle, and countable."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.model.experts import Rows, mlp


def experts_by_segment(rows: Rows, up: Tensor, down: Tensor) -> Tensor:
    segments = rows.x.index_select(0, rows.source).split(rows.count.tolist())
    return torch.cat([mlp(*each) for each in zip(segments, up.unbind(0), down.unbind(0), strict=True)])
