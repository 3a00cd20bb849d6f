"""One optimizer step: accumulate, clip, update, balance; what is recomputed in it, and whether it is replayed.

L = layers with experts, E = routed experts, M = microbatches of a step, B = sequences of a microbatch, T = tokens of a
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config.sections import Config, Optim
from nmoe.effects.device import gpu, graph, ops, recompute
from nmoe.effects.device.process import Runtime
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.parallel.exchange import Exchange
from nmoe.effects.parallel.ranks import all_reduce_sum
from nmoe.effects.train import qk_clip, zero
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.core.layout import ArenaLayout, Stretch
from nmoe.pure.core.spec import Dims
from nmoe.pure.core.tree import record
from nmoe.pure.model import route
from nmoe.pure.model.model import Batch, Transformer, block, model_at, objective, targets_ahead
from nmoe.pure.model.ops import Env
from nmoe.pure.model.parameters import Block
from nmoe.pure.optim import spikes
from nmoe.pure.optim.clip import clip_scale
from nmoe.pure.optim.schedule import factor
from nmoe.pure.optim.update import joint_settings, settings


class SpentStateError(RuntimeError):
    """A State was used after `step` consumed it."""


@record
class State:
    """Everything a step reads and replaces.

    Of several ranks each has the new values of the parameters that it updated; `zero.gather_` brings those of the
    others, which the next step does beside its forward pass.
    """

    params: Transformer  # views of the arenas
    arenas: tuple[Any, ...]
    router_bias: Tensor  # [L E] f32, one row a layer with experts
    recent: Tensor | tuple[()]  # [2 WINDOW] f32, of `pure.optim.spikes`; () without `train.skip_spikes`
    spikes: Tensor  # 0-d i64, steps skipped for them so far
    updates: Tensor  # 0-d i64, optimizer updates made
    skipped: Tensor  # 0-d i64, non-finite steps so far
    skipped_in_row: Tensor  # 0-d i64, of these, the last ones in a row
    cursor: int  # sequences read, all ranks
    tokens: int  # tokens read, all ranks
    step: int  # steps taken, skipped ones included

    def __getattr__(self, name: str) -> Any:
        """Reached only for a field that `donate` took away."""
        if name in DONATED:
            raise SpentStateError(
                f"State at step {self.step}: expected one that is not donated, got a read of '{name}'; "
                "use the State that step() returned"
            )
        raise AttributeError(name)


DONATED = tuple(field.name for field in attrs.fields(State) if field.name != "step")
"""Fields that `donate` takes away; `step` stays, for the message."""


@record
class Metrics:
    """What a step returns; 0-d device tensors unless said otherwise, read at the log's cadence."""

    loss: Tensor  # nats a target
    mtp: Tensor  # [D] f32, nats a target of each depth of multi-token prediction
    auxiliary_loss: Tensor  # weighted sequence-wise balance loss, and the attention's own loss
    grad_norm: Tensor  # before the clip
    update_norm: Tensor
    load: Tensor  # [L E] i64, tokens each expert was chosen by
    entropy: Tensor  # [L] f32, router entropy in nats
    spikes: Tensor
    skipped: Tensor
    skipped_in_row: Tensor
    sent: Tensor  # i64, bytes this rank wrote into the memory of others in this step; 0 without an exchange


@record
class Rates:
    """What a schedule gives one step; 0-d on the device."""

    dense: Tensor  # f64, learning rate of the group
    expert: Tensor
    router: Tensor
    mtp: Tensor  # f32, weight of the loss of multi-token prediction


@attrs.frozen(kw_only=True)
class Setup:
    """What every step of a training has in common.

    env            with the ops that recompute, where the config wants that
    passes         of the optimizer over an arena
    run            `block`, or the wrapper around it that recomputes
    mark           called with the name of each part of a step when it ends
    within         around what is a part of its own within another
    before_update  called before anything is written but gradients, and values that other ranks own
    exchange       of rows with the ranks that hold the other experts; too many rows for one change nothing anywhere
    accumulator    of the weight gradients that kernels write themselves
    scores         of the attention, where `optim.qk_clip` limits them
    """

    config: Config
    blueprint: Blueprint
    env: Env
    rt: Runtime
    passes: ops.ArenaOps
    run: Callable[..., tuple[Tensor, Any, Any]]
    mark: Callable[[str], None]
    within: Callable[[str], AbstractContextManager[None]]
    before_update: Callable[[], None]
    exchange: Exchange | None
    accumulator: Accumulator
    scores: qk_clip.Scores | None


def donate(state: State) -> State:
    """The fields of `state` as a fresh record; `state` itself becomes unusable, as a donated JAX array does.

    Writes:  every field of `state` but `step`.
    """
    kept = attrs.evolve(state)
    for name in DONATED:
        object.__delattr__(state, name)
    return kept


def microbatch(batch: Batch, index: int) -> Batch:
    """One [B T] of a batch [M B T]."""
    return tree.map(lambda path, leaf: leaf[index], batch)


def tokens_per_step(config: Config) -> int:
    """Tokens that all ranks read in a step."""
    return config.train.batch_size * config.train.sequence_length


def learning_rates(config: Config, tokens: int) -> dict[str, float]:
    """Learning rate of each optimizer group in the step that brings the run to `tokens` tokens."""
    share = factor(tokens, config.schedule_in_tokens())
    return {group: share * getattr(config.optim, group).lr for group in ("dense", "expert", "router")}


def place_rates(config: Config, state: State, device: torch.device) -> Rates:
    """The rates of the step after `state`, on the device, without a copy that would wait for it."""
    tokens, mtp = state.tokens + tokens_per_step(config), config.model.mtp
    rates = learning_rates(config, tokens)
    placed = {group: torch.full((), rate, dtype=torch.float64, device=device) for group, rate in rates.items()}
    return Rates(**placed, mtp=torch.full((), 0.0 if mtp is None else mtp.weight_at(tokens), device=device))


def make_step(
    config: Config,
    blueprint: Blueprint,
    env: Env,
    rt: Runtime,
    *,
    mark: Callable[[str], None],
    within: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    before_update: Callable[[], None] = lambda: None,
    exchange: Exchange | None = None,
    accumulator: Accumulator | None = None,
    scope: ExitStack | None = None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """`step(state, batch) -> (state, metrics)`. It consumes its state: the storages are reused.

    A step whose loss or gradient norm is not finite changes no parameter, moment or bias, and is counted; after
    `train.max_nonfinite_steps` of them in a row no step changes anything more, so that whoever reads the metrics late
    finds the state as it was. A step without a target changes none of them either: the balance loss alone is no reason
    for an update; nor does one that `train.skip_spikes` takes for a spike, which is counted too. Nothing in a step
    waits for the device.

    mark           called with the name of each part of a step when it ends, also while a graph of it is recorded
    within         around a part within another: what is waited for of the all-gather, in the forward pass
    before_update  called before anything is written but gradients, and values that other ranks own; of a
                   replayed step, before all of it
    exchange       of rows with the ranks that hold the other experts; too many rows for one change nothing anywhere
    accumulator    the one that the ops of `env` write weight gradients through, if they do
    scope          at whose end a recorded graph is destroyed, before the ranks part; None: with the process
    """
    # What the backward pass computes again in the place of keeping it.
    run: Callable[..., tuple[Tensor, Any, Any]] = block
    if config.train.recompute == "full":
        run = recompute.full()
    elif config.train.recompute == "cheap":
        cheap, run = recompute.cheap(env.ops)
        env = attrs.evolve(env, ops=cheap)
    scores = None
    if config.optim.qk_clip is not None:
        scores = qk_clip.Scores()
        env = attrs.evolve(env, ops=scores.noting(env.ops))
    setup = Setup(
        config=config,
        blueprint=blueprint,
        env=env,
        rt=rt,
        passes=ops.arena_ops(rt.device, config.run.kernels),
        run=run,
        mark=mark,
        within=within,
        before_update=before_update,
        exchange=exchange,
        accumulator=accumulator or Accumulator(),
        scores=scores,
    )

    # Launched kernel by kernel, or recorded once and replayed: then the host calls nothing between its kernels.
    if not config.train.graph:

        def eager(state: State, batch: Batch) -> tuple[State, Metrics]:
            rates = place_rates(config, state, rt.device)
            return compute(setup, donate(state), batch, rates)

        return eager
    recorded = attrs.evolve(setup, before_update=lambda: None)

    def marked(state: State, batch: Batch, rates: Rates) -> tuple[State, Metrics]:
        mark("data")  # in the graph: where its first part begins
        return compute(recorded, state, batch, rates)

    replayed = graph.replaying(marked, scope or ExitStack())

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        before_update()
        rates = place_rates(config, state, rt.device)
        after = replayed(donate(state), batch, rates)
        mark(gpu.REPLAY)
        return after

    return step


def compute(setup: Setup, state: State, batch: Batch, rates: Rates) -> tuple[State, Metrics]:
    """One step on a batch [M B T].

    Writes:  the arenas of `state`; the State returned has them.
    """
    config, ranks, exchange, layouts = setup.config, setup.rt.ranks, setup.exchange, setup.blueprint.layouts
    sent = state.updates.new_zeros(()) if exchange is None else -exchange.sent[0]
    num_targets, nll, ahead, auxiliary, load, margins, entropy = accumulate_(setup, state, batch, rates.mtp)
    if exchange is not None:
        sent = sent + exchange.sent[0]
    with torch.no_grad():
        # All-reduce of what was summed over the microbatches, and of the square of the gradient norm.
        owned = zero.owned(layouts, state.arenas, ranks)
        norm = setup.passes.global_norm(owned)
        overflow = norm.new_zeros(()) if exchange is None else (exchange.needed[0] > 0).float()
        nll, ahead, auxiliary, load, margins, entropy, square, overflow = all_reduce_sum(
            ranks.world, (nll, ahead, auxiliary, load, margins, entropy, norm.double().square(), overflow)
        )
        loss, norm = nll / num_targets[0].clamp(min=1), square.sqrt().to(norm.dtype)
        ahead = ahead / num_targets[1:].clamp(min=1)
        if ranks.world.size > 1:
            setup.mark("reduce")

        # Clip and update, unless something is not finite: decided on the device, so that the host does not wait.
        setup.before_update()
        finite = torch.isfinite(loss) & torch.isfinite(norm) & (overflow == 0)
        sound = finite & (state.skipped_in_row < config.train.max_nonfinite_steps)
        counts, recent = sound & (num_targets[0] > 0), state.recent
        spike = torch.zeros_like(counts)
        if isinstance(recent, Tensor) and config.train.skip_spikes is not None:
            seen = torch.stack((loss, norm)).float()
            spike = counts & spikes.is_spike(recent, seen, deviations=config.train.skip_spikes)
            recent = spikes.remembered(recent, seen, counts)
        allowed = counts & ~spike
        updates = state.updates + allowed
        shrink = clip_scale(norm, config.optim.clip_norm)
        factors = {} if setup.scores is None else setup.scores.factors(config, allowed, ranks)
        change = update_(setup, state, rates, allowed, shrink, updates.clamp(min=1), factors)
        (square,) = all_reduce_sum(ranks.world, [change.double().square()])
        change = square.sqrt().to(change.dtype)

        # Balance the load of the experts.
        moe = config.model.moe
        if moe.balance == "sign":
            bias = route.balance(state.router_bias, load, rate=config.sign_step())
        else:
            bias = route.balance_quantile(state.router_bias, margins, top_k=moe.top_k, decay=moe.bias_decay)
        bias = torch.where(allowed, bias, state.router_bias)
        skipped = state.skipped + ~sound
        skipped_in_row = torch.where(sound, 0, state.skipped_in_row + 1)
        setup.mark("optimizer")
    after = attrs.evolve(
        state,
        router_bias=bias,
        recent=recent,
        spikes=state.spikes + spike,
        updates=updates,
        skipped=skipped,
        skipped_in_row=skipped_in_row,
        cursor=state.cursor + config.train.batch_size,
        tokens=state.tokens + tokens_per_step(config),
        step=state.step + 1,
    )
    counters = (after.spikes, skipped, skipped_in_row, sent)
    return after, Metrics(loss, ahead, auxiliary, norm, change, load, entropy, *counters)


def accumulate_(setup: Setup, state: State, batch: Batch, mtp_weight: Tensor) -> tuple[Tensor, ...]:
    """Add the gradient of the mean loss over the global batch, and reduce-scatter it.

    returns  targets of the global batch [1 + D] i64, of the next token and of each depth of multi-token prediction;
             this rank's part of the loss, of the loss of each depth [D], auxiliary loss, load, margins and entropy

    Writes:  gradients of the arenas; what this rank owns of them is complete.
    """
    train, ranks, device = setup.config.train, setup.rt.ranks, setup.rt.device
    c = model_at(setup.config.model, setup.env, state.tokens)
    layouts = setup.blueprint.layouts
    counts = [(targets_ahead(batch, depth) >= 0).sum() for depth in range(1, 1 + c.depth())]
    (num_targets,) = all_reduce_sum(ranks.world, [torch.stack([(batch.targets >= 0).sum(), *counts])])
    nll = torch.zeros((), device=device)
    ahead = torch.zeros(c.depth(), device=device)
    auxiliary = torch.zeros((), device=device)
    load = torch.zeros(state.router_bias.shape, dtype=torch.int64, device=device)
    margins = torch.zeros((), dtype=torch.int64, device=device)
    entropy = torch.zeros(state.router_bias.shape[0], device=device)
    count = batch.tokens.shape[0]

    # All-gather of the parameters that the ranks updated in the step before, in overlap with the first forward pass.
    need = zero.gathering_(layouts, state.arenas, state.params, ranks, setup.within)

    def waiting(p: Block, *arguments: Any) -> tuple[Tensor, Any, Any]:
        need(p)
        outputs = setup.run(p, *arguments)
        if p is state.params.blocks[-1]:
            need(state.params)
        return outputs

    need(state.params.embed)
    for index in range(count):
        setup.accumulator.first = index == 0
        if setup.scores is not None:
            setup.scores.begin(first=index == 0)
        loss, part, report = objective(
            state.params,
            microbatch(batch, index),
            state.router_bias,
            setup.env,
            c,
            num_targets=num_targets[0].clamp(min=1),
            num_sequences=train.batch_size,
            chunk=train.loss_chunk,
            z_loss=train.z_loss,
            mtp_weight=mtp_weight,
            run=waiting if index == 0 else setup.run,
        )
        if setup.scores is not None:
            setup.scores.end()
        setup.mark("forward")
        if index == count - 1:
            with zero.scattering_(layouts, state.arenas, state.params, setup.accumulator, ranks) as finish:
                loss.backward()
                setup.mark("backward")
                finish()
        else:
            loss.backward()
            setup.mark("backward")
        nll = nll + part
        ahead = ahead + torch.stack(report.ahead) if report.ahead else ahead
        load = load + report.load
        margins = margins + report.margins
        entropy = entropy + report.entropy / (count * ranks.world.size)
        auxiliary = auxiliary + report.imbalance.detach().sum() * (c.moe.sequence_balance / train.batch_size)
        if isinstance(report.attention, Tensor):
            auxiliary = auxiliary + report.attention.detach() / tokens_per_step(setup.config)
    return num_targets, nll, ahead, auxiliary, load, margins, entropy


def update_(
    setup: Setup,
    state: State,
    rates: Rates,
    allowed: Tensor,
    shrink: Tensor,
    updates: Tensor,
    factors: Mapping[str, Tensor],
) -> Tensor:
    """Update what this rank owns of every arena, where allowed; the next step gathers what the others updated.

    factors  path of a parameter -> what multiplies its new value
    returns  norm of the change

    Writes:  the arenas; gradients are zero afterwards, but for those that ops store anew in each step.
    """
    passes, ranks, optim = setup.passes, setup.rt.ranks, setup.config.optim
    changes: list[Tensor] = []
    for layout, arena in zip(setup.blueprint.layouts, state.arenas, strict=True):
        rule, name, sharing = layout.policy.optimizer, layout.policy.group, ranks.sharing(layout)
        update = passes.update_(rule)
        places = (arena.value[slot.offset :].data_ptr() for slot in layout.slots)
        clear = not setup.accumulator.stored.issuperset(places)
        sums = arena.sums if isinstance(arena.sums, Tensor) else None
        for (low, high), own in zip(layout.buckets(), layout.stretches(sharing.part()), strict=True):
            for begin, end, of_matrix in _passes(layout, own, passes, setup.blueprint.dims, optim):
                part, held = slice(begin, end), slice(begin - own.begin + own.at, end - own.begin + own.at)
                changes.append(
                    update(
                        arena.value[part],
                        arena.remainder[held] if layout.has_remainder() else None,
                        *(moment[held] for moment in arena.moments),
                        arena.gradient[part] if sums is None else sums[held],
                        allowed=allowed,
                        shrink=shrink,
                        updates=updates,
                        lr=getattr(rates, name),
                        **settings(rule, getattr(optim, name)),
                        **of_matrix,
                        decay=optim.weight_decay if layout.policy.decay else 0.0,
                        clear=clear and sums is None,
                    )
                )
            for slot in layout.slots:
                if low <= slot.offset < high and slot.path in factors:
                    qk_clip.multiply_(arena, layout, slot, factors[slot.path], part=sharing.part())
            if clear and sums is not None:
                arena.gradient[low:high].zero_()
            elif clear and sharing.size > 1:
                # what others own, of which this rank had a part; the update cleared its own
                arena.gradient[low : own.begin].zero_()
                arena.gradient[own.end : high].zero_()
    return torch.linalg.vector_norm(torch.stack(changes))


def _passes(
    layout: ArenaLayout, own: Stretch, passes: ops.ArenaOps, dims: Dims, optim: Optim
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """A stretch in pieces for the optimizer: chunks of elements, or whole parameters, one by one or together."""
    if not layout.whole():
        for first in range(own.begin, own.end, passes.chunk):
            yield first, min(first + passes.chunk, own.end), {}
        return
    slots = [slot for slot in layout.slots if own.begin <= slot.offset < own.end]
    how = {"bf16": layout.has_remainder(), "heads_apart": optim.muon_heads == "apart"}
    for group in [slots] if slots and passes.joint else [[slot] for slot in slots]:
        about = joint_settings(layout.policy.optimizer, group, dims, **how)
        yield group[0].offset, group[-1].offset + group[-1].size(), about
