"""NVSHMEM as a transport: kernels store to ranks of this host and put to those of others, in NVSHMEM's memory.

Ranks of this host, itself included, are reached by stores to the addresses that NVSHMEM hands out, as in memory that
they share. What a rank puts is copied into its own arena first, in an order in which neighbours go to neighbouring
places, and leaves in messages of many. A barrier waits until every put of this rank has arrived, then signals.

NVSHMEM is opened once, over all ranks of the run, and stays until the process ends, as does its memory: freeing is a
collective, which Python's garbage collector would begin at any time. Flags are our own: the barrier of torch's handle
does nothing in torch 2.11.

W ranks · N tokens of this rank · K choices of a token · C rows a rank can hold
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.effects.parallel.exchange.arena import Exchange, Put, Transport, view
from nmoe.errors import InputError
from nmoe.pure.parallel.exchange_arena import GRANULARITY, Sizes

HEAP = "NVSHMEM_SYMMETRIC_SIZE"
UNITS = "KMGT"
"""Of a heap's size in the environment, each 1024 of the one before."""


@attrs.frozen(kw_only=True)
class Links:
    """What the puts of one rank need besides its exchange."""

    pes: Tensor  # [W] i32, what NVSHMEM calls each rank
    library: str  # path of the functions that kernels are linked with
    group: dist.ProcessGroup | None  # None: virtual ranks
    order: Tensor  # [max(C, N K, W)] i32, 0, 1, 2, ...: places that are sent as they lie
    ranks: Tensor  # [W] i32, of each its number
    every: Tensor  # [3] i32, W each: all items of a put that has one for each rank


def links(
    sizes: Sizes, pes: Sequence[int], library: str, group: dist.ProcessGroup | None, device: torch.device
) -> Links:
    """Links of one rank to those with these numbers."""
    most = max(sizes.capacity, sizes.tokens * sizes.top_k, sizes.ranks)
    return Links(
        pes=torch.tensor(pes, dtype=torch.int32, device=device),
        library=library,
        group=group,
        order=torch.arange(most, dtype=torch.int32, device=device),
        ranks=torch.arange(sizes.ranks, dtype=torch.int32, device=device),
        every=torch.full((3,), sizes.ranks, dtype=torch.int32, device=device),
    )


def problems(cuda: str | None) -> list[str]:
    """What keeps this process from NVSHMEM.

    cuda  version that torch is built for
    """
    import torch.distributed._symmetric_memory as memory
    from torch.distributed._symmetric_memory._nvshmem_triton import NvshmemLibFinder

    wanted = f"nvidia-nvshmem-cu{(cuda or '13').split('.')[0]}"
    found: list[str] = []
    if not memory.is_nvshmem_available():
        found.append("no library that torch can load")
    try:
        NvshmemLibFinder.find_device_library()
    except RuntimeError:
        found.append("no functions for kernels")
    if not found:
        return []
    return [
        f'parallel.transport: expected NVSHMEM for "nvshmem", got {" and ".join(found)}; install a torch for CUDA and '
        f"{wanted} in the version that it asks for"
    ]


def environment(environ: Mapping[str, str], size: int, hosts: Sequence[str]) -> dict[str, str]:
    """Variables to set before NVSHMEM opens.

    size     bytes of this rank's arena
    hosts    of each rank of the run
    Raises:  InputError for a heap that is too small, and NVLink multicast that is on.
    """
    found: list[str] = []
    needed = (-(-size // GRANULARITY) + 1) * GRANULARITY  # and the words that torch adds
    if environ.get("NVSHMEM_DISABLE_NVLS") != "1":
        found.append(
            "NVSHMEM_DISABLE_NVLS: expected NVLink multicast off before ranks share memory, got it on; export "
            "NVSHMEM_DISABLE_NVLS=1 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0"
        )
    wanted = {HEAP: str(needed)}
    if HEAP in environ:
        number = re.fullmatch(rf"(\d+(?:\.\d+)?)([{UNITS}]?)", environ[HEAP].strip().upper())
        given = float(number[1]) * 1024 ** (UNITS.index(number[2]) + 1 if number[2] else 0) if number else 0.0
        if given < needed:
            found.append(
                f"{HEAP}: expected at least {needed} bytes, the arena of this config, got {environ[HEAP]!r}; unset it, "
                "or lower parallel.capacity or train.microbatch_size"
            )
        wanted = {}
    if len(set(hosts)) == 1 and "NVSHMEM_REMOTE_TRANSPORT" not in environ:
        wanted["NVSHMEM_REMOTE_TRANSPORT"] = "none"  # no network is looked for
    if found:
        raise InputError(*found)
    return wanted


def opened(size: int, sizes: Sizes, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, list[int], Links]:
    """Open NVSHMEM and allocate this rank's arena: it, where stores reach each rank's of this host (0: not), the links.

    Collective over all ranks of the run, not of the group alone.

    size     bytes
    Writes:  what NVSHMEM reads of the environment, torch's back end of symmetric memory and Triton's hook behind a
             compilation, all of which stay.
    Raises:  InputError for a heap that is too small or cannot be had.
    """
    # only here: a CPU needs none of it
    import torch.distributed._symmetric_memory as memory
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed._symmetric_memory._nvshmem_triton import NvshmemLibFinder, requires_nvshmem

    from nmoe.effects.kernels.exchange import nvshmem as kernels

    hosts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, os.uname().nodename)  # also: a rank that is lost shows here, by the group's time-out
    os.environ.update(environment(os.environ, size, [str(host) for host in hosts]))
    memory.set_backend("NVSHMEM")
    # torch's hook gives a kernel of one of these names NVSHMEM's state when it is first launched
    for kernel in (kernels.nvshmem_put_kernel, kernels.nvshmem_barrier_kernel):
        requires_nvshmem(kernel)
    # Under a name, here its size, torch never frees it.
    raw = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device, alloc_id=size)
    if not raw.data_ptr():
        raise InputError(
            f"parallel.transport: expected {size} bytes of NVSHMEM's memory on {device}, got none; lower "
            "parallel.capacity or train.microbatch_size"
        )
    handle = memory.rendezvous(raw, group)
    before = raw.data_ptr() - handle.buffer_ptrs[handle.rank]
    raw.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group=group)
    pes = [dist.get_global_rank(group, rank) for rank in range(sizes.ranks)]
    found = links(sizes, pes, NvshmemLibFinder.find_device_library(), group, device)
    here = [hosts[pe] == os.uname().nodename for pe in pes]
    # NVSHMEM has 0 for memory that no load or store of this GPU reaches
    addresses = [
        address + before if address and near else 0 for address, near in zip(handle.buffer_ptrs, here, strict=True)
    ]
    return raw, addresses, found


def over(by: Links, peers: Transport, addresses: Sequence[int]) -> Transport:
    """Stores to the ranks that have an address, puts by NVSHMEM to the others.

    Within a host puts had 0.47 and 0.70 of the rate of stores to the same memory (docs/log.md, 2026-11-29).

    peers      writes to ranks with an address, and nowhere for those without
    addresses  of each rank's arena, 0 where stores do not reach it
    """

    def flush(e: Exchange) -> None:
        torch.cuda.synchronize(e.raw.device)
        dist.barrier(group=by.group)  # a rank comes when all signals have reached it

    if all(addresses):
        return attrs.evolve(peers, flush=flush)
    # only here: triton is not everywhere
    from nmoe.effects.kernels.exchange import nvshmem as kernels

    def leave_(e: Exchange, stage: Tensor, put: Put, programs: int) -> None:
        item = by.order if put.item is None else put.item
        target = e.raw.data_ptr() + put.field.offset
        valid = by.every if put.valid is None else put.valid
        kernels.put_(
            stage, target, item, put.to, put.at, e.addresses, valid, by.pes, by.library, programs, back=put.back
        )

    def put_rows_(e: Exchange, put: Put) -> None:
        stage = view(e.raw, e.fields.sent_back if put.back else e.fields.sent)
        most, width = len(stage), put.values.shape[1]  # in fp8 a row is narrower
        stage = stage.flatten().view(put.values.dtype)[: most * width].view(most, width)
        item = by.order if put.item is None else put.item
        valid = by.every if put.valid is None else put.valid
        kernels.stage_(stage, put.values, item, put.to, e.addresses, valid, put.programs, back=put.back)
        leave_(e, stage, put, put.programs)
        peers.put_rows_(e, put)  # while what was put is under way

    def put_words_(e: Exchange, put: Put) -> None:
        words = put.values.flatten().view(torch.int32)
        stage = view(e.raw, e.fields.sent_words_back if put.back else e.fields.sent_words)[: len(words)]
        if put.item is None:
            stage.copy_(words)
        else:
            torch.index_select(words, 0, put.item, out=stage)
        leave_(e, stage, put, e.programs)
        peers.put_words_(e, put)

    def put_counts_(e: Exchange, count: Tensor, tokens: Tensor | None) -> None:
        stage = view(e.raw, e.fields.sent_counts)
        stage[:, : len(count)] = count
        stage[:, len(count) :] = 0 if tokens is None else tokens[: len(stage)]
        put = Put(field=e.fields.counts, values=stage, to=by.ranks, at=torch.full_like(by.ranks, e.rank))
        leave_(e, stage, put, e.programs)
        peers.put_counts_(e, count, tokens)

    def barrier_(e: Exchange, *, signal: bool, wait: bool) -> None:
        limit = int(e.timeout_s * 1e9) if e.raw.is_cuda else 0
        at, flags = e.fields.arrived.offset, view(e.raw, e.fields.arrived)
        kernels.barrier_(
            e.epoch, e.addresses, flags, e.missing, by.pes, at, e.rank, by.library, signal=signal, wait=wait,
            limit_ns=limit,
        )  # fmt: skip

    return Transport(
        put_rows_=put_rows_, put_words_=put_words_, put_counts_=put_counts_, barrier_=barrier_, flush=flush
    )
