"""From a config and a Blueprint to what trains: state, ops, exchange, and whether it fits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import attrs
import torch

from nmoe.config import Checkpoint, Config
from nmoe.effects.device import buffers, ops, process
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.parallel.exchange import Exchange, open_exchange
from nmoe.effects.parallel.ranks import Ranks
from nmoe.effects.train.step import State
from nmoe.errors import InputError
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.core.key import Key
from nmoe.pure.cost.plan import Plan
from nmoe.pure.model import low_precision
from nmoe.pure.model.ops import Env, environment
from nmoe.pure.optim import spikes
from nmoe.pure.parallel import exchange_arena
from nmoe.pure.units import quantity


def fresh(
    config: Config,
    blueprint: Blueprint,
    rt: process.Runtime,
    exchange: Exchange | None = None,
    accumulator: Accumulator | None = None,
) -> tuple[State, Env]:
    """The state before the first step, and what the model needs besides it."""
    state, env = blank(config, blueprint, rt, exchange, accumulator)
    initialise_(config, blueprint, state, rt)
    return state, env


def initialise_(config: Config, blueprint: Blueprint, state: State, rt: process.Runtime) -> None:
    """Draw the initial values. Writes: the parameters of `state`."""
    key = Key(config.run.seed).fold("init")
    buffers.initialise_(state.arenas, blueprint, key, ranks=rt.ranks)


def blank(
    config: Config,
    blueprint: Blueprint,
    rt: process.Runtime,
    exchange: Exchange | None = None,
    accumulator: Accumulator | None = None,
) -> tuple[State, Env]:
    """A state of zeros at step 0, and what the model needs besides it.

    Writes:  buffers of `accumulator`: the gradients of this state.
    """
    c = config.model
    arenas = buffers.allocate(blueprint, rt.device, rt.ranks)
    state = State(
        buffers.bind(blueprint, arenas),
        arenas,
        torch.zeros(len(c.mixtures()), c.moe.num_experts, device=rt.device),
        () if config.train.skip_spikes is None else spikes.nothing(rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        cursor=0,
        tokens=0,
        step=0,
    )
    if accumulator is not None:
        accumulator.buffers = {
            leaf.data_ptr(): leaf.grad for _, leaf in tree.leaves(state.params) if leaf.grad is not None
        }
    train = config.train
    built = ops.build(
        rt.device,
        c,
        deterministic=train.deterministic,
        documents=train.document_mask,
        exchange=exchange,
        accumulator=accumulator,
        kernels=config.run.kernels,
        low=emulated(config),
        fp8=config.precision.kernels_fp8(),
    )
    env = environment(c, train.sequence_length, built)
    return state, attrs.evolve(env, tables=buffers.place(env.tables, rt.device))


def emulated(config: Config) -> low_precision.Emulated | None:
    """The experts in the precision of the config, emulated; None where nothing is."""
    if not config.precision.emulate:
        return None
    key = Key(config.run.seed).fold("precision")
    return low_precision.emulated(low_precision.RECIPES[config.precision.compute], key)


def exchanging(
    config: Config, ranks: Ranks, device: torch.device
) -> AbstractContextManager[Exchange] | AbstractContextManager[None]:
    """The exchange of rows with the ranks that hold the other experts, if there are others."""
    train, moe, parallel, group = config.train, config.model.moe, config.parallel, ranks.experts
    if group.handle is None:
        return nullcontext()
    sizes = exchange_arena.sizes(
        ranks=group.size,
        experts=moe.num_experts,
        top_k=moe.top_k,
        hidden_size=config.model.hidden_size,
        tokens=train.microbatch_size * train.sequence_length,
        capacity=parallel.room(),
        dedup=parallel.dedup,
        dtype=torch.bfloat16 if config.precision.storage() == "bf16" else torch.float32,
        staged=parallel.transport == "nvshmem",
        fp8=config.precision.kernels_fp8(),
    )
    return open_exchange(
        device=device,
        group=group.handle,
        sizes=sizes,
        timeout_s=parallel.timeout_s,
        transport=parallel.transport,
        rendezvous=ranks.rendezvous,
    )


LESS_MEMORY = 'lower train.microbatch_size, write train.recompute = "cheap" or "full", or precision.moments = "bf16"'


def check_memory(config: Config, planned: Plan, device: torch.device) -> None:
    """Refuse what the device has no room for, before anything is allocated.

    Raises:  InputError with the settings that would make it fit.
    """
    if device.type == "cpu":
        there, whose = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "machine"
    else:
        there, whose = torch.cuda.get_device_properties(device).total_memory, "GPU"
        there = int(there * config.memory.fraction)
    wanted, train = planned.memory.total(), config.train
    if wanted > there:
        raise InputError(
            f"train.microbatch_size: expected a step that fits the {whose}'s {quantity(there, 'B')}, got "
            f"{quantity(wanted, 'B')} for {train.microbatch_size} sequences of {train.sequence_length}; {LESS_MEMORY}"
        )


@contextmanager
def memory_explained(planned: Plan) -> Iterator[None]:
    """Explain in one line that the GPU's memory was not enough, in the place of the allocator's statistics.

    Raises:  InputError with what was asked for, what the plan holds by kind, and the settings that help.
    """
    try:
        yield
    except RuntimeError as error:
        # of symmetric memory, torch raises a plain RuntimeError: "CUDA driver error: out of memory"
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        held = [f"{name} {quantity(size, 'B')}" for name, size in attrs.asdict(planned.memory).items() if size]
        raise InputError(
            f"GPU memory: expected room for {asked[1] if asked else 'another tensor'}, got none beside the planned "
            f"{', '.join(held)}; {LESS_MEMORY}"
        ) from error


def keep(settings: Checkpoint) -> Keep:
    """What the config keeps of the checkpoints."""
    return Keep(last=settings.keep_last, every=settings.keep_every, best=int(settings.keep_best))
