"""Ranks as forked processes: everything is imported once, so that a world of them takes a fraction of a second."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from nmoe.config.sections import Config
from nmoe.effects.device.process import Runtime
from nmoe.effects.parallel.launch import from_environment
from nmoe.effects.parallel.ranks import Ranks, open_ranks
from nmoe.effects.train import build, run
from nmoe.effects.train.world import World
from nmoe.pure.core.layout import layout
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.soak.forked import call_and_exit

PATIENCE_S = 90.0


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher tells one rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def on_ranks(
    world: int, work: Path, call: Callable[[int], int], *, only: tuple[int, ...] | None = None, port: int | None = None
) -> list[tuple[int, str]]:
    """Exit code and output of `call(rank)` on each rank, each a fork of this process.

    only  the ranks that come at all
    """
    work.mkdir(parents=True, exist_ok=True)
    port = free_port() if port is None else port
    pids: dict[int, int] = {}
    for rank in range(world) if only is None else only:

        def rank_call(rank: int = rank) -> int:
            os.environ.update(environment(rank, world, port))
            return call(rank)

        pid = os.fork()
        if pid == 0:
            call_and_exit(rank_call, work / f"rank{rank}.txt")
        pids[rank] = pid
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE_S
    try:
        while len(codes) < len(pids):
            assert time.monotonic() < end, [(work / f"rank{rank}.txt").read_text() for rank in pids]
            for rank, pid in pids.items():
                if rank not in codes and (found := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                    codes[rank] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.01)
    finally:
        for rank, pid in pids.items():
            if rank not in codes:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
    return [(codes[rank], (work / f"rank{rank}.txt").read_text(errors="replace")) for rank in pids]


def as_world(config: Config, world: int, **parallel: Any) -> Config:
    """The config for so many ranks."""
    return attrs.evolve(config, parallel=attrs.evolve(config.parallel, ranks=world, timeout_s=60.0, **parallel))


def train(
    config: Config, work: Path, worlds: Mapping[int, World] | None = None, **changes: Config
) -> list[tuple[int, str]]:
    """Exit code and output of each rank of one attempt, as `nmoe run` makes it.

    worlds   what single ranks meet outside
    changes  `rank<r>`: the config of that rank
    """

    def call(rank: int) -> int:
        mine = changes.get(f"rank{rank}", config)
        return run.main(mine, {}, ("nmoe", "run"), "x", (), (worlds or {}).get(rank))

    return on_ranks(config.parallel.ranks, work, call)


def in_group(config: Config, work: Path, call: Callable[[Ranks], None]) -> None:
    """Call a function on every rank, among the groups that `nmoe run` opens."""

    def act(rank: int) -> int:
        told = from_environment(os.environ)
        experts = config.parallel.experts or told.world
        with open_ranks(told, experts, torch.device("cpu"), config.parallel.timeout_s) as ranks:
            call(ranks)
        return 0

    told = on_ranks(config.parallel.ranks, work, act)
    assert [code for code, _ in told] == [0] * len(told), told


def state_of(config: Config, ranks: Ranks, bucket: int, microbatches: int = 64) -> tuple[Any, Any, Any]:
    """A Blueprint with small buckets, and a fresh state and Env in it."""
    blueprint = make_blueprint(config, ranks.world.size, ranks.experts.size)
    layouts = layout(
        blueprint.specs,
        blueprint.dims,
        optimizers=config.optim.optimizers(),
        compute=config.precision.storage(),
        moments=config.precision.moments,
        microbatches=microbatches,
        world=ranks.experts.size,
        replicas=ranks.replicas.size,
        bucket=bucket,
    )
    blueprint = attrs.evolve(blueprint, layouts=layouts)
    rt = Runtime(device=torch.device("cpu"), rank=ranks.world.rank, world=ranks.world.size, peak_flops=1.0, ranks=ranks)
    state, env = build.fresh(config, blueprint, rt)
    return blueprint, state, (env, rt)
