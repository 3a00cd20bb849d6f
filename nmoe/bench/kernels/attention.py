"""Latent attention, deterministic and not, beside cuDNN on keys that somebody else assembled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.effects.kernels.attention import mla as attention
from nmoe.pure.model.attention.mla import attend_mla

PEER = "bare cuDNN"


@attrs.frozen(kw_only=True)
class Case:
    """Sizes."""

    batch: int
    length: int
    heads: int
    nope: int  # channels of a key without position
    rope: int  # rotated ones
    value: int

    def flop(self) -> float:
        """Forward and backward over visible pairs: two products and five; a recomputed one does not count."""
        pairs = self.batch * self.heads * self.length**2 / 2
        return 2 * pairs * (4 * (self.nope + self.rope) + 3 * self.value)

    def moved_bytes(self) -> float:
        """Queries, keys, values, output and each's gradient: forward reads and writes, backward too."""
        head = 2 * self.nope + self.rope + 2 * self.value  # q, own part of k, v, o
        return 2.0 * self.batch * self.length * (3 * self.heads * head + 3 * self.rope)


CASES = (Case(batch=8, length=4096, heads=16, nope=128, rope=64, value=128),)


def variants(case: Case, device: torch.device, tiles: attention.Tiles) -> Iterator[Variant]:
    """Ours, and cuDNN alone."""
    shape, scale = (case.batch, case.length), (case.nope + case.rope) ** -0.5
    q = draw(device, *shape, case.heads, case.nope + case.rope, name="q")
    kv = draw(device, *shape, case.heads, case.nope + case.value, name="kv")
    k_rope = draw(device, *shape, case.rope, name="k_rope")
    grad_output = draw(device, *shape, case.heads, case.value, name="grad_output").detach()
    with torch.no_grad():
        keys = torch.cat((kv[..., : case.nope], k_rope[:, :, None].expand(-1, -1, case.heads, -1)), -1)
        k, v = (tensor.contiguous().requires_grad_() for tensor in (keys, kv[..., case.nope :]))

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = (tensor.transpose(1, 2) for tensor in (q, k, v))
        given = (None, True, 0.0, True, False)
        return torch.ops.aten._scaled_dot_product_cudnn_attention(*operands, *given, scale=scale)[0].transpose(1, 2)

    latent = (q, kv, k_rope)
    given: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "cuDNN with assembly": (partial(attention.mla_attention_cudnn, scale=scale), latent),
        "deterministic": (partial(attention.mla_attention, scale=scale, forward="cudnn", tiles=tiles), latent),
        "deterministic, own forward": (
            partial(attention.mla_attention, scale=scale, forward="triton", tiles=tiles),
            latent,
        ),
        PEER: (bare, (q, k, v)),
    }
    truth = exact(case, latent, grad_output, scale)
    for name, (apply, leaves) in given.items():

        def forward(apply: Any = apply, leaves: Any = leaves) -> Tensor:
            with torch.no_grad():
                return apply(*leaves)

        def both(apply: Any = apply, leaves: Any = leaves) -> tuple[Tensor, ...]:
            y = apply(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, grad_output)

        def error(both: Callable[[], tuple[Tensor, ...]] = both) -> float:
            y, dq, dk, *_ = both()
            return relative_error(
                [tensor[0, :, 0, : t.shape[-1]] for tensor, t in zip((y, dq, dk), truth, strict=True)], truth
            )

        yield Variant(name=name, forward=forward, both=both, error=error)


def exact(case: Case, latent: tuple[Tensor, ...], grad_output: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first head of the first sequence in fp64: output, gradient of the query, and of the head's own key."""
    q, kv, k_rope = (tensor.detach()[:1].double() for tensor in latent)
    leaves = q[:, :, :1].requires_grad_(), kv[:, :, :1].requires_grad_()
    y = attend_mla(*leaves, k_rope, scale=scale)
    dq, dkv = torch.autograd.grad(y, leaves, grad_output[:1, :, :1].double())
    return y.detach()[0, :, 0], dq[0, :, 0], dkv[0, :, 0, : case.nope]
