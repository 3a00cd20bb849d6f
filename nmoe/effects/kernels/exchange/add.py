"""Add what another rank has copied, on few multiprocessors.

M elements
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 24
"""Programs: a sum keeps up with the copy engine, which brings 375 GB/s, and leaves the GEMMs beside it the rest."""

BLOCK = 4096
"""Elements a program adds at once."""


@triton.jit
def add_kernel(total, term, M, PROGRAMS, BLOCK: tl.constexpr):
    for begin in range(tl.program_id(0) * BLOCK, M, PROGRAMS * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        real = at < M
        added = tl.load(total + at, mask=real) + tl.load(term + at, mask=real)
        tl.store(total + at, added, mask=real)


def add_(total: Tensor, term: Tensor) -> None:
    """Add to a tensor.

    total   [M] fp32
    term    [M] fp32, in memory of its own

    Writes:  total.
    """
    programs = min(PROGRAMS, triton.cdiv(total.numel(), BLOCK))
    add_kernel[(programs,)](total, term, total.numel(), programs, BLOCK, num_warps=8)
