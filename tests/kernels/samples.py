"""Kernels that the harness is tested on: a right one of each kind, and one for each fault it must see."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale(x, y, size, factor, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < size) * factor, mask=at < size)


@triton.jit
def matmul(a, b, c, k_size, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr):
    rows, columns, inner = tl.arange(0, m), tl.arange(0, n), tl.arange(0, k)
    total = tl.zeros((m, n), dtype=tl.float32)
    for start in range(0, k_size, k):
        left = tl.load(a + rows[:, None] * k_size + start + inner[None, :])
        right = tl.load(b + (start + inner)[:, None] * n + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * n + columns[None, :], total.to(c.dtype.element_ty))


@triton.jit
def add_into(x, total, block: tl.constexpr):
    tl.atomic_add(total, tl.sum(tl.load(x + tl.arange(0, block))))
