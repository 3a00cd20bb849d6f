"""The products of the experts over the rows that a rank holds, in the format of the rows or in fp8.

Each is what `device` runs between two barriers. N tokens of this rank, C rows it can hold, W ranks, E experts of all,
D hidden size, F width of an expert.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.kernels.moe import dispatch as places
from nmoe.effects.kernels.moe import experts, fp8, moe_fp8
from nmoe.effects.kernels.moe.experts import PLAIN, Form
from nmoe.effects.kernels.moe.moe import Tiles, activation_gradient
from nmoe.effects.parallel.exchange.arena import Exchange, view
from nmoe.pure.parallel.exchange_arena import Field


@attrs.frozen(kw_only=True)
class Kept:
    """Destinations and origins of all rows; the backward pass uses them too."""

    slot: Tensor  # [P] i32, pair in the order of experts -> pair in the order of tokens
    place: Tensor  # [N K] i32, the other way
    row_to: Tensor  # [N K] i32, rank that holds the pair's expert
    row_at: Tensor  # [N K] i32, its row there
    token_to: Tensor  # [N K] i32, rank to send the token to for this choice; no rank if it goes there already
    token_at: Tensor  # [N K] i32, place in the landing buffer
    token_slot: Tensor  # [P] i32, choices in an order in which neighbours land side by side
    origin_to: Tensor  # [C] i32, rank a row came from
    origin_at: Tensor  # [C] i32, its pair there
    source: Tensor  # [C] i32, row -> place in the landing buffer
    count: Tensor  # [E/W] i32
    end: Tensor  # [E/W] i32
    valid: Tensor  # [3] i32
    crossing: Tensor  # [3] i32


@attrs.frozen(kw_only=True)
class Product:
    """A product whose rows go back to where their tokens came from."""

    here: Callable[[], Tensor]  # [C D], in memory of this rank
    push_: Callable[[Tensor, Tensor, Tensor, int], None]  # [C] ranks, [C] places, [W] addresses, offset: stored there


class Products(Protocol):
    """The products of a pass. Weights are those of the experts held here: `up` [E/W D 2 F], `down` [E/W F D]."""

    @property
    def tiles(self) -> Tiles:
        """Of the weight gradients, at least."""
        ...

    def sent(self, e: Exchange, x: Tensor) -> tuple[Field, Tensor]:
        """What crosses of tokens [N D] in the forward pass, and where it lands."""
        ...

    def forward(self, e: Exchange, kept: Kept, up: Tensor, down: Tensor) -> tuple[Tensor, Product]:
        """Of what has landed the pre-activation [C 2 F], and the output of each row."""
        ...

    def backward(
        self, e: Exchange, kept: Kept, pulls: Tensor, up: Tensor, down: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Product]:
        """Gradient of the pre-activation [C 2F], the activation times its gate [C F], the gate's gradient in parts
        [C tiles] f32, and the input's gradient of each row.

        pulls  [C D]   gradient of the output at each row; tokens' are in the landing buffer, gates in their field
        """
        ...

    def bias_gradient(self, dh: Tensor, kept: Kept) -> Tensor | None:
        """Of the bias, from that of the pre-activation."""
        ...


@attrs.frozen(kw_only=True)
class Stored:
    """Products in the format that rows and weights are stored in."""

    tiles: Tiles
    form: Form = PLAIN

    def sent(self, e: Exchange, x: Tensor) -> tuple[Field, Tensor]:
        """See `Products`."""
        return e.fields.land, x

    def forward(self, e: Exchange, kept: Kept, up: Tensor, down: Tensor) -> tuple[Tensor, Product]:
        """See `Products`."""
        t, capacity = self.tiles, e.sizes.capacity
        cut = places.tiles(kept.count, capacity, t.up.block_m)
        land = view(e.raw, e.fields.land)
        h, a = experts.gather_gemm_swiglu(land, kept.source, up, kept.end, cut, t.up, t.group, self.form)
        cut = places.tiles(kept.count, capacity, t.down.block_m)
        rest = {"end": kept.end, "tiles": cut, "tile": t.down, "group": t.group, "transposed": False}
        return h, Product(
            here=partial(experts.grouped_gemm, a, down, **rest),
            push_=partial(experts.grouped_gemm_push_, a, down, **rest),
        )

    def backward(
        self, e: Exchange, kept: Kept, pulls: Tensor, up: Tensor, down: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Product]:
        """See `Products`.

        One tile a program where the kernel allows it: of persistent programs, those whose multiprocessor pushes rows
        would begin late with an equal share of the tiles. Not measured apart from other changes (docs/log.md,
        2026-11-28).
        """
        t, capacity = self.tiles, e.sizes.capacity
        identity = torch.arange(capacity, dtype=torch.int32, device=h.device)
        cut = partial(places.tiles, kept.count, capacity)
        gate = view(e.raw, e.fields.gate)
        dh, a, part = activation_gradient(pulls, identity, gate, down, h, kept.end, cut, t, self.form, sys.maxsize)
        dh = dh.flatten(1)
        cut = places.tiles(kept.count, capacity, t.input.block_m)
        rest = {"end": kept.end, "tiles": cut, "tile": t.input, "group": t.group, "transposed": True}
        dx = Product(
            here=partial(experts.grouped_gemm, dh, up.flatten(2), **rest),
            push_=partial(experts.grouped_gemm_push_, dh, up.flatten(2), **rest),
        )
        return dh, a, part, dx

    def bias_gradient(self, dh: Tensor, kept: Kept) -> Tensor | None:
        """See `Products`."""
        return self.form.gradient(dh, kept.end, kept.count)


@attrs.frozen(kw_only=True)
class Fp8:
    """Products of the recipe "fp8", as `moe_fp8` has them: the same codes, for a token and a block of a weight are
    quantised alike wherever they are. Weight gradients are in the format that rows are stored in."""

    tiles: Tiles

    def sent(self, e: Exchange, x: Tensor) -> tuple[Field, Tensor]:
        """Codes and scales: all that the first product reads. Rows follow in the backward pass, in overlap."""
        with record_function("quantise"):
            return e.fields.land_codes, fp8.packed_rows(x, e.fields.land_codes.shape[-1])

    def forward(self, e: Exchange, kept: Kept, up: Tensor, down: Tensor) -> tuple[Tensor, Product]:
        """See `Products`."""
        s, group = e.sizes, self.tiles.group
        with record_function("quantise"):
            up_codes, up_scale = fp8.quantise_weight(up.flatten(2), across=True)
            down_codes, down_scale = fp8.quantise_weight(down, across=True)
        codes, scale = fp8.unpacked(view(e.raw, e.fields.land_codes), s.hidden_size)
        cut = places.tiles(kept.count, s.capacity, moe_fp8.UP.block_m)
        h, a, a_scale = fp8.gather_gemm_swiglu(
            codes, scale, kept.source, up_codes, up_scale, kept.end, cut, moe_fp8.UP, group, s.dtype
        )
        return h, self._product(e, kept, a, a_scale, down_codes, down_scale, moe_fp8.DOWN, across=True)

    def backward(
        self, e: Exchange, kept: Kept, pulls: Tensor, up: Tensor, down: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Product]:
        """See `Products`. The output's gradient has come whole, for the weight gradient, and is quantised here, once
        a token."""
        s, f = e.sizes, e.fields
        identity = torch.arange(s.capacity, dtype=torch.int32, device=h.device)
        tile, group = moe_fp8.BACKWARD, self.tiles.group
        with record_function("quantise"):
            # with dedup a rank does not know how many tokens landed, but that they are at most `landing`
            limit = None if s.dedup else kept.valid[2:]
            dy_codes, dy_scale = fp8.quantise_rows(view(e.raw, f.land_gradient), limit)
            up_codes, up_scale = fp8.quantise_weight(up.flatten(2), across=False)
            down_codes, down_scale = fp8.quantise_weight(down, across=False)
        cut = places.tiles(kept.count, s.capacity, tile.block_m)
        gathered = fp8.gather_rows(dy_codes, dy_scale, kept.source, kept.end)
        a = fp8.grouped_gemm(*gathered, down_codes, down_scale, kept.end, cut, tile, group, s.dtype, across=False)
        dh, dh_codes, dh_scale, part = fp8.swiglu_backward_(a, h, view(e.raw, f.gate), identity, kept.end)
        dx = self._product(e, kept, dh_codes, dh_scale, up_codes, up_scale, tile, across=False)
        return dh.flatten(1), a, part, dx

    def bias_gradient(self, dh: Tensor, kept: Kept) -> Tensor | None:
        """Experts in fp8 have no bias."""
        return None

    def _product(
        self, e: Exchange, kept: Kept, rows: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, tile: fp8.Tile,
        *, across: bool,
    ) -> Product:  # fmt: skip
        cut = places.tiles(kept.count, e.sizes.capacity, tile.block_m)
        rest = {"end": kept.end, "tiles": cut, "tile": tile, "group": self.tiles.group, "dtype": e.sizes.dtype}
        return Product(
            here=partial(fp8.grouped_gemm, rows, scale, w, w_scale, **rest, across=across),
            push_=partial(fp8.grouped_gemm_push_, rows, scale, w, w_scale, **rest, across=across),
        )
