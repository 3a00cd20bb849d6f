"""One rank of an exchange in its own process:

    python -m tests.effects.parallel.exchange_rank WHAT DEVICE RANK RANKS STORE [JOINED [RENDEZVOUS]]

DEVICE is "cpu", "cuda" (a GPU a rank) or "cuda:0" (one GPU for all).
JOINED is "nvshmem" within one host, "nvshmem:1" where ranks lie on hosts of so many, or a number alone: so too, and the
proxy joins them; with RENDEZVOUS they are hosts already. What a rank found is one line of JSON on standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.pure.core.key import Key
from nmoe.pure.model import experts, route
from nmoe.pure.model.low_precision import RECIPES, experts_low
from nmoe.pure.model.route import Routing

TOKENS, EXPERTS, TOP_K = 12, 8, 3
MANY = 5000
KERNELS = ("kernels", "fp8")
"""What runs in kernels on a CPU too."""

TIMEOUT_S = 2.0  # for a peer that is gone; all others are waited for, however loaded the machine is

GONE: Mapping[str, Callable[[], None]] = MappingProxyType(
    {"dead": lambda: os.kill(os.getpid(), signal.SIGKILL), "asleep": lambda: time.sleep(4 * TIMEOUT_S)}
)
"""How the last rank leaves after a pass: killed, or its threads alone go on."""

Mixture = Callable[..., tuple[Tensor, Tensor]]


def main(
    what: str, device: str, rank: int, ranks: int, store: str, joined: str = "", rendezvous: str = "127.0.0.1"
) -> None:
    """Open an exchange and do what is asked."""
    torch.set_num_threads(1)
    if what in KERNELS and device == "cpu":
        from tests.kernels import interpreter

        interpreter.turn_on()
    from nmoe.effects.parallel import exchange

    where = torch.device(device if device != "cuda" else f"cuda:{rank}")
    if where.type == "cuda":
        torch.cuda.set_device(where)
        # what is allocated from here on is NaN until it is written
        torch.full((2**31,), 255, dtype=torch.uint8, device=where)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    transport, per_host = joining(joined)
    small = where.type == "cpu"
    # on a GPU sizes whose activation's gradient has a kernel of Hopper's, and sizes that have none
    large = (2048, 1024 if what == "plain" else 2048, 512)
    tokens, hidden, width = large if not small else (TOKENS, *((128, 128) if "fp8" in what else (16, 16)))
    sizes = exchange.Sizes(
        ranks=ranks,
        experts=EXPERTS + (rank if what == "disagree" else 0),
        top_k=TOP_K,
        hidden_size=hidden,
        tokens=tokens,
        capacity=tokens if what == "overflow" else ranks * tokens * TOP_K,
        dedup=what != "plain",
        dtype=torch.float32 if small else torch.bfloat16,
        staged=transport == "nvshmem",
        fp8=what == "fp8",
    )
    open_here = partial(
        exchange.open_exchange,
        device=where,
        sizes=sizes,
        timeout_s=20.0 if not small else TIMEOUT_S if what in ("hung", *GONE) else 60.0,
        transport=transport,
        rendezvous=rendezvous,
        peers=kernels_of_a_cpu() if what in KERNELS and small else None,
    )
    if per_host and rendezvous == "127.0.0.1":
        be_on_host(rank // per_host)
    found: dict[str, Any] = {}
    everybody: Any = dist.group.WORLD
    if what == "astray":
        lead_astray(rank)
    if what == "hosts":
        be_on_host(rank)
    try:
        with open_here(group=everybody) as e:
            take, whole = mixtures(what, e, where)
            if what == "many":
                many(take, whole, sizes, rank, where, (tokens, hidden, width), found)
            for seed in range({"kernels": 1, "many": 0, "fp8": 1 if small else 5}.get(what, 5)):
                if what == "hung" and rank == ranks - 1 and seed == 1:
                    print("hung", flush=True)
                    time.sleep(60)
                if what in GONE and rank == ranks - 1 and seed == 1:
                    GONE[what]()
                if what == "slow":
                    time.sleep(0.2 * ((rank + seed) % 2))
                compare(take, whole, sizes, rank, where, (tokens, hidden, width), seed, found)
                exchange.check(e)
            found["sent"] = int(e.sent)
    except (RuntimeError, ValueError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
        found["seconds"] = time.monotonic() - found.pop("since", time.monotonic())
    print(json.dumps(found), flush=True)
    if "error" not in found:
        dist.destroy_process_group()


def joining(joined: str) -> tuple[str, int]:
    """Transport and ranks of a host, 0 for all, of what joins ranks."""
    if joined.isdecimal():
        return "proxy", int(joined)
    transport, _, per_host = joined.partition(":")
    return transport or "peer", int(per_host or 0)


def kernels_of_a_cpu() -> Any:
    """How interpreted kernels reach the memory of other processes."""
    from nmoe.effects.parallel.exchange import device

    return device.PEER


def be_on_host(number: int) -> None:
    """A host of its own."""
    name = os.uname
    os.uname = lambda: os.uname_result((*name()[:1], f"host{number}", *name()[2:]))  # pyright: ignore


def lead_astray(rank: int) -> None:
    """Arenas of others in the wrong order."""
    from nmoe.effects.parallel.exchange import opening

    shared = opening._shared

    @contextmanager
    def turned(*arguments: Any) -> Iterator[tuple[Tensor, ...]]:
        with shared(*arguments) as peers:
            yield peers[::-1] if rank == 0 else peers

    opening._shared = turned


def mixtures(what: str, e: Any, where: torch.device) -> tuple[Mixture, Mixture]:
    """The mixture over ranks, and the one of a single rank."""
    if where.type == "cpu" and what not in KERNELS:
        from nmoe.effects.device.cpu import experts_grouped
        from nmoe.effects.parallel.exchange import host

        low = partial(experts_low, recipe=RECIPES["fp8"], key=Key(0))
        run = low if what == "emulated fp8" else experts_grouped
        return partial(host.mixture, exchange=e, experts=run), partial(experts.moe_experts, experts=run)
    from nmoe.effects.kernels.moe.moe import Tiles, moe_experts
    from nmoe.effects.kernels.moe.moe_fp8 import moe_experts_fp8
    from nmoe.effects.kernels.tables import GemmTile
    from nmoe.effects.parallel.exchange import device

    size = 64 if where.type == "cuda" or what == "fp8" else 16
    tile = GemmTile(block_m=size, block_n=size, block_k=size, num_warps=4, num_stages=2)
    tiles = Tiles(
        up=tile, down=tile, activation=tile, down_gradient=tile, input=tile, up_gradient=tile, group=8, programs=16
    )
    whole = moe_experts_fp8 if what == "fp8" else moe_experts
    return partial(device.mixture, exchange=e, tiles=tiles), partial(whole, tiles=tiles)


def compare(
    take: Mixture,
    whole: Mixture,
    sizes: Any,
    rank: int,
    where: torch.device,
    shape: tuple[int, int, int],
    seed: int,
    found: dict[str, Any],
) -> None:
    """Both mixtures on one global batch; the largest difference of each result, relative to its largest entry."""
    tokens, hidden, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(where, dtype)

    count = tokens * sizes.ranks
    x, grad_output, weight = draw(count, hidden), draw(count, hidden), draw(count, TOP_K, dtype=torch.float32).abs()
    up, down = draw(EXPERTS, hidden, 2, width) / hidden**0.5, draw(EXPERTS, width, hidden) / width**0.5
    score = torch.rand(count, EXPERTS, generator=generator)
    score[:, seed % EXPERTS] += seed % 2
    expert = route.top_k(score, TOP_K).to(where).contiguous()

    def graded(apply: Mixture, mine: slice, held: slice) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in (x[mine], weight[mine], up[held], down[held])]
        y, chosen = apply(leaves[0], Routing(expert[mine], leaves[1]), leaves[2], leaves[3])
        return [y.detach(), chosen, *torch.autograd.grad(y, leaves, grad_output[mine])]

    mine = slice(rank * tokens, (rank + 1) * tokens)
    held = slice(rank * sizes.local(), (rank + 1) * sizes.local())
    found["since"] = time.monotonic()
    ours = graded(take, mine, held)
    plain = graded(whole, slice(None), slice(None))
    wanted = [plain[0][mine], route.load(expert[mine], EXPERTS), plain[2][mine], plain[3][mine]]
    wanted += [plain[4][held], plain[5][held]]
    found["bits"] = digest(found.get("bits", ""), ours)
    for name, a, b in zip(("y", "count", "dx", "d_weight", "d_up", "d_down"), ours, wanted, strict=True):
        gap = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        found[name] = max(gap, found.get(name, 0.0))


def many(
    take: Mixture,
    whole: Mixture,
    sizes: Any,
    rank: int,
    where: torch.device,
    shape: tuple[int, int, int],
    found: dict[str, Any],
) -> None:
    """Thousands of passes on routing of their own, of which half are replayed from one graph, with random delays of the
    host and of the device: how many results have a bit that one GPU's do not have. Nothing waits for the device."""
    tokens, hidden, width = shape
    count, local = tokens * sizes.ranks, sizes.local()
    mine, held = slice(rank * tokens, (rank + 1) * tokens), slice(rank * local, (rank + 1) * local)
    draw, late = torch.Generator(where).manual_seed(1), random.Random(rank)
    x, grad_output = (torch.randn(count, hidden, generator=draw, device=where).to(sizes.dtype) for _ in range(2))
    up = (torch.randn(EXPERTS, hidden, 2, width, generator=draw, device=where) / hidden**0.5).to(sizes.dtype)
    down = (torch.randn(EXPERTS, width, hidden, generator=draw, device=where) / width**0.5).to(sizes.dtype)
    expert = torch.zeros(count, TOP_K, dtype=torch.int64, device=where)
    weight = torch.zeros(count, TOP_K, device=where)
    wrong = torch.zeros(6, dtype=torch.int64, device=where)

    def graded(apply: Mixture, mine: slice, held: slice) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in (x[mine], weight[mine], up[held], down[held])]
        y, chosen = apply(leaves[0], Routing(expert[mine], leaves[1]), leaves[2], leaves[3])
        return [y.detach(), chosen, *torch.autograd.grad(y, leaves, grad_output[mine])]

    graph, ours = torch.cuda.CUDAGraph(), []
    for number in range(MANY):
        x.copy_(x.roll(1, 0))
        score = torch.rand(count, EXPERTS, generator=draw, device=where)
        if number % 3 == 0:
            score[:, number % EXPERTS] += 1  # every token there
        if number % 3 == 1:
            score[:, : EXPERTS // 2] -= 1  # nearly none there
        weight.copy_(score.topk(TOP_K).values.abs())
        expert.copy_(score.topk(TOP_K).indices)
        if late.random() < 0.02:
            time.sleep(0.01 * late.random())
        if late.random() < 0.1:
            torch.cuda._sleep(late.randrange(1_000_000))  # cycles
        if number == MANY // 2:
            torch.cuda.synchronize()
            dist.barrier()
            with torch.cuda.graph(graph):
                ours = graded(take, mine, held)
        if number < MANY // 2:
            ours = graded(take, mine, held)
        else:
            graph.replay()
        plain = graded(whole, slice(None), slice(None))
        wanted = [plain[0][mine], route.load(expert[mine], EXPERTS), plain[2][mine], plain[3][mine]]
        wanted += [plain[4][held], plain[5][held]]
        wrong += torch.stack([(a != b).any() for a, b in zip(ours, wanted, strict=True)])
    found["wrong"], found["passes"] = wrong.tolist(), 2 * MANY


def digest(before: str, tensors: list[Tensor]) -> str:
    """Of all bits of tensors, and what came before."""
    hashed = hashlib.sha256(before.encode())
    for tensor in tensors:
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return hashed.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
