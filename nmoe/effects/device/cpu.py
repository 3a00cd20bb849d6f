"""What a CPU runs in the place of the reference: attention and experts by torch's own kernels, AdamW in chunks, and
a new token of a text in fewer calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim.adamw import adamw

from nmoe.config import sections
from nmoe.pure.core.shape import expect_shape
from nmoe.pure.formats import master
from nmoe.pure.model import norm as reference
from nmoe.pure.model.attention import mla
from nmoe.pure.model.attention.cached import New
from nmoe.pure.model.attention.mla import Mla, MlaOps, QueryUp, attend_mla
from nmoe.pure.model.experts import Rows, activation, add_all, combine, dispatch, swiglu
from nmoe.pure.model.norm import add_output, upcast
from nmoe.pure.model.rope import Rope
from nmoe.pure.model.route import Routing
from nmoe.pure.optim.update import Rule, rule

CHUNK = 1 << 18
"""Elements the optimizer handles at once, so that its temporaries stay in the cache."""

FEW = 64
"""Rows up to which a call costs more than what it computes."""


def rms_norm(x: Tensor, gain: Tensor, *, eps: float) -> Tensor:
    """`pure.model.norm.rms_norm`; of few rows, where text is generated, in four calls: the reference takes six.

    The mean of squares is a product of each row with itself, and its divisor is in the gain, which a recorded step
    multiplies once.
    """
    width = x.shape[-1]
    if x.device.type != "cpu" or not torch.is_inference_mode_enabled() or x.numel() > FEW * width:
        return reference.rms_norm(x, gain, eps=eps)
    expect_shape("rms_norm: expected a gain", gain.shape, (width,), "pass one a channel")
    rows = upcast(x).reshape(-1, 1, width)
    total = torch.baddbmm(torch.full((1, 1, 1), eps * width, dtype=rows.dtype), rows, rows.mT)
    return (rows * total.rsqrt() * (upcast(gain) * width**0.5)).view(x.shape).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor | tuple[()], gain: Tensor, *, eps: float, readers: int = 1) -> tuple[Tensor, ...]:
    """`pure.model.norm.add_rms_norm` by `rms_norm`."""
    total = x if not isinstance(y, Tensor) else add_output(x, y)
    return total, *[rms_norm(total, gain, eps=eps)] * readers


def attend_new(
    p: Mla,
    x: Tensor,
    cache: Tensor,
    new: New,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: MlaOps,
    c: sections.Mla,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`pure.model.attention.mla.attend_new`; of one new token a row in fp32 in half of the calls.

    Channels turn as complex numbers in the memory of the product, where the cache's row then lies whole; scale and mask
    of the scores are in their product.
    """
    rank, rotated = c.kv_lora_rank, c.qk_rope_head_dim
    width = p.down.shape[1] - rank - rotated
    plain = x.shape[1] != 1 or x.dtype is not torch.float32 or torch.is_grad_enabled() or x.device.type != "cpu"
    if plain or width % 2 or rank % 2 or c.qk_nope_head_dim % 2:
        return mla.attend_new(p, x, cache, new, rope, norm, ops, c, eps=eps)
    query, kept = (x @ p.down).split((width, rank + rotated), dim=-1)
    if isinstance(p.query, QueryUp):
        query = norm(query, p.query.norm, eps=eps) @ p.query.up.flatten(1)
    q_nope, q_rope = query.unflatten(-1, (c.num_heads, -1)).split((c.qk_nope_head_dim, rotated), dim=-1)
    at = new.documents.position
    turn = torch.complex(rope.cos[at], rope.sin[at])
    _turn_(q_rope, turn[:, :, None])
    _turn_(kept[..., rank:], turn)
    kept[..., :rank].copy_(norm(kept[..., :rank], p.norm, eps=eps))
    cache = new.store(cache, kept, new.place)

    up_key, up_value = p.up.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
    latent = (q_nope[:, 0].transpose(0, 1) @ up_key.permute(1, 2, 0)).transpose(0, 1)[:, None]
    keys = cache[:, : new.reach()]
    hidden = torch.where(new.visible, 0.0, -torch.inf)  # [B 1 S]
    score = torch.baddbmm(hidden, torch.cat((latent, q_rope), dim=-1)[:, 0], keys.mT, alpha=mla.scale(c))
    o = score.softmax(dim=-1) @ keys[..., :rank]
    return (o.transpose(0, 1) @ up_value.transpose(0, 1)).transpose(0, 1)[:, None], cache


def _turn_(x: Tensor, turn: Tensor) -> None:
    """Turn neighbouring channels (2i, 2i+1) by complex factors. Writes: `x`."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)


def attend_mla_padded(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float) -> Tensor:
    """`pure.model.attention.mla.attend_mla` with values padded to the width of the keys.

    torch's fused attention on the CPU takes only equal widths; it halves the time of the plain one and keeps no
    probabilities, which pays for the padding. Values wider than the keys take the plain one.
    """
    width = kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
    return attend_mla(q, F.pad(kv, (0, max(0, q.shape[-1] - width))), k_rope, start, scale=scale)[..., :width]


def experts_grouped(
    rows: Rows,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    activate: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """`pure.model.experts.experts` with torch's grouped product; counts stay on the device.

    rows.x   [M D]   bf16, or fp32 on a CPU
    returns  [P D]   in the format of `rows.x`
    """
    ends = rows.count.cumsum(0).to(torch.int32)
    x = rows.x.index_select(0, rows.source)
    h = F.grouped_mm(x, up.flatten(2), offs=ends).unflatten(-1, (2, -1))
    h = h + bias[rows.expert] if isinstance(bias, Tensor) else h
    return F.grouped_mm(activate(h), down, offs=ends)


def few_rows(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    activate: Callable[[Tensor], Tensor] = swiglu,
) -> tuple[Tensor, Tensor]:
    """`pure.model.experts.moe_experts` of a few tokens on a CPU: a product a row, with the weights where they are.

    torch's grouped product slices and multiplies for all E experts, also for those without a row: of one token of the
    quickstart, which chooses 2 of 16, that is 64 products and a third of its time.
    """
    chosen, top_k = routing.expert.flatten(), routing.expert.shape[1]
    source = torch.arange(len(chosen), device=x.device) // top_k
    h = _rows(x.index_select(0, source), up.flatten(2), chosen).unflatten(-1, (2, -1))
    y = activate(h + bias[chosen] if isinstance(bias, Tensor) else h)
    y = upcast(_rows(y, down, chosen).unflatten(0, routing.expert.shape))
    count = chosen.new_zeros(len(up)).scatter_add(0, chosen, torch.ones_like(chosen))
    return (routing.weight[:, None].to(y.dtype) @ y)[:, 0].to(x.dtype), count


def _rows(x: Tensor, matrices: Tensor, chosen: Tensor) -> Tensor:
    """Each row times its own matrix, as the sum of the matrix's rows by weight: torch has it without a copy of them.

    x         [P D]
    matrices  [E D F]
    chosen    [P] i64
    returns   [P F]
    """
    width = x.shape[1]
    at = chosen[:, None] * width + torch.arange(width, device=x.device)
    return F.embedding_bag(at, matrices.flatten(0, 1), mode="sum", per_sample_weights=x)


def moe_experts(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    *,
    added: tuple[Tensor, ...] = (),
    limit: float | None = None,
    alpha: float = 1.0,
    experts: Callable[..., Tensor] = experts_grouped,
) -> tuple[Tensor, Tensor]:
    """`pure.model.experts.moe_experts` by `experts`, each part in a profiler range.

    Where `experts` are the plain ones, a CPU takes `few_rows` for fewer rows than there are experts.
    """
    activate = activation(limit, alpha)
    if x.device.type == "cpu" and experts is experts_grouped and routing.expert.numel() < len(up):
        y, count = few_rows(x, routing, up, down, bias, activate)
        return add_all(y, added), count
    with record_function("dispatch"):
        rows = dispatch(x, routing, num_experts=up.shape[0])
    y = experts(rows, up, down, bias, activate)
    with record_function("combine"):
        return add_all(combine(y, rows, routing), added), rows.count


@torch.no_grad()
def adamw_(
    value: Tensor,
    remainder: Tensor | None,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    *,
    allowed: Tensor,
    shrink: Tensor,
    updates: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    clear: bool = True,
) -> Tensor:
    """`pure.optim.adamw` on a stretch of an arena, where `allowed`; the norm of the change.

    Without a remainder it is torch's own one-pass kernel; with one, the reference on the joined fp32 value.

    allowed  0-d bool   false: nothing but `gradient` changes, whatever the gradient holds
    shrink   0-d        factor on the gradient, from the clip
    updates  0-d i64    number of updates this one makes it, counted from 1
    lr       0-d f64
    clear    whether `gradient` is to be zero afterwards

    Writes:  value, remainder, first, second, gradient.
    """
    if remainder is None:
        old = value.clone()
        gradient.mul_(shrink)
        adamw(
            [value],
            [gradient],
            [first],
            [second],
            [],
            [(updates - 1).float()],
            fused=True,
            found_inf=torch.where(allowed, 0.0, 1.0),
            amsgrad=False,
            lr=lr.to(value.dtype),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=decay,
            maximize=False,
        )
        change = torch.linalg.vector_norm(value - old)
    else:
        return update_(
            rule("adamw"),
            value,
            remainder,
            first,
            second,
            gradient,
            allowed=allowed,
            shrink=shrink,
            updates=updates,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decay=decay,
            clear=clear,
        )
    if clear:
        gradient.zero_()
    return change


@torch.no_grad()
def update_(
    which: Rule,
    value: Tensor,
    remainder: Tensor | None,
    *rest: Tensor,
    allowed: Tensor,
    shrink: Tensor,
    clear: bool = True,
    **numbers: Any,
) -> Tensor:
    """A rule of `pure.optim.update` on a stretch of an arena, where `allowed`; the norm of the change.

    rest     the rule's moments, then the gradient
    allowed  0-d bool   false: nothing but the gradient changes
    shrink   0-d        factor on the gradient, from the clip
    clear    whether the gradient is to be zero afterwards
    numbers  updates, lr, decay and the settings of the rule

    Writes:  value, remainder, moments, gradient.
    """
    *moments, gradient = rest
    old = value if remainder is None else master.join(value, remainder)
    new, after = which.update(old, gradient.to(old.dtype) * shrink, tuple(moments), **numbers)
    new = torch.where(allowed, new, old)
    change = torch.linalg.vector_norm(new - old)
    if remainder is None:
        value.copy_(new)
    else:
        high, low = master.split(new)
        value.copy_(high)
        remainder.copy_(low)
    for stored, moment in zip(moments, after, strict=True):
        torch.where(allowed, moment.to(stored.dtype), stored, out=stored)
    if clear:
        gradient.zero_()
    return change
