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
from nmoe.pure.model.attention.kda import attend_kda, flops

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
        """Queries, keys, values and output in 2 bytes, decays in 4, and each's gradient."""
        forward, backward = 3 * 2 + 4 + 2, (3 * 2 + 4 + 2) + 3 * 2 + 4
        return float(self.batch * self.length * self.heads * self.head_dim * (forward + backward))


CASES = (Case(batch=1, length=8192, heads=32, head_dim=128),)


def peer(device: torch.device) -> str:
    """What the others are compared with: fla where it is installed."""
    return FLA if device.type == "cuda" and importlib.util.find_spec(FLA) is not None else PLAIN


def variants(case: Case, device: torch.device, tiles: Tiles) -> Iterator[Variant]:
    """Ours and theirs, on slices of one product, with decays that channels remember ten to a thousand tokens by."""
    tokens = (case.batch, case.length, case.heads)
    product = draw(device, *tokens[:2], 3, case.heads, case.head_dim, name="product").detach()
    decay = draw(device, *tokens, case.head_dim, name="decay").detach().float().mul(2).exp().mul(-0.01)
    step = draw(device, *tokens, name="step").detach().float().sigmoid()
    grad_output = draw(device, *tokens, case.head_dim, name="grad_output").detach()
    leaves = tuple(tensor.requires_grad_() for tensor in (*product.unbind(2), decay, step))

    def variant(name: str, apply: Callable[..., tuple[Tensor, Tensor]]) -> Variant:
        def forward() -> Tensor:
            with torch.no_grad():
                return apply(*leaves)[0]

        def both() -> tuple[Tensor, ...]:
            o = apply(*leaves)[0]
            return o.detach(), *torch.autograd.grad(o, leaves, grad_output)

        def error() -> float:
            return relative_error([tensor[:1, :, :1] for tensor in both()], exact(leaves, grad_output))

        return Variant(name=name, forward=forward, both=both, error=error)

    yield variant("ours", partial(kda_attention, tiles=tiles))
    if peer(device) == FLA:
        yield variant(FLA, theirs())
    yield variant(PLAIN, attend_kda)


def theirs() -> Callable[..., tuple[Tensor, Tensor]]:
    """fla's kernels, which scale to unit length themselves."""
    chunk_kda: Any = importlib.import_module(f"{FLA}.ops.kda").chunk_kda

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_kda(q, k, v, decay, step, use_qk_l2norm_in_kernel=True)

    return attend


def exact(leaves: tuple[Tensor, ...], grad_output: Tensor) -> list[Tensor]:
    """Of the first head of the first sequence in fp64: output, and gradients of q, k, v, decay and step."""
    first = [tensor.detach()[:1, :, :1].double().requires_grad_() for tensor in leaves]
    o, _ = attend_kda(*first)
    return [o.detach(), *torch.autograd.grad(o, first, grad_output[:1, :, :1].double())]
