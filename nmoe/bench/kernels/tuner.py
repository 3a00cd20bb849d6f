"""Looking for the fastest tiles: one product's tile is changed at a time, the others as they ship, and all timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch

from nmoe.bench.kernels import attention, gqa, kda, moe
from nmoe.bench.kernels.meter import Variant
from nmoe.effects.device import ops
from nmoe.effects.kernels.tables import AttentionTile, DeltaTile, GemmTile, Tile

PRODUCTS = tuple(
    GemmTile(block_m=m, block_n=n, block_k=k, num_warps=8, num_stages=stages)
    for (m, n), k, stages in itertools.product(((128, 128), (128, 256), (256, 128)), (32, 64), (3, 4, 5))
)
"""What is tried for a product of the mixture."""

ATTENTION = MappingProxyType(
    {
        "forward": ((128, 128), (128, 64)),
        "dq": ((128, 64), (64, 64)),
        "dkv": ((32, 64), (32, 128), (64, 64)),
    }
)
"""Queries and keys a step, tried for each pass of latent attention."""

GROUPED = MappingProxyType(
    {
        "forward": ((128, 64), (128, 128), (128, 32), (64, 64)),
        "dq": ((128, 64), (64, 64), (128, 32)),
        "dkv": ((64, 64), (64, 128), (32, 64), (32, 128)),
    }
)
"""Rows and keys a step, or queries and keys, tried for each pass of grouped-query attention."""

DELTA = MappingProxyType(
    {
        "sums": ((32, 64), (1,)),
        "prepare": ((32, 64, 128), (1,)),
        "scan": ((32, 64), (2, 3)),
        "output": ((64, 128), (1,)),
        "scan_backward": ((32, 64), (2, 3)),
        "backward": ((16, 32, 64), (1,)),
    }
)
"""Channels and stages, tried for each kernel of the delta rule."""

Timed = Callable[[Callable[[], object]], float]


def table(device: torch.device, sizes: Sequence[tuple[int, int]], timed: Timed) -> Iterator[str]:
    """The entries, each as it is found.

    sizes  hidden size and expert size of each mixture
    timed  median seconds of a call
    """
    for hidden, width in sizes:
        case = attrs.evolve(moe.CASES[0], hidden=hidden, width=width)
        operands = moe.Operands.of(case, device)
        # Hopper's own kernels have no tiles to choose: what is measured is the others
        shipped = attrs.evolve(ops.mixture_tiles(device, hidden, width), hopper=False)
        names = [name for name, tile in attrs.asdict(shipped, recurse=False).items() if isinstance(tile, GemmTile)]

        fastest = best({name: PRODUCTS for name in names}, shipped, partial(moe.variants, case, operands), timed)
        yield entry(f"moe.{hidden}x{width}", fastest, names, group=fastest.group)
    for case in attention.CASES:
        shipped = attrs.evolve(ops.mla_tiles(device, case.nope, case.rope, case.value), hopper=False)
        fastest = best(tried(ATTENTION, shipped), shipped, partial(own_attention, case, device), timed)
        yield entry(f"mla.{case.nope}x{case.rope}x{case.value}", fastest, list(ATTENTION))
    for case in gqa.CASES:
        yield grouped(case, device, timed)
    for case in kda.CASES:
        yield delta(case, device, timed)


def grouped(case: gqa.Case, device: torch.device, timed: Timed) -> str:
    """The entry of a layer of grouped-query attention."""
    sizes = (case.head_dim, case.window) if case.window else (case.head_dim,)
    shipped = ops.gqa_tiles(device, *sizes)
    fastest = best(tried(GROUPED, shipped), shipped, partial(gqa.variants, case, device), timed)
    return entry(f"gqa.{'x'.join(map(str, sizes))}", fastest, list(GROUPED))


def delta(case: kda.Case, device: torch.device, timed: Timed) -> str:
    """The entry of a layer of Kimi delta attention."""
    shipped = ops.kda_tiles(device, case.head_dim)
    candidates = {
        name: tuple(
            DeltaTile(values=values, num_warps=warps, num_stages=stages)
            for values, warps, stages in itertools.product(sizes, (4, 8), depths)
        )
        for name, (sizes, depths) in DELTA.items()
    }
    fastest = best(candidates, shipped, partial(kda.variants, case, device), timed)
    return entry(f"kda.{case.head_dim}", fastest, list(DELTA))


def tried(blocks: Mapping[str, Sequence[tuple[int, int]]], shipped: Any) -> dict[str, tuple[AttentionTile, ...]]:
    """What is tried for each pass of an attention: blocks, with four and eight warps, two and three stages."""
    return {
        name: tuple(
            attrs.evolve(getattr(shipped, name), block_m=m, block_n=n, num_warps=warps, num_stages=stages)
            for (m, n), warps, stages in itertools.product(sizes, (4, 8), (2, 3))
        )
        for name, sizes in blocks.items()
    }


def own_attention(case: attention.Case, device: torch.device, tiles: Any) -> Iterator[Variant]:
    """The variant that runs all three passes of our own."""
    return (
        variant for variant in attention.variants(case, device, tiles) if variant.name == "deterministic, own forward"
    )


def best(
    candidates: Mapping[str, Sequence[Tile]],
    shipped: Any,
    variants: Callable[[Any], Iterator[Variant]],
    timed: Timed,
) -> Any:
    """The fastest tiles, starting from some that are good."""
    for name, tiles in candidates.items():
        every = [shipped, *(attrs.evolve(shipped, **{name: tile}) for tile in tiles)]
        times = [
            (seconds, index)
            for index, tiling in enumerate(every)
            if (seconds := attempt(next(variants(tiling)), timed))
        ]
        shipped = every[min(times)[1]]
    return shipped


def attempt(variant: Variant, timed: Timed) -> float | None:
    """Seconds forward and backward, or None when a tile does not fit the GPU."""
    from triton.runtime.errors import OutOfResources

    try:
        return timed(variant.both)
    except OutOfResources:
        return None


def entry(key: str, fastest: object, names: Sequence[str], group: int | None = None) -> str:
    """An entry as the table has it."""
    lines = [f"[{key}]", "measured = true", *([] if group is None else [f"group = {group}"])]
    for name in names:
        fields = attrs.asdict(getattr(fastest, name))
        lines.append(f"{name} = {{ {', '.join(f'{field} = {value}' for field, value in fields.items())} }}")
    return "\n".join(lines)
