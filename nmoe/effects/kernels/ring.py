"""What the kernels for Hopper have in common: a ring of stages in shared memory between warps that load and warps that
multiply, and an epilogue of a product."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

PIECE, NARROW = 32, 16
"""Columns that are stored at once, and where an epilogue computes with more than the accumulator."""

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

barrier = next(getattr(gl, name) for name in ("barrier", "thread_barrier") if hasattr(gl, name))
"""Its names in Triton 3.7 and 3.6."""


@gluon.jit
def ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr, READERS: gl.constexpr = 1):
    """Barriers of the stages: filled, after so many arrivals, and free again, when all readers gave them back."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=READERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def claim(full, empty, step, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """The stage of a step, once it is free, and its barrier, which so many bytes will fill."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BYTES)
    return stage, full.index(stage)


@gluon.jit
def filled(full, step, STAGES: gl.constexpr):
    """The stage of a step, once it is filled."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    return stage


@gluon.jit
def free(empty, step, STAGES: gl.constexpr, pred=True):
    """Give back the stage of the step before."""
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=pred)


@gluon.jit
def halves(x):
    """Left and right half of the columns; no value moves to another thread."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return x.reshape((M, 2, N // 2)).permute((0, 2, 1)).split()


@gluon.jit
def store(acc, to, first, last, column, WIDTH, ADD: gl.constexpr, PIECE: gl.constexpr):
    """Epilogue: a tile, piece by piece, from row `first` on and up to `last`; or added to what is there."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    if N > PIECE:
        left, right = halves(acc)
        store(left, to, first, last, column, WIDTH, ADD, PIECE)
        store(right, to, first, last, column + N // 2, WIDTH, ADD, PIECE)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [gl.num_warps(), 1], [1, 0])
        dtype: gl.constexpr = to.dtype.element_ty
        row = first + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
        at = column + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
        there = to + row.to(gl.int64)[:, None] * WIDTH + at[None, :]
        inside = (row < last)[:, None] & (at < WIDTH)[None, :]
        if ADD:
            value = gl.convert_layout(acc, layout)
            value = (gl.load(there, mask=inside, other=0.0).to(gl.float32) + value).to(dtype)
        else:
            value = gl.convert_layout(acc.to(dtype), layout)
        gl.store(there, value, mask=inside)
        if ADD:
            barrier()  # what is read next is other columns, but no compiler or check of races has to know
