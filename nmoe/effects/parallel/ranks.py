"""The ranks of a run, one process a GPU: their process groups, and the collectives of the hosts.

Ranks that share out the experts are neighbours and exchange rows; ranks at the same place among their neighbours hold
the same experts. On a CPU torch's gloo carries everything, on GPUs NCCL what is computed, gloo what the hosts say.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.config.check import beyond_hosts
from nmoe.effects.parallel.launch import MULTICAST_OFF, Launch
from nmoe.errors import InputError
from nmoe.pure.core.layout import ArenaLayout

SETUP_S = 1800.0
"""Seconds a rank waits for another one that prepares data or reads a checkpoint."""

HEAD_START_S = 10.0
"""Seconds that our launcher, which watches too, has to end a rank that hangs before another one gives up on it."""

MARGIN_S = 2.0
"""Seconds that the rank with the rendezvous stays there longer, so that the others can say whom they miss."""

MEETING_S = 0.05
"""Seconds between two looks for ranks that have not come."""

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Group:
    """Ranks that compute something together."""

    rank: int = 0  # of this process among them
    size: int = 1
    handle: Any = None  # torch's process group; None: nobody else


AllGatherText = Callable[[str], Sequence[str]]
"""All-gather of texts: that of every rank, by rank."""


def single_rank(text: str) -> Sequence[str]:
    """All-gather of texts on a single rank."""
    return [text]


@attrs.frozen(kw_only=True)
class Ranks:
    """All groups of this process."""

    world: Group = Group()
    experts: Group = Group()  # share out the experts
    replicas: Group = Group()  # hold the same experts
    host: Group = Group()  # all; for numbers of the host
    all_gather_text: AllGatherText = single_rank
    background: AllGatherText = single_rank  # the same, for another thread

    def sharing(self, layout: ArenaLayout) -> Group:
        """The ranks that hold the same arena."""
        return self.replicas if layout.policy.shard else self.world

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """The highest of each number on any rank. The host waits for every other one's."""
        if self.host.handle is None:
            return list(numbers)
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host.handle)
        return largest.tolist()


SINGLE_RANK = Ranks()
"""One process."""


def all_reduce_sum(group: Group, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The sum of each tensor over the ranks, the same bits on all of them, in one collective.

    tensors  of any shapes and formats; added in fp64, so that counts below 2^53 are exact
    """
    if group.handle is None:
        return tuple(tensors)
    with record_function("reduce"):
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        dist.all_reduce(flat, group=group.handle)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True))


def all_reduce_largest(group: Group, tensor: Tensor) -> Tensor:
    """The largest of each number over the ranks; the host does not wait."""
    if group.handle is None:
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.handle)
    return largest


def on_all_ranks(ranks: Ranks, act: Callable[[], T]) -> T:
    """What `act` returned here, when it went well on every rank.

    Raises:  InputError on every rank, with the problems of all on rank 0 and none on the others: one tells.
    """
    value: T | None = None
    cause: InputError | None = None
    try:
        value = act()
    except InputError as error:
        if ranks.world.size == 1:
            raise
        cause = error
    reports = [
        json.loads(text) for text in ranks.all_gather_text(json.dumps(None if cause is None else cause.problems))
    ]
    if all(report is None for report in reports):
        return value  # pyright: ignore[reportReturnType]
    if ranks.world.rank:
        raise InputError() from cause
    by_problem: dict[str, list[int]] = {}
    for rank, problems in enumerate(reports):
        for problem in problems or ():
            by_problem.setdefault(problem, []).append(rank)
    everybody = list(range(ranks.world.size))
    raise InputError(
        *(problem if who == everybody else f"{_named(who)}: {problem}" for problem, who in by_problem.items())
    ) from cause


@contextmanager
def with_rank_note(where: str) -> Iterator[None]:
    """Say where an error happened, such as on which rank: before each problem of an InputError, beside any other."""
    try:
        yield
    except InputError as error:
        if not where:
            raise
        raise InputError(*(f"{where}: {problem}" for problem in error.problems)) from error
    except Exception as error:
        if where:
            error.add_note(where)
        raise


def check_machine(launch: Launch, expert_ranks: int, *, cuda: bool) -> None:
    """Refuse what this machine cannot do, before any rank waits for another.

    Raises:  InputError for NVLink multicast that is on, experts shared out beyond one host, GPUs that cannot reach
             each other.
    """
    problems = [*beyond_hosts(expert_ranks, launch.local_world)]
    if cuda and launch.world > 1:
        wrong = [f"{name}={value}" for name, value in MULTICAST_OFF.items() if launch.multicast.get(name) != value]
        if wrong:
            problems.append(
                f"NVLink multicast: expected it off in the environment of every rank, got it unset; "
                f"export {' '.join(wrong)}, or start with `nmoe run --gpus N`"
            )
        here, first = launch.local_rank, launch.local_rank - launch.local_rank % expert_ranks
        problems += [
            f"GPU {here}: expected direct access (P2P) to GPU {other}, got none; see `nvidia-smi topo -p2p r`, "
            "or add --parallel.experts=1"
            for other in range(first, first + expert_ranks)
            if other != here and not torch.cuda.can_device_access_peer(here, other)
        ]
    if problems:
        raise InputError(*problems)


@contextmanager
def open_ranks(launch: Launch, expert_ranks: int, device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Join the process group of the other ranks, until the block ends.

    expert_ranks  neighbours that share out the experts; divides the world
    timeout_s     most seconds a rank waits for another in a step

    Writes:  which GPU is the process's own.
    Raises:  InputError when a rank does not come, naming it, or the rendezvous cannot be opened.
    """
    if launch.world == 1:
        yield SINGLE_RANK
        return
    if not dist.is_gloo_available() or (device.type == "cuda" and not dist.is_nccl_available()):
        raise InputError(
            'run.device: expected a build of torch with gloo and, for "cuda", NCCL, got one without; install another'
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _rendezvous(launch, timeout_s)
    waits = timedelta(seconds=timeout_s + (HEAD_START_S if launch.heartbeats else 0))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world,
        timeout=waits,
        device_id=device if device.type == "cuda" else None,
    )
    everybody = dist.group.WORLD
    patient = timedelta(seconds=max(timeout_s, SETUP_S))
    setup: Any = dist.new_group(backend="gloo", timeout=patient)
    saving: Any = dist.new_group(backend="gloo", timeout=patient)
    world = Group(rank=launch.rank, size=launch.world, handle=everybody)
    rows = [range(begin, begin + expert_ranks) for begin in range(0, launch.world, expert_ranks)]
    columns = [range(begin, launch.world, expert_ranks) for begin in range(expert_ranks)]
    yield Ranks(
        world=world,
        experts=_own(world, rows, waits),
        replicas=_own(world, columns, waits),
        host=attrs.evolve(world, handle=dist.new_group(backend="gloo", timeout=waits)),
        all_gather_text=_texts(setup, launch.world),
        background=_texts(saving, launch.world),
    )
    # Not when an error passes by: whom one waits for may be dead.
    dist.barrier(setup)
    dist.destroy_process_group()


def _rendezvous(launch: Launch, timeout_s: float) -> Any:
    """The store at the rendezvous, once every rank has said there that it has come.

    Raises:  InputError when one does not, or the port is taken.
    """
    end = time.monotonic() + timeout_s
    if not launch.hosts_store:
        _await_listener(launch, end, timeout_s)
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            launch.address, launch.port, is_master=launch.hosts_store, timeout=timedelta(seconds=timeout_s)
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        where = f"{launch.address}:{launch.port}"
        raise InputError(
            f"MASTER_PORT: expected a free port, got {where}, which is in use; choose another one"
        ) from error
    store = dist.PrefixStore(f"nmoe/{launch.restart}", store)  # pyright: ignore[reportPrivateImportUsage]
    if launch.hosts_store:
        end += MARGIN_S
    names = [f"here/{rank}" for rank in range(launch.world)]
    missing = [rank for rank in range(launch.world) if rank != launch.rank]
    try:
        store.set(names[launch.rank], "1")
        while missing := [rank for rank in missing if not store.check([names[rank]])]:
            if time.monotonic() > end:
                raise _absent(launch, missing, timeout_s)
            time.sleep(MEETING_S)
    except dist.DistError as error:  # who held the store waited in vain, and has gone
        raise _absent(launch, missing, timeout_s) from error
    return store


def _await_listener(launch: Launch, end: float, timeout_s: float) -> None:
    """Wait until somebody listens at the rendezvous; torch's own wait ends in pages of its own words."""
    while True:
        try:
            with socket.create_connection((launch.address, launch.port), timeout=timeout_s):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise _absent(launch, [0], timeout_s) from error
        time.sleep(MEETING_S)


def _absent(launch: Launch, missing: Sequence[int], timeout_s: float) -> InputError:
    """What to say of ranks that did not come."""
    return InputError(
        f"parallel.ranks: expected all {launch.world} ranks at {launch.address}:{launch.port} within {timeout_s:g} s, "
        f"got none of {_named(missing)}; look why it did not start, or raise parallel.timeout_s"
    )


def _own(world: Group, groups: Sequence[range], timeout: timedelta) -> Group:
    """The one of these groups, which share out the world, that this rank is in. Every rank has to call it."""
    if len(groups) == 1:
        return world
    own = Group()
    for members in groups:
        handle = dist.new_group(list(members), timeout=timeout) if len(members) > 1 else None
        if world.rank in members:
            own = Group(rank=members.index(world.rank), size=len(members), handle=handle)
    return own


def _texts(handle: Any, world: int) -> Callable[[str], Sequence[str]]:
    """All-gather of texts in a process group."""

    def all_gather_text(text: str) -> Sequence[str]:
        texts_of_ranks: list[Any] = [None] * world
        dist.all_gather_object(texts_of_ranks, text, group=handle)
        return texts_of_ranks

    return all_gather_text


def _named(who: Sequence[int]) -> str:
    """`rank 3`, or `ranks 1, 3`."""
    return f"rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
