"""Which experts a token goes to, with which weights, and how load is kept even."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmoe.pure.core.tree import record
from nmoe.pure.model.norm import wide


@record
class Health:
    """How evenly experts are used; one entry a layer."""

    max_over_mean: Tensor  # f64, load of the busiest expert / mean load
    cv: Tensor  # f64, coefficient of variation: deviation of the load / mean load
    dead: Tensor  # i64, experts no token chose


@record
class Routing:
    """Where each token goes."""

    expert: Tensor  # [N K] i64, no expert twice in a row
    weight: Tensor  # [N K] f32, rows sum to the route scale


def first(x: Tensor, num: int) -> Tensor:
    """Indices of the `num` largest entries of the last axis, ties to the lower index."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :num]


def scores(x: Tensor, router: Tensor) -> Tensor:
    """Affinity of each token to each expert, sigmoid of fp32 logits.

    x        [N D]
    router   [D E]
    returns  [N E] f32 in (0, 1)
    Source:  DeepSeek-V3 (arXiv:2412.19437) eq. 15.
    """
    return torch.sigmoid(wide(x) @ wide(router))


def route(
    score: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    num_groups: int = 1,
    top_k_groups: int = 1,
    scale: float = 1.0,
    first: Callable[[Tensor, int], Tensor] = first,
) -> Routing:
    """Choose `top_k` experts a token by biased score, weigh them by the unbiased one.

    With groups, a token first keeps the groups whose two best experts have the largest biased sum, then chooses
    among their experts.

    score    [N E] f32
    bias     [E] f32   steers selection only; updated by `balance`
    scale    sum of a token's weights
    first    `first` or a kernel that implements it
    Source:  DeepSeek-V3 (arXiv:2412.19437) eq. 13-16, groups as in section 2.1.2.
    """
    choice = score.detach() + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        kept = first(grouped.topk(2, dim=-1).values.sum(-1), top_k_groups)
        member = (kept[..., None] == torch.arange(num_groups, device=kept.device)).any(-2)
        choice = grouped.masked_fill(~member[..., None], float("-inf")).flatten(-2)
    expert = first(choice, top_k)
    weight = score.gather(-1, expert)
    return Routing(expert, scale * weight / weight.sum(-1, keepdim=True))


def choose(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    *,
    scores: Callable[[Tensor, Tensor], Tensor] = scores,
    **how: Any,
) -> tuple[Tensor, Routing]:
    """Scores, and what `route` makes of them.

    scores   `scores` or a kernel that implements it
    how      keywords of `route`
    """
    score = scores(x, router)
    return score, route(score, bias, **how)


def load(expert: Tensor, num_experts: int) -> Tensor:
    """Tokens each expert was chosen by.

    expert   [... K] i64
    returns  [E] i64
    """
    flat = expert.flatten()
    return flat.new_zeros(num_experts).scatter_add(0, flat, torch.ones_like(flat))


def balance(bias: Tensor, load: Tensor, *, rate: float) -> Tensor:
    """Nudge the bias of under-loaded experts up and of over-loaded ones down.

    bias     [... E] f32
    load     [... E] i64   tokens of the whole step, all ranks
    Source:  Wang et al. (arXiv:2408.15664) algorithm 1.
    """
    rows = load.to(bias.dtype)
    return bias + rate * torch.sign(rows.mean(-1, keepdim=True) - rows)


def health(load: Tensor) -> Health:
    """Evenness of the load of each layer.

    load     [L E] i64, each row with a token at least
    """
    rows = load.double()
    mean = rows.mean(-1)
    return Health(rows.amax(-1) / mean, rows.std(-1, correction=0) / mean, (load == 0).sum(-1))


def sequence_imbalance(score: Tensor, *, top_k: int, first: Callable[[Tensor, int], Tensor] = first) -> Tensor:
    """The sequence-wise auxiliary loss, summed over sequences and not yet weighted.

    Per sequence, the share of tokens that would choose an expert by unbiased score times the mean share of its score:
    one when both are even.

    score    [B T E] f32
    first    `first` or a kernel that implements it
    returns  scalar f32
    Source:  DeepSeek-V3 (arXiv:2412.19437) eq. 17-20.
    """
    num_experts = score.shape[-1]
    chosen = first(score.detach(), top_k)
    hot = torch.zeros_like(score.detach()).scatter(-1, chosen, 1.0)
    fraction = hot.mean(-2) * (num_experts / top_k)
    share = (score / score.sum(-1, keepdim=True)).mean(-2)
    return (fraction * share).sum()


def entropy(score: Tensor) -> Tensor:
    """Mean entropy of a token's normalised scores, in nats; log E when the router has no opinion.

    score    [N E] f32
    """
    share = score / score.sum(-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(-1).mean()
