"""The ranks of a run, one process a GPU: their process groups, and the collectives of the hosts.

Ranks that share out the experts are neighbours and exchange rows; ranks at the same place among their neighbours hold
the same experts. On a CPU torch's gloo carries everything, on GPUs NCCL what is computed, gloo what the hosts say.
"""

from __future__ import annotations

import json
import os
import socket
import threading
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
from nmoe.effects.parallel.exchange import nvshmem
from nmoe.effects.parallel.exchange.arena import PeerError, named
from nmoe.effects.parallel.launch import MULTICAST_OFF, Launch
from nmoe.effects.terminal import warn
from nmoe.errors import InputError
from nmoe.pure.core.layout import ArenaLayout
from nmoe.pure.parallel.levels import level_sizes, part_of

SETUP_S = 1800.0
"""Seconds a rank waits for another one that prepares data or reads a checkpoint."""

HEAD_START_S = 10.0
"""Seconds that our launcher, which watches too, has to end a rank that hangs before another one gives up on it."""

MARGIN_S = 2.0
"""Seconds that the rank with the rendezvous stays there longer, so that the others can say whom they miss."""

MEETING_S = 0.05
"""Seconds between two looks for ranks that have not come."""

ROLL_CALL_S = 5.0
"""Seconds that ranks whose collective ran out of time wait for each other: all began to wait in one step."""

LAST_S = 10.0
"""Seconds that a rank has to end after others are lost: what still waits for them, as a save does, may half an hour."""

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Group:
    """Ranks that compute something together."""

    rank: int = 0  # of this process among them
    size: int = 1
    handle: Any = None  # torch's process group; None: nobody else
    levels: Sequence[Group] = ()  # what they sum in, one after another; none: all at once
    stream: Any = None  # of a GPU, on which levels wait for each other
    copies: Any = None  # `Copies` of GPUs of one host; None: the process group moves everything

    def part(self) -> int:
        """Which of as many equal parts this rank has after a reduce-scatter."""
        return part_of(self.rank, self.size)


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
    rendezvous: str = "127.0.0.1"  # address where the ranks met, which every host reaches
    hosts: Sequence[str] = ()  # name of each rank's host
    store: Any = None  # torch's, at the rendezvous; None: nobody else
    timeout_s: float = 0.0  # most seconds a rank waits for another in a step
    all_gather_text: AllGatherText = single_rank
    background: AllGatherText = single_rank  # the same, for another thread

    def sharing(self, layout: ArenaLayout) -> Group:
        """The ranks that hold the same arena."""
        return self.replicas if layout.policy.shard else self.world

    def symmetric_bytes(self) -> int:
        """Memory of this GPU into which others copy, beside torch's pools."""
        copies = {id(group.copies): group.copies for group in (self.world, self.replicas) if group.copies is not None}
        return sum(each.num_bytes() for each in copies.values())

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
        *(problem if who == everybody else f"{named(who)}: {problem}" for problem, who in by_problem.items())
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


@contextmanager
def lost_ranks_named(ranks: Ranks) -> Iterator[None]:
    """When a collective or an exchange of the block fails because others are gone, say who, and end soon.

    The first rank that knows writes so at the rendezvous, where the others look first: a rank that gave up on a lost
    one is not lost itself.

    Raises:  PeerError in the place of what gloo or NCCL raised.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if ranks.store is None or not _is_loss(error):
            raise
        if isinstance(error, PeerError):
            warn(f"nmoe: {error}")
            _roll_call(ranks, error)
            _end_soon()
            raise
        loss = _lost(ranks, error)
        warn(f"nmoe: {loss}")
        _end_soon()
        raise loss from error


def _end_soon() -> None:
    """End this process, whatever in it still waits for ranks that are gone, unless it ends by itself before."""
    timer = threading.Timer(LAST_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _is_loss(error: Exception) -> bool:
    """Whether another rank is what failed."""
    return isinstance(error, PeerError | dist.DistError) or "gloo" in str(error)


def _lost(ranks: Ranks, error: Exception) -> PeerError:
    """What to say after a collective failed."""
    lost = _roll_call(ranks, error)
    if not lost:
        return PeerError(
            f"rank {ranks.world.rank}: expected connections between ranks that last, got {str(error).splitlines()[0]}; "
            "every rank is there: look at the network between the hosts, the same command resumes"
        )
    return PeerError(
        f"rank {ranks.world.rank}: expected every rank within {ranks.timeout_s:g} s, got nothing from "
        f"{named(lost, ranks.hosts)}; look at that rank's log, the same command resumes, on fewer hosts too"
    )


def _roll_call(ranks: Ranks, error: Exception) -> Sequence[int]:
    """The ranks that do not come to the rendezvous after `error`; the first one, where there is no rendezvous left.

    Ranks whose collective ran out of time began to wait in one step, others may wait as long as a step may take.
    """
    patience = ROLL_CALL_S if "timed out" in str(error).lower() else ranks.timeout_s + ROLL_CALL_S
    found: list[Sequence[int]] = []

    def call() -> None:
        try:
            found.append(_absentees(ranks, patience))
            if ranks.world.rank == 0:
                _await_readers(ranks, found[0], patience)
        except dist.DistError:  # who holds the store is gone
            found.append([0])

    thread = threading.Thread(target=call, name="roll call", daemon=True)  # a store that is cut off never answers
    thread.start()
    thread.join(2 * patience + MARGIN_S if ranks.world.rank == 0 else patience + MARGIN_S)
    return found[0] if found else [0]


def _absentees(ranks: Ranks, patience_s: float) -> Sequence[int]:
    """The ranks that the first one to know found missing. Writes: at the rendezvous, this rank and what it found."""
    store, me = ranks.store, ranks.world.rank
    store.set(f"present/{me}", "1")
    missing = [rank for rank in range(ranks.world.size) if rank != me]
    end = time.monotonic() + patience_s
    while not store.check(["lost"]):
        missing = [rank for rank in missing if not store.check([f"present/{rank}"])]
        if time.monotonic() > end or not missing:
            store.set("lost", json.dumps(missing))
            break
        time.sleep(MEETING_S)
    found = json.loads(store.get("lost"))
    store.set(f"told/{me}", "1")
    return found


def _await_readers(ranks: Ranks, lost: Sequence[int], patience_s: float) -> None:
    """Keep the rendezvous until every rank that is left has read who is lost."""
    readers = [rank for rank in range(1, ranks.world.size) if rank not in lost]
    end = time.monotonic() + patience_s
    while readers and time.monotonic() < end:
        readers = [rank for rank in readers if not ranks.store.check([f"told/{rank}"])]
        time.sleep(MEETING_S)


def check_machine(launch: Launch, expert_ranks: int, transport: str, *, cuda: bool) -> None:
    """Refuse what this machine cannot do, before any rank waits for another.

    Raises:  InputError for NVLink multicast that is on, experts shared out beyond what the transport reaches, NVSHMEM
             that is not there, GPUs that cannot reach each other.
    """
    problems = [*beyond_hosts(expert_ranks, launch.local_world, transport)]
    if transport == "nvshmem" and expert_ranks > 1:
        problems += nvshmem.problems(torch.version.cuda)
    if cuda and launch.world > 1:
        wrong = [f"{name}={value}" for name, value in MULTICAST_OFF.items() if launch.multicast.get(name) != value]
        if wrong:
            problems.append(
                f"NVLink multicast: expected it off in the environment of every rank, got it unset; "
                f"export {' '.join(wrong)}, or start with `nmoe run --gpus N`"
            )
        near = min(expert_ranks, launch.local_world)
        here, first = launch.local_rank, launch.local_rank - launch.local_rank % near
        problems += [
            f"GPU {here}: expected direct access (P2P) to GPU {other}, got none; see `nvidia-smi topo -p2p r`, "
            "or add --parallel.experts=1"
            for other in range(first, first + near)
            if other != here and not torch.cuda.can_device_access_peer(here, other)
        ]
    if problems:
        raise InputError(*problems)


def check_hosts(ranks: Ranks, local_world: int) -> None:
    """Refuse hosts that differ in how many ranks they have.

    local_world  ranks that the launcher of this host started
    Raises:      InputError on every rank.
    """
    counts = [int(text) for text in ranks.all_gather_text(str(local_world))]
    if len(set(counts)) > 1:
        differing = next(rank for rank, count in enumerate(counts) if count != counts[0])
        raise InputError(
            f"parallel.ranks: expected equally many ranks on every host, got {counts[0]} where rank 0 is and "
            f"{counts[differing]} where rank {differing} is; start as many on each"
        )


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
    all_gather_text = _texts(setup, launch.world)
    replicas = _own(world, columns, waits)
    levelled = _levelled(world, [range(launch.world)], waits, device)
    yield Ranks(
        world=levelled,
        experts=_own(world, rows, waits),
        replicas=levelled if replicas is world else _levelled(replicas, columns, waits, device),
        host=attrs.evolve(world, handle=dist.new_group(backend="gloo", timeout=waits)),
        rendezvous=launch.address,
        hosts=all_gather_text(os.uname().nodename),
        store=store,
        timeout_s=timeout_s,
        all_gather_text=all_gather_text,
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
        f"got none of {named(missing)}; look why it did not start, or raise parallel.timeout_s"
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


def _levelled(own: Group, groups: Sequence[range], timeout: timedelta, device: torch.device) -> Group:
    """A group with its levels. Every rank has to call it, with all groups that share out the world."""
    sizes = level_sizes(own.size)
    if len(sizes) < 2:
        return own
    levels: list[Group] = []
    apart = 1
    for size in sizes:
        for members in groups:
            for first in range(own.size):
                if first // apart % size:
                    continue
                among = [first + apart * digit for digit in range(size)]
                handle = dist.new_group([members[index] for index in among], timeout=timeout)
                if dist.get_rank() in members and own.rank in among:
                    levels.append(Group(rank=among.index(own.rank), size=size, handle=handle))
        apart *= size
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    return attrs.evolve(own, levels=tuple(levels), stream=stream)


def _texts(handle: Any, world: int) -> Callable[[str], Sequence[str]]:
    """All-gather of texts in a process group."""

    def all_gather_text(text: str) -> Sequence[str]:
        texts_of_ranks: list[Any] = [None] * world
        dist.all_gather_object(texts_of_ranks, text, group=handle)
        return texts_of_ranks

    return all_gather_text
