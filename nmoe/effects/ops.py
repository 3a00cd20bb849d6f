"""Which implementation of each op this device runs."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.pure.attention.mla import attend_mla
from nmoe.pure.experts import Rows, mlp, swiglu
from nmoe.pure.ops import REFERENCE, Ops

__all__ = ["attend_mla_padded", "build", "experts_by_segment", "experts_grouped"]


def build(device: torch.device) -> Ops:
    """The ops of a device: the reference, with experts that run only on their own rows, and fused attention."""
    if device.type == "cpu":
        return attrs.evolve(REFERENCE, experts=experts_by_segment, attend_mla=attend_mla_padded)
    return attrs.evolve(REFERENCE, experts=experts_grouped)


def attend_mla_padded(q: Tensor, kv: Tensor, k_rope: Tensor, *, scale: float) -> Tensor:
    """`pure.attention.mla.attend_mla` with values padded to the width of the keys.

    torch's fused attention on the CPU takes only equal widths; it halves the time of the plain one and keeps no
    probabilities, which pays for the padding.
    """
    width = kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
    return attend_mla(q, F.pad(kv, (0, q.shape[-1] - width)), k_rope, scale=scale)[..., :width]


def experts_by_segment(rows: Rows, up: Tensor, down: Tensor) -> Tensor:
    """`pure.experts.experts` as one product an expert over its own rows. For the CPU: reads the counts.

    returns  [P D]
    """
    segments = rows.x.index_select(0, rows.source).split(rows.count.tolist())
    return torch.cat([mlp(*each) for each in zip(segments, up.unbind(0), down.unbind(0), strict=True)])


def experts_grouped(rows: Rows, up: Tensor, down: Tensor) -> Tensor:
    """`pure.experts.experts` with torch's grouped product; counts stay on the device.

    rows.x   [M D] bf16
    returns  [P D] bf16
    """
    ends = rows.count.cumsum(0).to(torch.int32)
    x = rows.x.index_select(0, rows.source)
    y = swiglu(F.grouped_mm(x, up.flatten(2), offs=ends).unflatten(-1, (2, -1)))
    return F.grouped_mm(y, down, offs=ends)
