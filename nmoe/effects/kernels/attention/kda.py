"""Kimi delta attention in chunks of 64 tokens: `pure.model.attention.kda.attend_kda`, bitwise repeatable.

Letters: B sequences, T tokens, H heads, C channels of a head's query, key and value, N chunks, L tokens of a chunk.

Four kernels forward: gates and sums of decays, all of a chunk that does not depend on the memory, the memory from chunk
to chunk, the output. Three backward: the memory's gradient from the last chunk to the first, all of a chunk, sums of
decays and gates. The memory is in fp32; that which enters a chunk is kept, rounded, so that backward does not compute
it again.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config.attention import KDA_HEAD_DIMS
from nmoe.effects.kernels.attention import kda_kernels as kernels
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.tables import DeltaTile
from nmoe.errors import InputError
from nmoe.pure.model.attention.kda import CHUNK, UNIT_EPS


@attrs.frozen(kw_only=True)
class Tiles:
    """Channels and launch options of the kernels."""

    sums: DeltaTile
    prepare: DeltaTile
    scan: DeltaTile
    output: DeltaTile
    scan_backward: DeltaTile
    backward: DeltaTile


@attrs.frozen(kw_only=True)
class Shape:
    """Sizes of a call, and what kernels are launched with."""

    tiles: Tiles
    batch: int
    positions: int
    heads: int
    channels: int
    length: int  # tokens of a chunk

    @property
    def chunks(self) -> int:
        return -(-self.positions // self.length)

    def tokens(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised [B N H L C]."""
        return like.new_empty(self.batch, self.chunks, self.heads, self.length, self.channels, dtype=dtype)

    def pairs(self, like: Tensor) -> Tensor:
        """Uninitialised [B N H L L]."""
        return like.new_empty(self.batch, self.chunks, self.heads, self.length, self.length)

    def memories(self, like: Tensor) -> Tensor:
        """Uninitialised [B N H C C]."""
        return like.new_empty(self.batch, self.chunks, self.heads, self.channels, self.channels)

    def common(self, tile: DeltaTile) -> dict[str, Any]:
        """What every kernel is given."""
        return {
            "heads": self.heads,
            "chunks": self.chunks,
            "length": self.length,
            "channels": self.channels,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def grid(self) -> tuple[int]:
        """One program a chunk and head."""
        return (self.batch * self.chunks * self.heads,)

    def parts(self, tile: DeltaTile) -> tuple[int, int]:
        """One program a chunk, head and block of channels."""
        return *self.grid(), self.channels // tile.values

    def lanes(self, tile: DeltaTile) -> tuple[int]:
        """One program a block of the channels of a head's value; it goes through all chunks."""
        return (self.batch * self.heads * (self.channels // tile.values),)


@attrs.frozen(kw_only=True)
class Gate:
    """What decays follow from."""

    x: Tensor  # [B T H C]
    bias: Tensor  # [H C]
    log_rate: Tensor  # [H]
    limit: float | None

    def given(self) -> dict[str, Any]:
        """What kernels are given of it."""
        limit = {"limit": self.limit or 0.0, "bounded": self.limit is not None}
        return {"x": self.x, "bias": self.bias, "log_rate": self.log_rate, **limit}


@attrs.frozen(kw_only=True)
class Prepared:
    """What `prepare_kernel` makes of the chunks; it says what each is."""

    entered: Tensor  # [B N H L C]
    left: Tensor  # [B N H L C]
    correction: Tensor  # [B N H L C]
    value: Tensor  # [B N H L C]
    weight: Tensor  # [B N H L L]
    inverse: Tensor  # [B N H L L]
    carried: Tensor  # [B N H C] f32


def kda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    bias: Tensor,
    log_rate: Tensor,
    step: Tensor,
    start: Tensor | tuple[()] = (),
    memory: Tensor | tuple[()] = (),
    *,
    limit: float | None,
    tiles: Tiles,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule; `pure.model.attention.kda.log_decay` says what decays follow from the four of the gate.

    q, k, v   [B T H C]           bf16 or fp16, not yet of unit length; may be slices of one product
    x         [B T H C]           gates
    bias      [H C]               of the gates
    log_rate  [H]
    step      [B T H] f32         between 0 and 1
    start     [B T] i32 or ()     first token of each one's document; must not decrease along T. (): rows are whole
    memory    [B H C C] f32 or () before the row, of documents that begin at 0; (): zeros
    limit     largest decay in nats; None: the softplus gate, whose decays count as 87 nats beyond that
    chunk     tokens of a chunk, a power of two
    returns   [B T H C], and the memory after the row in fp32
    Raises:  InputError for formats and sizes that the kernels do not take.
    Cost:    `pure.model.attention.kda.flops`, and the scores once for each of log2(chunk) levels.
    """
    check(q, k, v)
    batch, positions, heads, channels = q.shape
    shape = Shape(
        tiles=tiles, batch=batch, positions=positions, heads=heads, channels=channels, length=chunk
    )  # fmt: skip
    return KdaAttention.apply(q, k, v, x, bias, log_rate, step, start, memory, limit, shape)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:  InputError with each problem.
    """
    problems: list[str] = []
    if q.shape[-1] not in KDA_HEAD_DIMS:
        known = " or ".join(map(str, KDA_HEAD_DIMS))
        problems.append(f"kda_attention: expected {known} channels a head, got {q.shape[-1]}; use the reference")
    if not q.shape == k.shape == v.shape:
        problems.append(
            f"kda_attention: expected q, k and v of one shape, got {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}; use the reference"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or (q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16)):
        problems.append(
            f"kda_attention: expected q, k and v all in bf16 or all in fp16, got {q.dtype}, {k.dtype}, {v.dtype}; "
            "use the reference for other formats"
        )
    if problems:
        raise InputError(*problems)


class KdaAttention(torch.autograd.Function):
    """Forward pass and backward pass; every gradient has one owner."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        bias: Tensor,
        log_rate: Tensor,
        step: Tensor,
        start: Tensor | tuple[()],
        memory: Tensor | tuple[()],
        limit: float | None,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]:
        """Output and memory; kept are the arguments, sums of decays, chunks as prepared, memories and values."""
        q, k, v = strided(q, k, v)
        step, gate = step.contiguous(), Gate(x=x.contiguous(), bias=bias, log_rate=log_rate, limit=limit)
        total = sums(gate, shape)
        prepared = prepare(q, k, v, total, step, start, shape)
        states, fresh, after = scan(prepared, memory, shape)
        o = output(prepared, states, fresh, shape)
        kept = (prepared.entered, prepared.left, prepared.correction, prepared.weight, prepared.inverse)
        starts = (start,) if isinstance(start, Tensor) else ()
        gates = (gate.x, bias, log_rate)
        ctx.save_for_backward(q, k, v, *gates, o, step, total, *kept, prepared.carried, states, fresh, *starts)
        ctx.shape, ctx.goes_on, ctx.limit = shape, isinstance(memory, Tensor), limit
        ctx.set_materialize_grads(False)
        return o, after

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, the gate, step and memory."""
        q, k, v, x, bias, log_rate, o, step, total, *rest = ctx.saved_tensors
        entered, left, correction, weight, inverse, carried, states, fresh, *rest = rest
        shape: Shape = ctx.shape
        start = (*rest, ())[0]
        prepared = Prepared(
            entered=entered, left=left, correction=correction, value=fresh, weight=weight, inverse=inverse,
            carried=carried,
        )  # fmt: skip
        grad_output, dafter = gradients
        do = v.new_zeros(v.shape) if grad_output is None else grad_output.contiguous()
        dstates, dfresh, dmemory = scan_backward(prepared, do, dafter, ctx.goes_on, shape)
        dq, dk, dv, dtotal, dstep = backward(
            q, k, v, o, total, step, start, inverse, states, fresh, do, dstates, dfresh, shape
        )  # fmt: skip
        gate = Gate(x=x, bias=bias, log_rate=log_rate, limit=ctx.limit)
        return dq, dk, dv, *sums_backward(gate, dtotal, shape), dstep, None, dmemory, None, None


def strided(*tensors: Tensor) -> list[Tensor]:
    """Tensors [B T H C] with heads side by side and the same strides; copies where they have others."""
    width = tensors[0].shape[-1]
    fits = all(x.stride()[2:] == (width, 1) and x.data_ptr() % 16 == 0 for x in tensors)
    return [*tensors] if fits and len({x.stride() for x in tensors}) == 1 else [x.contiguous() for x in tensors]


def sums(gate: Gate, shape: Shape) -> Tensor:
    """Sums to base 2 of decays from the begin of each chunk through each token, [B N H L C] f32."""
    tile, total = shape.tiles.sums, shape.tokens(gate.x, torch.float32)
    kernels.sum_kernel[shape.parts(tile)](
        total=total, positions=shape.positions, values=tile.values, **gate.given(), **shape.common(tile)
    )
    return total


def sums_backward(gate: Gate, dtotal: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, bias and log_rate; the latter two are sums over tokens in two stages, in fp32."""
    tile, dx = shape.tiles.sums, torch.empty_like(gate.x)
    dbias, drate = (dtotal.new_empty(shape.batch, shape.chunks, shape.heads, shape.channels) for _ in range(2))
    kernels.sum_backward_kernel[shape.parts(tile)](
        dtotal=dtotal,
        dx=dx,
        dbias=dbias,
        drate=drate,
        positions=shape.positions,
        values=tile.values,
        **gate.given(),
        **shape.common(tile),
    )
    return dx, dbias.sum((0, 1)).to(gate.bias.dtype), drate.sum((0, 1, 3)).to(gate.log_rate.dtype)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, step: Tensor, start: Tensor | tuple[()], shape: Shape
) -> Prepared:
    """What of each chunk does not depend on the memory."""
    made = Prepared(
        entered=shape.tokens(q),
        left=shape.tokens(q),
        correction=shape.tokens(q),
        value=shape.tokens(q),
        weight=shape.pairs(q),
        inverse=shape.pairs(q),
        carried=total.new_empty(shape.batch, shape.chunks, shape.heads, shape.channels),
    )
    tile = shape.tiles.prepare
    kernels.prepare_kernel[shape.grid()](
        q=q,
        k=k,
        v=v,
        total=total,
        step=step,
        values=tile.values,
        **attrs.asdict(made, recurse=False),
        **per_row(q, start, shape),
        **shape.common(tile),
    )
    return made


def per_row(q: Tensor, start: Tensor | tuple[()], shape: Shape) -> dict[str, Any]:
    """What the kernels are given that read queries and keys."""
    return {
        "start": start if isinstance(start, Tensor) else None,
        "positions": shape.positions,
        "by_batch": q.stride(0),
        "by_position": q.stride(1),
        "scale": shape.channels**-0.5,
        "eps": UNIT_EPS,
        "levels": shape.length.bit_length() - 1,
        "documents": isinstance(start, Tensor),
    }


def scan(prepared: Prepared, memory: Tensor | tuple[()], shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Memories that enter the chunks [B N H C C], what tokens write [B N H L C], and the memory after all in fp32."""
    tile, like = shape.tiles.scan, prepared.entered
    states, fresh = shape.memories(like), shape.tokens(like)
    after = prepared.carried.new_empty(shape.batch, shape.heads, shape.channels, shape.channels)
    kernels.scan_kernel[shape.lanes(tile)](
        correction=prepared.correction,
        value=prepared.value,
        left=prepared.left,
        carried=prepared.carried,
        before=memory.contiguous() if isinstance(memory, Tensor) else None,
        states=states,
        fresh=fresh,
        after=after,
        values=tile.values,
        goes_on=isinstance(memory, Tensor),
        **shape.common(tile),
    )
    return states, fresh, after


def output(prepared: Prepared, states: Tensor, fresh: Tensor, shape: Shape) -> Tensor:
    """What each query reads, [B T H C]."""
    tile = shape.tiles.output
    o = states.new_empty(shape.batch, shape.positions, shape.heads, shape.channels)
    kernels.output_kernel[shape.parts(tile)](
        entered=prepared.entered,
        states=states,
        weight=prepared.weight,
        fresh=fresh,
        o=o,
        positions=shape.positions,
        values=tile.values,
        **shape.common(tile),
    )
    return o


def scan_backward(
    prepared: Prepared, do: Tensor, dafter: Tensor | None, goes_on: bool, shape: Shape
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the memory that leaves each chunk, of what tokens write, and of the memory before the row if any."""
    tile = shape.tiles.scan_backward
    dstates, dfresh = shape.memories(do), shape.tokens(do)
    sizes = (shape.batch, shape.heads, shape.channels, shape.channels)
    dbefore = prepared.carried.new_empty(sizes) if goes_on else None
    kernels.scan_backward_kernel[shape.lanes(tile)](
        entered=prepared.entered,
        correction=prepared.correction,
        left=prepared.left,
        carried=prepared.carried,
        weight=prepared.weight,
        do=do,
        dafter=None if dafter is None else dafter.contiguous(),
        dstates=dstates,
        dfresh=dfresh,
        dbefore=dbefore,
        positions=shape.positions,
        values=tile.values,
        has_dafter=dafter is not None,
        goes_on=goes_on,
        **shape.common(tile),
    )
    return dstates, dfresh, dbefore


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    total: Tensor,
    step: Tensor,
    start: Tensor | tuple[()],
    inverse: Tensor,
    states: Tensor,
    fresh: Tensor,
    do: Tensor,
    dstates: Tensor,
    dfresh: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v [B T H C], of sums of decays [B N H L C] f32, and of steps [B T H] f32."""
    tile = shape.tiles.backward
    dq, dk, dv = (torch.empty_like(do) for _ in range(3))
    dtotal, dstep = torch.empty_like(total), torch.empty_like(step)
    kernels.backward_kernel[shape.grid()](
        q=q,
        k=k,
        v=v,
        total=total,
        step=step,
        inverse=inverse,
        states=states,
        fresh=fresh,
        o=o,
        do=do,
        dstates=dstates,
        dfresh=dfresh,
        dq=dq,
        dk=dk,
        dv=dv,
        dtotal=dtotal,
        dstep=dstep,
        values=tile.values,
        **per_row(q, start, shape),
        **shape.common(tile),
    )
    return dq, dk, dv, dtotal, dstep
