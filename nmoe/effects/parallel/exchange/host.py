"""The exchange between processes of one host that share memory, in plain torch: `pure.experts.mixture` over ranks.

The protocol is that of the kernels (`device`); a process waits for another by polling a word in its own arena.

W ranks · E experts of all ranks · N tokens of this rank · K choices of a token · P = N K pairs · D hidden size
F width of an expert · U tokens sent, counted once a rank with dedup
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.parallel.exchange.arena import Exchange, PeerError, fit, view
from nmoe.effects.parallel.exchange.opening import check
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
    row: Tensor  # [P] its row at the holder
    holder: Tensor  # [P] rank that holds its expert
    token: Tensor  # [U] with dedup: token of each place in a landing buffer, by rank; else of each pair
    place: Tensor  # [U] its place there
    to: Tensor  # [U] the rank whose landing buffer it is


def barrier_(e: Exchange) -> None:
    """Barrier: signal every rank that this one's writes are done, and wait for the signals of all.

    Writes:  the flags of all arenas, `e.epoch`.
    Raises:  PeerError naming who did not come within `e.timeout_s`.
    """
    e.epoch.add_(1)
    epoch = int(e.epoch)
    fence()
    for peer in e.peers:
        view(peer, e.fields.arrived)[e.rank, 0] = epoch
    arrived = view(e.raw, e.fields.arrived)[:, 0]
    end = time.monotonic() + e.timeout_s
    while True:
        late = (arrived < epoch).nonzero().flatten().tolist()
        if not late:
            break
        if time.monotonic() > end:
            e.missing.fill_(late[0] + 1)
            absent = ", ".join(str(rank) for rank in late)
            raise PeerError(
                f"rank {e.rank}: expected every rank of the exchange within {e.timeout_s:g} s, got nothing from rank "
                f"{absent} in phase {epoch}; look at that rank's log, or raise parallel.timeout_s if it was only slow"
            )
        time.sleep(PAUSE_S)
    fence()


def fence() -> None:
    """Order what this thread reads and writes before and after it, on processors that reorder too.

    What comes before a lock's release stays before it, what comes after the next acquire after it.
    """
    lock = threading.Lock()
    for _ in range(2):
        lock.acquire()
        lock.release()


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
    owner, item = planning.owners(expert, ranks=s.ranks, experts=s.experts).flatten().sort(stable=True)
    once = owner < s.ranks
    owner, item = owner[once], item[once]
    tokens = flat.new_zeros(s.ranks).scatter_add(0, owner, torch.ones_like(owner))
    row = torch.cat([count, tokens]).int()
    for peer in e.peers:
        view(peer, e.fields.counts)[e.rank] = row
    barrier_(e)
    plan = planning.plan(view(e.raw, e.fields.counts).clone(), rank=e.rank, capacity=s.capacity)
    e.needed.copy_(torch.maximum(e.needed, plan.needed.int()))
    check(e)
    at = torch.arange(len(slot)) + plan.shift[sorted_expert]
    holder = sorted_expert // s.local()
    if not s.dedup:
        return Sorted(plan=plan, slot=slot, row=at, holder=holder, token=slot // s.top_k, place=at, to=holder), count
    place = torch.arange(len(item)) + plan.token_shift[owner]
    landing = torch.full((s.ranks, len(expert)), -1)
    landing[owner, item // s.top_k] = place
    put_(e, e.fields.source, holder, at, landing[holder, slot // s.top_k].int())
    return Sorted(plan=plan, slot=slot, row=at, holder=holder, token=item // s.top_k, place=place, to=owner), count


def put_(e: Exchange, field: Field, to: Tensor, at: Tensor, values: Tensor) -> None:
    """Write values into a field of other ranks' arenas.

    to       [P] rank whose arena it is
    at       [P] index in the field
    values   [P ...]
    Writes:  that field.
    """
    for rank, peer in enumerate(e.peers):
        mine = to == rank
        view(peer, field).index_copy_(0, at[mine], values[mine])
        if rank != e.rank:
            e.sent.add_(values[mine].nbytes)


class Mixture(torch.autograd.Function):
    """Keeps the input and the plan; rows are sent again and experts run again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, expert: Tensor, weight: Tensor, up: Tensor, down: Tensor, e: Exchange, run: Any
    ) -> tuple[Tensor, Tensor]:
        fit(e, x, expert, up)
        with record_function("exchange plan"):
            at, count = begin_(expert, e)
        with record_function("exchange dispatch"):
            put_(e, e.fields.land, at.to, at.place, x[at.token])
            barrier_(e)
        with record_function("experts"):
            rows = torch.arange(int(at.plan.valid[2]))
            source = view(e.raw, e.fields.source)[: len(rows)].long() if e.sizes.dedup else rows
            y = run(received(e, at, source), up, down)
        with record_function("exchange return"):
            put_(e, e.fields.back, *planning.origins(at.plan, len(y)), y)
            barrier_(e)
        chosen = returned(e, e.fields.back, at).unflatten(0, weight.shape)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, weight, up, down, source)
        ctx.e, ctx.at, ctx.run = e, at, run
        return (upcast(chosen) * weight[..., None]).sum(-2).to(x.dtype), count

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, up, down, source = ctx.saved_tensors
        e: Exchange = ctx.e
        at: Sorted = ctx.at
        f = e.fields
        with record_function("exchange dispatch"):
            put_(e, f.land, at.to, at.place, x[at.token])
            put_(e, f.land_gradient, at.to, at.place, outputs[0][at.token])
            put_(e, f.gate, at.holder, at.row, weight.flatten()[at.slot])
            barrier_(e)
        with record_function("experts"), torch.enable_grad():
            rows = received(e, at, source)
            leaves = [tensor.detach().requires_grad_() for tensor in (rows.x, up, down)]
            y = ctx.run(Rows(leaves[0], rows.source, rows.expert, rows.count, rows.slot), *leaves[1:])
            grad_output = view(e.raw, f.land_gradient)[source]
            gate = view(e.raw, f.gate)[: len(y), None]
            dx, d_up, d_down = torch.autograd.grad(y, leaves, (upcast(grad_output) * gate).to(y.dtype))
            d_gate = (upcast(grad_output) * upcast(y.detach())).sum(-1)
        with record_function("exchange return"):
            origin = planning.origins(at.plan, len(y))
            put_(e, f.back, *origin, dx)
            put_(e, f.gate_gradient, *origin, d_gate)
            barrier_(e)
        d_rows = returned(e, f.back, at).unflatten(0, weight.shape)
        d_weight = returned(e, f.gate_gradient, at).view_as(weight)
        return upcast(d_rows).sum(-2).to(x.dtype), None, d_weight, d_up, d_down, None, None


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
    *,
    exchange: Exchange,
    experts: Callable[[Rows, Tensor, Tensor], Tensor] = reference.experts,
) -> tuple[Tensor, Tensor]:
    """`pure.experts.mixture` of this rank's tokens, with experts that all ranks of the exchange hold together.

    Every rank calls it and its backward in the same order. Gradients of `up` and `down` are sums over all tokens.

    x        [N D]
    up       [E/W D 2 F]   of this rank's experts
    down     [E/W F D]
    returns  [N D] in the format of `x`, and how many of this rank's tokens chose each expert [E] i64
    Raises:  InputError on all ranks when a rank cannot hold its rows, PeerError when one does not come.
    """
    return Mixture.apply(x, routing.expert, routing.weight, up, down, exchange, experts)  # pyright: ignore[reportReturnType]
