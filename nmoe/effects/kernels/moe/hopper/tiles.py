"""Tiles of the products for Hopper, and the order in which programs take them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS, COLUMNS, STEP = 128, 256, 64
"""Of a tile: rows and columns of the output, and the summed axis a step."""

STAGES = 4
"""Steps under way: 192 KB of shared memory."""


@gluon.jit
def swizzle(pid, num_n, num_m, GROUP: gl.constexpr):
    """`experts._swizzle`."""
    group = pid // (GROUP * num_n)
    first = group * GROUP
    size = gl.minimum(num_m - first, GROUP)
    inside = pid % (GROUP * num_n)
    return first + inside % size, inside // size
