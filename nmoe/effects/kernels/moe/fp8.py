"""Kernels of the routed experts in fp8: block quantisation, and grouped GEMMs whose sums are promoted every 128.

Letters: P rows sorted by expert, N tokens, E experts, D hidden size and F expert width, multiples of 128. A tile has M
rows and 128 columns, the block of a scale. Codes and scales are those of `pure.formats.e4m3`.

On sm_90 an fp8 product accumulates with about 14 bits, and takes both operands with the summed axis last: partial sums
of 128 are scaled and added in fp32 registers, and a weight is quantised in the direction that a product needs. The
scales of a step are read a step before, so that no sum waits for them. One GPU of that generation has the products of
`moe.hopper`, with the same bits.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.experts import _swizzle

BLOCK = 128
"""Values that share a scale, and columns of a tile."""

ROWS = 32
"""Rows that one program quantises."""

ACTIVATED = 16
"""Rows whose gradient of SwiGLU one program computes: 32 take 1.06 to 1.11 of the time on an H200 (docs/log.md)."""

GATHERED = 16
"""Rows that one program gathers, 512 codes of each."""


@attrs.frozen(kw_only=True)
class Tile:
    """Rows of a tile and launch options of one product; a tile has 128 columns, and 128 of the summed axis a step."""

    block_m: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@triton.jit
def _factor(largest):
    """Factor on a block, from the bits of its largest magnitude: as integers infinities and NaNs are larger still."""
    amax = largest.to(tl.float32, bitcast=True)
    factor = tl.minimum(tl.div_rn(tl.full(amax.shape, 448.0, tl.float32), amax), 448.0 / 1e-12)
    return tl.where(largest >= 0x7F800000, float("nan"), factor)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scaled_codes(x, factor):
    """Codes of a block of values, by the GPU's conversion: nearest, ties to even, at most 448; a NaN stays one."""
    return (x * factor).to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _sigmoid(x):
    """Zero where it would be a denormal number, for x below -87.3: the instructions of Hopper's kernels know none, and
    ranks that share experts have other kernels than one GPU has."""
    value = tl.sigmoid(x)
    return tl.where(value < 1.1754943508222875e-38, 0.0, value)


@triton.jit
def _store_quantised(x, codes, scale, row, real, first, CODES, SCALES):
    """Epilogue: quantise M x 128 values, a scale a row; `first` is a multiple of 128.

    CODES, SCALES  from one row to the next, of codes and of scales
    """
    factor = _factor(tl.max(_magnitude_bits(x), 1))
    column = first + tl.arange(0, 128)
    at = row.to(tl.int64)[:, None] * CODES + column[None, :]
    tl.store(codes + at, _scaled_codes(x, factor[:, None]), mask=real[:, None])
    one = tl.full(factor.shape, 1.0, tl.float32)
    tl.store(scale + row.to(tl.int64) * SCALES + first // 128, tl.div_rn(one, factor), mask=real)


@triton.jit
def quantise_rows_kernel(x, codes, scale, limit, rows, WIDTH, CODES, SCALES, M: tl.constexpr):
    if limit is not None:
        rows = tl.minimum(rows, tl.load(limit))
    if tl.program_id(0) * M < rows:
        row = tl.program_id(0) * M + tl.arange(0, M)
        first = tl.program_id(1) * 128
        real = row < rows
        at = row.to(tl.int64)[:, None] * WIDTH + (first + tl.arange(0, 128))[None, :]
        value = tl.load(x + at, mask=real[:, None], other=0.0).to(tl.float32)
        _store_quantised(value, codes, scale, row, real, first, CODES, SCALES)


@triton.jit
def quantise_weight_kernel(w, codes, scale, R, C, ACROSS: tl.constexpr):
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = expert * R * C + row.to(tl.int64)[:, None] * C + column[None, :]
    value = tl.load(w + at).to(tl.float32)
    factor = _factor(tl.max(tl.max(_magnitude_bits(value), 1), 0))
    code = _scaled_codes(value, factor)
    if ACROSS:
        tl.store(codes + expert * R * C + column.to(tl.int64)[:, None] * R + row[None, :], tl.trans(code))
    else:
        tl.store(codes + at, code)
    block = (expert * (R // 128) + tl.program_id(0)) * (C // 128) + tl.program_id(1)
    tl.store(scale + block, tl.div_rn(1.0, factor))


@triton.jit
def gather_gemm_swiglu_fp8_kernel(
    x, x_scale, source, w, w_scale, h, a_codes, a_scale, tile_expert, tile_row, end, CODES, SCALES, NUM_M, F, D,
    M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    columns = F // 128
    tile, column = _swizzle(tl.program_id(0), columns, NUM_M, GROUP)
    expert = tl.load(tile_expert + tile)
    first = tl.load(tile_row + tile)
    if expert >= 0:
        row = first + tl.arange(0, M)
        real = row < tl.load(end + expert)
        token = tl.load(source + row, mask=real, other=0).to(tl.int64)
        address = x + token[:, None] * CODES + tl.arange(0, 128)[None, :]
        steps = D // 128
        share_at = x_scale + token * SCALES
        # scales lie as the weight [D 2 F] does: a row of them for each 128 of D
        gate_at = w_scale + expert.to(tl.int64) * steps * 2 * columns + column
        gate = tl.zeros((M, 128), tl.float32)
        value = tl.zeros((M, 128), tl.float32)
        share, of_gate, of_value = tl.load(share_at), tl.load(gate_at), tl.load(gate_at + columns)
        for k in range(0, steps):
            then = tl.minimum(k + 1, steps - 1)
            next_share = tl.load(share_at + then)
            next_gate = tl.load(gate_at + then * 2 * columns)
            next_value = tl.load(gate_at + then * 2 * columns + columns)
            rows = tl.load(address)
            part = tl.dot(rows, w.load([expert * 2 * F + column * 128, k * 128]).T)
            gate += part * (share * of_gate)[:, None]
            part = tl.dot(rows, w.load([expert * 2 * F + F + column * 128, k * 128]).T)
            value += part * (share * of_value)[:, None]
            address += 128
            share, of_gate, of_value = next_share, next_gate, next_value
        f = column * 128 + tl.arange(0, 128)
        gate = gate.to(h.dtype.element_ty)
        value = value.to(h.dtype.element_ty)
        at = h + row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        tl.store(at, gate, mask=real[:, None])
        tl.store(at + F, value, mask=real[:, None])
        gate = gate.to(tl.float32)
        a = (gate * _sigmoid(gate) * value.to(tl.float32)).to(h.dtype.element_ty).to(tl.float32)
        _store_quantised(a, a_codes, a_scale, row, real, column * 128, F, columns)


@triton.jit
def grouped_gemm_fp8_kernel(
    rows, row_scale, w, w_scale, out, to, at, addresses, tile_expert, tile_row, end, OFFSET, NUM_M, INNER, OUTER,
    STEP_IN, STEP_OUT, M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    columns = OUTER // 128
    tile, column = _swizzle(tl.program_id(0), columns, NUM_M, GROUP)
    expert = tl.load(tile_expert + tile)
    first = tl.load(tile_row + tile)
    if expert >= 0:
        row = first + tl.arange(0, M)
        real = row < tl.load(end + expert)
        steps = INNER // 128
        share_at = row_scale + row.to(tl.int64) * steps
        block_at = w_scale + expert.to(tl.int64) * columns * steps + column * STEP_OUT
        acc = tl.zeros((M, 128), tl.float32)
        share = tl.load(share_at, mask=real, other=0.0) * tl.load(block_at)
        for k in range(0, steps):
            then = tl.minimum(k + 1, steps - 1)
            next_share = tl.load(share_at + then, mask=real, other=0.0)
            next_block = tl.load(block_at + then * STEP_IN)
            part = tl.dot(rows.load([first, k * 128]), w.load([expert * OUTER + column * 128, k * 128]).T)
            acc += part * share[:, None]
            share = next_share * next_block
        if addresses is None:
            there = out + row.to(tl.int64) * OUTER
        else:
            base = tl.load(addresses + tl.load(to + row, mask=real, other=0)) + OFFSET
            place = tl.load(at + row, mask=real, other=0).to(tl.int64) * OUTER
            # the cast loses what is known of the address: without this the stores are of two bytes
            there = tl.multiple_of(base.to(out.dtype) + place, 16)
        n = column * 128 + tl.arange(0, 128)
        tl.store(there[:, None] + n[None, :], acc.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def gather_rows_kernel(codes, scale, source, total, out, out_scale, D, M: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    if tl.program_id(0) * M < tl.load(total):
        real = row < tl.load(total)
        token = tl.load(source + row, mask=real, other=0).to(tl.int64)
        inside = real[:, None] & (column < D)[None, :]
        value = tl.load(codes + token[:, None] * D + column[None, :], mask=inside)
        tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=inside)
        blocks = D // 128
        block = tl.program_id(1) * (N // 128) + tl.arange(0, N // 128)
        inside = real[:, None] & (block < blocks)[None, :]
        value = tl.load(scale + token[:, None] * blocks + block[None, :], mask=inside)
        tl.store(out_scale + row.to(tl.int64)[:, None] * blocks + block[None, :], value, mask=inside)


@triton.jit
def swiglu_backward_kernel(da, h, weight, slot, total, dh, codes, scale, gate_part, F, M: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)
    first = tl.program_id(1) * 128
    if tl.program_id(0) * M < tl.load(total):
        real = row < tl.load(total)
        share = tl.load(weight + tl.load(slot + row, mask=real, other=0), mask=real, other=0.0)
        f = first + tl.arange(0, 128)
        here = row.to(tl.int64)[:, None] * F + f[None, :]
        there = row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        given = tl.load(da + here, mask=real[:, None], other=0.0).to(tl.float32)
        gate = tl.load(h + there, mask=real[:, None], other=0.0).to(tl.float32)
        value = tl.load(h + there + F, mask=real[:, None], other=0.0).to(tl.float32)
        tl.debug_barrier()  # `da` is overwritten below, by other threads than those that have just read it
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        activation = silu * value
        tl.store(gate_part + row.to(tl.int64) * (F // 128) + tl.program_id(1), tl.sum(given * activation, 1), mask=real)
        dtype: tl.constexpr = dh.dtype.element_ty
        tl.store(da + here, (activation * share[:, None]).to(dtype), mask=real[:, None])
        given = given * share[:, None]
        d_gate = (given * value * (sigmoid + silu * (1 - sigmoid))).to(dtype)
        d_value = (given * silu).to(dtype)
        tl.store(dh + there, d_gate, mask=real[:, None])
        tl.store(dh + there + F, d_value, mask=real[:, None])
        _store_quantised(d_gate.to(tl.float32), codes, scale, row, real, first, 2 * F, F // 64)
        _store_quantised(d_value.to(tl.float32), codes, scale, row, real, F + first, 2 * F, F // 64)


def _codes(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device=like.device)


def _scales(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def quantise_rows(x: Tensor, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`pure.formats.e4m3.quantise` of rows.

    x        [P C]
    limit    [1] i32   rows to quantise, the others are undefined; None: all
    returns  [P C] e4m3, [P C/128] f32
    """
    rows, width = x.shape
    codes, scale = _codes(rows, width, like=x), _scales(rows, width // BLOCK, like=x)
    _quantise_rows_(codes, scale, x, limit)
    return codes, scale


def packed_rows(x: Tensor, words: int) -> Tensor:
    """`quantise_rows` with the scales of a row behind its codes, so that it is sent as one.

    x        [P C]
    words    of 4 bytes of a row, as `pure.formats.e4m3.row_words` counts them
    returns  [P words] i32; what fills a row up is undefined
    """
    rows, width = x.shape
    packed = torch.empty(rows, words, dtype=torch.int32, device=x.device)
    _quantise_rows_(*unpacked(packed, width), x, None)
    return packed


def unpacked(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The codes [P C] e4m3 and scales [P C/128] f32 of rows that are packed, in the same memory."""
    codes = packed.view(torch.float8_e4m3fn)[:, :width]
    return codes, packed.view(torch.float32)[:, width // packed.itemsize :][:, : width // BLOCK]


def _quantise_rows_(codes: Tensor, scale: Tensor, x: Tensor, limit: Tensor | None) -> None:
    rows, width = x.shape
    if rows:
        quantise_rows_kernel[(triton.cdiv(rows, ROWS), width // BLOCK)](
            x, codes.view(torch.uint8), scale, limit, rows, width, codes.stride(0), scale.stride(0), ROWS, num_warps=4
        )


def quantise_weight(w: Tensor, *, across: bool) -> tuple[Tensor, Tensor]:
    """`pure.formats.e4m3.quantise` of weights in blocks of 128 x 128.

    w        [E R C]
    across   whether the codes are those of the transpose
    returns  [E R C], or [E C R] if `across`, e4m3; [E R/128 C/128] f32 either way
    """
    experts, r, c = w.shape
    codes = _codes(experts, *((c, r) if across else (r, c)), like=w)
    scale = _scales(experts, r // BLOCK, c // BLOCK, like=w)
    quantise_weight_kernel[(r // BLOCK, c // BLOCK, experts)](
        w, codes.view(torch.uint8), scale, r, c, across, num_warps=8
    )
    return codes, scale


def gather_gemm_swiglu(
    x: Tensor, x_scale: Tensor, source: Tensor, w: Tensor, w_scale: Tensor, end: Tensor, tiles: RowTiles,
    tile: Tile, group: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Pre-activation of every row, and its activation quantised.

    x        [N D] e4m3, x_scale [N D/128]; rows may lie apart
    source   [P] i32    row -> token
    w        [E 2F D] e4m3, w_scale [E D/128 2F/128]
    dtype    of the pre-activation
    returns  h [P 2 F], the activation's codes [P F] and scales [P F/128]
    """
    experts, double, d = w.shape
    f, pairs, num = double // 2, source.shape[0], tiles.expert.shape[0]
    h = torch.empty(pairs, 2, f, dtype=dtype, device=x.device)
    codes, scale = _codes(pairs, f, like=x), _scales(pairs, f // BLOCK, like=x)
    gather_gemm_swiglu_fp8_kernel[(num * (f // BLOCK),)](
        x, x_scale, source, TensorDescriptor.from_tensor(w.view(experts * double, d), [BLOCK, BLOCK]), w_scale,
        h, codes.view(torch.uint8), scale, tiles.expert, tiles.row, end, x.stride(0), x_scale.stride(0), num, f, d,
        tile.block_m, group, **tile.options(),
    )  # fmt: skip
    return h, codes, scale


def grouped_gemm(
    rows: Tensor, row_scale: Tensor, w: Tensor, w_scale: Tensor, end: Tensor, tiles: RowTiles, tile: Tile,
    group: int, dtype: torch.dtype, *, across: bool,
) -> Tensor:  # fmt: skip
    """Grouped GEMM: out[p] = rows[p] @ w[expert of p].T, one launch.

    rows     [P I] e4m3, row_scale [P I/128]
    w        [E O I] e4m3
    w_scale  [E O/128 I/128], or [E I/128 O/128] if `across`
    returns  [P O] in `dtype`
    """
    out = torch.empty(rows.shape[0], w.shape[1], dtype=dtype, device=rows.device)
    _launch_(rows, row_scale, w, w_scale, out, None, None, None, 0, end, tiles, tile, group, across)
    return out


def grouped_gemm_push_(
    rows: Tensor, row_scale: Tensor, w: Tensor, w_scale: Tensor, to: Tensor, at: Tensor, addresses: Tensor,
    offset: int, end: Tensor, tiles: RowTiles, tile: Tile, group: int, dtype: torch.dtype, *, across: bool,
) -> None:  # fmt: skip
    """`grouped_gemm` whose epilogue stores each row into a field of another rank's arena, as that of `experts` does.

    to         [P] i32   rank of each row
    at         [P] i32   its place in the field
    addresses  [W] i64   of the arenas
    offset     bytes from an arena's beginning to the field

    Writes:  that field.
    """
    none = torch.empty(0, dtype=dtype, device=rows.device)  # of the format that is stored
    _launch_(rows, row_scale, w, w_scale, none, to, at, addresses, offset, end, tiles, tile, group, across)


def _launch_(
    rows: Tensor, row_scale: Tensor, w: Tensor, w_scale: Tensor, out: Tensor, to: Tensor | None, at: Tensor | None,
    addresses: Tensor | None, offset: int, end: Tensor, tiles: RowTiles, tile: Tile, group: int, across: bool,
) -> None:  # fmt: skip
    experts, outer, inner = w.shape
    num = tiles.expert.shape[0]
    step_in, step_out = (outer // BLOCK, 1) if across else (1, inner // BLOCK)
    grouped_gemm_fp8_kernel[(num * (outer // BLOCK),)](
        TensorDescriptor.from_tensor(rows, [tile.block_m, BLOCK]), row_scale,
        TensorDescriptor.from_tensor(w.view(experts * outer, inner), [BLOCK, BLOCK]), w_scale,
        out, to, at, addresses, tiles.expert, tiles.row, end, offset, num, inner, outer, step_in, step_out,
        tile.block_m, group, **tile.options(),
    )  # fmt: skip


def gather_rows(codes: Tensor, scale: Tensor, source: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of each row's token.

    codes    [N D] e4m3, scale [N D/128]
    source   [P] i32   row -> token
    end      [E] i32   of each expert's rows; those beyond the last are undefined
    returns  [P D] e4m3, [P D/128] f32
    """
    pairs, d = source.shape[0], codes.shape[1]
    out, out_scale = _codes(pairs, d, like=codes), _scales(pairs, d // BLOCK, like=codes)
    gather_rows_kernel[(triton.cdiv(pairs, GATHERED), triton.cdiv(d, 4 * BLOCK))](
        codes.view(torch.uint8), scale, source, end[-1:], out.view(torch.uint8), out_scale, d, GATHERED, 4 * BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out, out_scale


def swiglu_backward_(
    da: Tensor, h: Tensor, weight: Tensor, slot: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of SwiGLU, and its codes.

    A pass of its own: as an epilogue of the product, which needs all its registers for two sums, it took longer than
    both (docs/log.md, 2026-11-30).

    da       [P F]      gradient of the activation, no gate applied
    h        [P 2 F]    pre-activation
    weight   [N K] f32  gate of each pair
    slot     [P] i32    row -> pair
    end      [E] i32    of each expert's rows; those beyond the last are undefined
    returns  dh [P 2 F], its codes [P 2F] and scales [P 2F/128], and the gate's gradient in parts [P F/128] f32

    Writes:  the activation times its gate, in the place of `da`.
    """
    pairs, f = da.shape
    dh, part = torch.empty_like(h), _scales(pairs, f // BLOCK, like=h)
    codes, scale = _codes(pairs, 2 * f, like=h), _scales(pairs, 2 * f // BLOCK, like=h)
    swiglu_backward_kernel[(triton.cdiv(pairs, ACTIVATED), f // BLOCK)](
        da, h, weight, slot, end[-1:], dh, codes.view(torch.uint8), scale, part, f, ACTIVATED, num_warps=4
    )
    return dh, codes, scale, part
