"""A mixture shared out among virtual ranks: tokens cut into as many parts, experts into equal ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.effects.kernels.moe.experts import Form
from nmoe.effects.kernels.moe.moe import Tiles, moe_experts
from nmoe.effects.kernels.moe.moe_fp8 import moe_experts_fp8
from nmoe.effects.parallel.exchange import Exchange, Sizes, arena, device
from nmoe.effects.parallel.exchange.opening import virtual
from nmoe.effects.parallel.exchange.products import Fp8, Stored
from nmoe.pure.model import route
from nmoe.pure.model.route import Routing
from tests.kernels.truth import normal
from tests.poison import poison_


@attrs.frozen(kw_only=True)
class Case:
    """What a mixture is given, forward and backward."""

    x: Tensor
    expert: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor
    bias: Tensor
    added: Tensor
    grad_output: Tensor


LIMIT, ALPHA = 0.7, 1.702  # many gates and values lie beyond


def chosen(kind: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Experts of each token: as it comes, all to one, none to the first half of the experts, ties."""
    score = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1))
    if kind == "all to one":
        score[:, 3] += 1
    elif kind == "none to the first half":
        score[:, : experts // 2] -= 2
    elif kind == "ties":
        score[:] = 0.5
    return route.top_k(score, top_k).contiguous()


def case(
    kind: str,
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
    where: str = "cpu",
) -> Case:
    """Random values and a routing of some kind."""

    def draw(*shape: int, seed: int) -> Tensor:
        return normal(*shape, seed=seed, dtype=dtype, device=where)

    return Case(
        x=draw(tokens, hidden, seed=0),
        expert=chosen(kind, tokens, experts, top_k).to(where),
        weight=normal(tokens, top_k, seed=1, device=where).abs(),
        up=draw(experts, hidden, 2, width, seed=2) / hidden**0.5,
        down=draw(experts, width, hidden, seed=3) / width**0.5,
        bias=draw(experts, 2, width, seed=5),
        added=draw(tokens, hidden, seed=6),
        grad_output=draw(tokens, hidden, seed=4),
    )


def single_rank(c: Case, tiles: Tiles, *, fp8: bool = False) -> list[Tensor]:
    """Output and gradients of x, weight, up, down, bias by the kernels of one rank; in fp8 without a bias."""
    if fp8:
        leaves = [each.clone().requires_grad_() for each in (c.x, c.weight, c.up, c.down)]
        y, _ = moe_experts_fp8(leaves[0], Routing(c.expert, leaves[1]), *leaves[2:], tiles=tiles, added=(c.added,))
        return [y.detach(), *torch.autograd.grad(y, leaves, c.grad_output)]
    leaves = [each.clone().requires_grad_() for each in (c.x, c.weight, c.up, c.down, c.bias)]
    form: dict[str, Any] = {"limit": LIMIT, "alpha": ALPHA, "added": (c.added,)}
    y, _ = moe_experts(leaves[0], Routing(c.expert, leaves[1]), *leaves[2:], tiles=tiles, **form)
    return [y.detach(), *torch.autograd.grad(y, leaves, c.grad_output)]


def open_ranks(
    c: Case,
    parts: Sequence[int],
    *,
    dedup: bool,
    capacity: int | None = None,
    staged: bool = False,
    fp8: bool = False,
) -> tuple[Exchange, ...]:
    """Virtual ranks for a case, their arenas poisoned but for the flags.

    parts     tokens of each rank
    capacity  rows a rank holds; None: the most any rank gets
    """
    ranks, experts = len(parts), c.up.shape[0]
    rows = route.load(c.expert, experts).unflatten(0, (ranks, -1)).sum(1).max()
    sizes = Sizes(
        ranks=ranks,
        experts=experts,
        top_k=c.expert.shape[1],
        hidden_size=c.x.shape[1],
        tokens=max(parts),
        capacity=int(rows) if capacity is None else capacity,
        dedup=dedup,
        dtype=c.x.dtype,
        staged=staged,
        fp8=fp8,
    )
    exchanges = virtual(sizes, c.x.device)
    for e in exchanges:
        for field in attrs.fields(arena.Fields):
            if field.name not in ("arrived", "size"):
                poison_(arena.view(e.raw, getattr(e.fields, field.name)))
    return exchanges


def shared(c: Case, exchanges: Sequence[Exchange], parts: Sequence[int], tiles: Tiles) -> list[Tensor]:
    """The same as `single_rank`, by ranks that each have some of the tokens and of the experts."""
    by_token = (c.x, c.expert, c.weight, c.added, c.grad_output)
    x, expert, weight, added, grad_output = (each.split(list(parts)) for each in by_token)
    up, down = c.up.chunk(len(parts)), c.down.chunk(len(parts))
    products = [
        Fp8(tiles=tiles) if e.sizes.fp8 else Stored(tiles=tiles, form=Form(bias=bias, limit=LIMIT, alpha=ALPHA))
        for e, bias in zip(exchanges, c.bias.chunk(len(parts)), strict=True)
    ]
    forward = [
        device.forward_(e, x[r], expert[r], weight[r], up[r], down[r], products[r], (added[r],))
        for r, e in enumerate(exchanges)
    ]
    out = device.run_(exchanges, forward)
    backward = [
        device.backward_(e, grad_output[r], x[r], weight[r], up[r], down[r], *out[r][2:], products[r])
        for r, e in enumerate(exchanges)
    ]
    back = [[each for each in grads if each is not None] for grads in device.run_(exchanges, backward)]
    return [torch.cat([y for y, *_ in out]), *(torch.cat(each) for each in zip(*back, strict=True))]
