"""What the fp8 products for Hopper have in common: a step of the summed axis, and how an epilogue quantises.

A step is 128 of the summed axis, what shares a scale; all codes lie with the summed axis last. Two groups of 4 warps
multiply, one loads. A group owns 64 rows at a time: it multiplies them by 128 columns in four products of m64n128k32,
waits, adds the scaled sums to fp32 accumulators, and goes on with the next block of 64 x 128. The tensor cores work for
the other group meanwhile: what a promotion costs does not add to what the products take.

Offsets of scales have 32 bits: theirs would pass 2^31 beside 256 GB of codes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from nmoe.effects.kernels.moe.hopper.tiles import swizzle

ROWS = 128
"""Of a tile."""

STAGES = 4
"""Steps under way: 192 KB of shared memory, in stages of 384 rows and columns."""

CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@gluon.jit
def tile_at(pid, tile_expert, tile_row, num_m, columns, GROUP: gl.constexpr):
    """Expert, first row and column of a tile, zeros beyond the last: read a tile ahead, so that no product waits."""
    inside = pid < num_m * columns
    tile, column = swizzle(gl.where(inside, pid, 0), columns, num_m, GROUP)
    expert = gl.load(tile_expert + tile, mask=inside, other=0)
    return expert, gl.load(tile_row + tile, mask=inside, other=0), column


@gluon.jit
def tokens(source, first, ROWS, mma: gl.constexpr):
    """Of 64 rows; those of the next expert too, whose results are not stored."""
    row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    return gl.load(source + row, mask=row < ROWS, other=0)


@gluon.jit
def multiply(a, b):
    """Sums of one step, under way: a [64 128] by b [128 128], codes."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    zero = gl.zeros((64, 128), gl.float32, mma)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def magnitude_bits(x):
    """`fp8._magnitude_bits`."""
    return x.to(gl.int32, bitcast=True) & 0x7FFFFFFF


@gluon.jit
def _factor(largest):
    """`fp8._factor`."""
    amax = largest.to(gl.float32, bitcast=True)
    factor = gl.minimum(gl.div_rn(gl.full(amax.shape, 448.0, gl.float32, amax.type.layout), amax), 448.0 / 1e-12)
    return gl.where(largest >= 0x7F800000, float("nan"), factor)


@gluon.jit
def store_scale(largest, scale, first, last, column, SCALES):
    """Store the scales of rows from the bits of their largest magnitudes; returns the factors, as `largest` lies.

    column   first of the 128 that share a scale
    SCALES   of a row
    """
    M: gl.constexpr = largest.shape[0]
    # a row's quotients are not computed by every thread that has a part of the row
    once: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    factor = _factor(gl.convert_layout(largest, once))
    row = first + gl.arange(0, M, layout=once)
    one = gl.full([M], 1.0, gl.float32, once)
    gl.store(scale + row.to(gl.int64) * SCALES + column // 128, gl.div_rn(one, factor), mask=row < last)
    return gl.convert_layout(factor, largest.type.layout)


@gluon.jit
def sigmoid(x):
    """`fp8._sigmoid`: in four instructions, which take denormal numbers for zero."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t; }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
