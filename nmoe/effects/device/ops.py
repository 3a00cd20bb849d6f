"""Which implementation of each op this device runs, and the optimizer's passes over arenas."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim.adamw import adamw

from nmoe.config.sections import Model
from nmoe.effects.kernels import tables as tuning
from nmoe.effects.parallel.exchange import Exchange, host
from nmoe.errors import InputError
from nmoe.pure.core.tree import record
from nmoe.pure.model.attention.mla import attend_mla
from nmoe.pure.model.experts import Rows, combine, dispatch, mixture, swiglu
from nmoe.pure.model.ops import REFERENCE, Ops
from nmoe.pure.model.route import choose
from nmoe.pure.optim import adamw as optim

if TYPE_CHECKING:
    from nmoe.effects.kernels.attention import mla as attention
    from nmoe.effects.kernels.moe import moe as mixtures


CPU_CHUNK = 1 << 18
"""Elements the optimizer handles at once on a CPU, so that its temporaries stay in the cache."""


def build(
    device: torch.device,
    c: Model,
    *,
    deterministic: bool = True,
    documents: bool = False,
    exchange: Exchange | None = None,
) -> Ops:
    """The ops of a device for a model.

    On a CPU the reference, but for experts on their own rows and fused attention; on a GPU kernels.

    documents  whether attention keeps inside documents, which cuDNN's kernels cannot
    exchange   with the ranks that hold the other experts; None: all are here

    Raises:  InputError for sizes that a kernel does not take.
    """
    if device.type == "cpu":
        parts = {
            "dispatch": named("dispatch", dispatch),
            "experts": named("experts", experts_grouped),
            "combine": named("combine", combine),
        }
        return attrs.evolve(
            REFERENCE,
            attend_mla=named("attention", attend_mla_padded),
            route=named("router", choose),
            mixture=partial(mixture, **parts)
            if exchange is None
            else partial(host.mixture, exchange=exchange, experts=parts["experts"]),
            linear_cross_entropy=named("head", REFERENCE.linear_cross_entropy),
        )
    # only here: triton is not everywhere
    from nmoe.effects.kernels import loss as cross_entropy
    from nmoe.effects.kernels import norm as rms_norm
    from nmoe.effects.kernels.attention import mla as attention
    from nmoe.effects.kernels.attention.rope import rotate_mla_
    from nmoe.effects.kernels.moe import moe as mixtures
    from nmoe.effects.kernels.moe import router, swiglu
    from nmoe.effects.parallel.exchange import device as exchanged

    check(c)
    tiles = mixture_tiles(device, c.hidden_size, c.moe.intermediate_size)
    a = c.attention
    attend = attention.mla_attention_cudnn
    if deterministic or documents:
        forward = "triton" if documents else "cudnn"
        attend = partial(
            attention.mla_attention,
            forward=forward,
            tiles=attention_tiles(device, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim),
        )
    return Ops(
        norm=rms_norm.rms_norm,
        add_norm=rms_norm.add_rms_norm,
        swiglu=swiglu.swiglu,
        rotate_mla=rotate_mla_,
        attend_mla=named("attention", attend),
        route=named("router", partial(choose, scores=router.scores, first=router.top_k)),
        first=router.top_k,
        mixture=partial(mixtures.moe_experts, tiles=tiles)
        if exchange is None
        else partial(exchanged.mixture, exchange=exchange, tiles=tiles),
        linear_cross_entropy=named("head", cross_entropy.linear_cross_entropy),
    )


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that `nmoe run --profile` counts its time by."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return function(*arguments, **keywords)

    return run


def mixture_tiles(device: torch.device, hidden: int, width: int) -> mixtures.Tiles:
    """How a mixture of these sizes is cut up on this GPU."""
    from nmoe.effects.kernels.moe import moe as mixtures

    found = tuning.find(shipped(device), "moe", hidden, width)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return mixtures.Tiles(**found.tiles, group=found.group, programs=programs)


def attention_tiles(device: torch.device, nope: int, rope: int, value: int) -> attention.Tiles:
    """How attention over heads of these sizes is cut up on this GPU."""
    from nmoe.effects.kernels.attention import mla as attention

    return attention.Tiles(**tuning.find(shipped(device), "attention", nope, rope, value).tiles)


def unmeasured(device: torch.device, c: Model) -> tuple[str, ...]:
    """A line for each op whose tiles nobody measured for this model's sizes: it is right, and may be slow."""
    if device.type == "cpu":
        return ()
    a, table = c.attention, shipped(device)
    sizes = {
        "moe": (c.hidden_size, c.moe.intermediate_size),
        "attention": (a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim),
    }
    found = {op: (tuning.find(table, op, *size), "x".join(map(str, size))) for op, size in sizes.items()}
    return tuple(
        f"{op}: no measured tiles for {size} in {table.where}, those of entry {entry.size!r} are used"
        + (f"; `nmoe bench kernels --tune --size {size}` finds better ones" if op == "moe" else "")
        for op, (entry, size) in found.items()
        if not entry.measured
    )


def shipped(device: torch.device) -> tuning.Table:
    """The table that ships for this GPU."""
    return tuning.load(torch.cuda.get_device_capability(device))


@record
class ArenaOps:
    """The optimizer's passes over arenas."""

    global_norm: Callable[[Sequence[Tensor]], Tensor]
    adamw_: Callable[..., Tensor]
    chunk: int  # elements of a pass


def arena_ops(device: torch.device) -> ArenaOps:
    """The passes of a device: one launch an arena on a GPU, pieces that stay in the cache on a CPU."""
    if device.type == "cpu":
        return ArenaOps(named("optimizer", optim.global_norm), named("optimizer", adamw_), CPU_CHUNK)
    from nmoe.effects.kernels.optim import adamw

    return ArenaOps(named("optimizer", adamw.global_norm), named("optimizer", adamw.adamw_), sys.maxsize)


def check(c: Model) -> None:
    """Refuse what the kernels do not take.

    Raises:  InputError with each size that is wrong.
    """
    sizes = {"model.hidden_size": c.hidden_size, "model.moe.intermediate_size": c.moe.intermediate_size}
    problems = [
        f'{key}: on device "cuda" a multiple of 8, because kernels read 16 bytes at once, got {size}; '
        f"take {-(-size // 8) * 8}"
        for key, size in sizes.items()
        if size % 8
    ]
    if problems:
        raise InputError(*problems)


def attend_mla_padded(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float) -> Tensor:
    """`pure.attention.mla.attend_mla` with values padded to the width of the keys.

    torch's fused attention on the CPU takes only equal widths; it halves the time of the plain one and keeps no
    probabilities, which pays for the padding.
    """
    width = kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
    return attend_mla(q, F.pad(kv, (0, q.shape[-1] - width)), k_rope, start, scale=scale)[..., :width]


def experts_grouped(rows: Rows, up: Tensor, down: Tensor) -> Tensor:
    """`pure.experts.experts` with torch's grouped product; counts stay on the device.

    rows.x   [M D]   bf16, or fp32 on a CPU
    returns  [P D]   in the format of `rows.x`
    """
    ends = rows.count.cumsum(0).to(torch.int32)
    x = rows.x.index_select(0, rows.source)
    y = swiglu(F.grouped_mm(x, up.flatten(2), offs=ends).unflatten(-1, (2, -1)))
    return F.grouped_mm(y, down, offs=ends)


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
) -> Tensor:
    """`pure.optim.adamw` on a stretch of an arena, where `allowed`; the norm of the change.

    Without a remainder it is torch's own one-pass kernel; with one, the reference on the joined fp32 value.

    allowed  0-d bool   false: nothing but `gradient` changes, whatever the gradient holds
    shrink   0-d        factor on the gradient, from the clip
    updates  0-d i64    number of updates this one makes it, counted from 1
    lr       0-d f64

    Writes:  value, remainder, first, second; `gradient` is zero afterwards.
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
        old = optim.join(value, remainder)
        new, moments = optim.adamw(
            old,
            gradient.to(old.dtype) * shrink,
            optim.Moments(first, second),
            updates=updates,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decay=decay,
        )
        new = torch.where(allowed, new, old)
        change = torch.linalg.vector_norm(new - old)
        high, low = optim.split(new)
        value.copy_(high)
        remainder.copy_(low)
        torch.where(allowed, moments.first.to(first.dtype), first, out=first)
        torch.where(allowed, moments.second.to(second.dtype), second, out=second)
    gradient.zero_()
    return change
