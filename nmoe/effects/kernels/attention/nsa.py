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
import torch.nn.functional as F
import triton
from torch import Tensor

from nmoe.config.attention import NSA_MOST
from nmoe.effects.kernels.attention import gqa
from nmoe.effects.kernels.attention import nsa_kernels as kernels
from nmoe.effects.kernels.attention.blocks import box, described, readable
from nmoe.effects.kernels.attention.dsa import launch
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.tables import AttentionTile, SparseTile
from nmoe.errors import InputError
from nmoe.pure.model.attention.blocks import SHARE, WORKSPACE

SIDE_BY_SIDE = 8
"""Heads of keys whose programs run next to each other where a range of keys is read."""


@attrs.frozen(kw_only=True)
class Tiles:
    """Tile sizes of each kernel; `block_m` counts queries times heads, of `dkv` queries."""

    forward: SparseTile
    dq: SparseTile
    dkv: SparseTile
    list_forward: SparseTile
    list_dq: SparseTile
    list_dkv: SparseTile
    weight: SparseTile
    select: SparseTile
    join: SparseTile

    def of_ranges(self) -> gqa.Tiles:
        """Those of the branches that read a range of keys."""
        sizes = ("block_m", "block_n", "num_warps", "num_stages")
        named = {"forward": self.forward, "dq": self.dq, "dkv": self.dkv}
        return gqa.Tiles(
            **{
                name: AttentionTile(heads=SIDE_BY_SIDE, **{size: getattr(tile, size) for size in sizes})
                for name, tile in named.items()
            }
        )


@attrs.frozen(kw_only=True)
class Lists:
    """Which blocks of tokens a query reads."""

    chosen: Tensor  # [B T K S] i32
    start: Tensor | tuple[()]  # [B T] i32, first token of each token's document
    span: int  # tokens of a block


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
    mask = gqa.Mask(start=start, window=None if window >= q.shape[1] else window)
    return gqa.GqaAttention.apply(q, k, v, sinks, mask, scale, tiles.of_ranges())[0]


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
    if not k.shape[1]:
        # one that nobody sees: descriptors describe a row at least
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        first = F.pad(first, (0, 1), value=q.shape[1])
    begins = first.expand(q.shape[0], -1).to(torch.int32).contiguous()
    mask = gqa.Mask(start=start, blocks=gqa.Blocks(begins=begins, size=block, stride=stride))
    o, lse = gqa.GqaAttention.apply(q, k, v, (), mask, scale, tiles.of_ranges())
    with torch.no_grad():
        chosen = select(q, k, lse, mask, scale, selected_block, num_selected, tiles)
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
    return Attend.apply(q, k, v, Lists(chosen=chosen.contiguous(), start=start, span=block), scale, tiles)


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
    """The selected branch: forward, and a backward pass of two kernels: one owns queries, the other keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, tiles: Tiles) -> Tensor:
        """Output [B T H U]; the logarithm to base 2 of each row's sum of exponentials is kept."""
        q, k, v = q.contiguous(), readable(k), readable(v)
        o, lse = forward_pass(q, k, v, lists, scale, tiles.list_forward)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.lists, ctx.scale, ctx.tiles = lists, scale, tiles
        return o

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, o, lse = ctx.saved_tensors
        do = gradients[0].contiguous()
        dq, delta = dq_pass(q, k, v, ctx.lists, o, lse, do, ctx.scale, ctx.tiles.list_dq)
        dk, dv = dkv_pass(q, k, v, ctx.lists, lse, delta, do, ctx.scale, ctx.tiles)
        return dq, dk, dv, None, None, None


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, tile: SparseTile
) -> tuple[Tensor, Tensor]:
    """Output, and logarithms to base 2 of row sums [B T H] f32."""
    o, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    kernels.forward_kernel[(q.shape[0] * q.shape[1] * k.shape[2],)](
        q=q,
        o=o,
        lse=lse,
        chosen=lists.chosen,
        slots=lists.chosen.shape[-1],
        slots_box=triton.next_power_of_2(lists.chosen.shape[-1]),
        **common(q, k, v, lists, scale, tile),
    )
    return o, lse


def dq_pass(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, o: Tensor, lse: Tensor, do: Tensor, scale: float, tile: SparseTile
) -> tuple[Tensor, Tensor]:
    """Gradient of q, and what softmax takes off each of a row's gradients [B T H] f32."""
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    kernels.dq_kernel[(q.shape[0] * q.shape[1] * k.shape[2],)](
        q=q,
        o=o,
        do=do,
        dq=dq,
        lse=lse,
        delta=delta,
        chosen=lists.chosen,
        slots=lists.chosen.shape[-1],
        slots_box=triton.next_power_of_2(lists.chosen.shape[-1]),
        **common(q, k, v, lists, scale, tile),
    )
    return dq, delta


def dkv_pass(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, lse: Tensor, delta: Tensor, do: Tensor, scale: float, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    (batch, length), groups, values = q.shape[:2], k.shape[2], v.shape[-1]
    dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (k, v))
    tile = tiles.list_dkv
    readers, bounds, owners, step = inverted(lists, length)
    shares = Shares.of(bounds.diff(), SHARE, lists.chosen.numel() // SHARE)
    extra, number, block_n = len(shares.owner_of), owners * batch * groups, box(lists.span)
    # an owner that is shared has two sums at least
    parts = [lse.new_empty(2 * extra, block_n, size) for size in (k.shape[-1], values)]
    given = common(q, k, v, lists, scale, tile)
    kernels.dkv_kernel[(extra + number,)](
        q=q,
        do=do,
        dk=dk,
        dv=dv,
        lse=lse,
        delta=delta,
        readers=readers,
        bounds=bounds,
        **attrs.asdict(shares, recurse=False),
        part=parts[0],
        part_v=parts[1],
        step=step,
        owners=owners,
        extra=extra,
        chunk=SHARE,
        size=max(1, tile.block_m // given["pack"]),
        **given,
    )
    if extra:
        for part, to in zip(parts, (dk, dv), strict=True):
            kernels.join_kernel[(number,)](
                part=part,
                dk=to,
                more=shares.more,
                base=shares.base,
                step=step,
                owners=owners,
                width=to.shape[-1],
                width_box=box(to.shape[-1]),
                **{name: given[name] for name in ("start", "positions", "kv_heads", "block_n", "span", "documents")},
                **launch(tiles.join),
            )
    return dk, dv


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


def inverted(lists: Lists, length: int) -> tuple[Tensor, Tensor, int, int]:
    """The lists of blocks, the other way round: which queries read a block, in their order.

    returns  queries, sorted by the block they read [B·K·T·S] i32; where those of each owner begin [B·K·O + 1] i64;
             owners O of a row: its blocks, or with documents, whose blocks begin anywhere, its tokens; and tokens from
             one owner to the next
    """
    chosen = lists.chosen.transpose(1, 2)  # [B K T S]
    batch, groups, _, slots = chosen.shape
    if isinstance(lists.start, Tensor):
        owners, step = length, 1
        owner = chosen * lists.span + lists.start[:, None, :, None]
    else:
        owners, step = triton.cdiv(length, lists.span), lists.span
        owner = chosen
    row = torch.arange(batch * groups, dtype=torch.int32, device=chosen.device).view(batch, groups, 1, 1)
    owner = torch.where(chosen < 0, batch * groups * owners, owner + row * owners)
    found, order = owner.flatten().sort(stable=True)
    edges = torch.arange(batch * groups * owners + 1, dtype=found.dtype, device=found.device)
    readers = (order // slots % length).to(torch.int32)
    return readers, torch.searchsorted(found, edges), owners, step


def select(
    q: Tensor, k: Tensor, lse: Tensor, mask: gqa.Mask, scale: float, span: int, count: int, tiles: Tiles
) -> Tensor:
    """The blocks of `span` tokens that each query and group selects, [B T K S] i32, ascending, -1 behind them.

    lse  [B·H T] f32, as `gqa.forward_pass` has it
    """
    if mask.blocks is None:
        raise ValueError("select: expected the mask of compressed keys, got one of tokens; pass what they stand for")
    q, k, tile = q.contiguous(), readable(k), tiles.weight
    batch, length, heads, width = q.shape
    groups, num_keys = k.shape[2], k.shape[1]
    num_blocks = triton.cdiv(length, span)
    slots = min(count, num_blocks)
    chosen = torch.empty(batch, length, groups, slots, dtype=torch.int32, device=q.device)
    number = batch * length * groups
    at_once = min(number, max(1, WORKSPACE // ((num_keys + num_blocks) * 4)))
    weight = lse.new_empty(at_once, num_keys)
    total = lse.new_empty(at_once, num_blocks)
    near, far = gqa.parted(k)
    documents = isinstance(mask.start, Tensor)
    told: dict[str, Any] = {
        "start": mask.start if documents else None,
        "positions": length,
        "kv_heads": groups,
        "documents": documents,
    }
    placed = {"num_keys": num_keys, "block": mask.blocks.size, "stride": mask.blocks.stride}
    for first in range(0, number, at_once):
        here = min(at_once, number - first)
        kernels.weight_kernel[(here,)](
            q=q,
            k=described(near, tile.block_n),
            k_far=far if far is None else described(far, tile.block_n),
            lse=lse,
            begins=mask.blocks.begins,
            weight=weight,
            first_row=first,
            padded=lse.stride(0),
            heads=heads,
            group=heads // groups,
            scale=scale,
            pack=box(heads // groups),
            block_n=tile.block_n,
            width=width,
            near=box(near.shape[-1]),
            far=0 if far is None else box(far.shape[-1]),
            **told,
            **placed,
            **launch(tile),
        )
        kernels.total_kernel[(here,)](
            weight=weight,
            total=total,
            first_row=first,
            num_blocks=num_blocks,
            ratio=span // mask.blocks.stride,
            overlap=mask.blocks.size // mask.blocks.stride,
            span=span,
            block_n=tiles.select.block_n,
            **told,
            **placed,
            **launch(tiles.select),
        )
        kernels.select_kernel[(here,)](
            total=total,
            chosen=chosen,
            first_row=first,
            num_blocks=num_blocks,
            count=count,
            slots=slots,
            span=span,
            block_n=tiles.select.block_n,
            **told,
            **launch(tiles.select),
        )
    return chosen


def common(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, tile: SparseTile) -> dict[str, Any]:
    """What the kernels of the selected branch are given; a step is one block."""
    (near, far), block_n, group = gqa.parted(k), box(lists.span), q.shape[2] // k.shape[2]
    return {
        "k": described(near, block_n),
        "k_far": far if far is None else described(far, block_n),
        "v": described(v, block_n),
        "start": lists.start if isinstance(lists.start, Tensor) else None,
        "positions": q.shape[1],
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "group": group,
        "scale": scale,
        "pack": box(group),
        "block_n": block_n,
        "width": q.shape[-1],
        "near": box(near.shape[-1]),
        "far": 0 if far is None else box(far.shape[-1]),
        "value_width": v.shape[-1],
        "value": box(v.shape[-1]),
        "span": lists.span,
        "documents": isinstance(lists.start, Tensor),
        **launch(tile),
    }
