"""Which experts a token goes to, with which weights, and how load is kept even."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.tree import record
from nmoe.pure.model.norm import upcast

REMEDY = "pass the choices that were made for these tokens"


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
    weight: Tensor  # [N K] f32, rows of normalised ones sum to the route scale


@record
class Routed:
    """What a router made of its tokens."""

    routing: Routing
    score: Tensor  # [N E] f32, carries the gradient
    favoured: Tensor  # [N K] i64, experts of the largest scores without bias, for the balance loss


def top_k(x: Tensor, num: int) -> Tensor:
    """Indices of the `num` largest entries of the last axis, ties to the lower index.

    Raises:  ValueError for more than there are.
    """
    if not 1 <= num <= x.shape[-1]:
        raise ValueError(
            f"top_k: expected num from 1 to the {x.shape[-1]} entries of the last axis, got {num}; choose fewer"
        )
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :num]


def logits(x: Tensor, router: Tensor, shift: Tensor | tuple[()] = ()) -> Tensor:
    """[N E] f32; `shift` is the router's own bias, see `scores`."""
    y = upcast(x) @ upcast(router)
    return y + upcast(shift) if isinstance(shift, Tensor) else y


def scores(x: Tensor, router: Tensor, shift: Tensor | tuple[()] = ()) -> Tensor:
    """Affinity of each token to each expert, sigmoid of fp32 logits.

    x        [N D]
    router   [D E]
    shift    [E] or ()   added to the logits: of choices and weights, unlike the router bias of `route`
    returns  [N E] f32 in (0, 1)
    Source:  DeepSeek-V3 (arXiv:2412.19437) eq. 15.
    """
    return torch.sigmoid(logits(x, router, shift))


def softmax_scores(x: Tensor, router: Tensor, shift: Tensor | tuple[()] = ()) -> Tensor:
    """Affinity of each token to each expert, softmax of fp32 logits over all experts.

    Normalised over the chosen experts, they are the softmax of the chosen logits, as gpt-oss weighs.

    x        [N D]
    router   [D E]
    shift    [E] or ()   as in `scores`
    returns  [N E] f32, rows sum to one
    Source:  DeepSeek-V2 (arXiv:2405.04434) eq. 22.
    """
    return torch.softmax(logits(x, router, shift), dim=-1)


VANISHING = 2.0**-64
"""Sum of scores below which they are filled up: all logits are then below -44. The gradient of a share, up to 1 / sum,
stays far inside fp32."""


def shares(score: Tensor, *, scale: float = 1.0) -> Tensor:
    """Scores over their sum, times `scale`.

    Sigmoids of finite logits can all be zero in fp32 (logits below -89). The rule for a sum below `VANISHING`: every
    entry gets an equal part of what the sum lacks. The result is finite, sums to `scale`, depends continuously on the
    scores, and is even where all of them are zero; a larger sum gives the bits of `scale * score / sum`.

    score    [... K], not negative
    returns  [... K]
    """
    total = score.sum(-1, keepdim=True)
    filled = total.clamp(min=VANISHING)
    return scale * (score + (filled - total) / score.shape[-1]) / filled


def gates(score: Tensor, expert: Tensor, *, scale: float = 1.0, normalize: bool = True) -> Tensor:
    """Weights of the chosen experts, from their scores without bias.

    score      [N E] f32
    expert     [N K] i64
    normalize  True: `shares` of the chosen scores, which sum to `scale`; False: each score times `scale`
    returns    [N K] f32
    Raises:    ValueError for choices of another number of tokens.
    """
    expect_shape("gates: expected choices", expert.shape, (*score.shape[:-1], expert.shape[-1]), REMEDY)
    weight = score.gather(-1, expert)
    return shares(weight, scale=scale) if normalize else scale * weight


def route(
    score: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    num_groups: int = 1,
    top_k_groups: int = 1,
    ranked_by: int = 2,
    scale: float = 1.0,
    normalize: bool = True,
    select: Callable[[Tensor, int], Tensor] = top_k,
) -> Routing:
    """Choose `top_k` experts a token by biased score, weigh them by the unbiased one.

    With groups, a token first keeps the groups whose `ranked_by` best experts have the largest biased sum, then chooses
    among their experts.

    score             [N E] f32
    bias              [E] f32   steers selection only; updated by `balance`
    scale, normalize  of the weights, as in `gates`
    select            `top_k` or a kernel that implements it
    Raises:           ValueError for a bias of another shape, or more choices than experts.
    Source:           DeepSeek-V3 (arXiv:2412.19437) eq. 13-16, groups as in section 2.1.2.
    """
    num_experts = score.shape[-1]
    expect_shape("route: expected a bias", bias.shape, (num_experts,), "pass one number an expert")
    open_to_a_token = num_experts // num_groups * top_k_groups
    if not 1 <= top_k <= open_to_a_token:
        raise ValueError(
            f"route: expected top_k from 1 to the {open_to_a_token} experts a token may choose from, got {top_k}; "
            "lower top_k"
        )
    choice = score.detach() + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        kept = select(grouped.topk(ranked_by, dim=-1).values.sum(-1), top_k_groups)
        member = (kept[..., None] == torch.arange(num_groups, device=kept.device)).any(-2)
        choice = grouped.masked_fill(~member[..., None], float("-inf")).flatten(-2)
    expert = select(choice, top_k)
    return Routing(expert, gates(score, expert, scale=scale, normalize=normalize))


def replay(
    score: Tensor, recorded: Routing | Tensor, *, top_k: int, scale: float = 1.0, normalize: bool = True
) -> Routing:
    """Recorded choices again; without weights they get gates of these scores, through which gradients flow.

    score     [N E] f32
    recorded  a Routing, or experts alone [N K] i64
    Raises:   ValueError for choices that do not fit the tokens.
    """
    expert, weight = (recorded, None) if isinstance(recorded, Tensor) else (recorded.expert, recorded.weight)
    wanted = (score.shape[0], top_k)  # tokens by top_k
    for name, tensor in (("expert", expert), ("weight", expert if weight is None else weight)):
        expect_shape(f"replay: expected routing.{name}", tensor.shape, wanted, REMEDY)
    if expert.dtype is not torch.int64:
        raise ValueError(f"replay: expected routing.expert in i64, got {expert.dtype}; pass expert.long()")
    if weight is None:
        weight = gates(score, expert, scale=scale, normalize=normalize)
    return Routing(expert, weight)


def route_tokens(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    shift: Tensor | tuple[()] = (),
    *,
    top_k: int,
    num_groups: int = 1,
    top_k_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
    softmax: bool = False,
    recorded: Routing | Tensor | tuple[()] = (),
    score: Callable[..., Tensor] = scores,
    softmax_score: Callable[..., Tensor] = softmax_scores,
    select: Callable[[Tensor, int], Tensor] = top_k,
) -> Routed:
    """Scores, what `route` makes of them, and what the balance loss needs.

    x         [N D]
    router    [D E]
    bias      [E] f32
    shift     [E] or ()   as in `scores`
    softmax   the router of DeepSeek-V2: `softmax_scores`, and groups ranked by their best expert
    recorded  choices to take in the place of the router's own, as in `replay`
    score     `scores` or a kernel that implements it; not called for a softmax
    softmax_score  the same of `softmax_scores`
    select    `top_k` or a kernel that implements it
    """
    affinity = (softmax_score if softmax else score)(x, router, shift)
    if isinstance(recorded, Routing | Tensor):
        routing = replay(affinity, recorded, top_k=top_k, scale=scale, normalize=normalize)
    else:
        groups = {"num_groups": num_groups, "top_k_groups": top_k_groups, "ranked_by": 1 if softmax else 2}
        routing = route(affinity, bias, top_k=top_k, scale=scale, normalize=normalize, select=select, **groups)
    return Routed(routing, affinity, select(affinity.detach(), top_k))


def load(expert: Tensor, num_experts: int) -> Tensor:
    """Tokens each expert was chosen by.

    expert   [... K] i64
    returns  [E] i64
    """
    flat = expert.flatten()
    return flat.new_zeros(num_experts).scatter_add(0, flat, torch.ones_like(flat))


def balance(bias: Tensor, load: Tensor, *, rate: float) -> Tensor:
    """Move the bias of under-loaded experts up and of over-loaded ones down, by steps that sum to zero.

    Selection does not depend on a shift common to all experts. Without centring, a load whose busy experts are few
    shifts all biases up, step after step, until they have no digits left for their differences.

    bias     [... E] f32
    load     [... E] i64   tokens of the whole step, all ranks; compared in integers, exact for any load
    Raises:  ValueError for a load of another shape.
    Source:  Wang et al. (arXiv:2408.15664) algorithm 1; the centring is ours.
    """
    expect_shape("balance: expected a load", load.shape, bias.shape, "pass one count for each number of the bias")
    sign = torch.sign(load.sum(-1, keepdim=True) - load.shape[-1] * load).to(bias.dtype)
    return bias + rate * (sign - sign.mean(-1, keepdim=True))


BINS = 1024
"""Of a histogram of margins over [-1, 1]: a quantile is found to less than a bin, 0.002."""


def margin_histogram(score: Tensor, bias: Tensor, expert: Tensor) -> Tensor:
    """How much bias each expert needs to be chosen, counted over tokens in `BINS` equal bins of [-1, 1].

    A margin is a token's cutoff less the expert's score without bias: the token chooses the experts whose bias is above
    their margin. Margins beyond the range count in the bin at its end.

    score    [N E] f32
    bias     [E] f32
    expert   [N K] i64   chosen by `score + bias`, without groups; fewer than E
    returns  [E BINS] i64, rows sum to N; histograms of microbatches and ranks add up
    Source:  Su (kexue.fm 11619), Kimi K3 report section 2.3.3. Their cutoff is the (K+1)-th biased score; ours lies
             midway between it and the K-th. The margin of the (K+1)-th expert would be its bias itself, and so many
             equal margins hold a bias in its bin: loads of fixed scores stayed 6 % from even, ours reach 0.3 %.
    Raises:  ValueError for a bias or choices of another shape.
    """
    num_tokens, num_experts = score.shape
    expect_shape("margin_histogram: expected a bias", bias.shape, (num_experts,), "pass one number an expert")
    expect_shape("margin_histogram: expected choices", expert.shape, (num_tokens, expert.shape[-1]), REMEDY)
    choice = score + bias
    best_left = choice.scatter(-1, expert, float("-inf")).amax(-1, keepdim=True)
    cutoff = (choice.gather(-1, expert).amin(-1, keepdim=True) + best_left) / 2
    place = ((cutoff - score + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    place = place + BINS * torch.arange(num_experts, device=score.device)
    return load(place, num_experts * BINS).view(num_experts, BINS)


def balance_quantile(bias: Tensor, margins: Tensor, *, top_k: int, decay: float) -> Tensor:
    """Move each bias towards the quantile of the expert's margins that gives it top_k / E of the tokens.

    Inside a bin the quantile is interpolated, so that it is less than a bin from the exact one. Biases are centred, as
    by `balance`.

    bias     [... E] f32
    margins  [... E BINS] i64   `margin_histogram` of the whole step, all ranks; a token at least
    decay    share of the old bias that is kept; 0: none
    Raises:  ValueError for margins of another shape.
    Source:  as `margin_histogram`; the moving average as Megatron-LM (PR 5349).
    """
    expect_shape("balance_quantile: expected margins", margins.shape, (*bias.shape, BINS), "pass a histogram an expert")
    up_to = margins.cumsum(-1)
    num_experts, wanted = bias.shape[-1], top_k * up_to[..., -1:]
    # In integers: num_experts times the tokens up to a bin, against num_experts times the share of an expert.
    place = (num_experts * up_to < wanted).sum(-1, keepdim=True)
    inside = margins.gather(-1, place)
    before = up_to.gather(-1, place) - inside
    part = (wanted - num_experts * before).double() / (num_experts * inside)
    quantile = ((place + part) * (2 / BINS) - 1).squeeze(-1).to(bias.dtype)
    moved = torch.lerp(quantile, bias, decay)
    return moved - moved.mean(-1, keepdim=True)


def health(load: Tensor) -> Health:
    """Evenness of the load of each layer.

    load     [L E] i64, each row with a token at least; no row for a dense model
    """
    rows = load.double()
    mean = rows.mean(-1)
    if not load.shape[0]:
        return Health(mean, mean, load.sum(-1))  # torch warns of the deviation of nothing
    return Health(rows.amax(-1) / mean, rows.std(-1, correction=0) / mean, (load == 0).sum(-1))


def sequence_imbalance(score: Tensor, favoured: Tensor) -> Tensor:
    """The sequence-wise auxiliary loss, summed over sequences and not yet weighted.

    Per sequence, the share of tokens that would choose an expert by unbiased score times the mean share of its score:
    one when both are even.

    score     [B T E] f32
    favoured  [B T K] i64, experts of the largest scores
    returns   scalar f32
    Raises:   ValueError for experts of other tokens.
    Source:   DeepSeek-V3 (arXiv:2412.19437) eq. 17-20.
    """
    wanted = (*score.shape[:-1], favoured.shape[-1])
    expect_shape("sequence_imbalance: expected experts", favoured.shape, wanted, REMEDY)
    hot = torch.zeros_like(score.detach()).scatter(-1, favoured, 1.0)
    fraction = hot.mean(-2) * (score.shape[-1] / favoured.shape[-1])
    share = shares(score).mean(-2)
    return (fraction * share).sum()


def entropy(score: Tensor) -> Tensor:
    """Mean entropy of a token's normalised scores, in nats; log E when the router has no opinion.

    score    [N E] f32
    """
    share = shares(score)
    return -torch.special.xlogy(share, share).sum(-1).mean()


def report(
    score: Tensor, favoured: Tensor, bias: Tensor, expert: Tensor, *, margins: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What is told of a router: `entropy`, `sequence_imbalance`, which alone carries a gradient, `margin_histogram`.

    score     [B T E] f32
    favoured  [B T K] i64, experts of the largest scores
    bias      [E] f32
    expert    [N K] i64, chosen by the biased scores of the N = B T tokens
    margins   whether they are wanted; False: [E 0]
    """
    flat = score.detach().flatten(0, -2)
    histogram = margin_histogram(flat, bias, expert) if margins else expert.new_zeros(len(bias), 0)
    return entropy(flat), sequence_imbalance(score, favoured), histogram
