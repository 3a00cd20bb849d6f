"""Open an exchange: allocate the arena, exchange addresses with all ranks, test every mapping, release at the end.

W ranks · L ranks of a host
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.effects.parallel.exchange import nvshmem, proxy
from nmoe.effects.parallel.exchange.arena import Exchange, PeerError, Put, Relay, Transport, view
from nmoe.errors import InputError
from nmoe.pure.parallel.exchange_arena import Fields, Sizes, fields

SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def open_exchange(
    *,
    device: torch.device,
    group: dist.ProcessGroup,
    sizes: Sizes,
    timeout_s: float,
    transport: str = "peer",
    rendezvous: str = "127.0.0.1",
    peers: Transport | None = None,
) -> Iterator[Exchange]:
    """This process's part in an exchange among the ranks of `group`: on a CPU over shared memory, else P2P over NVLink.

    Collective: every rank of the group opens at the same place, with the same sizes, and closes at the same place.

    timeout_s   how long a rank is waited for in each phase
    transport   "peer": all ranks are on one host; "proxy": a thread sends what goes to another host over TCP;
                "nvshmem": kernels put to other hosts, for which all ranks of the run open together
    rendezvous  address that all hosts reach
    peers       how ranks of one host write to each other; None: `host` on a CPU, else `device`

    Raises:    InputError when ranks disagree about sizes or hosts, are on several hosts without a transport between
               them, or cannot reach each other's memory; PeerError, from what came first, when the time for a rank had
               run out.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    hosts = _agree(sizes, rank, ranks, group, transport)
    f = fields(sizes)
    record = partial(_exchange, rank=rank, sizes=sizes, f=f, timeout_s=timeout_s, programs=_most(device), hosts=hosts)
    with ExitStack() as scope:
        if transport == "nvshmem":
            raw, addresses, links = nvshmem.opened(f.size, sizes, group, device)
            transfer = nvshmem.over(links, peers or _peers(device), addresses)
            e = record(raw=raw, peers=(), addresses=addresses, transport=transfer)
        else:
            place = proxy.Hosts(rank=rank, ranks=ranks, per_host=hosts.count(hosts[0]))
            e = scope.enter_context(_in_memory(record, place, f, group, device, rendezvous, peers or _peers(device)))
        _shake_hands_(e, group, signalled=transport == "nvshmem" or len(set(hosts)) > 1)
        try:
            yield e
        except PeerError:
            raise
        except BaseException as error:
            late = int(e.missing)
            if late:
                raise PeerError(
                    f"rank {rank}: expected every rank of the exchange within {timeout_s:g} s, got nothing from "
                    f"{e.named([late - 1])}; look at that rank's log, or raise parallel.timeout_s if it was only slow"
                ) from error
            raise
        e.transport.flush(e)


@contextmanager
def _in_memory(
    record: Callable[..., Exchange],
    place: proxy.Hosts,
    f: Fields,
    group: dist.ProcessGroup,
    device: torch.device,
    rendezvous: str,
    peers: Transport,
) -> Iterator[Exchange]:
    """An exchange over memory that the ranks of a host share, and over the proxy to those of others.

    record  the exchange around an arena
    """
    ranks = place.ranks
    near = range(place.first(), place.first() + place.per_host)
    beyond = len(near) < ranks
    with ExitStack() as scope:
        within = _of_host(group, near, ranks)
        arenas: Sequence[Tensor] = ()
        if device.type == "cpu":
            arenas = scope.enter_context(_shared(f.size, within))
            raw = arenas[place.rank - near.start]
            addresses = [arena.data_ptr() for arena in arenas]
        elif len(near) == 1:
            raw = torch.zeros(f.size, dtype=torch.uint8, device=device)  # no other process reaches it
            addresses = [raw.data_ptr()]
        else:
            raw, addresses, _ = scope.enter_context(symmetric(f.size, within, device))
        addresses = [addresses[other - near.start] if other in near else 0 for other in range(ranks)]
        mapped = tuple(arenas[other - near.start] if other in near else None for other in range(ranks) if arenas)
        e = record(raw=raw, peers=mapped, addresses=addresses, transport=peers)
        if beyond:
            connections = scope.enter_context(proxy.connections(place, group, rendezvous, e.timeout_s))
            carried = proxy.Proxy(place, partial(proxy.areas, e.sizes, f, device), e.lost, connections, device)
            e = attrs.evolve(e, transport=proxy.over(e.transport, _relay(device), carried))
            scope.enter_context(_carrying(carried))
        yield e


@contextmanager
def _carrying(carried: proxy.Proxy) -> Iterator[None]:
    """Threads of the proxy run inside the block."""
    carried.start()
    orderly = False
    try:
        yield
        orderly = True
    finally:
        carried.stop(orderly=orderly)


def _peers(device: torch.device) -> Transport:
    """How ranks of one host write to each other."""
    if device.type == "cpu":
        from nmoe.effects.parallel.exchange.host import PEER
    else:
        # only here: triton is not everywhere
        from nmoe.effects.parallel.exchange.device import PEER
    return PEER


def _relay(device: torch.device) -> Relay:
    """How a rank and the threads of its process reach each other."""
    if device.type == "cpu":
        from nmoe.effects.parallel.exchange.host import RELAY
    else:
        # only here: triton is not everywhere
        from nmoe.effects.parallel.exchange.device import RELAY
    return RELAY


def _most(device: torch.device) -> int:
    """Most programs that push rows: two a multiprocessor; two on a CPU, where kernels are interpreted."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)


def _of_host(group: dist.ProcessGroup, near: range, ranks: int) -> dist.ProcessGroup:
    """The ranks of this host as a group. Only they call it."""
    if len(near) == ranks:
        return group
    members = [dist.get_global_rank(group, rank) for rank in near]
    handle: Any = dist.new_group(members, backend="gloo", use_local_synchronization=True)
    return handle


def virtual(sizes: Sizes, device: torch.device) -> tuple[Exchange, ...]:
    """All ranks of an exchange in this process, on one device: for tests, and to measure with one GPU."""
    # only here: triton is not everywhere
    from nmoe.effects.parallel.exchange.device import PEER

    f = fields(sizes)
    arenas = tuple(torch.zeros(f.size, dtype=torch.uint8, device=device) for _ in range(sizes.ranks))
    return tuple(
        _exchange(
            rank=rank,
            sizes=sizes,
            f=f,
            raw=raw,
            peers=arenas,
            addresses=[arena.data_ptr() for arena in arenas],
            timeout_s=60.0,
            programs=_most(device),
            hosts=("",) * sizes.ranks,
            transport=PEER,
        )
        for rank, raw in enumerate(arenas)
    )


def _exchange(
    *,
    rank: int,
    sizes: Sizes,
    f: Fields,
    raw: Tensor,
    peers: tuple[Tensor | None, ...],
    addresses: Sequence[int],
    timeout_s: float,
    programs: int,
    hosts: tuple[str, ...],
    transport: Transport,
) -> Exchange:
    """The record around an arena."""
    device = raw.device

    def word(dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, dtype=dtype, device=device)

    return Exchange(
        rank=rank,
        sizes=sizes,
        fields=f,
        raw=raw,
        hosts=hosts,
        transport=transport,
        peers=peers,
        addresses=torch.tensor(addresses, dtype=torch.int64, device=device),
        epoch=word(torch.int64),
        needed=word(torch.int32),
        sent=word(torch.int64),
        missing=torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"),
        lost=torch.zeros(sizes.ranks, dtype=torch.bool),
        stream=torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None,
        timeout_s=timeout_s,
        programs=programs,
    )


def _agree(sizes: Sizes, rank: int, ranks: int, group: dist.ProcessGroup, transport: str) -> tuple[str, ...]:
    """The host of each rank. Refuses what cannot work, before anything is allocated."""
    problems: list[str] = []
    if sizes.ranks != ranks:
        problems.append(
            f"exchange: expected sizes for the {ranks} ranks of the group, got {sizes.ranks}; pass the group's"
        )
    if sizes.experts % sizes.ranks:
        problems.append(
            f"model.moe.num_experts: expected equally many on every rank of an expert group, got "
            f"{sizes.experts} experts for "
            f"{sizes.ranks} ranks; take a number of ranks that divides it"
        )
    if sizes.hidden_size * sizes.dtype.itemsize % 16:
        problems.append(
            f"model.hidden_size: expected rows of a multiple of 16 bytes, the width of a store, got "
            f"{sizes.hidden_size * sizes.dtype.itemsize} bytes; take a multiple of {16 // sizes.dtype.itemsize}"
        )
    if sizes.staged != (transport == "nvshmem"):
        problems.append(
            f'exchange: expected sizes that are staged for "nvshmem" alone, got staged = {sizes.staged} for '
            f'"{transport}"; pass those of the transport'
        )
    answers: list[Any] = [None] * ranks
    dist.all_gather_object(answers, (os.uname().nodename, sizes, transport), group=group)
    hosts = tuple(host for host, _, _ in answers)
    problems += _hosts_problems(hosts, transport)
    for other, (_, theirs, by) in enumerate(answers):
        if by != transport:
            problems.append(
                f'parallel.transport: expected one for all ranks, got "{transport}" on rank {rank} and "{by}" on '
                f"rank {other}; start all ranks with one config"
            )
        if theirs != sizes:
            problems.append(
                f"rank {rank}: expected the same sizes on all ranks, got {sizes} and on rank {other} {theirs}"
            )
    if problems:
        raise InputError(*problems)
    return hosts


def _hosts_problems(hosts: Sequence[str], transport: str) -> Iterator[str]:
    """What keeps ranks on these hosts from an exchange."""
    names = list(dict.fromkeys(hosts))
    if len(names) == 1:
        return
    if transport == "peer":
        other = next(rank for rank, host in enumerate(hosts) if host != hosts[0])
        yield (
            f"parallel.experts: expected the ranks of an expert group on one host, got rank {other} on {hosts[other]} "
            f"and rank 0 on {hosts[0]}; lower parallel.experts to the ranks of a host, or write parallel.transport = "
            '"proxy"'
        )
        return
    counts = {name: hosts.count(name) for name in names}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} on {name}" for name, count in counts.items())
        yield f"parallel.ranks: expected equally many ranks on every host, got {text}; start as many on each"
    elif list(hosts) != [name for name in names for _ in range(counts[name])]:
        text = ", ".join(f"rank {rank} on {host}" for rank, host in enumerate(hosts))
        yield (
            f"parallel.experts: expected neighbouring ranks on each host, got {text}; number the ranks host by host, "
            "as torchrun does"
        )


@contextmanager
def _shared(size: int, group: dist.ProcessGroup) -> Iterator[tuple[Tensor, ...]]:
    """Every rank's arena, in memory that the group's processes share; the files are gone before any work begins."""
    ranks = dist.get_world_size(group)
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    filesystem = os.statvfs(folder)
    free = filesystem.f_bavail * filesystem.f_frsize
    if free < size * ranks:
        raise InputError(
            f"{folder}: expected {size * ranks} free bytes for the arenas of {ranks} ranks, got {free}; "
            "make room, or lower parallel.capacity or train.microbatch_size"
        )
    names: list[Any] = [None] * ranks
    with tempfile.NamedTemporaryFile(prefix="nmoe-", dir=folder) as file:
        os.ftruncate(file.fileno(), size)
        dist.all_gather_object(names, file.name, group=group)
        maps: list[mmap.mmap] = []
        for name in names:
            with open(name, "r+b") as other:
                maps.append(mmap.mmap(other.fileno(), size))
        dist.barrier(group=group)
    # a mapping ends with the last tensor that looks at it
    yield tuple(torch.frombuffer(memory, dtype=torch.uint8) for memory in maps)


@contextmanager
def symmetric(
    size: int, group: dist.ProcessGroup, device: torch.device
) -> Iterator[tuple[Tensor, list[int], list[Tensor]]]:
    """This rank's arena, in memory that the group's GPUs reach; where this process sees each rank's, and as tensors.

    One allocation for the life of the exchange, and none through torch's pools: a pool may give two ranks different
    slots of it, and data would go astray without a word (pytorch issue 190977).
    """
    # only here: a CPU needs none of it
    import torch.distributed._symmetric_memory as memory
    from torch._C._distributed_c10d import _SymmetricMemory

    _refuse_unreachable(group, device)
    _refuse_multicast(device)
    raw = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    handle = memory.rendezvous(raw, group)
    if handle.multicast_ptr:
        raise InputError("exchange: expected shared memory without a multicast address, got one; see docs/exchange.md")
    before = raw.data_ptr() - handle.buffer_ptrs[handle.rank]
    raw.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group=group)
    arenas = [handle.get_buffer(rank, (size,), torch.uint8, before) for rank in range(handle.world_size)]
    yield raw, [address + before for address in handle.buffer_ptrs], arenas
    # not after an error: the device may have trapped, and a peer may be gone
    torch.cuda.synchronize(device)
    dist.barrier(group=group)
    del handle, arenas


def _refuse_multicast(device: torch.device) -> None:
    """Multicast is off: a rendezvous would set it up wherever all GPUs know it."""
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    if _SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index):
        raise InputError(
            "TORCH_SYMM_MEM_DISABLE_MULTICAST: expected NVLink multicast off before ranks share memory, got "
            "it on; export "
            "TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 NCCL_NVLS_ENABLE=0"
        )


def _refuse_unreachable(group: dist.ProcessGroup, device: torch.device) -> None:
    """Every GPU of the group is one whose memory this one reaches."""
    indices: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(indices, device.index, group=group)
    others = [index for index in indices if index != device.index and index < torch.cuda.device_count()]
    far = [index for index in others if not torch.cuda.can_device_access_peer(device.index, index)]
    if far:
        raise InputError(
            f"parallel.experts: expected GPUs that reach each other's memory in an expert group, got GPU "
            f"{device.index} that cannot "
            f"reach GPU {far[0]}; lower parallel.experts to GPUs that NVLink or PCIe peer access joins"
        )


def _shake_hands_(e: Exchange, group: dist.ProcessGroup, *, signalled: bool) -> None:
    """Write a word into every arena and look whether each rank's arrived in ours: a wrong mapping shows here.

    signalled  whether words arrive with a signal: they pass another host, or wait for a barrier

    Writes:  the first word of this rank's row of counts in every arena.
    Raises:  InputError naming the rank whose word is not there.
    """
    ranks = e.sizes.ranks
    counts = e.fields.counts
    rank = torch.arange(ranks, dtype=torch.int32, device=e.raw.device)
    mine = rank + 1000 * (e.rank + 1)
    at = torch.full_like(rank, e.rank * counts.shape[1])
    e.transport.put_words_(e, Put(field=counts, values=mine, to=rank, at=at, valid=torch.full_like(rank, ranks)))
    if signalled:
        e.transport.barrier_(e, signal=True, wait=True)
    if e.raw.is_cuda:
        torch.cuda.synchronize(e.raw.device)
    dist.barrier(group=group)
    got = view(e.raw, counts)[:, 0].tolist()
    wanted = [1000 * (other + 1) + e.rank for other in range(ranks)]
    wrong = [other for other in range(ranks) if got[other] != wanted[other]]
    if wrong:
        raise InputError(
            f"rank {e.rank}: expected each rank's first word in its arena, got another one from rank "
            f"{wrong[0]}; the memory "
            "that ranks share is not the memory they agreed on: see docs/exchange.md"
        )
    dist.barrier(group=group)
