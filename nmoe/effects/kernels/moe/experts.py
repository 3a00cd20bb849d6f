"""Grouped GEMMs of the routed experts, with SwiGLU and its gradient as epilogues.

Letters: P (token, expert) pairs sorted by expert, N tokens, K chosen experts, D hidden size, F expert width, E experts;
in a kernel M, N, K are the block sizes of `GemmTile`.

Batch-invariant: a tile never spans two experts, and a row's result does not depend on which rows share its tile. The
backward pass recomputes the activation from the pre-activation, and takes a gate's gradient from <activation, its
gradient>: neither a row's output nor that output's gradient is kept for it (0.8 GB each a layer at 32,768 tokens).
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.tables import GemmTile


@triton.jit
def _swizzle(pid, num_n, num_m, GROUP: tl.constexpr):
    """Grouped program order: `GROUP` row tiles side by side, so that they share the weights in the L2 cache."""
    group = pid // (GROUP * num_n)
    first = group * GROUP
    size = min(num_m - first, GROUP)
    inside = pid % (GROUP * num_n)
    return first + inside % size, inside // size


@triton.jit
def gather_gemm_swiglu_kernel(
    x, source, w, bias, h, a, tile_expert, tile_row, end, NUM_M, F, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    tile, column = _swizzle(tl.program_id(0), tl.cdiv(F, N), NUM_M, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        row = tl.load(tile_row + tile) + tl.arange(0, M)
        real = row < tl.load(end + expert)
        token = tl.load(source + row, mask=real, other=0).to(tl.int64)
        inner = tl.arange(0, K)
        address = x + token[:, None] * D + inner[None, :]
        # two dots a step: one of 256 columns would need gate and value interleaved in memory, and saves 0.2 of 3.84 ms
        gate = tl.zeros((M, N), tl.float32)
        value = tl.zeros((M, N), tl.float32)
        for k in range(0, D, K):
            # beyond the last column of x the descriptor reads the next expert's weights, which meet zeros
            rows = tl.load(address) if D % K == 0 else tl.load(address, mask=inner[None, :] < D - k, other=0.0)
            gate = tl.dot(rows, w.load([expert * D + k, column * N]), gate)
            value = tl.dot(rows, w.load([expert * D + k, F + column * N]), value)
            address += K
        f = column * N + tl.arange(0, N)
        inside = real[:, None] & (f < F)[None, :]
        if bias is not None:
            own = bias + expert * (2 * F) + f
            gate += tl.load(own, mask=f < F, other=0.0).to(tl.float32)[None, :]
            value += tl.load(own + F, mask=f < F, other=0.0).to(tl.float32)[None, :]
        gate = gate.to(h.dtype.element_ty)
        value = value.to(h.dtype.element_ty)
        at = row.to(tl.int64)[:, None] * F + f[None, :]
        here = h + row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        tl.store(here, gate, mask=inside)
        tl.store(here + F, value, mask=inside)
        gate, value = gate.to(tl.float32), value.to(tl.float32)
        if LIMIT is None:
            activation = gate * tl.sigmoid(gate) * value
        else:
            gate = tl.minimum(gate, LIMIT)
            activation = (tl.clamp(value, -LIMIT, LIMIT) + 1) * (gate * tl.sigmoid(ALPHA * gate))
        tl.store(a + at, activation.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_epilogue(
    da, first, row, real, share, h, dh, a, F, N: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr
):
    """Epilogue: gradient of SwiGLU on N columns; returns the gate's gradient summed over them."""
    f = first + tl.arange(0, N)
    inside = real[:, None] & (f < F)[None, :]
    here = row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    gate = tl.load(h + here, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(h + here + F, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = dh.dtype.element_ty
    if LIMIT is None:
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        activation = silu * value
        part = tl.sum(da * activation, 1)
        da = da * share[:, None]
        tl.store(dh + here, (da * value * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask=inside)
        tl.store(dh + here + F, (da * silu).to(dtype), mask=inside)
    else:
        below = tl.minimum(gate, LIMIT)
        sigmoid = tl.sigmoid(ALPHA * below)
        silu = below * sigmoid
        activation = silu * (tl.clamp(value, -LIMIT, LIMIT) + 1)
        part = tl.sum(da * activation, 1)
        da = da * share[:, None]
        tl.store(dh + here + F, tl.where(tl.abs(value) <= LIMIT, da * silu, 0.0).to(dtype), mask=inside)
        da *= (tl.clamp(value, -LIMIT, LIMIT) + 1) * (sigmoid + ALPHA * silu * (1 - sigmoid))
        tl.store(dh + here, tl.where(gate <= LIMIT, da, 0.0).to(dtype), mask=inside)
    at = row.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(a + at, (activation * share[:, None]).to(dtype), mask=inside)
    return part


@triton.jit
def swiglu_backward_gemm_kernel(
    rows, w, h, weight, slot, dh, a, gate_part, tile_expert, tile_row, num_needed, end, F, D,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(F, N)
    num_m = tl.load(num_needed)
    # Persistent and flattened, 5 stages: 2.61 ms on an H200, one tile a program 2.66 (docs/log.md, 2026-11-24). The
    # loop ends at the last tile needed: over tiles of all the rows that an exchange has room for it took twice as long.
    for pid in tl.range(tl.program_id(0), num_m * columns, PROGRAMS, flatten=True):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        expert = tl.load(tile_expert + tile)
        first = tl.load(tile_row + tile)
        row = first + tl.arange(0, M)
        real = row < tl.load(end + expert)
        da = tl.zeros((M, N), tl.float32)
        for k in range(0, D, K):
            da = tl.dot(rows.load([first, k]), w.load([expert * F + column * N, k]).T, da)
        share = tl.load(weight + tl.load(slot + row, mask=real, other=0), mask=real, other=0.0)
        # half the columns at a time: the whole tile's gate and value beside its accumulator spill (187 instructions)
        left, right = tl.split(tl.permute(tl.reshape(da, (M, 2, N // 2)), (0, 2, 1)))
        part = _swiglu_backward_epilogue(left, column * N, row, real, share, h, dh, a, F, N // 2, LIMIT, ALPHA)
        part += _swiglu_backward_epilogue(
            right, column * N + N // 2, row, real, share, h, dh, a, F, N // 2, LIMIT, ALPHA
        )
        tl.store(gate_part + row * columns + column, part, mask=real)


@triton.jit
def grouped_gemm_kernel(
    rows, w, out, to, at, addresses, tile_expert, tile_row, end, OFFSET, NUM_M, INNER, OUTER,
    TRANSPOSED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, column = _swizzle(tl.program_id(0), tl.cdiv(OUTER, N), NUM_M, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        first = tl.load(tile_row + tile)
        row = first + tl.arange(0, M)
        real = row < tl.load(end + expert)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, INNER, K):
            if TRANSPOSED:
                acc = tl.dot(rows.load([first, k]), w.load([expert * OUTER + column * N, k]).T, acc)
            else:
                acc = tl.dot(rows.load([first, k]), w.load([expert * INNER + k, column * N]), acc)
        n = column * N + tl.arange(0, N)
        if addresses is None:
            there = out + row.to(tl.int64) * OUTER
        else:
            base = tl.load(addresses + tl.load(to + row, mask=real, other=0)) + OFFSET
            place = tl.load(at + row, mask=real, other=0).to(tl.int64) * OUTER
            # the cast loses what is known of the address: without this the stores are of two bytes
            there = tl.multiple_of(base.to(tl.pointer_type(rows.dtype)) + place, 16)
        tl.store(there[:, None] + n[None, :], acc.to(rows.dtype), mask=real[:, None] & (n < OUTER)[None, :])


@triton.jit
def grouped_weight_gradient_kernel(
    a, source, b, b_rows, out, end, count, A, B, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(A, M), tl.cdiv(B, N)
    expert = tl.program_id(0) // (num_m * num_n)
    m, n = _swizzle(tl.program_id(0) % (num_m * num_n), num_n, num_m, GROUP)
    stop = tl.load(end + expert)
    rows = tl.load(count + expert)
    start = stop - rows
    whole = start + rows // K * K
    am = m * M + tl.arange(0, M)
    bn = n * N + tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    inner = tl.arange(0, K)
    if source is not None:
        own = a + tl.max_contiguous(tl.multiple_of(tl.where(am < A, am, 0), 8), 8)[None, :]
    # both operands by descriptor, the last partial step by pointers: 3.21 ms on an H200, gathered by pointers 3.56
    for k in range(start, whole, K):
        if source is None:
            acc = tl.dot(a.load([k, m * M]).T, b.load([k, n * N]), acc)
        else:
            token = tl.load(source + k + inner).to(tl.int64)
            acc = tl.dot(tl.load(own + token[:, None] * A).T, b.load([k, n * N]), acc)
    if whole < stop:
        # the next expert's rows, which the descriptor of `a` reads too, meet zeros
        row = whole + inner
        column = tl.max_contiguous(tl.multiple_of(tl.where(bn < B, bn, 0), 8), 8)
        last = tl.load(b_rows + row.to(tl.int64)[:, None] * B + column[None, :], mask=(row < stop)[:, None], other=0.0)
        if source is None:
            acc = tl.dot(a.load([whole, m * M]).T, last, acc)
        else:
            token = tl.load(source + row, mask=row < stop, other=0).to(tl.int64)
            acc = tl.dot(tl.load(own + token[:, None] * A).T, last, acc)
    to = out + (expert.to(tl.int64) * A + am.to(tl.int64)[:, None]) * B
    if ADD:
        # a quarter of the columns at a time: what is stored already, beside the whole accumulator, spills
        left, right = tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))
        _add_columns(left, to, n * N, am < A, B, N // 2)
        _add_columns(right, to, n * N + N // 2, am < A, B, N // 2)
    else:
        tl.store(to + bn[None, :], acc.to(out.dtype.element_ty), mask=(am < A)[:, None] & (bn < B)[None, :])


@triton.jit
def _add_columns(acc, to, first, real, B, N: tl.constexpr):
    """Epilogue: add N columns, from `first` on, to what is stored; in two halves."""
    left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, N // 2)), (0, 2, 1)))
    _add(left, to, first + tl.arange(0, N // 2), real, B)
    _add(right, to, first + N // 2 + tl.arange(0, N // 2), real, B)


@triton.jit
def _add(acc, to, column, real, B):
    inside = real[:, None] & (column < B)[None, :]
    before = tl.load(to + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(to + column[None, :], (before + acc).to(to.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # what is read next is other columns, but no compiler or check of races has to know


@triton.jit
def bias_gradient_kernel(dh, out, end, count, WIDTH, M: tl.constexpr, N: tl.constexpr):
    expert = tl.program_id(0)
    column = tl.program_id(1) * N + tl.arange(0, N)
    stop = tl.load(end + expert)
    acc = tl.zeros((M, N), tl.float32)
    for first in range(stop - tl.load(count + expert), stop, M):
        row = first + tl.arange(0, M)
        inside = (row < stop)[:, None] & (column < WIDTH)[None, :]
        acc += tl.load(dh + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + expert * WIDTH + column, tl.sum(acc, 0).to(out.dtype.element_ty), mask=column < WIDTH)


@attrs.frozen(kw_only=True, eq=False)
class Form:
    """What a routed expert has beside a plain SwiGLU.

    bias           [E 2 F] or ()   of the experts here, added before the activation
    limit, alpha   of `pure.model.experts.activation`
    """

    bias: Tensor | tuple[()] = ()
    limit: float | None = None
    alpha: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether it is SwiGLU and nothing else."""
        return not isinstance(self.bias, Tensor) and self.limit is None

    def gradient(self, dh: Tensor, end: Tensor, count: Tensor) -> Tensor | None:
        """Of the bias, in its format; rows are summed in fp32 and in one order."""
        if not isinstance(self.bias, Tensor):
            return None
        out = torch.empty_like(self.bias, memory_format=torch.contiguous_format)
        width = out[0].numel()
        bias_gradient_kernel[(len(out), triton.cdiv(width, 128))](dh, out, end, count, width, 32, 128, num_warps=4)
        return out


PLAIN = Form()


def gather_gemm_swiglu(
    x: Tensor,
    source: Tensor,
    weight: Tensor,
    end: Tensor,
    tiles: RowTiles,
    tile: GemmTile,
    group: int,
    form: Form = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Pre-activation and activation of every row.

    x        [N D]
    source   [P] i32    row -> token
    weight   [E D 2 F]
    end      [E] i32    one past an expert's last row
    tiles    `dispatch.tiles` of `tile.block_m` rows; `tile.block_n` cuts F, `tile.block_k` cuts D
    returns  h [P 2 F], a [P F] in the format of `x`
    """
    experts, d, _, f = weight.shape
    pairs = source.shape[0]
    h = torch.empty(pairs, 2, f, dtype=x.dtype, device=x.device)
    a = torch.empty(pairs, f, dtype=x.dtype, device=x.device)
    w = TensorDescriptor.from_tensor(weight.view(experts * d, 2 * f), [tile.block_k, tile.block_n])
    bias = form.bias.contiguous() if isinstance(form.bias, Tensor) else None
    num = tiles.expert.shape[0]
    gather_gemm_swiglu_kernel[(num * triton.cdiv(f, tile.block_n),)](
        x, source, w, bias, h, a, tiles.expert, tiles.row, end, num, f, d, tile.block_m, tile.block_n, tile.block_k,
        group, form.limit, form.alpha,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return h, a


def swiglu_backward_gemm(
    rows: Tensor,
    slot: Tensor,
    weight: Tensor,
    down: Tensor,
    h: Tensor,
    end: Tensor,
    tiles: RowTiles,
    tile: GemmTile,
    group: int,
    programs: int,
    form: Form = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped GEMM with the gradient of SwiGLU as epilogue: from the output's gradient to the pre-activation's.

    rows      [P D]     gradient of the combined output at each row, its gate not yet applied
    slot      [P] i32   row -> pair
    weight    [N K] f32 gate of each pair
    down      [E F D]
    h         [P 2 F]
    programs  programs that share the tiles out: one a multiprocessor
    returns   dh [P 2 F], the activation times its gate [P F], and the gate's gradient in parts [P tiles of F] f32
    """
    experts, f, d = down.shape
    pairs = rows.shape[0]
    dh = torch.empty_like(h)
    a = torch.empty(pairs, f, dtype=h.dtype, device=h.device)
    columns = triton.cdiv(f, tile.block_n)
    part = torch.empty(pairs, columns, dtype=torch.float32, device=h.device)
    num = tiles.expert.shape[0]
    swiglu_backward_gemm_kernel[(min(programs, num * columns),)](
        TensorDescriptor.from_tensor(rows, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(down.view(experts * f, d), [tile.block_n, tile.block_k]),
        h, weight, slot, dh, a, part, tiles.expert, tiles.row, tiles.needed, end, f, d,
        tile.block_m, tile.block_n, tile.block_k, group, min(programs, num * columns), form.limit, form.alpha,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dh, a, part


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    end: Tensor,
    tiles: RowTiles,
    tile: GemmTile,
    group: int,
    *,
    transposed: bool,
) -> Tensor:
    """Grouped GEMM: out[p] = rows[p] @ weight[expert of p], one launch.

    rows     [P I]
    weight   [E I O], or [E O I] if `transposed`
    tile     `m` cuts rows, `n` O, `k` I
    returns  [P O] in the format of `rows`
    """
    outer = weight.shape[1] if transposed else weight.shape[2]
    out = torch.empty(rows.shape[0], outer, dtype=rows.dtype, device=rows.device)
    _launch_(rows, weight, out, None, None, None, 0, end, tiles, tile, group, transposed)
    return out


def grouped_gemm_push_(
    rows: Tensor,
    weight: Tensor,
    to: Tensor,
    at: Tensor,
    addresses: Tensor,
    offset: int,
    end: Tensor,
    tiles: RowTiles,
    tile: GemmTile,
    group: int,
    *,
    transposed: bool,
) -> None:
    """`grouped_gemm` whose epilogue stores each row into a field of another rank's arena: the same bits, pushed while
    later tiles are computed.

    to         [P] i32   rank of each row
    at         [P] i32   its place in the field
    addresses  [W] i64   of the arenas
    offset     bytes from an arena's beginning to the field

    Writes:  that field.
    """
    _launch_(rows, weight, None, to, at, addresses, offset, end, tiles, tile, group, transposed)


def _launch_(
    rows: Tensor,
    weight: Tensor,
    out: Tensor | None,
    to: Tensor | None,
    at: Tensor | None,
    addresses: Tensor | None,
    offset: int,
    end: Tensor,
    tiles: RowTiles,
    tile: GemmTile,
    group: int,
    transposed: bool,
) -> None:
    experts, inner = weight.shape[0], rows.shape[1]
    outer = weight.shape[1] if transposed else weight.shape[2]
    block = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]
    num = tiles.expert.shape[0]
    grouped_gemm_kernel[(num * triton.cdiv(outer, tile.block_n),)](
        TensorDescriptor.from_tensor(rows, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight.view(experts * weight.shape[1], weight.shape[2]), block),
        out, to, at, addresses, tiles.expert, tiles.row, end, offset, num, inner, outer, transposed,
        tile.block_m, tile.block_n, tile.block_k, group, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def weight_gradient(
    a: Tensor,
    b: Tensor,
    write_: Callable[..., None],
    *,
    parameter: Tensor,
    accumulator: Accumulator | None,
) -> Tensor | None:
    """Grouped weight gradient of a parameter [E A B]: for autograd, or None when it went into the parameter's buffer.

    write_  `grouped_weight_gradient_` but for what it is given here: `out`, `a`, `b`, `add`

    Writes:  the buffer that `accumulator` has for the parameter, and there that it is stored anew.
    """
    buffer = None if accumulator is None else accumulator.buffers.get(parameter.data_ptr())
    sizes = parameter.shape[0], a.shape[1], b.shape[1]
    if accumulator is None or buffer is None:
        made = torch.empty_like(parameter, dtype=a.dtype)
        write_(made.view(sizes), a, b, add=False)
        return made
    write_(buffer.view(sizes), a, b, add=not accumulator.first)
    if accumulator.first:
        accumulator.stored.add(parameter.data_ptr())
    accumulator.added(parameter)
    return None


def grouped_weight_gradient_(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    end: Tensor,
    count: Tensor,
    tile: GemmTile,
    group: int,
    *,
    source: Tensor | None = None,
    add: bool = False,
) -> None:
    """Grouped weight gradient: out[e] = a[e].T @ b[e], or added to what `out` holds; one launch, one rounding.

    out      [E A B] bf16 or f32; zeros for an expert without rows, where nothing is added
    a        [P A], or with `source` what its rows are gathered from, [N A]
    source   [P] i32    row -> row of `a`, or None
    b        [P B]
    tile     `m` cuts A, `n` B, `k` the rows summed over

    Writes:  out.
    """
    experts, width, other = out.shape
    grouped_weight_gradient_kernel[(experts * triton.cdiv(width, tile.block_m) * triton.cdiv(other, tile.block_n),)](
        TensorDescriptor.from_tensor(a, [tile.block_k, tile.block_m]) if source is None else a,
        source,
        TensorDescriptor.from_tensor(b, [tile.block_k, tile.block_n]),
        b, out, end, count, width, other, tile.block_m, tile.block_n, tile.block_k, group, add,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
