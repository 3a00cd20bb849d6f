"""The gated delta rule, beside flash-linear-attention where it is installed, and plain torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.config.attention import Kda
from nmoe.effects.kernels.attention.kda import Tiles, kda_attention
from nmoe.pure.model.attention.kda import attend_gated, flops

FLA, PLAIN = "fla", "plain torch"


@attrs.frozen(kw_only=True)
class Case:
    """Sizes."""

    batch: int
    length: int
    heads: int
    head_dim: int

    def flop(self) -> float:
        """Forward, and twice that backward."""
        section = Kda(num_heads=self.heads, head_dim=self.head_dim)
        return 3.0 * self.batch * self.length * flops(section, sequence_length=self.length, causal=True)

    def moved_bytes(self) -> float:
        """Queries, keys, values, gates and output, and each's gradient: forward reads and writes, backward too."""
        return 2.0 * self.batch * self.length * self.heads * self.head_dim * (5 + 5 + 4)


CASES = (Case(batch=1, length=8192, heads=32, head_dim=128),)


def peer(device: torch.device) -> str:
    """What the others are compared with: fla where it is installed."""
    return FLA if device.type == "cuda" and importlib.util.find_spec(FLA) is not None else PLAIN


def variants(case: Case, device: torch.device, tiles: Tiles) -> Iterator[Variant]:
    """Ours and theirs, on slices of one product; channels remember some ten to a thousand tokens."""
    tokens = (case.batch, case.length, case.heads)
    product = draw(device, *tokens[:2], 3, case.heads, case.head_dim, name="product").detach()
    x = draw(device, *tokens, case.head_dim, name="gate").detach()
    bias = draw(device, case.heads, case.head_dim, name="bias").detach().float() - 4
    log_rate = draw(device, case.heads, name="rate").detach().float()
    step = draw(device, *tokens, name="step").detach().float().sigmoid()
    grad_output = draw(device, *tokens, case.head_dim, name="grad_output").detach()
    leaves = tuple(tensor.requires_grad_() for tensor in (*product.unbind(2), x, bias, log_rate, step))

    def variant(name: str, apply: Callable[..., tuple[Tensor, Tensor]]) -> Variant:
        def first(results: tuple[Tensor, ...]) -> list[Tensor]:
            o, dq, dk, dv, dx, dbias, drate, dstep = results
            return [*(tensor[:1, :, :1] for tensor in (o, dq, dk, dv, dx)), dbias[:1], drate[:1], dstep[:1, :, :1]]

        def forward() -> Tensor:
            with torch.no_grad():
                return apply(*leaves)[0]

        def both() -> tuple[Tensor, ...]:
            o = apply(*leaves)[0]
            return o.detach(), *torch.autograd.grad(o, leaves, grad_output)

        def error() -> float:
            return relative_error(first(both()), exact(leaves, grad_output))

        return Variant(name=name, forward=forward, both=both, error=error)

    yield variant("ours", partial(kda_attention, limit=None, tiles=tiles))
    if peer(device) == FLA:
        yield variant(FLA, theirs())
    yield variant(PLAIN, partial(attend_gated, limit=None))


def theirs() -> Callable[..., tuple[Tensor, Tensor]]:
    """fla's kernels, which scale to unit length and make decays of gates themselves."""
    chunk_kda: Any = importlib.import_module(f"{FLA}.ops.kda").chunk_kda

    def attend(
        q: Tensor, k: Tensor, v: Tensor, x: Tensor, bias: Tensor, log_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate = {"A_log": log_rate, "dt_bias": bias.flatten(), "use_gate_in_kernel": True}
        return chunk_kda(q, k, v, x, step, use_qk_l2norm_in_kernel=True, **gate)

    return attend


def exact(leaves: tuple[Tensor, ...], grad_output: Tensor) -> list[Tensor]:
    """Of the first head, of one sequence, in fp64: output, and gradients of all operands."""
    q, k, v, x, bias, log_rate, step = (tensor.detach().double() for tensor in leaves)
    first = [*(tensor[:1, :, :1] for tensor in (q, k, v, x)), bias[:1], log_rate[:1], step[:1, :, :1]]
    first = [tensor.requires_grad_() for tensor in first]
    o, _ = attend_gated(*first, limit=None)
    return [o.detach(), *torch.autograd.grad(o, first, grad_output[:1, :, :1].double())]
