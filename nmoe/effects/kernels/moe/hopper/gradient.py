"""Grouped weight gradients, which may gather the rows of one side."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.hopper.tiles import COLUMNS, ROWS, STAGES, STEP, swizzle
from nmoe.effects.kernels.ring import NARROW, PIECE, SWIZZLED, claim, filled, free, ring, store


@gluon.jit
def _tile(pid, end, count, num_m, num_n, GROUP: gl.constexpr):
    """Which expert, tile of rows and of columns, and where the expert's rows begin and end."""
    expert = pid // (num_m * num_n)
    m, n = swizzle(pid % (num_m * num_n), num_n, num_m, GROUP)
    stop = gl.load(end + expert)
    return expert, m, n, stop - gl.load(count + expert), stop


@gluon.jit
def _load_gradient(
    a, source, b, end, count, E, num_m, num_n, a_buf, b_buf, full, empty, A: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    inner = gl.arange(0, K, layout=gl.SliceLayout(1, layout))
    step = 0
    for pid in range(gl.program_id(0), E * num_m * num_n, PROGRAMS):
        _, m, n, start, stop = _tile(pid, end, count, num_m, num_n, GROUP)
        am = m * M + gl.arange(0, M, layout=gl.SliceLayout(0, layout))
        own = a + am[None, :]
        row = start + inner
        token = row if source is None else gl.load(source + row, mask=row < stop, other=0)
        for k in range(start, stop, K):
            # the next expert's rows, which the descriptor of `b` reads too, meet zeros
            real = (k + inner < stop)[:, None] & (am < A)[None, :]
            address = own + token.to(gl.int64)[:, None] * A
            row = k + K + inner  # a step ahead: its copy does not wait for where a token is
            token = row if source is None else gl.load(source + row, mask=row < stop, other=0)
            stage, ready = claim(full, empty, step, K * N * 2, STAGES)
            tma.async_copy_global_to_shared(b, [k, n * N], ready, b_buf.index(stage))
            async_copy.async_copy_global_to_shared(a_buf.index(stage), address, mask=real)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _multiply_gradient(
    out, end, count, E, B, num_m, num_n, a_buf, b_buf, full, empty, A: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, N, 16])
    step = 0
    for pid in range(gl.program_id(0), E * num_m * num_n, PROGRAMS):
        expert, m, n, start, stop = _tile(pid, end, count, num_m, num_n, GROUP)
        acc = gl.zeros((M, N), gl.float32, mma)
        for k in range(start, stop, K):
            stage = filled(full, step, STAGES)
            fence_async_shared()  # what single threads copied is seen by the tensor cores
            acc = warpgroup_mma(a_buf.index(stage).permute((1, 0)), b_buf.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            free(empty, step, STAGES, k > start)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        free(empty, step, STAGES, stop > start)
        store(acc, out + expert.to(gl.int64) * A * B, m * M, A, n * N, B, ADD, PIECE)


# A is compiled in: as an argument that is no multiple of 16 it would hide that rows are multiples of 16 bytes apart.
# Then bf16 would be copied one by one, which cp.async refuses.
@gluon.jit
def grouped_weight_gradient_kernel(
    a, source, b, out, end, count, E, B, A: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, K, M], b.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, K, N], b.layout)
    full, empty = ring(STAGES, 1 + 128)
    num_m, num_n = gl.cdiv(A, M), gl.cdiv(B, N)
    gl.warp_specialize(
        [
            (_multiply_gradient, (out, end, count, E, B, num_m, num_n, a_buf, b_buf, full, empty, A, M, N, K, GROUP,
                                  PROGRAMS, STAGES, ADD, PIECE)),
            (_load_gradient, (a, source, b, end, count, E, num_m, num_n, a_buf, b_buf, full, empty, A, M, N, K, GROUP,
                              PROGRAMS, STAGES)),
        ],
        [4],
        [56],
    )  # fmt: skip


def grouped_weight_gradient_(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    end: Tensor,
    count: Tensor,
    group: int,
    programs: int,
    *,
    source: Tensor | None = None,
    add: bool = False,
) -> None:
    """`experts.grouped_weight_gradient_`.

    programs  that share the tiles out: one a multiprocessor

    Writes:  out.
    """
    experts, width, other = out.shape
    started = min(programs, experts * triton.cdiv(width, ROWS) * triton.cdiv(other, COLUMNS))
    grouped_weight_gradient_kernel[(started,)](
        a, source, TensorDescriptor.from_tensor(b, [STEP, COLUMNS], SWIZZLED), out, end, count, experts, other, width,
        ROWS, COLUMNS, STEP, group, started, STAGES, add, NARROW if add else PIECE, num_warps=8,
    )  # fmt: skip
