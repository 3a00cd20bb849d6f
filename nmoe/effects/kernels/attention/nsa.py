"""Native sparse attention: the three ops of `pure.model.attention.nsa`, bitwise repeatable.

Letters: B sequences, T positions, H query heads, K heads of keys and values, G = H / K, C channels of a key and U of a
value, M compressed blocks of a row, S selected blocks of a query.

Keys and values are read where projections left them and never copied. No tensor has an element for each pair: weights
of the compressed blocks, of which each query selects, are made for so many queries at a time as `WORKSPACE` holds.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
from torch import Tensor

from nmoe.config.attention import NSA_MOST
from nmoe.effects.kernels.attention import nsa_kernels as kernels
from nmoe.effects.kernels.attention.blocks import box, ends
from nmoe.effects.kernels.attention.dsa import launch
from nmoe.effects.kernels.attention.dsa_kernels import delta_kernel
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.tables import SparseTile
from nmoe.errors import InputError
from nmoe.pure.model.attention.blocks import SHARE, SHARERS, WORKSPACE


@attrs.frozen(kw_only=True)
class Tiles:
    """Tile sizes of each kernel; `block_m` counts queries times the heads of a group."""

    forward: SparseTile
    dq: SparseTile
    dkv: SparseTile
    list_forward: SparseTile
    list_dq: SparseTile
    list_dkv: SparseTile
    weight: SparseTile
    select: SparseTile
    delta: SparseTile


@attrs.frozen(kw_only=True)
class Reach:
    """Which keys a query reads, in one of three ways."""

    mode: int  # kernels.WINDOW, COMPRESSED or SELECTED
    start: Tensor | tuple[()]  # [B T] i32, first token of each token's document
    begins: Tensor | None = None  # [B M] i32, first token of each compressed block
    chosen: Tensor | None = None  # [B T K S] i32
    window: int = 0  # last tokens that are read
    block: int = 0  # tokens of a compressed block
    stride: int = 1  # tokens from one to the next
    span: int = 1  # tokens of a selected block

    def arguments(self, k: Tensor, v: Tensor) -> dict[str, Any]:
        """What every kernel is given of it, and where keys and values lie."""
        return {
            "start": self.start if isinstance(self.start, Tensor) else None,
            "begins": self.begins,
            "num_keys": k.shape[1],
            "slots": 1 if self.chosen is None else self.chosen.shape[-1],
            "window": self.window,
            "block": self.block,
            "stride": self.stride,
            "kv_heads": k.shape[2],
            **dict(zip(("k_batch", "k_row", "k_head"), k.stride()[:3], strict=True)),
            **dict(zip(("v_batch", "v_row", "v_head"), v.stride()[:3], strict=True)),
            "span": self.span,
            "mode": self.mode,
            "documents": isinstance(self.start, Tensor),
        }


def window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: tuple[()] = (),
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    window: int,
    tiles: Tiles,
) -> Tensor:
    """Softmax attention to the last `window` keys, a query's own included.

    q, k, v  [B T H C], [B T K C], [B T K U]   bf16 or fp16; k and v may be slices of one product
    start    [B T] i32 or ()   query i sees no key before start[i]; must not decrease along T. (): all up to i
    returns  [B T H U]
    Raises:  InputError for formats and sizes that the kernels do not take.
    Cost:    forward 2·(C + U), backward 2·(5 C + 4 U) FLOPs for each pair of query and visible key, times H.
    """
    check(q, k, v, scale)
    return Attend.apply(q, k, v, Reach(mode=kernels.WINDOW.value, start=start, window=window), scale, tiles)[0]


def compressed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    block: int,
    stride: int,
    selected_block: int,
    num_selected: int,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the compressed blocks that end at or before a query, and the blocks it selects.

    q, k, v  [B T H C], [B M K C], [B M K U]
    first    [B M] or [1 M] i64    first token of each compressed block, T where there is none
    start    [B T] i32 or ()       index in the row of each token's document; (): rows are whole
    returns  [B T H U], zeros of a query that sees no block, and [B T K S] i32: of the heads of a group together the
             document's first block, the query's own, the one before, and the heaviest others, as the reference
             selects; any number of blocks
    Raises, cost: as of `window`; the selection 2·C FLOPs more for each pair of query and visible block, times H.
    """
    check(q, k, v, scale)
    begins = first.expand(q.shape[0], -1).to(torch.int32).contiguous()
    reach = Reach(mode=kernels.COMPRESSED.value, start=start, begins=begins, block=block, stride=stride)
    o, lse = Attend.apply(q, k, v, reach, scale, tiles)
    with torch.no_grad():
        chosen = select(q, k, lse, reach, scale, selected_block, num_selected, tiles)
    return o, chosen


def selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    block: int,
    tiles: Tiles,
) -> Tensor:
    """Softmax attention to the tokens of the selected blocks, up to a query's own.

    q, k, v  [B T H C], [B T K C], [B T K U]
    chosen   [B T K S] i32     blocks that a query reads, counted in its document, ascending; -1: none; its own is among
             them, as `compressed` selects
    start    [B T] i32 or ()   index in the row of each token's document; (): rows are whole
    block    tokens a block
    returns  [B T H U]
    Raises, cost: as of `window`.
    """
    check(q, k, v, scale)
    mode = kernels.SELECTED.value
    reach = Reach(mode=mode, start=start, chosen=chosen.contiguous(), window=q.shape[1], span=block)
    return Attend.apply(q, k, v, reach, scale, tiles)[0]


def check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:  InputError with each problem.
    """
    problems: list[str] = []
    for key, size in (("head_dim", q.shape[-1]), ("v_head_dim", v.shape[-1])):
        if size > NSA_MOST[key]:
            problems.append(
                f"model.attention.{key}: expected at most {NSA_MOST[key]} for the attention kernels, got {size}; write "
                f"{NSA_MOST[key]}"
            )
    if q.shape[2] % k.shape[2] or k.shape[:3] != v.shape[:3]:
        problems.append(
            f"nsa: expected k and v of one shape but for channels, whose heads divide the {q.shape[2]} query heads, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}; choose groups of the same size"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or (q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16)):
        problems.append(
            f"nsa: expected q, k and v all in bf16 or all in fp16, got {q.dtype}, {k.dtype}, {v.dtype}; use the "
            "reference for other formats"
        )
    if not scale > 0:
        problems.append(f"nsa: expected scale > 0, got {scale}; negate q instead")
    if problems:
        raise InputError(*problems)


class Attend(torch.autograd.Function):
    """One branch: forward, and a backward pass of two kernels, of which one owns queries and the other keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, reach: Reach, scale: float, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        """Output [B T H U], and the logarithm to base 2 of each row's sum of exponentials [B T H] f32."""
        q, k, v = q.contiguous(), side_by_side(k), side_by_side(v)
        o, lse = forward_pass(q, k, v, reach, scale, tiles)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.reach, ctx.scale, ctx.tiles = reach, scale, tiles
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # of `lse` there is none
        return o, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, o, lse = ctx.saved_tensors
        return *backward_pass(q, k, v, ctx.reach, o, lse, gradients[0].contiguous(), ctx.scale, ctx.tiles), *[None] * 3


def forward_pass(q: Tensor, k: Tensor, v: Tensor, reach: Reach, scale: float, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """What `Attend` gives."""
    batch, length, heads, width = q.shape
    o, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    tile = tiles.forward if reach.chosen is None else tiles.list_forward
    cut = rows(tile, heads // k.shape[2], listed=reach.chosen is not None)
    kernels.forward_kernel[(triton.cdiv(length, cut["size"]) * batch * k.shape[2],)](
        q=q,
        k=k,
        v=v,
        o=o,
        lse=lse,
        chosen=reach.chosen,
        width=width,
        value_box=box(v.shape[-1]),
        **common(q, v, k, reach, scale, tile),
        **cut,
    )
    return o, lse


def backward_pass(
    q: Tensor, k: Tensor, v: Tensor, reach: Reach, o: Tensor, lse: Tensor, do: Tensor, scale: float, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    (batch, length, heads, width), groups, values = q.shape, k.shape[2], v.shape[-1]
    listed = reach.chosen is not None
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(lse.numel(), tiles.delta.block_m),)](
        o=o,
        do=do,
        delta=delta,
        rows=lse.numel(),
        block_m=tiles.delta.block_m,
        rank=values,
        rank_box=box(values),
        **launch(tiles.delta),
    )
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k, v))
    given = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta, "width": width, "width_box": box(width)}
    tile = tiles.list_dq if listed else tiles.dq
    cut = rows(tile, heads // groups, listed=listed)
    kernels.dq_kernel[(triton.cdiv(length, cut["size"]) * batch * groups,)](
        dq=dq, chosen=reach.chosen, **given, **common(q, v, k, reach, scale, tile), **cut
    )
    if not k.shape[1]:
        return dq, dk, dv
    tile = tiles.list_dkv if listed else tiles.dkv
    order, bounds, owners, step = inverted(reach, length) if listed else (None, None, 0, tile.block_n)
    if listed:
        tile = attrs.evolve(tile, block_n=box(reach.span))
    owners = owners or triton.cdiv(k.shape[1], step)
    number, cut = owners * batch * groups, rows(tile, heads // groups, listed=False)
    shares, chunk = None, 0
    if bounds is not None and reach.chosen is not None:
        chunk = SHARE
        shares = Shares.of(bounds.diff(), chunk, reach.chosen.numel() // chunk)
    elif reach.mode == kernels.COMPRESSED.value:
        chunk = triton.cdiv(triton.cdiv(length, SHARERS), cut["size"]) * cut["size"]
        readers = torch.full((number,), length, dtype=torch.int64, device=k.device)
        shares = Shares.of(readers, chunk, number * (triton.cdiv(length, chunk) - 1))
    extra = 0 if shares is None else len(shares.owner_of)
    told = {**common(q, v, k, reach, scale, tile), "owners": owners, "step": step}
    # an owner that is shared has two sums at least
    parts = [lse.new_empty(2 * extra, tile.block_n, size) for size in (width, values)]
    shared: dict[str, Any] = dict.fromkeys(("more", "base", "owner_of", "chunk_of", "part", "part_v"))
    if shares is not None:
        shared = {**attrs.asdict(shares, recurse=False), "part": parts[0], "part_v": parts[1]}
    kernels.dkv_kernel[(extra + number,)](
        dk=dk,
        dv=dv,
        end=ends(reach.start) if isinstance(reach.start, Tensor) else None,
        order=order,
        bounds=bounds,
        **shared,
        extra=extra,
        chunk=chunk,
        value_box=box(values),
        **given,
        **told,
        **cut,
    )
    if shares is not None and extra:
        names = ("start", "positions", "kv_heads", "num_keys", "step", "owners", "block_n", "span", "mode", "documents")
        for part, to in zip(parts, (dk, dv), strict=True):
            kernels.join_kernel[(number,)](
                part=part,
                dk=to,
                more=shares.more,
                base=shares.base,
                width=to.shape[-1],
                width_box=box(to.shape[-1]),
                **{name: told[name] for name in names},
                **launch(tiles.delta),
            )
    return dq, dk, dv


@attrs.frozen(kw_only=True)
class Shares:
    """Owners of keys whose readers several programs share, as one would go through them for too long."""

    more: Tensor  # [owners] i32, programs beside the first one
    base: Tensor  # [owners] i32, place of the first one's sum among the parts
    owner_of: Tensor  # [extra] i32, of the programs beside
    chunk_of: Tensor  # [extra] i32, which part of the readers each has; -1: there is nothing for it

    @classmethod
    def of(cls, readers: Tensor, chunk: int, extra: int) -> Shares:
        """Shares of `chunk` readers. extra: at least the sum of (readers - 1) // chunk."""
        more = (readers - 1).clamp(min=0) // chunk
        until, held = more.cumsum(0), more + (more > 0)
        number = torch.arange(extra, device=readers.device)
        owner = torch.searchsorted(until, number, right=True)
        there = owner < len(readers)
        owner = owner.clamp(max=len(readers) - 1)
        chunk_of = torch.where(there, number - (until - more)[owner] + 1, -1)
        return cls(more=more.int(), base=(held.cumsum(0) - held).int(), owner_of=owner.int(), chunk_of=chunk_of.int())


def inverted(reach: Reach, length: int) -> tuple[Tensor, Tensor, int, int]:
    """The lists of blocks, the other way round: which queries read a block, in their order.

    returns  places in the lists [B K T S], sorted by their block [B·K·T·S] i64; where those of each owner begin [B·K·O
             + 1] i64; owners O of a row: its blocks, or with documents, whose blocks begin anywhere, its tokens; and
             tokens from one owner to the next
    """
    if reach.chosen is None:
        raise ValueError("inverted: expected a list of blocks, got none; pass the selection")
    chosen = reach.chosen.transpose(1, 2)  # [B K T S]
    batch, groups = chosen.shape[:2]
    if isinstance(reach.start, Tensor):
        owners, step = length, 1
        owner = chosen * reach.span + reach.start[:, None, :, None]
    else:
        owners, step = triton.cdiv(length, reach.span), reach.span
        owner = chosen
    row = torch.arange(batch * groups, dtype=torch.int32, device=chosen.device).view(batch, groups, 1, 1)
    owner = torch.where(chosen < 0, batch * groups * owners, owner + row * owners)
    found, order = owner.flatten().sort(stable=True)
    edges = torch.arange(batch * groups * owners + 1, dtype=found.dtype, device=found.device)
    return order, torch.searchsorted(found, edges), owners, step


def select(
    q: Tensor, k: Tensor, lse: Tensor, reach: Reach, scale: float, span: int, count: int, tiles: Tiles
) -> Tensor:
    """The blocks of `span` tokens that each query and group selects, [B T K S] i32, ascending, -1 behind them."""
    q, k = q.contiguous(), side_by_side(k)
    batch, length, heads, width = q.shape
    groups, num_keys = k.shape[2], k.shape[1]
    num_blocks = triton.cdiv(length, span)
    slots = min(count, num_blocks)
    chosen = torch.empty(batch, length, groups, slots, dtype=torch.int32, device=q.device)
    number = batch * length * groups
    at_once = min(number, max(1, WORKSPACE // ((num_keys + num_blocks) * 4)))
    weight = lse.new_empty(at_once, max(1, num_keys))
    total = lse.new_empty(at_once, num_blocks)
    pack = max(16, triton.next_power_of_2(heads // groups))
    given = reach.arguments(k, k)
    known = {name: given[name] for name in ("start", "num_keys", "kv_heads", "block", "stride", "documents")}
    placed = {name: given[name] for name in ("begins", "k_batch", "k_row", "k_head")}
    tile = tiles.weight
    for first in range(0, number, at_once):
        here, at = min(at_once, number - first), {"first_row": first, "positions": length}
        kernels.weight_kernel[(here,)](
            q=q,
            k=k,
            lse=lse,
            weight=weight,
            heads=heads,
            group=heads // groups,
            scale=scale,
            pack=pack,
            block_n=tile.block_n,
            block_k=tile.block_k,
            width=width,
            **at,
            **known,
            **placed,
            **launch(tile),
        )
        kernels.total_kernel[(here,)](
            weight=weight,
            total=total,
            num_blocks=num_blocks,
            ratio=span // reach.stride,
            overlap=reach.block // reach.stride,
            span=span,
            block_n=tiles.select.block_n,
            **at,
            **known,
            **launch(tiles.select),
        )
        kernels.select_kernel[(here,)](
            total=total,
            chosen=chosen,
            num_blocks=num_blocks,
            count=count,
            slots=slots,
            span=span,
            block_n=tiles.select.block_n,
            start=given["start"],
            kv_heads=groups,
            documents=given["documents"],
            **at,
            **launch(tiles.select),
        )
    return chosen


def rows(tile: SparseTile, group: int, *, listed: bool) -> dict[str, int]:
    """Queries that a program takes at once, and heads of a group; of lists one query, as each has its own."""
    pack = triton.next_power_of_2(group)
    if listed:
        return {"size": 1, "pack": max(16, pack)}
    return {"size": max(1, tile.block_m // pack), "pack": pack}


def common(q: Tensor, v: Tensor, k: Tensor, reach: Reach, scale: float, tile: SparseTile) -> dict[str, Any]:
    """What every kernel of a branch is given."""
    return {
        "positions": q.shape[1],
        "heads": q.shape[2],
        "group": q.shape[2] // k.shape[2],
        "scale": scale,
        "value": v.shape[-1],
        "block_n": tile.block_n,
        "block_k": tile.block_k,
        **reach.arguments(k, v),
        **launch(tile),
    }


def side_by_side(x: Tensor) -> Tensor:
    """`x`, whose channels lie side by side, or a copy whose do."""
    return x if x.stride(-1) == 1 else x.contiguous()
