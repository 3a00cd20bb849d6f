"""The loss with both gradients, beside its three products alone and whatever fused loss is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.effects.kernels.loss import add_product_, linear_cross_entropy
from nmoe.pure.model import loss

PEER = "its three products alone"

SAMPLE = 64
"""Tokens whose gradient is compared with fp64."""


@attrs.frozen(kw_only=True)
class Case:
    """Sizes."""

    tokens: int
    hidden: int
    vocabulary: int
    chunk: int

    def flop(self) -> float:
        """Three products."""
        return 6.0 * self.tokens * self.hidden * self.vocabulary

    def moved_bytes(self) -> float:
        """The head twice, its gradient, the tokens and theirs: logits need never leave the chip."""
        return 2.0 * (3 * self.hidden * self.vocabulary + 3 * self.tokens * self.hidden)


CASES = (Case(tokens=32768, hidden=2048, vocabulary=201088, chunk=2048),)


def variants(case: Case, device: torch.device) -> Iterator[Variant]:
    """Ours and the others."""
    x = draw(device, case.tokens, case.hidden, name="x")
    head = draw(device, case.hidden, case.vocabulary, name="head", scale=0.02)
    generator = torch.Generator(device).manual_seed(2)
    target = torch.randint(case.vocabulary, (case.tokens,), device=device, generator=generator)
    truth = exact(x, head, target)

    def variant(name: str, apply: Callable[..., Tensor], replayed: bool = True) -> Variant:
        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(apply(x, head, target), (x, head))

        return Variant(
            name=name,
            forward=None,
            both=both,
            error=lambda: relative_error((both()[0][:SAMPLE],), (truth,)),
            replayed=replayed,
        )

    yield variant("ours", lambda *given: linear_cross_entropy(*given, chunk=case.chunk)[0])
    logits = draw(device, case.chunk, case.vocabulary, name="logits", scale=1e-5).detach()
    yield Variant(name=PEER, forward=None, both=partial(products_, x, head, logits), error=None)
    yield variant("plain, in as large chunks", lambda *given: loss.linear_cross_entropy(*given, chunk=case.chunk)[0])
    if importlib.util.find_spec("liger_kernel"):
        yield variant("Liger", liger(), replayed=False)


def products_(x: Tensor, head: Tensor, logits: Tensor) -> None:
    """What any chunked loss must multiply. Writes: logits, as many tokens' as a chunk has."""
    with torch.no_grad():
        dx, dhead = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        chunk = logits.shape[0]
        for rows, to in zip(x.split(chunk), dx.split(chunk), strict=True):
            here = logits[: rows.shape[0]]
            torch.mm(rows, head, out=here)
            torch.mm(here, head.T, out=to)
            add_product_(dhead, rows.T, here, beta=1)


def exact(x: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Gradient of the first tokens in fp64."""
    rows = x[:SAMPLE].detach().double().requires_grad_()
    logits = rows @ head.detach().double()
    total = torch.nn.functional.cross_entropy(logits, target[:SAMPLE], reduction="sum")
    return torch.autograd.grad(total, rows)[0]


def liger() -> Callable[..., Any]:
    """Liger's fused loss. It waits for the device, and takes the head the other way round."""
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    total = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda x, head, target: total(head.T, x, target)
