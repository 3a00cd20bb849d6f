"""One rank of two or more that put rows into each other's memory by NVSHMEM, each a GPU of one host:

    python -m tests.gpu.nvshmem_rank RANK RANKS STORE

How fast that is, beside plain stores to the addresses that NVSHMEM hands out, is one line of JSON on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from nmoe.effects.parallel.exchange import Sizes, open_exchange
from nmoe.effects.parallel.exchange.arena import Put, Transport
from nmoe.effects.parallel.exchange.device import PEER

TIMED = 20
COUNTS, WIDTH = (4096, 16384), 2048
"""Rows for each rank, and how wide they are."""


def main(rank: int, ranks: int, store: str) -> None:
    """Put rows to all ranks, every one to the next, and wait; then the same by stores."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    shared = dist.FileStore(store, ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    everybody: Any = dist.group.WORLD
    most = ranks * max(COUNTS)
    sizes = Sizes(
        ranks=ranks,
        experts=ranks,
        top_k=1,
        hidden_size=WIDTH,
        tokens=most,
        capacity=most,
        dedup=False,
        dtype=torch.bfloat16,
        staged=True,
    )
    rates: dict[str, list[float]] = {"nvshmem": [], "stores": []}
    with open_exchange(device=device, group=everybody, sizes=sizes, timeout_s=60.0, transport="nvshmem") as e:
        for count in COUNTS:
            number = torch.arange(ranks * count, dtype=torch.int32, device=device)
            to = number % ranks
            rows = Put(
                field=e.fields.land,
                values=torch.randn(len(number), WIDTH, device=device).bfloat16(),
                to=to[:, None],
                at=(rank * count + number // ranks)[:, None],
                valid=torch.full((3,), len(number), dtype=torch.int32, device=device),
                item=to.argsort(stable=True).int(),
                programs=e.programs,
            )

            def moved(by: Transport, rows: Put = rows) -> None:
                by.put_rows_(e, rows)
                e.transport.barrier_(e, signal=True, wait=True)

            for name, by in (("nvshmem", e.transport), ("stores", PEER)):
                away = rows.values.nbytes * (ranks - 1) // ranks
                rates[name].append(round(away / timed(partial(moved, by)) / 1e9, 1))
    print(json.dumps({"GB/s": rates, "rows": COUNTS}), flush=True)


def timed(act: Callable[[], None]) -> float:
    """Seconds of one call, barrier included."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for count in (2, TIMED):
        events[0].record()
        for _ in range(count):
            act()
        events[1].record()
        torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / TIMED


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
