"""`nmoe bench exchange`: how fast rows reach other ranks, and what a mixture over ranks costs beside one GPU's.

Started once it has all ranks in one process on one GPU, where rows cross no link; a launcher starts one a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.bench.kernels import meter
from nmoe.effects.device import gpu, ops
from nmoe.effects.kernels.exchange import push as moves
from nmoe.effects.kernels.moe import moe as mixtures
from nmoe.effects.parallel import exchange
from nmoe.effects.parallel.exchange import Exchange, Sizes, device
from nmoe.effects.parallel.exchange.opening import virtual
from nmoe.effects.parallel.exchange.products import Stored
from nmoe.effects.parallel.launch import Launch
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.model.route import Routing
from nmoe.pure.parallel import exchange_arena

PROGRAMS = (8, 16, 32, 64, 132, 264)
"""How many programs push, beside the number that an exchange takes."""

TIMEOUT_S = 120.0
"""Time a rank is waited for; the first call compiles."""


@attrs.frozen(kw_only=True)
class Shape:
    """A mixture's sizes."""

    tokens: int  # of a rank
    hidden: int
    width: int
    experts: int
    top_k: int


@attrs.frozen(kw_only=True)
class Cases:
    """What is measured."""

    pushes: tuple[tuple[int, int], ...]  # rows and hidden size
    programs: tuple[int, ...]
    round_trip: Shape  # dispatch and combine, no experts
    layer: Shape


FULL = Cases(
    pushes=((4096, 2048), (16384, 2048), (8192, 7168)),
    programs=PROGRAMS,
    round_trip=Shape(tokens=4096, hidden=4096, width=8, experts=32, top_k=1),
    layer=Shape(tokens=32768, hidden=2048, width=1408, experts=64, top_k=6),
)


@attrs.frozen(kw_only=True)
class Bench:
    """Where it is measured."""

    device: torch.device
    dtype: torch.dtype
    ranks: int
    here: tuple[int, ...]  # ranks in this process
    open: Callable[[Sizes], Sequence[Exchange]]
    seconds: Callable[[Callable[[], object]], float]
    tiles: mixtures.Tiles


def main(launch: Launch, ranks: int) -> int:
    """Measure and print, on virtual ranks or as one of several processes.

    ranks    virtual ranks, when there is one process
    returns  exit code 0
    Raises:  InputError when there is no supported GPU, or a size does not divide.
    """
    gpu.to_measure("bench exchange")
    where = torch.device("cuda", launch.rank % torch.cuda.device_count())
    torch.cuda.set_device(where)
    several = launch.world > 1
    ranks = launch.world if several else ranks
    if FULL.layer.experts % ranks or ranks < 1:
        raise InputError(
            f"--ranks: expected a divisor of {FULL.layer.experts} experts, got {ranks}; take a power of two up to 64"
        )
    with ExitStack() as scope:
        if several:
            enough = torch.cuda.device_count() >= launch.world
            dist.init_process_group("nccl" if enough else "gloo", device_id=where if enough else None)
            scope.callback(dist.destroy_process_group)

        def open_ranks(sizes: Sizes) -> Sequence[Exchange]:
            if not several:
                return virtual(sizes, where)
            group: Any = dist.group.WORLD
            opened = exchange.open_exchange(device=where, group=group, sizes=sizes, timeout_s=TIMEOUT_S)
            return [scope.enter_context(opened)]

        bench = Bench(
            device=where,
            dtype=torch.bfloat16,
            ranks=ranks,
            here=(launch.rank,) if several else tuple(range(ranks)),
            open=open_ranks,
            seconds=meter.seconds,
            tiles=ops.mixture_tiles(where, FULL.layer.hidden, FULL.layer.width),
        )
        if launch.rank == 0:
            how = "one rank a process" if several else "all ranks on this GPU: rows cross no link"
            say(f"{torch.cuda.get_device_name(where)}  torch {torch.__version__}  {ranks} ranks, {how}")
        for row in rows(bench, FULL):
            if launch.rank == 0:
                say(row)
    return 0


def rows(bench: Bench, cases: Cases) -> Iterator[str]:
    """Every line, as it is measured."""
    for count, hidden in cases.pushes:
        yield from push_rows(bench, count, hidden, cases.programs)
    for dedup in (False, True):
        yield round_trip_row(bench, cases.round_trip, dedup=dedup)
    yield from layer_rows(bench, cases.layer)


def sizes(bench: Bench, shape: Shape, *, dedup: bool, capacity: float) -> Sizes:
    """An arena's for a mixture. capacity: room for rows, over the mean."""
    return exchange_arena.sizes(
        ranks=bench.ranks,
        experts=shape.experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        tokens=shape.tokens,
        capacity=capacity,
        dedup=dedup,
        dtype=bench.dtype,
    )


def push_rows(bench: Bench, count: int, hidden: int, programs: Sequence[int]) -> Iterator[str]:
    """All rows of each rank to the next one, to shuffled places, and one exchange with its barrier."""
    shape = Shape(tokens=count, hidden=hidden, width=8, experts=bench.ranks, top_k=1)
    exchanges = bench.open(sizes(bench, shape, dedup=False, capacity=math.inf))
    generator = torch.Generator().manual_seed(0)
    destinations: list[tuple[Tensor, Tensor]] = []
    for rank in bench.here:
        at = torch.randperm(count, generator=generator).to(bench.device, torch.int32)[:, None]
        destinations.append((torch.full_like(at, (rank + 1) % bench.ranks), at))
    x = torch.randn(count, hidden, device=bench.device).to(bench.dtype)
    valid = torch.full((3,), count, dtype=torch.int32, device=bench.device)
    num_bytes = x.nbytes * len(bench.here)

    def pushed(number: int) -> None:
        for e, destination in zip(exchanges, destinations, strict=True):
            moves.push_(x, *destination, e.addresses, e.fields.land.offset, valid, number, back=False)

    def exchanged() -> Generator[None, None, None]:
        yield

    chosen = device.programs(exchanges[0], x)
    for number in dict.fromkeys((*programs, chosen)):
        seconds = bench.seconds(lambda number=number: pushed(number))
        yield line(f"push {count} rows x {hidden}, {number} programs", seconds, num_bytes)

    def whole() -> None:
        pushed(chosen)
        device.run_(exchanges, [exchanged() for _ in exchanges])

    yield line(f"push {count} rows x {hidden} and barrier", bench.seconds(whole), num_bytes)
    yield line("barrier", bench.seconds(lambda: device.run_(exchanges, [exchanged() for _ in exchanges])), 0)


def inputs(bench: Bench, shape: Shape, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's tokens, chosen experts and weights."""
    generator = torch.Generator(bench.device).manual_seed(rank)
    x = torch.randn(shape.tokens, shape.hidden, generator=generator, device=bench.device).to(bench.dtype)
    score = torch.rand(shape.tokens, shape.experts, generator=generator, device=bench.device)
    weight, expert = score.topk(shape.top_k)
    return x, expert.contiguous(), torch.softmax(weight, -1).contiguous()


def round_trip_row(bench: Bench, shape: Shape, *, dedup: bool) -> str:
    """Counts, plan, rows out, rows back and their sum; what was received stands for what experts make of it."""
    exchanges = bench.open(sizes(bench, shape, dedup=dedup, capacity=1.5))
    given = [inputs(bench, shape, rank) for rank in bench.here]

    def trip(e: Exchange, x: Tensor, expert: Tensor, weight: Tensor) -> Generator[None, None, Tensor]:
        kept, _ = yield from device.begin_(e, expert)
        kept = yield from device.dispatch_(e, x, kept, e.fields.land)
        y = device.received(e, e.fields.land, kept)
        device.send_back_(e, y, kept)
        return (yield from device.combine_(e, weight, kept))

    seconds = bench.seconds(
        lambda: device.run_(exchanges, [trip(e, *arguments) for e, arguments in zip(exchanges, given, strict=True)])
    )
    how = "dedup" if dedup else "plain"
    return line(f"dispatch and combine {shape.tokens} x {shape.hidden}, top {shape.top_k}, {how}", seconds, 0)


def layer_rows(bench: Bench, shape: Shape) -> Iterator[str]:
    """A mixture forward and backward, of one GPU with all experts, and over ranks; bytes on the wire of a rank."""
    weights = {rank: inputs(bench, shape, rank) for rank in bench.here}
    up = torch.randn(shape.experts, shape.hidden, 2, shape.width, device=bench.device).to(bench.dtype) * 0.02
    down = torch.randn(shape.experts, shape.width, shape.hidden, device=bench.device).to(bench.dtype) * 0.03
    x, expert, weight = weights[bench.here[0]]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, up, down)]

    def single_rank() -> object:
        y, _ = mixtures.moe_experts(leaves[0], Routing(expert, leaves[1]), leaves[2], leaves[3], tiles=bench.tiles)
        return torch.autograd.grad(y, leaves, x)

    plain = bench.seconds(single_rank)
    yield line(f"mixture of one GPU, {shape.tokens} x {shape.hidden}, forward and backward", plain, 0)
    local = shape.experts // bench.ranks
    for dedup in (False, True):
        exchanges = bench.open(sizes(bench, shape, dedup=dedup, capacity=1.25))
        held = {rank: slice(rank * local, (rank + 1) * local) for rank in bench.here}

        def passes(exchanges: Sequence[Exchange] = exchanges, held: dict[int, slice] = held) -> None:
            ranks = list(zip(exchanges, bench.here, strict=True))
            products = Stored(tiles=bench.tiles)
            ahead = [device.forward_(e, *weights[r], up[held[r]], down[held[r]], products) for e, r in ranks]
            out = device.run_(exchanges, ahead)
            back = [
                device.backward_(
                    e,
                    weights[r][0],
                    weights[r][0],
                    weights[r][2],
                    up[held[r]],
                    down[held[r]],
                    *out[number][2:],
                    products,
                )
                for number, (e, r) in enumerate(ranks)
            ]
            device.run_(exchanges, back)

        passes()
        sent = int(exchanges[0].sent)
        seconds = bench.seconds(passes) / len(bench.here)
        how = "dedup" if dedup else "plain"
        yield line(f"mixture over {bench.ranks} ranks, {how}", seconds, sent) + f"  {seconds / plain:.2f} x one GPU's"
        for e in exchanges:
            exchange.check(e)


def line(what: str, seconds: float, num_bytes: int) -> str:
    """One measurement."""
    rate = f"  {num_bytes / seconds / 1e9:7.0f} GB/s  {num_bytes / 1e6:.1f} MB" if num_bytes else ""
    return f"{what:<64} {1e6 * seconds:10.1f} us{rate}"
