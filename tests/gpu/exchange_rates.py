"""One rank of two or more, each a GPU of one host, that measures how fast a transport is:

    python -m tests.gpu.exchange_rates JOINED DEDUP RANK RANKS STORE

JOINED as in `tests.effects.parallel.exchange_rank`; DEDUP is 0 or 1. Rows that are put and waited for, a mixture
forward and backward at several numbers of tokens and the bytes that it sends to other ranks: the last line of JSON on
standard output has all of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nmoe.effects.device import ops
from nmoe.effects.parallel.exchange import Exchange, check, device, open_exchange, proxy
from nmoe.effects.parallel.exchange.arena import Put
from nmoe.pure.model.route import Routing
from nmoe.pure.parallel import exchange_arena
from tests.effects.parallel.exchange_rank import be_on_host, joining

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1408, 64, 6
TOKENS = (1024, 4096, 16384)
ROWS = (4096, 16384)
"""For each rank, of the hidden size."""

OFTEN, SELDOM = 20, 5
"""Repeats. A pass over TCP takes up to a second; the others are replayed from one graph, as a training's steps are:
launched one by one, 4,096 rows took 100 us of the host and 49 of the link (docs/log.md, 2026-11-30)."""


def main(joined: str, dedup: str, rank: int, ranks: int, store: str) -> None:
    """Measure all of it over one exchange."""
    where = torch.device("cuda", rank)
    torch.cuda.set_device(where)
    shared = dist.FileStore(store, ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    everybody: Any = dist.group.WORLD
    transport, per_host = joining(joined)
    if per_host:
        be_on_host(rank // per_host)
    senders: list[proxy.Proxy] = []

    class Kept(proxy.Proxy):
        def start(self) -> None:
            senders.append(self)
            super().start()

    proxy.Proxy = Kept  # pyright: ignore[reportPrivateImportUsage]
    sizes = exchange_arena.sizes(
        ranks=ranks,
        experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        tokens=max(TOKENS),
        capacity=1.25,
        dedup=dedup == "1",
        dtype=torch.bfloat16,
        staged=transport == "nvshmem",
    )
    is_replayed = transport != "proxy"
    found: dict[str, Any] = {"joined": joined, "dedup": sizes.dedup, "rows": {}, "passes": {}}
    with open_exchange(device=where, group=everybody, sizes=sizes, timeout_s=60.0, transport=transport) as e:

        def sent() -> int:
            torch.cuda.synchronize()
            e.transport.flush(e)
            return sum(each.bytes_sent for each in senders)

        # the proxy has room for rows with all their choices alone
        for count in () if transport == "proxy" else ROWS:
            seconds = timed(put_and_waited_for(e, count), is_replayed=is_replayed)
            away = (ranks - 1) * count * HIDDEN * sizes.dtype.itemsize
            found["rows"][count] = {"us": round(1e6 * seconds, 1), "GB/s": round(away / seconds / 1e9, 1)}
        for tokens in TOKENS:
            act = passed(e, tokens)
            act()
            before, over_tcp = int(e.sent), sent()
            act()
            row = {"MB": round((int(e.sent) - before) / 1e6, 2), "MB over TCP": round((sent() - over_tcp) / 1e6, 2)}
            check(e)
            found["passes"][tokens] = {**row, "ms": round(1e3 * timed(act, is_replayed=is_replayed), 3)}
            print(json.dumps(found), flush=True)  # so that what was measured is there when time is cut
    dist.destroy_process_group()


def put_and_waited_for(e: Exchange, count: int) -> Callable[[], None]:
    """Put so many rows to each rank, every one to the next, and wait; this rank's own are among them."""
    ranks, where = e.sizes.ranks, e.raw.device
    number = torch.arange(ranks * count, dtype=torch.int32, device=where)
    to = number % ranks
    rows = Put(
        field=e.fields.land,
        values=torch.randn(len(number), HIDDEN, device=where).to(e.sizes.dtype),
        to=to[:, None],
        at=(e.rank * count + number // ranks)[:, None],
        valid=torch.full((3,), len(number), dtype=torch.int32, device=where),
        item=to.argsort(stable=True).int(),
        programs=e.programs,
    )

    def act() -> None:
        e.transport.put_rows_(e, rows)
        e.transport.barrier_(e, signal=True, wait=True)

    return act


def passed(e: Exchange, tokens: int) -> Callable[[], None]:
    """A mixture of so many tokens of this rank, forward and backward."""
    where, dtype, local = e.raw.device, e.sizes.dtype, e.sizes.local()
    draw = torch.Generator(where).manual_seed(e.rank)
    x = torch.randn(tokens, HIDDEN, generator=draw, device=where).to(dtype)
    weight, expert = torch.rand(tokens, EXPERTS, generator=draw, device=where).topk(TOP_K)
    up = torch.randn(local, HIDDEN, 2, WIDTH, generator=draw, device=where).to(dtype) * 0.02
    down = torch.randn(local, WIDTH, HIDDEN, generator=draw, device=where).to(dtype) * 0.03
    leaves = [each.detach().requires_grad_() for each in (x, torch.softmax(weight, -1).contiguous(), up, down)]
    tiles = ops.mixture_tiles(where, HIDDEN, WIDTH)
    expert = expert.contiguous()

    def act() -> None:
        routing = Routing(expert, leaves[1])
        y, _ = device.mixture(leaves[0], routing, leaves[2], leaves[3], exchange=e, tiles=tiles)
        torch.autograd.grad(y, leaves, x)

    return act


def timed(act: Callable[[], None], *, is_replayed: bool) -> float:
    """Seconds of one call, its waits included."""
    repeats = OFTEN if is_replayed else SELDOM

    def acts() -> None:
        for _ in range(repeats):
            act()

    act()  # compiles
    play = acts
    if is_replayed:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            acts()
        play = graph.replay
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(2):
        torch.cuda.synchronize()
        dist.barrier()
        events[0].record()
        play()
        events[1].record()
        torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / repeats


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
