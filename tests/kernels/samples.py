"""Kernels that the harness is tested on: a right one of each kind, and one for each fault it must see."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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


@triton.jit
def shift(x, block: tl.constexpr, ordered: tl.constexpr):
    """Each thread writes what another one reads: its value depends on its own load only."""
    at = tl.arange(0, block)
    value = tl.load(x + at + 1)
    if ordered:
        tl.debug_barrier()
    tl.store(x + at, value)


@triton.jit
def reverse_by_scratch(x, scratch, y, block: tl.constexpr, ordered: tl.constexpr):
    """Written by one thread, then read by another."""
    at = tl.arange(0, block)
    tl.store(scratch + at, tl.load(x + at))
    if ordered:
        tl.debug_barrier()
    tl.store(y + at, tl.load(scratch + (block - 1 - at)))


@triton.jit
def count_up(counter, ordered: tl.constexpr):
    """Every thread reads a scalar, one writes it."""
    number = tl.load(counter)
    if ordered:
        tl.debug_barrier()
    tl.store(counter, number + 1)


@triton.jit
def move(x, y, block: tl.constexpr):
    """No race, but when both are one tensor."""
    at = tl.arange(0, block)
    tl.store(y + at + 1, tl.load(x + at))


@triton.jit
def carried(x, y, total, number, chosen, block: tl.constexpr):
    """Reads through a pointer that an `if` chose and a loop carries; clears one of the two it may point into."""
    at = tl.arange(0, block)
    pointer = x + at
    if chosen > 0:
        pointer = y + at
    summed = tl.zeros((block,), tl.float32)
    for _ in range(number):
        summed += tl.load(pointer)
        pointer += block
    tl.store(total + at, summed)
    tl.store(y + at, tl.zeros((block,), tl.float32))


@triton.jit
def max_in_place(x, block: tl.constexpr):
    """A reduction over all warps is a barrier: every element is read before the first is written."""
    at = tl.arange(0, block)
    most = tl.max(tl.load(x + at), 0)
    tl.store(x + (block - 1 - at), tl.zeros((block,), tl.float32) + most)


@triton.jit
def add_one(x, block: tl.constexpr):
    """The same thread reads and writes."""
    at = tl.arange(0, block)
    tl.store(x + at, tl.load(x + at) + 1.0)


@triton.jit
def forget_last(x, y, size, block: tl.constexpr):
    """Leaves the last element of `y` as it was."""
    at = tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < size, other=0), mask=at < size - 1)


@triton.jit
def sum_beyond(x, y, size, block: tl.constexpr):
    """Adds up what a mask kept it from reading, too."""
    at = tl.arange(0, block)
    tl.store(y, tl.sum(tl.load(x + at, mask=at < size), 0))


@gluon.jit
def _copy(x, y, block: gl.constexpr):
    at = gl.arange(0, block, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y + at, gl.load(x + at))


@gluon.jit
def side_by_side(x, y, z, block: gl.constexpr, chained: gl.constexpr):
    """Other warps copy `y` on while it is written."""
    gl.warp_specialize([(_copy, (x, y, block)), (_copy, (y if chained else x, z, block))], [4], [24])
