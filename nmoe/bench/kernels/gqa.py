"""Grouped-query attention in a window and without, beside compiled flex_attention and SDPA with the same mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.effects.kernels.attention.gqa import Tiles, gqa_attention
from nmoe.pure.model.attention.gqa import attend_gqa, attended

PEER = "flex_attention"


@attrs.frozen(kw_only=True)
class Case:
    """Sizes; window 0 is none."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int

    def flop(self) -> float:
        """Forward and backward over attended pairs: two products and five; a recomputed one does not count."""
        pairs = self.batch * self.heads * attended(self.length, self.window or None)
        return 14.0 * pairs * self.head_dim

    def moved_bytes(self) -> float:
        """Queries, keys, values, output and each's gradient: forward reads and writes, backward too."""
        return 2.0 * self.batch * self.length * self.head_dim * 3 * (2 * self.heads + 2 * self.kv_heads)


CASES = tuple(
    Case(batch=1, length=16384, heads=64, kv_heads=8, head_dim=64, window=window) for window in (128, 1024, 0)
)


def variants(case: Case, device: torch.device, tiles: Tiles) -> Iterator[Variant]:
    """Ours with sinks and without, on slices of one product; theirs, on tensors of their own."""
    groups, window, scale = case.kv_heads, case.window or None, case.head_dim**-0.5
    fused = draw(device, case.batch, case.length, case.heads + 2 * groups, case.head_dim, name="product").detach()
    sinks = draw(device, case.heads, name="sinks").detach().float().requires_grad_()
    grad_output = draw(device, case.batch, case.length, case.heads, case.head_dim, name="grad_output").detach()
    sliced = tuple(tensor.requires_grad_() for tensor in fused.split((case.heads, groups, groups), dim=2))

    def variant(name: str, apply: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Variant:
        def forward() -> Tensor:
            with torch.no_grad():
                return apply(*leaves)

        def both() -> tuple[Tensor, ...]:
            y = apply(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, grad_output)

        def error() -> float:
            y, dq, dk, dv, *dsinks = both()
            group = case.heads // groups
            # of repeated keys, the gradient of their head is a sum
            first = [tensor[:1, :, : tensor.shape[2] // groups].double().sum(2) for tensor in (dk, dv)]
            results = [y[:1, :, :group], dq[:1, :, :group], *first, *(tensor[:group] for tensor in dsinks)]
            return relative_error(results, exact(case, (*sliced, *leaves[3:]), grad_output, scale))

        return Variant(name=name, forward=forward, both=both, error=error)

    ours = partial(gqa_attention, scale=scale, window=window, tiles={window: tiles})
    yield variant("ours, sinks", ours, (*sliced, sinks))
    yield variant("ours", ours, sliced)
    if device.type == "cuda":
        own = tuple(tensor.detach().contiguous().requires_grad_() for tensor in sliced)
        yield variant(PEER, flex(case, device, scale), own)
        repeated = (x.detach().repeat_interleave(case.heads // groups, 2).requires_grad_() for x in own[1:])
        yield variant("SDPA, keys repeated", dense(case, device, scale), (own[0], *repeated))


def flex(case: Case, device: torch.device, scale: float) -> Callable[..., Tensor]:
    """torch's compiled attention with a block mask."""

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query >= key
        return causal & (query - key < case.window) if case.window else causal

    # not compiled: with torch 2.11 and triton 3.6 that does not end within minutes
    mask = create_block_mask(visible, None, None, case.length, case.length, device=device.type)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(*operands: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in operands)
        return compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)

    return attend


def dense(case: Case, device: torch.device, scale: float) -> Callable[..., Tensor]:
    """SDPA: its causal kernel without a window, a mask of every pair with one."""
    mask = torch.ones(case.length, case.length, dtype=torch.bool, device=device).tril_()
    given: dict[str, Any] = {"attn_mask": mask.triu_(1 - case.window)} if case.window else {"is_causal": True}

    def attend(*operands: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in operands)
        return scaled_dot_product_attention(q, k, v, scale=scale, **given).transpose(1, 2)

    return attend


def exact(case: Case, leaves: tuple[Tensor, ...], grad_output: Tensor, scale: float) -> list[Tensor]:
    """Of the first group of the first sequence in fp64: output, gradients of queries, key, value and sinks if any."""
    group = case.heads // case.kv_heads
    q, k, v, *sinks = (tensor.detach().double() for tensor in leaves)
    first = [q[:1, :, :group], k[:1, :, :1], v[:1, :, :1], *(tensor[:group] for tensor in sinks)]
    first = [tensor.requires_grad_() for tensor in first]
    y = attend_gqa(*first, scale=scale, window=case.window or None)
    dq, dk, dv, *dsinks = torch.autograd.grad(y, first, grad_output[:1, :, :group].double())
    return [y.detach(), dq, dk[:, :, 0], dv[:, :, 0], *dsinks]
