"""The exchange between processes of a CPU, in plain torch: `pure.experts.mixture` over ranks.

The protocol is that of the kernels (`device`); a process waits for another by polling a word in its own arena.

W ranks · E experts of all ranks · N tokens of this rank · K choices of a token · P = N K pairs · D hidden size
F width of an expert
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.parallel.exchange.arena import (
    Exchange,
    PeerError,
    Put,
    Relay,
    Transport,
    check,
    fence,
    fit,
    store_,
    view,
)
from nmoe.pure.model import experts as reference
from nmoe.pure.model.experts import Rows
from nmoe.pure.model.norm import upcast
from nmoe.pure.model.route import Routing
from nmoe.pure.parallel import exchange_plan as planning
from nmoe.pure.parallel.exchange_arena import Field

PAUSE_S = 20e-6
"""Time between two polls of the flags: a rank that waits leaves the core to the one it waits for."""


@attrs.frozen(kw_only=True)
class Sorted:
    """This rank's pairs in the order of their experts, and the plan they follow."""

    plan: planning.Plan
    slot: Tensor  # [P] pair in that order -> pair in the order of tokens
    row_to: Tensor  # [N K] rank that holds the pair's expert
    row_at: Tensor  # [N K] its row there
    token_to: Tensor  # [N K] rank to send the token to for this choice; W if it goes there already
    token_at: Tensor  # [N K] place in the landing buffer


def barrier_(e: Exchange, *, signal: bool, wait: bool) -> None:
    """Barrier: signal every rank that this one's writes are done, and wait for the signals of all.

    Writes:  the flags of all arenas, `e.epoch`.
    Raises:  PeerError naming who did not come within `e.timeout_s`, or whose connection broke.
    """
    if signal:
        e.epoch.add_(1)
        _flag_(e, [e.rank])
    if wait:
        _wait(e, view(e.raw, e.fields.arrived)[:, 0], range(e.sizes.ranks))


def _flag_(e: Exchange, ranks: Sequence[int]) -> None:
    """Write the epoch into the flags of ranks in all arenas of this host, after everything before. Writes: these."""
    fence()
    for peer in e.peers:
        if peer is not None:
            view(peer, e.fields.arrived)[list(ranks), 0] = int(e.epoch)


def _wait(e: Exchange, arrived: Tensor, ranks: Sequence[int]) -> None:
    """Wait until each of these ranks has signalled the epoch.

    arrived  [W] i64
    """
    end, epoch = time.monotonic() + e.timeout_s, int(e.epoch)
    while late := [rank for rank, word in enumerate(arrived.tolist()) if word < epoch and rank in ranks]:
        # Not of a rank that has signalled: it gave up on another one, whom the time-out names.
        if lost := [rank for rank in late if e.lost[rank]]:
            raise PeerError(
                f"rank {e.rank}: expected an open connection to {e.named(lost)}, got its end in phase {epoch}; "
                "look at that rank's log and the network between"
            )
        if time.monotonic() > end:
            e.missing.fill_(late[0] + 1)
            raise PeerError(
                f"rank {e.rank}: expected every rank of the exchange within {e.timeout_s:g} s, got nothing from "
                f"{e.named(_silent(e, late))} in phase {epoch}; look at that rank's log, or raise parallel.timeout_s "
                "if it was only slow"
            )
        time.sleep(PAUSE_S)
    fence()


def _silent(e: Exchange, late: Sequence[int]) -> list[int]:
    """Of the ranks that are late those to blame: what a rank of another host sends, one of this host delivers."""
    per_host = e.hosts.count(e.hosts[e.rank])
    first = e.rank - e.rank % per_host
    return [rank for rank in late if (by := first + rank % per_host) == rank or by not in late]


def begin_(expert: Tensor, e: Exchange) -> tuple[Sorted, Tensor]:
    """Sort this rank's pairs, send every rank their counts, and plan.

    expert   [N K]
    returns  the plan, and this rank's pairs of each expert [E] i64
    Writes:  counts (and with dedup sources) of all arenas.
    Raises:  InputError on every rank when some rank would have to hold more than `capacity` rows.
    """
    s = e.sizes
    flat = expert.flatten()
    sorted_expert, slot = flat.sort(stable=True)
    count = flat.new_zeros(s.experts).scatter_add(0, flat, torch.ones_like(flat))
    to = planning.owners(expert, ranks=s.ranks, experts=s.experts)
    owner, item = to.flatten().sort(stable=True)
    once = owner < s.ranks
    owner, item = owner[once], item[once]
    tokens = flat.new_zeros(s.ranks).scatter_add(0, owner, torch.ones_like(owner))
    e.transport.put_counts_(e, count, tokens)
    e.transport.barrier_(e, signal=True, wait=True)
    plan = planning.plan(view(e.raw, e.fields.counts).clone(), rank=e.rank, capacity=s.capacity)
    e.needed.copy_(torch.maximum(e.needed, plan.needed.int()))
    check(e)
    at = torch.arange(len(slot)) + plan.shift[sorted_expert]
    row_to, row_at = expert // s.local(), torch.empty_like(slot).index_copy_(0, slot, at).view_as(expert)
    if not s.dedup:
        return Sorted(plan=plan, slot=slot, row_to=row_to, row_at=row_at, token_to=row_to, token_at=row_at), count
    place = torch.arange(len(item)) + plan.token_shift[owner]
    landing = torch.full((s.ranks, len(expert)), -1)
    landing[owner, item // s.top_k] = place
    token_at = landing[row_to, torch.arange(len(expert))[:, None]]
    put_(e, e.transport.put_words_, e.fields.source, token_at.flatten().int(), row_to, row_at)
    return Sorted(plan=plan, slot=slot, row_to=row_to, row_at=row_at, token_to=to, token_at=token_at), count


def put_(
    e: Exchange, over: Callable[[Exchange, Put], None], field: Field, values: Tensor, to: Tensor, at: Tensor
) -> None:
    """Put values into a field of other ranks' arenas.

    over     `put_rows_` or `put_words_` of the transport
    values   [M ...]
    to       [M K] rank whose arena it is; W: nowhere
    at       [M K] place in the field
    Writes:  that field, `e.sent`.
    """
    over(e, Put(field=field, values=values, to=to, at=at))
    crossing = int(((to != e.rank) & (to < e.sizes.ranks)).sum())
    e.sent.add_(crossing * (values[0].nbytes if len(values) else 0))


def _store_(e: Exchange, put: Put) -> None:
    """Copy rows or words to their places in the arenas of this host. Writes: `put.field` of these."""
    to, at = put.places()
    for rank, peer in enumerate(e.peers):
        if peer is not None:
            item, choice = (to == rank).nonzero(as_tuple=True)
            store_(peer, put.field, at[item, choice].long(), put.values[item])


def _store_counts_(e: Exchange, count: Tensor, tokens: Tensor | None) -> None:
    """Copy this rank's row of the matrix of counts into the arenas of this host. Writes: `counts` of these."""
    tail = count.new_zeros(e.sizes.ranks) if tokens is None else tokens[: e.sizes.ranks]
    for peer in e.peers:
        if peer is not None:
            view(peer, e.fields.counts)[e.rank] = torch.cat([count, tail]).int()


PEER = Transport(
    put_rows_=_store_, put_words_=_store_, put_counts_=_store_counts_, barrier_=barrier_, flush=lambda e: None
)
"""Memory that the processes of a host share."""


def _ring_(e: Exchange, word: Tensor) -> None:
    """Write the epoch into a word, after everything before. Writes: it."""
    fence()
    word.copy_(e.epoch)


RELAY = Relay(ring_=_ring_, await_=_wait, pass_on_=_flag_)
"""Words of a process and its threads."""


class Mixture(torch.autograd.Function):
    """Keeps the input and the plan; rows are sent again and experts run again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, expert: Tensor, weight: Tensor, e: Exchange, run: Any, *matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        fit(e, x, expert, matrices[0])
        over = e.transport
        with e.within("exchange"), record_function("exchange plan"):
            at, count = begin_(expert, e)
        with e.within("exchange"), record_function("exchange dispatch"):
            put_(e, over.put_rows_, e.fields.land, x, at.token_to, at.token_at)
            over.barrier_(e, signal=True, wait=True)
        with record_function("experts"):
            rows = torch.arange(int(at.plan.valid[2]))
            source = view(e.raw, e.fields.source)[: len(rows)].long() if e.sizes.dedup else rows
            y = run(received(e, at, source), *matrices)
        with e.within("exchange"), record_function("exchange return"):
            put_(e, over.put_rows_, e.fields.back, y, *planning.origins(at.plan, len(y)))
            over.barrier_(e, signal=True, wait=True)
        chosen = returned(e, e.fields.back, at).unflatten(0, weight.shape)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, weight, source, *matrices)
        ctx.e, ctx.at, ctx.run = e, at, run
        return (upcast(chosen) * weight[..., None]).sum(-2).to(x.dtype), count

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, source, *matrices = ctx.saved_tensors
        e: Exchange = ctx.e
        at: Sorted = ctx.at
        f, over = e.fields, e.transport
        with e.within("exchange"), record_function("exchange dispatch"):
            put_(e, over.put_rows_, f.land, x, at.token_to, at.token_at)
            put_(e, over.put_rows_, f.land_gradient, outputs[0], at.token_to, at.token_at)
            put_(e, over.put_words_, f.gate, weight.flatten(), at.row_to, at.row_at)
            over.barrier_(e, signal=True, wait=True)
        with record_function("experts"), torch.enable_grad():
            rows = received(e, at, source)
            leaves = [tensor.detach().requires_grad_() for tensor in (rows.x, *matrices)]
            y = ctx.run(Rows(leaves[0], rows.source, rows.expert, rows.count, rows.slot), *leaves[1:])
            grad_output = view(e.raw, f.land_gradient)[source]
            gate = view(e.raw, f.gate)[: len(y), None]
            dx, *gradients = torch.autograd.grad(y, leaves, (upcast(grad_output) * gate).to(y.dtype))
            d_gate = (upcast(grad_output) * upcast(y.detach())).sum(-1)
        with e.within("exchange"), record_function("exchange return"):
            origin = planning.origins(at.plan, len(y))
            put_(e, over.put_rows_, f.back, dx, *origin)
            put_(e, over.put_words_, f.gate_gradient, d_gate, *origin)
            over.barrier_(e, signal=True, wait=True)
        d_rows = returned(e, f.back, at).unflatten(0, weight.shape)
        d_weight = returned(e, f.gate_gradient, at).view_as(weight)
        return upcast(d_rows).sum(-2).to(x.dtype), None, d_weight, None, None, *gradients


def received(e: Exchange, at: Sorted, source: Tensor) -> Rows:
    """The rows this rank holds, each a copy of what was received."""
    row = torch.arange(len(source))
    expert = (at.plan.end[None, :] <= row[:, None]).sum(1)
    return Rows(view(e.raw, e.fields.land)[source], row, expert, at.plan.count, row)


def returned(e: Exchange, field: Field, at: Sorted) -> Tensor:
    """What came back, in the order of tokens and choices."""
    back = view(e.raw, field)[: len(at.slot)]
    return torch.empty_like(back).index_copy_(0, at.slot, back)


def mixture(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    *,
    exchange: Exchange,
    limit: float | None = None,
    alpha: float = 1.0,
    experts: Callable[..., Tensor] = reference.experts,
) -> tuple[Tensor, Tensor]:
    """`pure.experts.mixture` of this rank's tokens, with experts that all ranks of the exchange hold together.

    Every rank calls it and its backward in the same order. Gradients of `up` and `down` are sums over all tokens.

    x        [N D]
    up       [E/W D 2 F]   of this rank's experts
    down     [E/W F D]
    bias     [E 2 F] or ()   of all experts: each rank has all biases, and the gradient of its own experts'
    returns  [N D] in the format of `x`, and how many of this rank's tokens chose each expert [E] i64
    Raises:  InputError on all ranks when a rank cannot hold its rows, PeerError when one does not come.
    """
    matrices = [up, down]
    if isinstance(bias, Tensor):
        matrices.append(bias.unflatten(0, (-1, len(up)))[exchange.rank])
    activate = reference.activation(limit, alpha)

    def run(rows: Rows, up: Tensor, down: Tensor, *own: Tensor) -> Tensor:
        return experts(rows, up, down, own[0] if own else (), activate)

    return Mixture.apply(x, routing.expert, routing.weight, exchange, run, *matrices)  # pyright: ignore[reportReturnType]
