"""Sum of each token's rows, in fp32 and in the order of its choices: `pure.experts.combine` as a gather.

What else is added to a token's vector is added here, where it costs a read: a pass of its own over [65,536 768] in bf16
takes 73 us on an H200 (docs/log.md, 2026-11-29).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


@triton.jit
def combine_kernel(
    y, place, weight, first, second, out, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
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
    if first is not None:
        total += tl.load(first + token * D + column, mask=inside, other=0.0).to(tl.float32)
    if second is not None:
        total += tl.load(second + token * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)


def combine(y: Tensor, place: Tensor, weight: Tensor | None, added: tuple[Tensor, ...] = ()) -> Tensor:
    """Weighted sum of a token's rows, or their plain sum, and what is added to it; rounded once.

    y        [P D]
    place    [N K] i32   pair -> row
    weight   [N K] f32, or None: all one
    added    each [N D] in the format of `y`; of more than two the first ones are added up before
    returns  [N D] in the format of `y`
    """
    tokens, k = place.shape
    d = y.shape[1]
    out = torch.empty(tokens, d, dtype=y.dtype, device=y.device)
    block = min(COLUMNS, triton.next_power_of_2(d))
    given = y if weight is None else weight
    while len(added) > 2:  # biases, shared experts and the residual stream: no model that is known has all three
        added = (added[0] + added[1], *added[2:])
    first, second = (*(each.contiguous() for each in added), None, None)[:2]
    combine_kernel[(tokens, triton.cdiv(d, block))](
        y, place, given, first, second, out, d, k, weight is not None, block, num_warps=4
    )
    return out
