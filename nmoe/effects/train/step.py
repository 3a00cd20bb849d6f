"""One optimizer step: accumulate, clip, update, balance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config.sections import Config
from nmoe.effects.device import ops
from nmoe.effects.device.process import Runtime
from nmoe.effects.parallel.exchange import Exchange
from nmoe.effects.parallel.ranks import all_reduce_sum
from nmoe.effects.train import zero
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.core.layout import ArenaLayout
from nmoe.pure.core.tree import record
from nmoe.pure.model import route
from nmoe.pure.model.model import Batch, Transformer, block, objective
from nmoe.pure.model.ops import Env
from nmoe.pure.optim.clip import clip_scale
from nmoe.pure.optim.schedule import factor
from nmoe.pure.optim.update import settings


class SpentStateError(RuntimeError):
    """A State was used after `step` consumed it."""


@record
class State:
    """Everything a step reads and replaces."""

    params: Transformer  # views of the arenas
    arenas: tuple[Any, ...]
    router_bias: Tensor  # [L E] f32, one row a mixture layer
    updates: Tensor  # 0-d i64, optimizer updates made
    skipped: Tensor  # 0-d i64, non-finite steps so far
    skipped_in_row: Tensor  # 0-d i64, of these, the last ones in a row
    cursor: int  # sequences read, all ranks
    step: int  # steps taken, skipped ones included

    def __getattr__(self, name: str) -> Any:
        """Reached only for a field that `donate` took away."""
        if name in DONATED:
            raise SpentStateError(
                f"State at step {self.step}: a donated state is spent, got a read of '{name}'; "
                "use the State that step() returned"
            )
        raise AttributeError(name)


DONATED = tuple(field.name for field in attrs.fields(State) if field.name != "step")
"""Fields that `donate` takes away; `step` stays, for the message."""


@record
class Metrics:
    """What a step tells; 0-d device tensors unless said otherwise, read at the log's cadence."""

    loss: Tensor  # nats a target
    auxiliary_loss: Tensor  # weighted sequence-wise balance loss
    grad_norm: Tensor  # before the clip
    update_norm: Tensor
    load: Tensor  # [L E] i64, tokens each expert was chosen by
    entropy: Tensor  # [L] f32, router entropy in nats
    skipped: Tensor
    skipped_in_row: Tensor


@record
class Rates:
    """Learning rate of each optimizer group in one step; 0-d f64 on the device."""

    dense: Tensor
    expert: Tensor
    router: Tensor


Compute = Callable[[State, Batch, Rates], tuple[State, Metrics]]


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


def learning_rates(config: Config, step: int) -> dict[str, float]:
    """Learning rate of each optimizer group in the step after `step` steps."""
    share = factor((step + 1) * config.train.batch_size * config.train.sequence_length, config.schedule)
    return {group: share * getattr(config.optim, group).lr for group in ("dense", "expert", "router")}


def place_rates(config: Config, step: int, device: torch.device) -> Rates:
    """`learning_rates` on the device, without a copy that would wait for it."""
    rates = learning_rates(config, step)
    return Rates(**{group: torch.full((), rate, dtype=torch.float64, device=device) for group, rate in rates.items()})


def make_step(
    config: Config,
    blueprint: Blueprint,
    env: Env,
    rt: Runtime,
    *,
    mark: Callable[[str], None],
    before_update: Callable[[], None] = lambda: None,
    exchange: Exchange | None = None,
    run: Callable[..., tuple[Tensor, Any]] = block,
    wrap: Callable[[Compute], Compute] = lambda compute: compute,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """`step(state, batch) -> (state, metrics)`. It consumes its state: the storages are reused.

    A step whose loss or gradient norm is not finite changes no parameter, moment or bias, and is counted; after
    `train.max_nonfinite_steps` of them in a row no step changes anything more, so that whoever reads the metrics late
    finds the state as it was. Nothing in a step waits for the device.

    mark           called with the name of each part when it ends
    before_update  called before anything but gradients is written
    exchange       of rows with the ranks that hold the other experts; too many rows for one change nothing anywhere
    run            `block`, or a wrapper around it
    wrap           what replays a step, given the function that computes it
    """
    passes, ranks, layouts = ops.arena_ops(rt.device), rt.ranks, blueprint.layouts
    update_of = {described.name: passes.update_(described.policy.optimizer) for described in layouts}
    c, train, clip = config.model, config.train, config.optim.clip_norm

    def accumulate_(state: State, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Add the gradient of the mean loss over the global batch, and sum it over the ranks.

        returns  targets of the global batch; this rank's part of the loss, the auxiliary loss, load and entropy

        Writes:  gradients of the arenas; what this rank owns of them is complete.
        """
        (num_targets,) = all_reduce_sum(ranks.world, [(batch.targets >= 0).sum()])
        num_targets = num_targets.clamp(min=1)
        nll = torch.zeros((), device=rt.device)
        auxiliary = torch.zeros((), device=rt.device)
        load = torch.zeros(state.router_bias.shape, dtype=torch.int64, device=rt.device)
        entropy = torch.zeros(state.router_bias.shape[0], device=rt.device)
        count = batch.tokens.shape[0]
        for index in range(count):
            loss, part, report = objective(
                state.params,
                microbatch(batch, index),
                state.router_bias,
                env,
                c,
                num_targets=num_targets,
                num_sequences=train.batch_size,
                chunk=train.loss_chunk,
                z_loss=train.z_loss,
                run=run,
            )
            if index == count - 1:
                with zero.scattering_(layouts, state.arenas, state.params, ranks) as finish:
                    loss.backward()
                    mark("forward_backward")
                    finish()
            else:
                loss.backward()
            nll = nll + part
            load = load + report.load
            entropy = entropy + report.entropy / (count * ranks.world.size)
            auxiliary = auxiliary + report.imbalance.detach().sum() * (c.moe.sequence_balance / train.batch_size)
        return num_targets, nll, auxiliary, load, entropy

    def update_(state: State, rates: Rates, allowed: Tensor, shrink: Tensor, updates: Tensor) -> Tensor:
        """The update of what this rank owns of every arena, where allowed; the norm of the change.

        Writes:  the arenas; gradients are zero afterwards.
        """
        changes: list[Tensor] = []
        for described, arena, begin, end, at in chunks(state):
            group = getattr(config.optim, described.policy.group)
            part, held = slice(begin, end), slice(at, at + end - begin)
            changes.append(
                update_of[described.name](
                    arena.value[part],
                    arena.remainder[held] if described.has_remainder() else None,
                    *(moment[held] for moment in arena.moments),
                    arena.gradient[part],
                    allowed=allowed,
                    shrink=shrink,
                    updates=updates,
                    lr=getattr(rates, described.policy.group),
                    **settings(group),
                    decay=config.optim.weight_decay if described.policy.decay else 0.0,
                )
            )
        for described, arena in zip(layouts, state.arenas, strict=True):
            if described.parts > 1:
                arena.gradient.zero_()  # what others own, of which this rank had a part
        return torch.linalg.vector_norm(torch.stack(changes))

    def chunks(state: State) -> Iterator[tuple[ArenaLayout, Any, int, int, int]]:
        """What this rank owns, in pieces the optimizer takes: from where to where in an arena, and in what is held."""
        for described, arena in zip(layouts, state.arenas, strict=True):
            for each in described.stretches(ranks.sharing(described).rank):
                for begin in range(each.begin, each.end, passes.chunk):
                    yield described, arena, begin, min(begin + passes.chunk, each.end), begin - each.begin + each.at

    def compute(state: State, batch: Batch, rates: Rates) -> tuple[State, Metrics]:
        num_targets, nll, auxiliary, load, entropy = accumulate_(state, batch)
        with torch.no_grad():
            norm = passes.global_norm(zero.owned(layouts, [arena.gradient for arena in state.arenas], ranks))
            overflow = norm.new_zeros(()) if exchange is None else (exchange.needed[0] > 0).float()
            nll, auxiliary, load, entropy, square, overflow = all_reduce_sum(
                ranks.world, (nll, auxiliary, load, entropy, norm.double().square(), overflow)
            )
            loss, norm = nll / num_targets, square.sqrt().to(norm.dtype)
            if ranks.world.size > 1:
                mark("reduce")
            before_update()
            finite = torch.isfinite(loss) & torch.isfinite(norm) & (overflow == 0)
            allowed = finite & (state.skipped_in_row < train.max_nonfinite_steps)
            updates = state.updates + allowed
            change = update_(state, rates, allowed, clip_scale(norm, clip), updates.clamp(min=1))
            (square,) = all_reduce_sum(ranks.world, [change.double().square()])
            change = square.sqrt().to(change.dtype)
            bias = route.balance(state.router_bias, load, rate=c.moe.bias_update_rate)
            bias = torch.where(allowed, bias, state.router_bias)
            skipped = state.skipped + ~allowed
            skipped_in_row = torch.where(allowed, 0, state.skipped_in_row + 1)
            mark("optimizer")
            if ranks.world.size > 1:
                zero.gather_(layouts, state.arenas, ranks)
                mark("reduce_gather")
        after = State(
            state.params,
            state.arenas,
            bias,
            updates,
            skipped,
            skipped_in_row,
            state.cursor + train.batch_size,
            state.step + 1,
        )
        return after, Metrics(loss, auxiliary, norm, change, load, entropy, skipped, skipped_in_row)

    wrapped = wrap(compute)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state = donate(state)
        return wrapped(state, batch, place_rates(config, state.step, rt.device))

    return step
