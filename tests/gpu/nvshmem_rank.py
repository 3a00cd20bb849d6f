"""One rank of several that put runs of rows into each other's memory by NVSHMEM, each a GPU of one host:

    python -m tests.gpu.nvshmem_rank RANK RANKS STORE

What a rank found is one line of JSON on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.effects.kernels.exchange import nvshmem
from nmoe.effects.kernels.exchange import push as moves
from nmoe.effects.parallel.exchange.arena import view
from nmoe.pure.parallel import pushing
from nmoe.pure.parallel.exchange_arena import FLAG_BYTES, Field

EXPERTS, WIDTH, ROUNDS, TIMED = 8, 2048, 3, 20
LIMIT_NS = 60 * 10**9


def counts(ranks: int) -> Tensor:
    """[W E]: rows of each rank for each expert; one run is empty."""
    rows = 2048 + torch.arange(ranks * EXPERTS) * 37 % 512
    rows[1] = 0
    return rows.view(ranks, EXPERTS)


def rows_of(rank: int, seed: int, number: int) -> Tensor:
    """[M D] of a rank."""
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(1000 * seed + rank)).bfloat16()


def main(rank: int, ranks: int, store: str) -> None:
    """Put, signal, wait and compare; then time the puts beside plain stores to the same places."""
    import torch.distributed._symmetric_memory as symmetric
    from torch.distributed._symmetric_memory._nvshmem_triton import NvshmemLibFinder, requires_nvshmem

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    shared = dist.FileStore(store, ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    # by the names of these kernels torch's hook gives their modules NVSHMEM's state when they are first launched
    for kernel in (nvshmem.put_runs_kernel, nvshmem.signal_kernel):
        requires_nvshmem(kernel)
    library = NvshmemLibFinder.find_device_library()
    symmetric.set_backend("NVSHMEM")

    of, local = counts(ranks), EXPERTS // ranks
    most = int(of.sum())
    arrived = Field(offset=0, shape=(ranks, FLAG_BYTES // 8), dtype=torch.int64)
    source = Field(offset=arrived.size(), shape=(most, WIDTH), dtype=torch.bfloat16)
    target = Field(offset=source.offset + source.size(), shape=(most, WIDTH), dtype=torch.bfloat16)
    raw = symmetric.empty(target.offset + target.size(), dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(raw, dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    before = raw.data_ptr() - handle.buffer_ptrs[handle.rank]
    addresses = torch.tensor([each + before for each in handle.buffer_ptrs], device=device)
    raw.zero_()
    torch.cuda.synchronize()
    dist.barrier()

    mine = of[rank]
    end, begin = mine.cumsum(0), mine.cumsum(0) - mine
    held = of.view(ranks, ranks, local)  # source, holder, expert there
    first = held.sum(0).cumsum(1) - held.sum(0)  # [holder, expert there]: rows of its earlier experts
    place = (first + held[:rank].sum(0)).flatten()
    shift = (place - begin).int().to(device)
    ends = end.int().to(device)
    epoch, missing = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32).pin_memory()
    base = raw.data_ptr()

    def meet() -> None:
        nvshmem.signal_(epoch, base + arrived.offset + rank * FLAG_BYTES, ranks, library)
        moves.barrier_(
            epoch, view(raw, arrived), missing, addresses, arrived.offset, rank,
            signal=False, wait=True, limit_ns=LIMIT_NS,
        )  # fmt: skip

    def put() -> None:
        nvshmem.put_runs_(
            base + source.offset, base + target.offset, ends, shift, 2 * WIDTH, ranks, library, back=False
        )

    number = int(mine.sum())
    to = (torch.arange(EXPERTS) // local).repeat_interleave(mine).int()[:, None].to(device)
    at = (torch.arange(number) + (place - begin).repeat_interleave(mine)).int()[:, None].to(device)
    valid = torch.full((3,), number, dtype=torch.int32, device=device)

    def store_rows() -> None:
        rows = view(raw, source)[:number]
        rows_at_once, bytes_at_once = moves.at_once(rows)
        programs = pushing.programs(rows=number, rows_at_once=rows_at_once, bytes_at_once=bytes_at_once, most=264)
        moves.push_(rows, to, at, addresses, target.offset, valid, programs, back=False)

    wrong: list[dict[str, tuple[int, int]]] = []
    for act in [put] * ROUNDS + [store_rows]:
        seed = len(wrong)
        view(raw, source)[:number] = rows_of(rank, seed, number).to(device)
        view(raw, target).fill_(float("nan"))
        meet()
        act()
        meet()
        parts = [rows_of(other, seed, int(of[other].sum())).split(of[other].tolist()) for other in range(ranks)]
        runs = [(expert, other) for expert in range(rank * local, (rank + 1) * local) for other in range(ranks)]
        wanted = [parts[other][expert] for expert, other in runs]
        found = view(raw, target)[: sum(map(len, wanted))].cpu().split([*map(len, wanted)])
        wrong.append({f"expert {e} of rank {r}": of_run for (e, r), a, b in zip(runs, found, wanted, strict=True)
                      if (of_run := differing(a, b)) != (0, 0)})  # fmt: skip
    away = 2 * WIDTH * int(mine.sum() - mine[rank * local : (rank + 1) * local].sum())
    found_rates = {name: away / timed(act, meet) / 1e9 for name, act in (("nvshmem", put), ("stores", store_rows))}
    print(json.dumps({"wrong": wrong, "GB/s": found_rates, "rows": number}), flush=True)
    torch.cuda.synchronize()
    dist.barrier()


def differing(found: Tensor, wanted: Tensor) -> tuple[int, int]:
    """Rows that are not those wanted, and those among them that nobody has written."""
    rows = (found != wanted).any(1)
    return int(rows.sum()), int((rows & found.isnan().all(1)).sum())


def timed(act: Callable[[], None], meet: Callable[[], None]) -> float:
    """Seconds of one call, barrier included."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for count in (2, TIMED):
        events[0].record()
        for _ in range(count):
            act()
            meet()
        events[1].record()
        torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / TIMED


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
