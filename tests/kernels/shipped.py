"""Every kernel that ships, at the sizes it ships with, as requests to compile ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from nmoe.effects.kernels import loss as loss_kernels
from nmoe.effects.kernels import norm as norm_kernels
from nmoe.effects.kernels import pick, row
from nmoe.effects.kernels.attention import mla_assemble, mla_cached, mla_single
from nmoe.effects.kernels.exchange import plan as plan_kernels
from nmoe.effects.kernels.exchange import reduce
from nmoe.effects.kernels.moe import combine, dispatch, few, report, router, single, swiglu
from nmoe.effects.kernels.optim import adamw, muon
from nmoe.pure.model.route import BINS
from tests.kernels.aot import Request

KERNELS = "nmoe.effects.kernels"

SAME: Mapping[str, Mapping[str, str]] = {
    "attention.rope:rotate_kernel": {"y": "x"},
    "attention.mla_single:query_kernel": {"product": "q", "squares": "q_squares"},
    "exchange.push:counts_kernel": {"tokens": "count"},
    "exchange.reduce:sum_kernel": {"out": "own"},
    "moe.combine:combine_kernel": {"weight": "y"},
    "moe.experts:grouped_weight_gradient_kernel": {"b_rows": "b"},
    "norm:backward_kernel": {"residual": "grad_output"},
    "norm:forward_kernel": {"y": "x", "total": "x"},
    "optim.adamw:update_kernel": {"remainder": "value"},
    "optim.muon:value_kernel": {"remainder": "value"},
    "optim.newton_schulz:symmetric_kernel": {"right": "left", "added": "left"},
}
"""Arguments to which some caller gives the memory of another one: held complete by tests/kernels/conftest.py."""


@attrs.frozen
class Launch:
    """Options of a launch without a record of tile sizes."""

    num_warps: int = 4
    num_stages: int = 3


def request(
    kernel: str,
    signature: str,
    tile: Any,
    constants: Mapping[str, object],
    sizes: str = "",
    same: Mapping[str, str] | None = None,
) -> Request:
    """signature: "name:type name:type"; sizes: integers that are multiples of 16."""
    types = dict(each.split(":") for each in signature.split())
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    return Request(
        kernel=f"{KERNELS}.{kernel}",
        signature=types,
        constants=constants,
        aligned=[*pointers, *sizes.split()],
        warps=tile.num_warps,
        stages=tile.num_stages,
        same=same or {},
    )


def loss(wants_gradient: bool) -> Request:
    """A vocabulary of 201,088."""
    tile = loss_kernels.TILE
    return request(
        "loss:cross_entropy_kernel",
        "logits:*bf16 target:*i64 losses:*fp32 stride:i32 losses_stride:i32 vocabulary:i32 scale:fp32 z_loss:fp32",
        tile,
        {"wants_gradient": wants_gradient, "block": tile.block_n},
        "stride losses_stride vocabulary",
    )


def norm(name: str, adds: bool, width: int, readers: int = 1) -> Request:
    """Rows of a width that is a multiple of 16."""
    tile = norm_kernels.TILE
    if name == "forward":
        signature = (
            "x:*bf16 y:*bf16 gain:*fp32 total:*bf16 normed:*bf16 rstd:*fp32 rows:i32 width:i32 x_stride:i32 "
            "y_stride:i32 eps:fp32"
        )
    else:
        signature = (
            "x:*bf16 gain:*fp32 rstd:*fp32 grad_output:*bf16 "
            + "".join(f"{each}:*bf16 " for each in ("second", "third")[: readers - 1])
            + "residual:*bf16 gradient:*bf16 partial:*fp32 rows:i32 width:i32 x_stride:i32"
        )
    sizes = "rows width x_stride" + (" y_stride" if name == "forward" else "")
    block = 1 << (width - 1).bit_length()
    tile = attrs.evolve(tile, num_warps=norm_kernels.warps(width, tile))
    constants: dict[str, object] = {"adds": adds, "m": tile.block_m, "block": block}
    if name == "backward":
        constants |= dict.fromkeys(("second", "third")[readers - 1 :])
    same = {} if adds else SAME[f"norm:{name}_kernel"]
    return request(f"norm:{name}_kernel", signature, tile, constants, sizes, same)


def gate(name: str) -> Request:
    """The activation, forward or backward."""
    tile = swiglu.TILE
    arrays = "x:*bf16 y:*bf16" if name == "forward" else "x:*bf16 grad_output:*bf16 gradient:*bf16"
    constants = {"block_m": tile.block_m, "block_n": tile.block_n}
    return request(f"moe.swiglu:{name}_kernel", f"{arrays} rows:i32 width:i32", tile, constants, "rows width")


def update(value: str, gradient: str, moments: str, size: str = "i32", *, clear: bool = True) -> Request:
    """AdamW on an arena of these formats."""
    tile = adamw.TILE
    bits = "*fp32" if value == "fp32" else "*i16"
    return request(
        "optim.adamw:update_kernel",
        f"value:{bits} remainder:{bits} first:*{moments} second:*{moments} gradient:*{gradient} partial:*fp32 "
        f"allowed:*i8 shrink:*fp32 updates:*i64 lr:*fp64 size:{size}",
        tile,
        {
            **{"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1},
            **{"has_remainder": value == "bf16", "clear": clear, "block": tile.block, "repeats": tile.repeats},
        },
        "size",
        SAME["optim.adamw:update_kernel"] if value == "fp32" else {},
    )


def square_sum(gradient: str) -> Request:
    """The norm of an arena."""
    tile = adamw.NORM_TILE
    return request(
        "optim.adamw:norm_kernel",
        f"x:*{gradient} partial:*fp32 size:i32",
        tile,
        {"block": tile.block, "repeats": tile.repeats},
        "size",
    )


STEPS = "outer_step inner_step row_step rows columns width"
"""How matrices lie in an arena, in numbers that are multiples of 16."""


def ahead(gradient: str, moment: str, products: str = "bf16", *, clear: bool = True) -> Request:
    """What Muon orthogonalises, of these formats."""
    tile = muon.TILE
    return request(
        "optim.muon:ahead_kernel",
        f"gradient:*{gradient} momentum:*{moment} out:*{products} partial:*fp32 allowed:*i8 shrink:*fp32 "
        + integers(f"first inner {STEPS}"),
        tile,
        {"beta": 0.95, "clear": clear, "column_step": 1, "M": tile.block_m, "N": tile.block_n},
        STEPS,
    )


def scale() -> Request:
    """One over the norms of what Muon orthogonalises."""
    return request(
        "optim.muon:scale_kernel",
        "partial:*fp32 scale:*fp32 programs:i32",
        Launch(),
        {"smallest": 1e-7, "N": muon.PARTIALS},
    )


def moved(value: str) -> Request:
    """Muon's new value, of this format."""
    tile = muon.TILE
    bits = "*fp32" if value == "fp32" else "*i16"
    return request(
        "optim.muon:value_kernel",
        f"value:{bits} remainder:{bits} direction:*{value} partial:*fp32 allowed:*i8 lr:*fp64 "
        + integers(f"first inner {STEPS}"),
        tile,
        {
            **{"length": 9.05, "decay": 0.1, "has_remainder": value == "bf16", "column_step": 1},
            **{"M": tile.block_m, "N": tile.block_n},
        },
        STEPS,
        SAME["optim.muon:value_kernel"] if value == "fp32" else {},
    )


def choice(num_experts: int, top_k: int) -> Request:
    """The chosen experts of each token."""
    tile = router.TILE
    padded = 1 << (num_experts - 1).bit_length()
    return request(
        "moe.router:top_k_kernel",
        "x:*fp32 out:*i64 rows:i32 E:i32",
        tile,
        {"M": tile.block_m, "EP": padded, "K": top_k},
        "rows E",
    )


def of_router(num_experts: int = 64, top_k: int = 6) -> dict[str, Request]:
    """Choices and their weights, the gradient of the scores, and what is told of a router."""
    padded = 1 << (num_experts - 1).bit_length()
    rows, told = report.block(num_experts)
    places = {"K": top_k, "KP": 1 << (top_k - 1).bit_length()}
    sizes = "rows:i32 E:i32"
    chosen = "product:*fp32 bias:*fp32 score:*fp32 expert:*i64 favoured:*i64 weight:*fp32"
    parts = "narrow:*i16 wide:*i16"
    spoken = "score:*fp32 favoured:*i64 bias:*fp32 expert:*i64 hits:*i32 shares:*fp32 entropy:*fp32"
    spans = {"K": top_k, "BINS": BINS, "SPAN": report.SPAN, "M": rows, "EP": told}

    def back(pairs: str, normalize: bool, of: Mapping[str, object]) -> Request:
        constants = {"NORMALIZE": normalize, "M": max(1, router.SCORES // padded), "EP": padded}
        return request(
            "moe.router:score_gradient_kernel",
            f"gradient:*fp32 score:*fp32 {pairs}{parts} {sizes} scale:fp32 vanishing:fp32",
            Launch(),
            {**constants, **of},
            "rows E",
        )

    return {
        **{
            f"route{name}": request(
                "moe.router:choose_kernel",
                f"{chosen} {sizes} tiny:fp32 scale:fp32 vanishing:fp32",
                Launch(),
                {**places, "NORMALIZE": normalize, "M": max(1, router.CHOICES // padded), "EP": padded},
                "rows E",
            )
            for name, normalize in (("", True), (", not normalised", False))
        },
        **{
            f"route: backward{name}": back("expert:*i64 grad_weight:*fp32 ", normalize, places)
            for name, normalize in (("", True), (", not normalised", False))
        },
        "scores: backward": back("", True, {"K": 1, "KP": 1, "expert": None, "grad_weight": None}),
        "report": request(
            "moe.report:report_kernel",
            f"{spoken} margins:*i32 T:i32 E:i32 vanishing:fp32",
            Launch(report.WARPS),
            spans,
            "T E",
        ),
        "report: no margins": request(
            "moe.report:report_kernel",
            f"{spoken} T:i32 E:i32 vanishing:fp32",
            Launch(report.WARPS),
            {**spans, "margins": None, "BINS": 0},
            "T E",
        ),
        "report: backward": request(
            "moe.report:imbalance_backward_kernel",
            "score:*fp32 fraction:*fp32 grad_output:*fp32 gradient:*fp32 T:i32 E:i32 share_of_token:fp32 "
            "vanishing:fp32",
            Launch(report.WARPS),
            {"M": rows, "EP": told},
            "T E",
        ),
        "report: sums": request(
            "moe.report:sum_kernel",
            "hits:*i32 shares:*fp32 entropy:*fp32 fraction:*fp32 total:*fp32 E:i32 SPANS:i32 even:fp32 "
            "share_of_token:fp32",
            Launch(report.WARPS),
            {"M": rows, "EP": told},
            "E SPANS",
        ),
        "router in parts": request(
            "moe.router:split_kernel",
            f"w:*fp32 {' '.join(reversed(parts.split()))} size:i32 E:i32",
            Launch(),
            {"BLOCK": router.SPLIT},
            "size E",
        ),
    }


def of_few(width: int = 2048, inner: int = 1408, num_experts: int = 64, top_k: int = 6) -> dict[str, Request]:
    """Router and experts of a few tokens."""
    padded, parts = 1 << (num_experts - 1).bit_length(), 1 << (width // few.ROUTER - 1).bit_length()
    numbers = {"K": top_k, "KP": 1 << (top_k - 1).bit_length()}
    plain = {"bias": None, "LIMIT": None, "ALPHA": 1.0}
    up, down, several = (
        {"ROWS": tile.block_k, "COLUMNS": tile.block_n, "STAGES": tile.num_stages}
        for tile in (few.UP, few.DOWN, few.SEVERAL)
    )
    chosen = "bias:*fp32 score:*fp32 expert:*i64 favoured:*i64 weight:*fp32"
    return {
        "few: logits": request(
            "moe.few:logits_kernel",
            "x:*bf16 router:*fp32 partial:*fp32 D:i32 E:i32",
            Launch(8),
            {"ROWS": few.ROUTER, "EP": padded},
            "D E",
        ),
        "few: choice": request(
            "moe.few:choose_kernel",
            f"partial:*fp32 {chosen} parts:i32 E:i32 scale:fp32 tiny:fp32 vanishing:fp32",
            Launch(),
            {"shift": None, "PARTS": parts, "EP": padded, **numbers, "SOFTMAX": False, "NORMALIZE": True},
            "parts E",
        ),
        "few: up": request(
            "moe.few:up_kernel",
            "x:*bf16 expert:*i64 up:*bf16 a:*bf16 D:i32 F:i32",
            few.UP,
            {**up, **plain, "K": top_k},
            "D F",
        ),
        "few: up, clamped": request(
            "moe.few:up_kernel",
            "x:*bf16 expert:*i64 up:*bf16 bias:*bf16 a:*bf16 D:i32 F:i32",
            few.UP,
            {**up, "K": top_k, "LIMIT": 7.0, "ALPHA": 1.702},
            "D F",
        ),
        "few: down": request(
            "moe.few:down_kernel",
            "a:*bf16 expert:*i64 down:*bf16 y:*fp32 D:i32 F:i32",
            few.DOWN,
            down,
            "D F",
        ),
        "few: up of several": request(
            "moe.few:up_kernel",
            "x:*bf16 expert:*i64 up:*bf16 a:*bf16 D:i32 F:i32",
            few.SEVERAL,
            {**several, **plain, "K": top_k},
            "D F",
        ),
        "few: down of several": request(
            "moe.few:down_kernel",
            "a:*bf16 expert:*i64 down:*bf16 y:*fp32 D:i32 F:i32",
            few.SEVERAL,
            several,
            "D F",
        ),
        "few: sum": request(
            "moe.few:sum_kernel",
            "y:*fp32 weight:*fp32 expert:*i64 out:*bf16 count:*i64 pairs:i32 D:i32 E:i32",
            Launch(),
            {"K": top_k, "BLOCK": few.SUM, "EP": max(16, padded), "PAIRS": 16},
            "D E",
        ),
    }


def of_cached(rank: int = 512, rotated: int = 64) -> dict[str, Request]:
    """Latent attention of one token over a cache."""
    tile, sizes = mla_cached.TILE, {"R": rank, "RP": rank}
    steps = "q_row q_head cache_row"
    attended = {"P": rotated, "PP": rotated, "HEADS": tile.heads, "KEYS": tile.keys}
    padded = {"AP": 2048, "RP": rank, "PP": rotated // 2}
    arrays = "product:*bf16 query_gain:*fp32 gain:*fp32 cos:*fp32 sin:*fp32 position:*i32 query:*bf16 latent:*bf16"
    return {
        "cached: latents": request(
            "attention.mla_cached:latents_kernel",
            f"{arrays} {integers('product_row A R P')} eps:fp32",
            Launch(8),
            padded,
            "product_row A R P",
        ),
        "cached: attend": request(
            "attention.mla_cached:attend_kernel",
            "query:*bf16 q:*bf16 cos:*fp32 sin:*fp32 cache:*bf16 start:*i32 position:*i32 "
            + f"{integers('out top total', '*fp32')} {integers(f'H B {steps}')} scale:fp32",
            tile,
            {**sizes, **attended, "SINGLE": False, "EARLY": False},
            f"H {steps}",
        ),
        "cached: join": request(
            "attention.mla_cached:join_kernel",
            "part:*fp32 top:*fp32 total:*fp32 out:*bf16 " + integers("parts H B"),
            Launch(),
            {"R": rank, "BLOCK": mla_cached.JOINED, "PARTS": tile.programs},
            "parts H",
        ),
    }


def of_row(
    inputs: int, outputs: int, parts: int, *, base: bool = False, normed: bool = False, before: int = 0
) -> Request:
    """Product of one row, the sum of so many parts and maybe of a base; `before` parts of the norm of those."""
    tile = row.TILE
    given = {"x": base, "total": base, "gain": normed, "squares": normed, "added": parts, "before": before}
    kinds = {"x": "*bf16", "total": "*bf16"}
    arrays = " ".join(f"{name}:{kinds.get(name, '*fp32')}" for name, there in given.items() if there)
    return request(
        "row:product_kernel",
        f"{arrays} weight:*bf16 out:*fp32 {integers('D N step width')} eps:fp32",
        Launch(tile.num_warps),
        {
            **{name: None for name, there in given.items() if not there},
            **{"PARTS": parts, "BEFORE": before, "ROWS": tile.rows, "COLUMNS": tile.columns, "EARLY": True},
        },
        "D N step" + " width" * bool(before),
    )


def of_single(width: int = 2048, rank: int = 512, heads: int = 16, num_experts: int = 64) -> dict[str, Request]:
    """A token of one row, at the sizes of `moonlet`."""
    tile, attend, tiles = mla_single.TILE, mla_cached.TILE, single.TILES
    early, wide = {"EARLY": True}, {"WIDTH": width}
    up, down = (
        {"ROWS": each.block_k, "COLUMNS": each.block_n, "STAGES": each.num_stages, **early}
        for each in (tiles.up, tiles.down)
    )
    sums = "x:*bf16 added:*fp32 gain:*fp32 total:*bf16 scaled:*fp32 squares:*fp32"
    squares = width // row.NORMED
    choice = {"KP": 8, "EP": num_experts, "PARTS": width // row.NORMED, "SOFTMAX": False, "NORMALIZE": True}
    choice |= {"SQUARES": squares, "SP": squares}
    parts = len(range(0, width, row.TILE.rows))
    reads = f"{integers('cos sin', '*fp32')} place:*i64 padding:*i32 query:*bf16 turned:*bf16 cache:*bf16"
    reads += " later:*bf16"
    numbers = "H q_step q_width product_step width A R P C Z later_size"
    sizes = {"NP": 128, "RP": rank, "PP": 32, "HP": heads, "RANKS": tile.query, **early}
    queries = {
        name: request(
            "attention.mla_single:query_kernel",
            f"{integers('q q_squares product squares', '*fp32')} up:*bf16 gain:*fp32 {reads} "
            + f"{integers(numbers)} eps:fp32",
            Launch(tile.num_warps),
            {"Q_PARTS": count, "Q_SQUARES": count, "PARTS": parts, "SQUARES": parts, **sizes},
            numbers,
            same,
        )
        for name, count, same in (("latent", 3, {}), ("whole", parts, SAME["attention.mla_single:query_kernel"]))
    }
    return {
        "single: embedding": request(
            "row:embed_kernel",
            "token:*i64 embed:*bf16 out:*bf16 D:i32 scale:fp32",
            Launch(8),
            {**wide, **early},
            "D",
        ),
        "single: best logits": request(
            "pick:best_kernel",
            "logits:*bf16 best:*i64 stride:i32 vocab:i32 scale:fp32",
            Launch(),
            {"BLOCK": pick.BLOCK, "VP": 1 << 18, **early},
            "stride vocab",
        ),
        "single: token": request(
            "pick:token_kernel",
            "best:*i64 token:*i64 parts:i32",
            Launch(),
            {"PARTS": 128, "VP": 1 << 18, **early},
        ),
        "single: inwards": of_row(width, 2112, tiles.parts, base=True, normed=True),
        "single: inwards, first": of_row(width, 2112, 0, base=True, normed=True),
        "single: queries": of_row(1536, 3072, parts, normed=True, before=parts),
        "single: outwards": of_row(width, width, rank // tile.value),
        "single: query latents": queries["latent"],
        "single: query latents, whole queries": queries["whole"],
        "single: attend": request(
            "attention.mla_cached:attend_kernel",
            "query:*bf16 q:*bf16 cos:*fp32 sin:*fp32 cache:*bf16 start:*i32 position:*i64 "
            + f"{integers('out top total', '*fp32')} {integers('H q_row q_head cache_row')} scale:fp32",
            attend,
            {
                **{"B": 1, "R": rank, "RP": rank, "P": 64, "PP": 64, "HEADS": attend.heads, "KEYS": attend.keys},
                **{"SINGLE": True, **early},
            },
            "H q_row q_head cache_row",
        ),
        "single: values": request(
            "attention.mla_single:value_kernel",
            f"{integers('part top total', '*fp32')} place:*i64 padding:*i32 up:*bf16 out:*fp32 "
            + integers("H parts R U Z"),
            Launch(tile.num_warps),
            {
                **{"KEYS": attend.keys, "PARTS": attend.programs, "RANKS": tile.value, "COLUMNS": tile.columns},
                **early,
            },
            "H R U Z",
        ),
        "single: router": request(
            "row:route_kernel",
            f"{sums} router:*fp32 partial:*fp32 D:i32 E:i32",
            Launch(8),
            {"PARTS": parts, "ROWS": row.NORMED, "EP": num_experts, **early},
            "D E",
        ),
        "single: no router": request(
            "row:route_kernel",
            f"{sums} D:i32 E:i32",
            Launch(8),
            {"router": None, "partial": None, "PARTS": parts, "ROWS": row.NORMED, "EP": 1, **early},
            "D E",
        ),
        "single: norm": request(
            "row:norm_kernel",
            "x:*bf16 added:*fp32 gain:*fp32 normed:*bf16 D:i32 eps:fp32",
            Launch(8),
            {"PARTS": tiles.parts, "ROWS": row.NORMED, **wide, **early},
            "D",
        ),
        "single: up": request(
            "moe.single:up_kernel",
            "x:*fp32 squares:*fp32 partial:*fp32 bias:*fp32 up:*bf16 plain:*bf16 "
            + "expert:*i64 weight:*fp32 a:*fp32 "
            + f"{integers('D F S parts E')} {integers('scale tiny vanishing eps', 'fp32')}",
            tiles.up,
            {**choice, **up, "K": 6},
            "D F S parts E",
        ),
        "single: up, no experts": request(
            "moe.single:up_kernel",
            "x:*fp32 squares:*fp32 plain:*bf16 expert:*i64 weight:*fp32 a:*fp32 "
            + f"{integers('D F S')} {integers('scale tiny vanishing eps', 'fp32')}",
            tiles.up,
            {
                **dict.fromkeys(("partial", "bias", "up"), None),
                **{"parts": 1, "E": 1, "KP": 1, "EP": 1, "PARTS": 1, "SOFTMAX": False, "NORMALIZE": False},
                **{"SQUARES": squares, "SP": squares},
                **{**up, "K": 0},
            },
            "D F S",
        ),
        "single: down": request(
            "moe.single:down_kernel",
            f"a:*fp32 expert:*i64 weight:*fp32 down:*bf16 plain:*bf16 out:*fp32 {integers('D F S')}",
            tiles.down,
            {**down, "K": 6, "KP": 8},
            "D F S",
        ),
        "single: down, no experts": request(
            "moe.single:down_kernel",
            f"a:*fp32 expert:*i64 weight:*fp32 plain:*bf16 out:*fp32 {integers('D F S')}",
            tiles.down,
            {**down, "down": None, "K": 0, "KP": 1},
            "D F S",
        ),
    }


def integers(names: str, kind: str = "i32") -> str:
    """Arguments of one type, as a part of a signature."""
    return " ".join(f"{name}:{kind}" for name in names.split())


def of_dispatch(num_experts: int, top_k: int = 6) -> dict[str, Request]:
    """The counting sort, and rows brought to their experts and back."""
    experts = {"E": num_experts, "EP": 1 << (num_experts - 1).bit_length()}
    stretch = {"STRETCH": dispatch.STRETCH, **experts}
    rows = {"K": top_k, "BLOCK": combine.COLUMNS}
    return {
        "count": request("moe.dispatch:count_kernel", "expert:*i64 histogram:*i32 P:i32", Launch(8), stretch),
        "scan": request(
            "moe.dispatch:scan_kernel", integers("histogram count", "*i32") + " S:i32 E:i32", Launch(), {"BLOCK": 1024}
        ),
        "place": request(
            "moe.dispatch:place_kernel",
            "expert:*i64 " + integers("before count source slot place end", "*i32") + " P:i32 K:i32",
            Launch(8),
            {**stretch, "CHUNK": dispatch.CHUNK},
        ),
        "tiles": request(
            "moe.dispatch:tiles_kernel",
            integers("count tile_expert tile_row num_needed", "*i32") + " T:i32",
            Launch(),
            {"M": 128, **experts, "BLOCK": dispatch.TILES},
        ),
        "spread": request(
            "moe.dispatch:spread_kernel",
            "x:*bf16 place:*i32 out:*bf16 D:i32",
            Launch(8),
            {"K": top_k, "BLOCK": 2048},
            "D",
        ),
        "combine": request(
            "moe.combine:combine_kernel",
            "y:*bf16 place:*i32 weight:*fp32 first:*bf16 second:*bf16 out:*bf16 D:i32",
            Launch(),
            {**rows, "WEIGHTED": True},
            "D",
        ),
        "combine: sum": request(
            "moe.combine:combine_kernel",
            "y:*bf16 place:*i32 weight:*bf16 out:*bf16 D:i32",
            Launch(),
            {**rows, "WEIGHTED": False, "first": None, "second": None},
            "D",
            SAME["moe.combine:combine_kernel"],
        ),
    }


def of_biases() -> dict[str, Request]:
    """What experts with biases have beside the products."""
    arguments = "dh:*bf16 out:*bf16 end:*i32 count:*i32 WIDTH:i32"
    return {
        "bias gradient": request("moe.experts:bias_gradient_kernel", arguments, Launch(), {"M": 32, "N": 128}, "WIDTH")
    }


def of_assembly() -> dict[str, Request]:
    """Whole keys for an attention of a library, and their gradients."""
    sizes = {"NOPE": 128, "ROPE": 64, "NOPE_BOX": 128, "ROPE_BOX": 64, "HEADS": mla_assemble.HEADS}
    key_strides = "kv_batch kv_position kv_head rope_batch rope_position"
    gradient_strides = "dk_batch dk_position dk_head dv_batch dv_position dv_head"
    return {
        "keys": request(
            "attention.mla_assemble:keys_kernel",
            "kv:*bf16 k_rope:*bf16 k:*bf16 " + integers(f"length {key_strides} heads"),
            Launch(),
            sizes,
            key_strides,
        ),
        "gradients": request(
            "attention.mla_assemble:gradients_kernel",
            "dk:*bf16 dv:*bf16 dkv:*bf16 dk_rope:*bf16 " + integers(f"length {gradient_strides} heads"),
            Launch(),
            {**sizes, "VALUE": 128, "VALUE_BOX": 128},
            gradient_strides,
        ),
    }


def reduced(gradient: str, levels: tuple[int, ...]) -> Request:
    """The sum over ranks: of fp32 in its place, of 16 bits apart."""
    return request(
        "exchange.reduce:sum_kernel",
        f"out:*fp32 own:*{gradient} landed:*{gradient} size:i32 stride:i32",
        Launch(reduce.WARPS),
        {"rank": 1, **dict(zip("ABCD", (*levels, 1, 1, 1), strict=False)), "block": reduce.BLOCK},
        "size stride",
        SAME["exchange.reduce:sum_kernel"] if gradient == "fp32" else {},
    )


def of_exchange(ranks: int = 8, num_experts: int = 256, top_k: int = 8) -> dict[str, Request]:
    """What of the exchange moves no rows."""
    padded = 1 << (top_k - 1).bit_length()
    choices = {"K": top_k, "KP": padded, "BLOCK": plan_kernels.BLOCK // padded}
    counts = {"E": num_experts, "EP": num_experts, "W": ranks, "WP": ranks}
    pushed = "count:*i32 tokens:*i32 addresses:*i64 OFFSET:i64 ME:i32"
    planned = integers("place shift owner token_place token_shift to at landing", "*i32")
    return {
        "owners": request(
            "exchange.plan:owners_kernel", "expert:*i64 owner:*i32 N:i32 LOCAL:i32 W:i32", Launch(), choices
        ),
        "destinations": request(
            "exchange.plan:destinations_kernel",
            f"expert:*i64 {planned} N:i32 LOCAL:i32 W:i32",
            Launch(),
            {**choices, "DEDUP": True},
        ),
        "origins": request(
            "exchange.plan:origins_kernel",
            integers("origin_end origin_shift valid to at", "*i32") + " W:i32",
            Launch(),
            {"RUNS": num_experts, "HALF": num_experts // 2, "BLOCK": plan_kernels.BLOCK},
        ),
        "counts": request("exchange.push:counts_kernel", pushed, Launch(), {**counts, "DEDUP": True}),
        "counts: plain": request(
            "exchange.push:counts_kernel",
            pushed,
            Launch(),
            {**counts, "DEDUP": False},
            same=SAME["exchange.push:counts_kernel"],
        ),
        "pad": request("exchange.push:pad_kernel", "x:*bf16 valid:*i32 D:i32 SIZE:i32", Launch(), {"BLOCK": 2048}, "D"),
        "bytes": request(
            "exchange.push:bytes_kernel", "crossing:*i32 sent:*i64 " + integers("PAIR PLACE ROW FIXED"), Launch(1), {}
        ),
    }
