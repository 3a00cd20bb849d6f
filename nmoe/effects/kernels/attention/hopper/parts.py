"""What both kernels have: which block a program takes, and products of 64 positions under way."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def schedule(pid, blocks, rows, heads, HEADS: gl.constexpr):
    """Sequence, head and block of a program, in the order of `blocks.schedule`."""
    group = pid // (blocks * HEADS)
    within = pid % (blocks * HEADS)
    width = gl.minimum(rows - group * HEADS, HEADS)
    row = group * HEADS + within % width
    return row // heads, row % heads, within // width


@gluon.jit
def product(a, b, N: gl.constexpr):
    """a [64 K] by b [N K] transposed, under way."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    zero = gl.zeros((64, N), gl.float32, layout)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def scores(a, a_rope, b, b_rope):
    """Of 64 positions by 64, before scaling, under way in two groups of products; own and rotated channels apart."""
    return warpgroup_mma(a_rope, b_rope.permute((1, 0)), product(a, b, 64), is_async=True)


@gluon.jit
def operand(x, N: gl.constexpr):
    """As the left side of a product of N columns; no value moves to another thread."""
    parent: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    return gl.convert_layout(x, gl.DotOperandLayout(operand_index=0, parent=parent, k_width=2))
