"""The up-projection of codes, which gathers its tokens, with SwiGLU as epilogue, quantised there."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.hopper.fp8_ring import (
    CODES,
    STAGES,
    magnitude_bits,
    multiply,
    sigmoid,
    store_scale,
    tile_at,
    tokens,
)
from nmoe.effects.kernels.moe.hopper.tiles import swizzle
from nmoe.effects.kernels.ring import claim, filled, ring


@gluon.jit
def _load_up(
    x, source, w, tile_expert, tile_row, end, num_m, columns, ROW, D, F, a_buf, b_part, full, empty,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    inner = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        row = gl.load(tile_row + tile) + gl.arange(0, 128, layout=gl.SliceLayout(1, layout))
        token = gl.load(source + row, mask=row < gl.load(end + expert), other=0).to(gl.int64)
        address = x + token[:, None] * ROW + inner[None, :]
        at = expert * 2 * F + column * 128
        for k in range(0, D, 128):
            stage, ready = claim(full, empty, step, 2 * 128 * 128, STAGES)
            tma.async_copy_global_to_shared(w, [at, k], ready, b_part.index(2 * stage))
            tma.async_copy_global_to_shared(w, [at + F, k], ready, b_part.index(2 * stage + 1))
            async_copy.async_copy_global_to_shared(a_buf.index(stage), address + k)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _rounded(x):
    """To bf16 and back, two values an instruction."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 t;
        cvt.rn.bf16x2.f32 t, $3, $2;
        shl.b32 $0, t, 16;
        and.b32 $1, t, 0xffff0000; }""",
        "=r,=r,r,r",
        [x.to(gl.int32, bitcast=True)],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    ).to(gl.float32, bitcast=True)


@gluon.jit
def _store_up(gate, value, h, codes, scale, first, last, column, F):
    """Epilogue: gate and value [64 128], rounded; SwiGLU of what was rounded, quantised."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    gate = gl.convert_layout(gate.to(gl.bfloat16), layout)
    value = gl.convert_layout(value.to(gl.bfloat16), layout)
    row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    f = column + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    inside = (row < last)[:, None]
    here = h + row.to(gl.int64)[:, None] * (2 * F) + f[None, :]
    gl.store(here, gate, mask=inside)
    gl.store(here + F, value, mask=inside)
    gate = gate.to(gl.float32)
    a = _rounded(gate * sigmoid(gate) * value.to(gl.float32))
    factor = store_scale(gl.max(magnitude_bits(a), 1), scale, first, last, column, F // 128)
    at = row.to(gl.int64)[:, None] * F + f[None, :]
    gl.store(codes + at, (a * factor[:, None]).to(gl.float8e4nv), mask=inside)


@gluon.jit
def _multiply_up(
    x_scale, source, w_scale, h, a_codes, a_scale, tile_expert, tile_row, end, num_m, columns, ROWS, SCALES, D, F,
    a_part, b_part, full, empty, PART: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """a_part [2 STAGES, 64 128], b_part [2 STAGES, 128 128]: of each stage one block of the gate, one of the value."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    steps = D // 128
    step = 0
    expert, first, column = tile_at(gl.program_id(0), tile_expert, tile_row, num_m, columns, GROUP)
    last = gl.load(end + expert)
    token = tokens(source, first + PART * 64, ROWS, mma)
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        next_expert, next_first, next_column = tile_at(pid + PROGRAMS, tile_expert, tile_row, num_m, columns, GROUP)
        share_at = token * SCALES
        gate_at = w_scale + expert.to(gl.int64) * steps * 2 * columns + column
        share = gl.load(x_scale + share_at)
        of_gate = gl.load(gate_at)
        of_value = gl.load(gate_at + columns)
        gate = gl.zeros((64, 128), gl.float32, mma)
        value = gl.zeros((64, 128), gl.float32, mma)
        for k in range(0, steps):
            stage = filled(full, step, STAGES)
            fence_async_shared()  # what single threads copied is seen by the tensor cores
            a = a_part.index(stage * 2 + PART)
            part = multiply(a, b_part.index(stage * 2))
            then = gl.minimum(k + 1, steps - 1)
            next_share = gl.load(x_scale + (share_at + then))
            next_gate = gl.load(gate_at + then * 2 * columns)
            next_value = gl.load(gate_at + (then * 2 * columns + columns))
            part = warpgroup_mma_wait(0, deps=(part,))
            # always true, as in `fp8_gemm`
            if then < D:
                gate += part * (share * of_gate)[:, None]
            part = multiply(a, b_part.index(stage * 2 + 1))
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(stage), count=1)
            if then < D:
                value += part * (share * of_value)[:, None]
            share, of_gate, of_value = next_share, next_gate, next_value
            step += 1
        next_last = gl.load(end + next_expert)
        token = tokens(source, next_first + PART * 64, ROWS, mma)
        _store_up(gate, value, h, a_codes, a_scale, first + PART * 64, last, column * 128, F)
        expert, first, column, last = next_expert, next_first, next_column, next_last


@gluon.jit(do_not_specialize=["ROWS", "SCALES"])
def gather_gemm_swiglu_fp8_kernel(
    x, x_scale, source, w, w_scale, h, a_codes, a_scale, tile_expert, tile_row, num_needed, end, ROWS, ROW, SCALES,
    F, D, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w.layout)
    b_part = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 128, 128], w.layout)
    a_part = a_buf._reinterpret(gl.float8e4nv, [2 * STAGES, 64, 128], w.layout)
    full, empty = ring(STAGES, 1 + 128, READERS=2)
    num_m = gl.load(num_needed)
    columns = F // 128
    gl.warp_specialize(
        [
            (_load_up, (x, source, w, tile_expert, tile_row, end, num_m, columns, ROW, D, F, a_buf, b_part, full, empty,
                        GROUP, PROGRAMS, STAGES)),
            (_multiply_up, (x_scale, source, w_scale, h, a_codes, a_scale, tile_expert, tile_row, end, num_m, columns,
                            ROWS, SCALES, D, F, a_part, b_part, full, empty, 0, GROUP, PROGRAMS, STAGES)),
            (_multiply_up, (x_scale, source, w_scale, h, a_codes, a_scale, tile_expert, tile_row, end, num_m, columns,
                            ROWS, SCALES, D, F, a_part, b_part, full, empty, 1, GROUP, PROGRAMS, STAGES)),
        ],
        [4, 4],
        [232, 232],
    )  # fmt: skip


def gather_gemm_swiglu(
    x: Tensor, x_scale: Tensor, source: Tensor, w: Tensor, w_scale: Tensor, end: Tensor, tiles: RowTiles, group: int,
    programs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fp8.gather_gemm_swiglu` with a pre-activation in bf16, the same bits.

    x        [N D] e4m3, x_scale [N D/128] f32
    source   [P] i32    row -> token
    w        [E 2F D] e4m3, w_scale [E D/128 2F/128] f32
    tiles    of `fp8_ring.ROWS` rows
    programs  that share the tiles out: one a multiprocessor
    returns  h [P 2 F] bf16, the activation's codes [P F] e4m3 and scales [P F/128] f32
    """
    experts, double, d = w.shape
    f, pairs = double // 2, source.shape[0]
    h = torch.empty(pairs, 2, f, dtype=torch.bfloat16, device=x.device)
    codes = torch.empty(pairs, f, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(pairs, f // 128, dtype=torch.float32, device=x.device)
    started = min(programs, tiles.expert.shape[0] * (f // 128))
    gather_gemm_swiglu_fp8_kernel[(started,)](
        x, x_scale, source, TensorDescriptor.from_tensor(w.view(experts * double, d), [128, 128], CODES), w_scale,
        h, codes, scale, tiles.expert, tiles.row, tiles.needed, end, pairs, x.stride(0), x_scale.stride(0), f, d,
        group, started, STAGES, num_warps=4,
    )  # fmt: skip
    return h, codes, scale
