"""`nmoe bench kernels`: how long each kernel takes beside what it has to beat, and the fastest tiles."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.effects import ops, runtime, tuning
from nmoe.effects.kernels.tile import Tile
from nmoe.effects.log import say
from nmoe.pure.experts import mixture
from nmoe.pure.key import Key
from nmoe.pure.route import Routing

__all__ = ["kernels", "tune"]

WARMUP, REPEATS = 3, 15

MIXTURES = (
    (32768, 2048, 1408, 64, 6, 0.0),
    (4096, 2048, 1408, 64, 6, 0.0),
    (32768, 2048, 768, 128, 8, 0.0),
    (32768, 2048, 1408, 64, 6, 0.25),
)
"""Tokens, hidden size, expert size, experts, chosen ones, share of the rows that one expert takes (0: as it comes)."""

LOSS = (32768, 2048, 201088, 2048)
"""Tokens, hidden size, vocabulary, chunk."""

ATTENTION = (8, 4096, 16, 128, 64, 128)
"""Sequences, length, heads, channels without position, with position, of a value."""

ARENA = 1 << 27


@attrs.frozen(kw_only=True)
class Row:
    """One line of the table."""

    what: str
    seconds: float
    work: float  # FLOPs, or bytes moved
    unit: str  # of work
    against: float | None = None  # seconds of what it has to beat


def kernels() -> int:
    """Time every kernel on random data, each beside its peer, and print a table.

    Raises:  InputError when there is no supported GPU.
    """
    device = runtime.device("cuda")
    say(f"{torch.cuda.get_device_name(device)}  torch {torch.__version__}  medians of {REPEATS}")
    for row in rows(device):
        rate = row.work / row.seconds / 1e12
        told = f"{rate:7.1f} TFLOP/s" if row.unit == "FLOP" else f"{1000 * rate:7.0f} GB/s  "
        beside = "" if row.against is None else f"  {row.against / row.seconds:.2f} x as fast"
        say(f"{row.what:<64} {1000 * row.seconds:9.3f} ms  {told}{beside}")
    return 0


def rows(device: torch.device) -> Iterator[Row]:
    """Every line, as it is measured."""
    for case in MIXTURES:
        yield from mixture_rows(device, *case)
    yield from loss_rows(device, *LOSS)
    yield from attention_rows(device, *ATTENTION)
    yield from arena_rows(device, ARENA)


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device, replayed from a CUDA graph: how long the host takes does not count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    taken: list[float] = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken)


def draw(device: torch.device, *shape: int, name: str, scale: float = 1.0) -> Tensor:
    """Random bf16 values; zeros would be multiplied faster."""
    generator = torch.Generator(device).manual_seed(Key(0).fold("bench", name).seed() % (1 << 62))
    return (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * scale).requires_grad_()


def routing(device: torch.device, tokens: int, experts: int, top_k: int, share: float) -> Routing:
    """Chosen experts and weights; expert 0 takes `share` of all rows, if that is more than none."""
    generator = torch.Generator(device).manual_seed(1)
    score = torch.rand(tokens, experts, generator=generator, device=device)
    if share:
        # all tokens together choose one expert of `top_k` for this part of them
        wants = torch.rand(tokens, generator=generator, device=device) < share * top_k
        score[:, 0] = torch.where(wants, 2.0, -1.0)
    weight, chosen = score.topk(top_k)
    return Routing(chosen, torch.softmax(weight, -1).requires_grad_())


def both_ways(
    apply: Callable[..., Tensor], leaves: tuple[Tensor, ...], pull: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls that run forward, and forward and backward."""

    def forward() -> object:
        with torch.no_grad():
            return apply(*leaves)

    return forward, lambda: torch.autograd.grad(apply(*leaves), leaves, pull)


def mixture_rows(
    device: torch.device, tokens: int, hidden: int, width: int, experts: int, top_k: int, share: float
) -> Iterator[Row]:
    """Our mixture and torch's grouped products, compiled and not."""
    x = draw(device, tokens, hidden, name="x")
    up = draw(device, experts, hidden, 2, width, name="up", scale=0.02)
    down = draw(device, experts, width, hidden, name="down", scale=0.03)
    chosen = routing(device, tokens, experts, top_k, share)
    pull = draw(device, tokens, hidden, name="pull").detach()
    plain = partial(mixture, experts=ops.experts_grouped)
    # a graph that compiles anew for every number of rows would measure the compiler
    compiled = torch.compile(plain, dynamic=False)
    ours = partial(our_mixture, device, tuning.find(table(device), "mixture", hidden, width))
    work = 6 * tokens * top_k * hidden * width
    where = f"T {tokens} D {hidden} F {width} E {experts} K {top_k}" + (f" skew {share:.2f}" if share else "")
    leaves = (x, chosen.weight, up, down)
    found: dict[str, tuple[float, float]] = {}
    for name, which in (("ours", ours), ("grouped_mm", plain), ("grouped_mm compiled", compiled)):

        def apply(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, which: Any = which) -> Tensor:
            return which(x, Routing(chosen.expert, weight), up, down)[0]

        forward, both = both_ways(apply, leaves, pull)
        found[name] = seconds(forward), seconds(both)
    peer = found["grouped_mm compiled"]
    yield Row(what=f"mixture forward  {where}", seconds=found["ours"][0], work=work, unit="FLOP", against=peer[0])
    for name, (_, both_s) in found.items():
        against = peer[1] if name == "ours" else None
        yield Row(what=f"mixture {name}  {where}", seconds=both_s, work=3 * work, unit="FLOP", against=against)


def our_mixture(
    device: torch.device, entry: tuning.Entry, x: Tensor, routing: Routing, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Our mixture with an entry's tiles."""
    from nmoe.effects.kernels import mixture as mixtures

    programs = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = mixtures.Tiles(**entry.tiles, group=entry.group, programs=programs)
    return mixtures.mixture(x, routing, up, down, tiles=tiles)


def table(device: torch.device) -> tuning.Table:
    """The table that ships for this GPU."""
    return tuning.load(torch.cuda.get_device_capability(device))


def loss_rows(device: torch.device, tokens: int, hidden: int, vocabulary: int, chunk: int) -> Iterator[Row]:
    """The loss with both gradients, beside its three products alone."""
    from nmoe.effects.kernels.cross_entropy import add_product_, linear_cross_entropy

    x = draw(device, tokens, hidden, name="x")
    head = draw(device, hidden, vocabulary, name="head", scale=0.02)
    target = torch.randint(vocabulary, (tokens,), device=device)
    logits = draw(device, chunk, vocabulary, name="logits", scale=1e-5).detach()
    dx, dhead = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)

    def products() -> None:
        with torch.no_grad():
            for rows in x.split(chunk):
                torch.mm(rows, head, out=logits)
                torch.mm(logits, head.T, out=dx[:chunk])
                add_product_(dhead, rows.T, logits, beta=1)

    def ours() -> object:
        return torch.autograd.grad(linear_cross_entropy(x, head, target, chunk=chunk)[0], (x, head))

    floor = seconds(products)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    taken = seconds(ours)
    extra = torch.cuda.max_memory_allocated(device) - held
    work, where = 6 * tokens * hidden * vocabulary, f"T {tokens} D {hidden} V {vocabulary}"
    yield Row(what=f"loss, its three products alone  {where}", seconds=floor, work=work, unit="FLOP")
    what = f"loss  {where}, {extra / 1e9:.2f} GB more"
    yield Row(what=what, seconds=taken, work=work, unit="FLOP", against=floor)


def attention_rows(
    device: torch.device, batch: int, length: int, heads: int, nope: int, rope: int, value: int
) -> Iterator[Row]:
    """Latent attention, deterministic and not, beside cuDNN on keys somebody else assembled."""
    from nmoe.effects.kernels import attend_mla as attention

    scale = (nope + rope) ** -0.5
    q = draw(device, batch, length, heads, nope + rope, name="q")
    kv = draw(device, batch, length, heads, nope + value, name="kv")
    k_rope = draw(device, batch, length, rope, name="k_rope")
    pull = draw(device, batch, length, heads, value, name="pull").detach()
    k = draw(device, batch, length, heads, nope + rope, name="k")
    v = draw(device, batch, length, heads, value, name="v")

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = (each.transpose(1, 2) for each in (q, k, v))
        given = (None, True, 0.0, True, False)
        return torch.ops.aten._scaled_dot_product_cudnn_attention(*operands, *given, scale=scale)[0].transpose(1, 2)

    ways: Mapping[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "bare cuDNN": (bare, (q, k, v)),
        "cuDNN with assembly": (partial(attention.attend_mla_cudnn, scale=scale), (q, kv, k_rope)),
        "deterministic": (partial(attention.attend_mla, scale=scale, forward="cudnn"), (q, kv, k_rope)),
        "deterministic, own forward": (partial(attention.attend_mla, scale=scale, forward="triton"), (q, kv, k_rope)),
    }
    # the five products of a backward pass count, not the seven that two kernels execute
    work = batch * heads * length**2 * (nope + rope + value)
    more = batch * heads * length**2 * (3 * (nope + rope) + 2 * value)
    found = {name: tuple(seconds(each) for each in both_ways(*way, pull)) for name, way in ways.items()}
    for name, (forward, both) in found.items():
        one, two = (None, None) if name == "bare cuDNN" else found["bare cuDNN"]
        yield Row(what=f"attention forward, {name}", seconds=forward, work=work, unit="FLOP", against=one)
        yield Row(what=f"attention, {name}", seconds=both, work=work + more, unit="FLOP", against=two)


def arena_rows(device: torch.device, size: int) -> Iterator[Row]:
    """AdamW and the norm, beside a copy of as many bytes."""
    from nmoe.effects.kernels import adamw

    source = draw(device, size, name="copy").detach()
    to = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: to.copy_(source))
    yield Row(what="copy", seconds=2 * source.nbytes / copied, work=2 * source.nbytes, unit="byte")
    scalars = {
        "allowed": torch.tensor(True, device=device),
        "shrink": torch.tensor(1.0, device=device),
        "updates": torch.tensor(3, device=device),
        "lr": torch.tensor(1e-3, device=device, dtype=torch.float64),
    }
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}
    remainder = torch.zeros(size, dtype=torch.int16, device=device)
    for moments in (torch.bfloat16, torch.float32):
        first, second = (torch.zeros(size, dtype=moments, device=device) for _ in range(2))
        update = partial(adamw.adamw_, source, remainder, first, second, to, **scalars, **numbers)
        moved = size * (2 * 2 * 2 + 2 * 2 * first.element_size() + 2 * 2)
        taken = seconds(update)
        name = str(moments).removeprefix("torch.")
        yield Row(what=f"AdamW, moments {name}", seconds=taken, work=moved, unit="byte", against=moved / copied)
    taken = seconds(lambda: adamw.global_norm([to]))
    yield Row(what="gradient norm", seconds=taken, work=to.nbytes, unit="byte", against=to.nbytes / copied)


CANDIDATES = tuple(
    Tile(m=m, n=n, k=k, warps=8, stages=stages)
    for (m, n), k, stages in itertools.product(((128, 128), (128, 256), (256, 128)), (32, 64), (3, 4, 5))
)
"""What `tune` tries; what does not fit is left out."""


def tune() -> int:
    """Measure which tiles are fastest for the mixture of each case's sizes, and print the table.

    A product's tile is changed alone, the others as they ship, and the whole mixture timed.
    """
    device = runtime.device("cuda")
    shipped = table(device)
    for tokens, hidden, width, experts, top_k, share in MIXTURES:
        if tokens == MIXTURES[0][0] and not share:
            best = tuned(device, tuning.find(shipped, "mixture", hidden, width), tokens, hidden, width, experts, top_k)
            say(f"[mixture.{hidden}x{width}]\ngroup = {best.group}")
            for name, tile in best.tiles.items():
                say(f"{name} = [{tile.m}, {tile.n}, {tile.k}, {tile.warps}, {tile.stages}]")
    return 0


def tuned(
    device: torch.device, best: tuning.Entry, tokens: int, hidden: int, width: int, experts: int, top_k: int
) -> tuning.Entry:
    """The fastest entry for these sizes, starting from one that is good."""
    x = draw(device, tokens, hidden, name="x")
    up = draw(device, experts, hidden, 2, width, name="up", scale=0.02)
    down = draw(device, experts, width, hidden, name="down", scale=0.03)
    chosen = routing(device, tokens, experts, top_k, 0.0)
    pull = draw(device, tokens, hidden, name="pull").detach()

    def taken(entry: tuning.Entry) -> float | None:
        def apply(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return our_mixture(device, entry, x, chosen, up, down)[0]

        return attempt(both_ways(apply, (x, up, down), pull)[1])

    for name, shipped in best.tiles.items():
        entries = [attrs.evolve(best, tiles={**best.tiles, name: tile}) for tile in (shipped, *CANDIDATES)]
        timed = [(seconds, index) for index, entry in enumerate(entries) if (seconds := taken(entry)) is not None]
        best = entries[min(timed)[1]]
    return best


def attempt(call: Callable[[], object]) -> float | None:
    """Seconds of a call, or None when its tile does not fit the GPU."""
    from triton.runtime.errors import OutOfResources

    try:
        return seconds(call)
    except OutOfResources:
        return None
