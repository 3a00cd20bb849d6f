"""Expert-parallel mixture in kernels: dispatch, grouped GEMMs and combine over symmetric memory.

A generator yields at every barrier, so the same code runs one rank a process, or all ranks of an exchange in one
process, each up to the next barrier. No size depends on what the router chose and the host never synchronises with the
device, so a CUDA graph can hold a step.

W ranks · E experts of all ranks · N tokens of this rank · K choices of a token · P = N K pairs · D hidden size
F width of an expert · C rows a rank can hold
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.exchange import plan as plans
from nmoe.effects.kernels.exchange import push as moves
from nmoe.effects.kernels.moe import combine as sums
from nmoe.effects.kernels.moe import dispatch as places
from nmoe.effects.kernels.moe import experts
from nmoe.effects.kernels.moe.experts import Form
from nmoe.effects.kernels.moe.moe import Tiles
from nmoe.effects.parallel.exchange.arena import Exchange, Put, Relay, Transport, fit, view
from nmoe.effects.parallel.exchange.products import Fp8, Kept, Product, Products, Stored
from nmoe.pure.model.route import Routing
from nmoe.pure.parallel import pushing
from nmoe.pure.parallel.exchange_arena import Field

T = TypeVar("T")

SIDE_PROGRAMS = 32
"""Most programs that push rows beside GEMMs: 278 to 341 GB/s of 346, and three quarters of an H100's multiprocessors
stay with the GEMM (docs/log.md, 2026-11-28)."""

Stretches = Generator[None, None, T]
"""Work that yields at every barrier."""


def run_(exchanges: Sequence[Exchange], works: Sequence[Stretches[T]]) -> list[T]:
    """Run each rank's work to its end, with a barrier at every yield; what each returned.

    exchanges  of the ranks in this process: one, or all of the exchange

    Writes:  flags of all arenas, and each `epoch`.
    """
    while True:
        results: list[T] = []
        for work in works:
            try:
                next(work)
            except StopIteration as end:
                results.append(end.value)
        if results:
            return results
        single = len(exchanges) == 1
        for e in exchanges:
            barrier_(e, signal=True, wait=single)
        if not single:
            for e in exchanges:
                barrier_(e, signal=False, wait=True)


def barrier_(e: Exchange, *, signal: bool, wait: bool) -> None:
    """Signal, wait, or both, for one rank. Writes: its flag in all arenas, `e.epoch`."""
    with record_function("exchange wait"):
        e.transport.barrier_(e, signal=signal, wait=wait)


def _barrier_(e: Exchange, *, signal: bool, wait: bool) -> None:
    """The same, where flags are in memory that the device reaches."""
    limit = int(e.timeout_s * 1e9) if e.raw.is_cuda else 0
    arrived = view(e.raw, e.fields.arrived)
    offset = e.fields.arrived.offset
    moves.barrier_(e.epoch, arrived, e.missing, e.addresses, offset, e.rank, signal=signal, wait=wait, limit_ns=limit)


def _push_(e: Exchange, put: Put) -> None:
    """Push rows. Writes: `put.field` of every arena."""
    valid: Any = put.valid
    moves.push_(put.values, put.to, put.at, e.addresses, put.field.offset, valid, put.programs, back=put.back)


def _push_words_(e: Exchange, put: Put) -> None:
    """Push words. Writes: `put.field` of every arena."""
    valid: Any = put.valid
    moves.push_words_(put.values, put.item, put.to, put.at, e.addresses, put.field.offset, valid, back=put.back)


def _push_counts_(e: Exchange, count: Tensor, tokens: Tensor | None) -> None:
    """Push this rank's row of the matrix of counts. Writes: `counts` of every arena."""
    moves.push_counts_(count, tokens, e.addresses, e.fields.counts.offset, e.rank)


PEER = Transport(
    put_rows_=_push_,
    put_words_=_push_words_,
    put_counts_=_push_counts_,
    barrier_=_barrier_,
    flush=lambda e: None,
    direct=True,
)
"""Memory of other devices, which kernels reach."""


def _await_(e: Exchange, arrived: Tensor, ranks: Sequence[int]) -> None:
    """Wait for words of the host. Writes: nothing, or `e.missing`."""
    limit = int(e.timeout_s * 1e9)
    for rank in ranks:
        moves.await_(e.epoch, arrived[rank:], e.missing, rank, limit_ns=limit)


def _pass_on_(e: Exchange, ranks: Sequence[int]) -> None:
    """Signal in the place of ranks of other hosts. Writes: their flags in the arenas of this host."""
    for rank in ranks:
        moves.pass_on_(e.epoch, e.addresses, e.fields.arrived, rank)


RELAY = Relay(ring_=lambda e, word: moves.ring_(e.epoch, word), await_=_await_, pass_on_=_pass_on_)
"""Pinned words, which kernels and threads of the host reach."""


def begin_(e: Exchange, expert: Tensor) -> Stretches[tuple[Kept, Tensor]]:
    """Sort this rank's pairs, send every rank their counts, and plan; how many chose each expert [E] i64.

    Needs nothing but the routing. With dedup the landing places of tokens are sent, not yet waited for.

    expert   [N K] integers
    """
    s, f = e.sizes, e.fields
    with record_function("exchange plan"):
        at = places.dispatch(expert, s.experts)
        owner = plans.owners(expert, s.ranks, s.experts) if s.dedup else None
        tokens = None if owner is None else places.dispatch(owner, s.ranks + 1)
        e.transport.put_counts_(e, at.count, None if tokens is None else tokens.count)
    yield
    with record_function("exchange plan"):
        plan = plans.plan_(view(e.raw, f.counts), e.needed, e.rank, s.capacity)
        row, landing = plans.destinations(expert, at.place, plan, owner, None if tokens is None else tokens.place)
        token = row if owner is None or landing is None else plans.Destination(to=owner, at=landing)
        origin = plans.origins(plan, s.capacity)
        if landing is not None:
            words = Put(field=f.source, values=landing.flatten(), to=row.to, at=row.at, valid=plan.valid, item=at.slot)
            e.transport.put_words_(e, words)
    kept = Kept(
        slot=at.slot,
        place=at.place,
        row_to=row.to,
        row_at=row.at,
        token_to=token.to,
        token_at=token.at,
        token_slot=at.slot if tokens is None else tokens.slot,
        origin_to=origin.to,
        origin_at=origin.at,
        source=torch.arange(s.capacity, dtype=torch.int32, device=expert.device),
        count=plan.count,
        end=plan.end,
        valid=plan.valid,
        crossing=plan.crossing,
    )
    return kept, at.count.to(torch.int64)


def dispatch_(e: Exchange, rows: Tensor, kept: Kept, field: Field) -> Stretches[Kept]:
    """Dispatch: send rows to the ranks that hold their experts; what is kept, with where each row was written.

    rows     [N ...]   of the tokens, as wide as those of the field
    """
    s = e.sizes
    with record_function("exchange dispatch"):
        send_(e, rows, kept, field)
        fixed = 4 * (s.ranks - 1) * (s.experts + s.ranks)
        out = rows.shape[1] * rows.itemsize
        count_bytes_(e, kept, out=out, words=4 if s.dedup else 0, back=0, fixed=fixed)
    yield
    return attrs.evolve(kept, source=view(e.raw, e.fields.source).clone()) if s.dedup else kept


def combine_(e: Exchange, weight: Tensor, kept: Kept, added: tuple[Tensor, ...] = ()) -> Stretches[Tensor]:
    """Combine: wait for the rows that every rank sent back, and sum each token's by weight, and what is added.

    weight   [N K]
    added    each [N D]
    returns  [N D]
    """
    yield
    with record_function("exchange combine"):
        return sums.combine(returned(e, weight.shape[0]), kept.place, weight, added)


def forward_(
    e: Exchange,
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    products: Products,
    added: tuple[Tensor, ...] = (),
) -> Stretches[tuple[Tensor, Tensor, Kept, Tensor]]:
    """Output, how many chose each expert, and what to keep: plan and pre-activation [C 2 F]. Shapes as `mixture`."""
    with e.within("exchange"):
        kept, count = yield from begin_(e, expert)
        field, rows = products.sent(e, x)
        kept = yield from dispatch_(e, rows, kept, field)
        del rows
    with record_function("experts"):
        h, product = products.forward(e, kept, up, down)
    y = return_product_(e, product, kept)
    with e.within("exchange"):
        if y is not None:  # else nothing went aside, and a graph must not wait for a stream that it does not record
            join(e)
        del product, y
        out = yield from combine_(e, weight, kept, added)
    return out, count, kept, h


def backward_(
    e: Exchange,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    kept: Kept,
    h: Tensor,
    products: Products,
    accumulator: Accumulator | None = None,
) -> Stretches[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Gradients of x, weight, up, down and the bias, from the output's.

    Overlap: rows of x are sent again, rather than kept, during the GEMMs on the output's gradient; rows of the input's
    gradient are sent back as they are made, or during the gradient of `down`. That of `up`, which reads the received
    x, comes last.

    grad_output  [N D]
    """
    f, t = e.fields, products.tiles
    with e.within("exchange"):
        with record_function("exchange dispatch"):
            gates = Put(
                field=f.gate,
                values=weight.flatten(),
                to=kept.row_to,
                at=kept.row_at,
                valid=kept.valid,
                item=kept.slot,
            )
            e.transport.put_words_(e, gates)
            send_(e, grad_output, kept, f.land_gradient)
            count_bytes_(e, kept, out=2 * x.shape[1] * x.itemsize, words=4, back=4, fixed=0)
        yield
    with record_function("exchange dispatch"), aside(e):
        send_(e, x, kept, f.land, SIDE_PROGRAMS)
    with record_function("experts"):
        pulls = received(e, f.land_gradient, kept)
        dh, a, part, product = products.backward(e, kept, pulls, up, down, h)
        d_bias = products.bias_gradient(dh, kept)
        d_gate = part.sum(-1)
    dx = return_product_(e, product, kept)
    with record_function("exchange return"), aside(e):
        gates = Put(
            field=f.gate_gradient,
            values=d_gate,
            to=kept.origin_to,
            at=kept.origin_at,
            valid=kept.valid,
            back=True,
        )
        e.transport.put_words_(e, gates)
    with record_function("experts"):
        moves.pad_(a, kept.valid, t.down_gradient.block_k)
        grouped = partial(experts.grouped_weight_gradient_, end=kept.end, count=kept.count, group=t.group)
        d_down = experts.weight_gradient(
            a, pulls, partial(grouped, tile=t.down_gradient), parameter=down, accumulator=accumulator
        )
    with e.within("exchange"):
        join(e)
        del a, part, pulls, product, dx, d_gate
        yield
        with record_function("exchange combine"):
            d_x = sums.combine(returned(e, x.shape[0]), kept.place, None)
            d_weight = view(e.raw, f.gate_gradient)[kept.place.to(torch.int64)]
    with record_function("experts"):
        rows = received(e, f.land, kept)
        moves.pad_(rows, kept.valid, t.up_gradient.block_k)
        d_up = experts.weight_gradient(
            rows, dh, partial(grouped, tile=t.up_gradient), parameter=up, accumulator=accumulator
        )
    return d_x, d_weight, d_up, d_down, d_bias


@contextmanager
def aside(e: Exchange) -> Iterator[None]:
    """Overlap: launches inside the block go to the side stream, after earlier work, beside later work, until `join`.

    It allocates nothing, and what it reads lives until then.
    """
    if e.stream is None:
        yield
    else:
        e.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.stream):
            yield


def join(e: Exchange) -> None:
    """Later work waits for the side stream."""
    if e.stream is not None:
        torch.cuda.current_stream().wait_stream(e.stream)


def send_(e: Exchange, x: Tensor, kept: Kept, field: Field, most: int = sys.maxsize) -> None:
    """Send tokens to the ranks that hold their experts, with at most so many programs.

    Writes:  a landing buffer of every arena.
    """
    to, at, item, number = kept.token_to, kept.token_at, kept.token_slot, programs(e, x, most)
    e.transport.put_rows_(e, Put(field=field, values=x, to=to, at=at, valid=kept.valid, item=item, programs=number))


def programs(e: Exchange, rows: Tensor, most: int = sys.maxsize) -> int:
    """How many programs, at most so many, push rows [M D]."""
    count, num_bytes = moves.at_once(rows)
    return pushing.programs(rows=len(rows), rows_at_once=count, bytes_at_once=num_bytes, most=min(e.programs, most))


def count_bytes_(e: Exchange, kept: Kept, *, out: int, words: int, back: int, fixed: int) -> None:
    """Count what one pass writes to other ranks.

    out    bytes that are sent of a token; rows come back once
    words  bytes sent with each pair
    back   bytes that come back with each row
    fixed  bytes sent whatever the routing

    Writes:  e.sent.
    """
    row = e.sizes.hidden_size * e.sizes.dtype.itemsize
    pair, place = (words, out) if e.sizes.dedup else (words + out, 0)
    moves.count_bytes_(e.sent, kept.crossing, pair=pair, place=place, row=row + back, fixed=fixed)


def send_back_(e: Exchange, y: Tensor, kept: Kept, most: int = sys.maxsize) -> None:
    """Send rows back to their origins, with at most so many programs. Writes: `back` of every arena."""
    to, at, number = kept.origin_to, kept.origin_at, programs(e, y, most)
    rows = Put(field=e.fields.back, values=y, to=to, at=at, valid=kept.valid, programs=number, back=True)
    e.transport.put_rows_(e, rows)


def return_product_(e: Exchange, product: Product, kept: Kept) -> Tensor | None:
    """Product whose rows go back to their origins: stored there by its epilogue, or pushed beside what follows.

    A push of its own behind the down-projection took 1.15 of the 2.8 ms by which a mixture over two H200 was slower.

    returns  what has to live until `join`, as do the product's operands

    Writes:  `back` of every arena.
    """
    if e.transport.direct:
        with record_function("experts"):
            product.push_(kept.origin_to, kept.origin_at, e.addresses, e.fields.back.offset)
        return None
    with record_function("experts"):
        y = product.here()
    with record_function("exchange return"), aside(e):
        send_back_(e, y, kept, SIDE_PROGRAMS)
    return y


def received(e: Exchange, field: Field, kept: Kept) -> Tensor:
    """Rows by expert: the landing buffer itself, or with dedup a copy that has a token at each of its rows."""
    land = view(e.raw, field)
    return moves.expand(land, kept.source, kept.end, kept.count) if e.sizes.dedup else land


def returned(e: Exchange, tokens: int) -> Tensor:
    """Rows by the number of their pair [N·K D]."""
    return view(e.raw, e.fields.back)[: tokens * e.sizes.top_k]


class Mixture(torch.autograd.Function):
    """`forward` and `backward` of the one rank that this process has."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        bias: Tensor | tuple[()],
        limit: float | None,
        alpha: float,
        e: Exchange,
        t: Tiles,
        accumulator: Accumulator | None,
        *added: Tensor,
    ) -> tuple[Tensor, Tensor]:
        fit(e, x, expert, up)
        x, expert, weight = x.contiguous(), expert.contiguous(), weight.contiguous()
        products = Fp8(tiles=t) if e.sizes.fp8 else Stored(tiles=t, form=Form(bias=bias, limit=limit, alpha=alpha))
        [(out, count, kept, h)] = run_([e], [forward_(e, x, expert, weight, up, down, products, added)])
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, weight, up, down, h, *(getattr(kept, field.name) for field in attrs.fields(Kept)))
        ctx.e, ctx.products, ctx.accumulator, ctx.added = e, products, accumulator, len(added)
        return out, count

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, up, down, h, *rest = ctx.saved_tensors
        kept = Kept(**{field.name: tensor for field, tensor in zip(attrs.fields(Kept), rest, strict=True)})
        pulls = outputs[0].contiguous()
        work = backward_(ctx.e, pulls, x, weight, up, down, kept, h, ctx.products, ctx.accumulator)
        [(dx, d_weight, d_up, d_down, d_bias)] = run_([ctx.e], [work])
        return dx, None, d_weight, d_up, d_down, d_bias, *[None] * 5, *[pulls] * ctx.added


def mixture(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    *,
    exchange: Exchange,
    tiles: Tiles,
    added: tuple[Tensor, ...] = (),
    accumulator: Accumulator | None = None,
    limit: float | None = None,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`pure.experts.mixture` of this rank's tokens, with experts that all ranks of the exchange hold together; in fp8
    if the exchange was opened for it, without what `bias`, `limit` and `alpha` add.

    Every rank calls it and its backward in the same order. Gradients of `up` and `down` are sums over all tokens. When
    a rank cannot hold its rows, the result has no meaning on any rank and `exchange.needed` says so.

    x        [N D]
    up       [E/W D 2 F]   of this rank's experts
    down     [E/W F D]
    bias     [E 2 F] or ()   of all experts: each rank has all biases, and the gradient of its own experts'
    added    each [N D]   added to the result before it is rounded
    limit, alpha  of `pure.model.experts.activation`
    returns  [N D] in the format of `x`, and how many of this rank's tokens chose each expert [E] i64
    """
    own = bias.unflatten(0, (-1, len(up)))[exchange.rank] if isinstance(bias, Tensor) else ()
    return Mixture.apply(  # pyright: ignore[reportReturnType]
        x, routing.expert, routing.weight, up, down, own, limit, alpha, exchange, tiles, accumulator, *added
    )
