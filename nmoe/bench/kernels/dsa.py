"""Sparse latent attention and its indexer, and its dense stage, beside dense latent attention of the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import attrs
import torch
from torch import Tensor

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.effects.kernels.attention import dsa, dsa_dense, mla
from nmoe.pure.model.attention.dsa import attend_dense, attend_dsa
from nmoe.pure.model.attention.gqa import attended

PEER = "dense MLA"

NOPE, VALUE = 128, 128
"""Channels of a head without position, and of its value, in dense attention."""

CHECKED = 64
"""Last queries whose output and gradient are compared with fp64."""


@attrs.frozen(kw_only=True)
class Case:
    """Sizes; the heads' own are those of DeepSeek-V3.2."""

    batch: int
    length: int
    top_k: int
    heads: int
    rank: int
    rope: int
    index_heads: int
    index_channels: int

    def flop(self) -> float:
        """Forward and backward over attended pairs, two products and four, and the indexer's scores of all pairs."""
        read, scored = (self.batch * attended(self.length, window) for window in (self.top_k, None))
        a_pair = self.heads * (6 * self.rank + 3 * self.rope) + 3 * self.index_heads * self.index_channels
        return 2.0 * (read * a_pair + scored * self.index_heads * self.index_channels)

    def moved_bytes(self) -> float:
        """Queries, output, and each's gradient: forward reads and writes, backward too."""
        return 2.0 * self.batch * self.length * self.heads * 3 * (2 * self.rank + self.rope)


CASES = tuple(
    Case(batch=1, length=length, top_k=2048, heads=128, rank=512, rope=64, index_heads=64, index_channels=128)
    for length in (8192, 32768)
)


def variants(
    case: Case, device: torch.device, tiles: dsa.Tiles, stage: dsa_dense.Tiles, dense: mla.Tiles
) -> Iterator[Variant]:
    """The choice alone, attention with it and without, the dense stage and dense attention; projections are apart."""
    shape, scale = (case.batch, case.length), (128 + case.rope) ** -0.5
    q = draw(device, *shape, case.heads, case.rank + case.rope, name="q")
    kv = draw(device, *shape, case.rank + case.rope, name="kv")
    index = (
        draw(device, *shape, case.index_heads, case.index_channels, name="index_q"),
        draw(device, *shape, case.index_channels, name="index_k"),
        draw(device, *shape, case.index_heads, name="index_w", scale=(case.index_heads * case.index_channels) ** -0.5),
    )
    grad_output = draw(device, *shape, case.heads, case.rank, name="grad_output").detach()
    select = partial(dsa.select, *index, count=case.top_k, tiles=tiles)
    attend = partial(dsa.dsa_attention, scale=scale, rank=case.rank, tiles=tiles)
    chosen, leaves = select(), (q, kv, *index)

    def forward(keys: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return attend(*leaves, keys())

    def both(keys: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        o, loss = attend(*leaves, keys())
        one = torch.ones_like(loss)
        return o.detach(), loss.detach(), *torch.autograd.grad((o, loss), leaves, (grad_output, one))

    def error() -> float:
        o, _, dq, *_ = both(lambda: chosen)
        last = slice(max(0, case.length - CHECKED), None)
        own = q[:1, last].detach().double().requires_grad_()
        rows, index_k = (tensor[:1].detach().double() for tensor in (kv, index[1]))
        index_q, index_w = (tensor[:1, last].detach().double() for tensor in (index[0], index[2]))
        y, _ = attend_dsa(own, rows, index_q, index_k, index_w, chosen[:1, last], scale=scale, rank=case.rank)
        (right,) = torch.autograd.grad(y, own, grad_output[:1, last].double())
        return relative_error([o[:1, last], dq[:1, last]], [y.detach(), right])

    yield Variant(name="choice", forward=select, both=select, error=None)
    for name, keys in (("ours", select), ("ours, keys given", lambda: chosen)):
        yield Variant(name=name, forward=partial(forward, keys), both=partial(both, keys), error=error)
    expanded = (
        draw(device, *shape, case.heads, NOPE + case.rope, name="dense_q"),
        draw(device, *shape, case.heads, NOPE + VALUE, name="dense_kv"),
        draw(device, *shape, case.rope, name="dense_k"),
    )
    grad_of_values = draw(device, *shape, case.heads, VALUE, name="dense_grad").detach()
    yield warm_up(case, (*expanded, *index), grad_of_values, stage, dense, scale)
    if device.type == "cuda":
        yield whole(expanded, grad_of_values, dense, scale)


def warm_up(
    case: Case,
    leaves: tuple[Tensor, ...],
    grad_output: Tensor,
    tiles: dsa_dense.Tiles,
    dense: mla.Tiles,
    scale: float,
) -> Variant:
    """The dense stage: `whole`, and the indexer's loss over all keys."""
    attend = partial(dsa_dense.dense_attention, scale=scale, tiles=tiles, attention=dense)

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        o, loss = attend(*leaves)
        one = torch.ones_like(loss)
        return o.detach(), loss.detach(), *torch.autograd.grad((o, loss), leaves, (grad_output, one))

    def error() -> float:
        """Of the first queries, which see few keys: the reference has scores of all pairs of a block and head."""
        first = slice(0, min(case.length, 4 * CHECKED))
        cut = tuple(leaf[:1, first].detach() for leaf in leaves)
        exact = [leaf.double().requires_grad_() for leaf in cut]
        y, distance = attend_dense(*exact, scale=scale)
        right = torch.autograd.grad(distance, exact[3:])
        own = [leaf.requires_grad_() for leaf in cut]
        o, loss = attend(*own)
        gradients = torch.autograd.grad(loss, own[3:])
        return relative_error([o.detach(), loss.detach(), *gradients], [y.detach(), distance.detach(), *right])

    return Variant(name="dense stage", forward=forward, both=both, error=error)


def whole(leaves: tuple[Tensor, ...], grad_output: Tensor, tiles: mla.Tiles, scale: float) -> Variant:
    """Dense attention of heads of 128 channels of key and of value, and the rotated ones: deterministic."""
    attend = partial(mla.mla_attention, scale=scale, forward="cudnn", tiles=tiles)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        y = attend(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad_output)

    return Variant(name=PEER, forward=forward, both=both, error=None)
