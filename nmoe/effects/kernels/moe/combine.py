"""Sum of each token's rows, in fp32 and in the order of its choices: `pure.experts.combine` as a gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


@triton.jit
def combine_kernel(y, place, weight, out, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k).to(tl.int64)
        part = tl.load(y + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = part * tl.load(weight + token * K + k)
        total += part
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)


def combine(y: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted sum of a token's rows, or their plain sum.

    y        [P D]
    place    [N K] i32   pair -> row
    weight   [N K] f32, or None: all one
    returns  [N D] in the format of `y`
    """
    tokens, k = place.shape
    d = y.shape[1]
    out = torch.empty(tokens, d, dtype=y.dtype, device=y.device)
    block = min(COLUMNS, triton.next_power_of_2(d))
    given = y if weight is None else weight
    combine_kernel[(tokens, triton.cdiv(d, block))](y, place, given, out, d, k, weight is not None, block, num_warps=4)
    return out
