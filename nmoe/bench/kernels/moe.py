"""The routed experts, beside torch's grouped products and, where it is installed, SonicMoE."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.effects.device import cpu
from nmoe.effects.kernels.moe import fp8
from nmoe.effects.kernels.moe.moe import Tiles
from nmoe.effects.kernels.moe.moe import moe_experts as fused_experts
from nmoe.effects.kernels.moe.moe_fp8 import moe_experts_fp8
from nmoe.pure.model.experts import moe_experts
from nmoe.pure.model.route import Routing

PEER = "grouped_mm compiled"

OURS, NARROW = "ours", "ours, fp8"

SAMPLE = 64
"""Tokens whose results are compared with fp64."""


@attrs.frozen(kw_only=True)
class Case:
    """Sizes and the routing of the tokens."""

    tokens: int
    hidden: int
    width: int  # of an expert
    experts: int
    top_k: int
    routing: str  # balanced; natural: as a fresh router with favourites chooses; skewed: one expert has 25 % of rows

    def flop(self) -> float:
        """Forward and backward."""
        return 18.0 * self.tokens * self.top_k * self.hidden * self.width

    def moved_bytes(self) -> float:
        """Weights twice and their gradient once; tokens, their output and both gradients; what backward is kept."""
        weights = 3 * 3 * self.experts * self.hidden * self.width
        return 2.0 * (weights + 4 * self.tokens * self.hidden + 2 * self.tokens * self.top_k * 2 * self.width)


LARGE = Case(tokens=32768, hidden=2048, width=1408, experts=64, top_k=6, routing="natural")

CASES = (
    LARGE,
    attrs.evolve(LARGE, routing="balanced"),
    attrs.evolve(LARGE, routing="skewed"),
    attrs.evolve(LARGE, tokens=2048),
    attrs.evolve(LARGE, width=768, experts=128, top_k=8),
    attrs.evolve(LARGE, tokens=16384, hidden=7168, width=2048, experts=32, top_k=8),
)

CROSSOVER = tuple(
    Case(tokens=tokens, hidden=hidden, width=width, experts=experts, top_k=top_k, routing="natural")
    for hidden, width, experts, top_k in (
        (2048, 768, 128, 8),
        (2048, 1408, 64, 6),
        (4096, 1536, 64, 8),
        (7168, 2048, 32, 8),
    )
    for tokens in (4096, 8192, 16384, 32768)
)
"""Where fp8 would pay: the table of docs/precision.md."""


@attrs.frozen(kw_only=True)
class Operands:
    """What a mixture is given, and the gradient of its output."""

    x: Tensor
    expert: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor
    grad_output: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Operands:
        """Random ones."""
        chosen = route(case, device)
        return cls(
            x=draw(device, case.tokens, case.hidden, name="x"),
            expert=chosen.expert,
            weight=chosen.weight,
            up=draw(device, case.experts, case.hidden, 2, case.width, name="up", scale=case.hidden**-0.5),
            down=draw(device, case.experts, case.width, case.hidden, name="down", scale=case.width**-0.5),
            grad_output=draw(device, case.tokens, case.hidden, name="grad_output").detach(),
        )

    def leaves(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        return self.x, self.weight, self.up, self.down

    def apply(self, which: Callable[..., Any], *leaves: Tensor) -> Tensor:
        """The output of one implementation."""
        x, weight, up, down = leaves
        return which(x, Routing(self.expert, weight), up, down)[0]


def route(case: Case, device: torch.device) -> Routing:
    """Chosen experts, a slice of wider rows as the router leaves them, and weights."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.tokens, case.experts)
    if case.routing == "balanced":
        order = torch.randperm(case.tokens, generator=generator, device=device)
        first = (order * case.top_k)[:, None]
        expert = (first + torch.arange(case.experts, device=device)) % case.experts
        score = torch.rand(shape, generator=generator, device=device).gather(1, expert)
    else:
        score = torch.randn(shape, generator=generator, device=device)
        if case.routing == "natural":
            score = score + 0.5 * torch.randn(case.experts, generator=generator, device=device)
        else:
            # all tokens together choose one expert of `top_k` for this part of them
            wants = torch.rand(case.tokens, generator=generator, device=device) < 0.25 * case.top_k
            score[:, 0] = torch.where(wants, math.inf, -math.inf)
        score, expert = score.sort(-1, descending=True)
        score = torch.sigmoid(score)
    score = score[:, : case.top_k]
    return Routing(expert[:, : case.top_k], (score / score.sum(-1, keepdim=True)).requires_grad_())


def busiest(case: Case, expert: Tensor) -> float:
    """Rows of the expert with most of them, over the mean."""
    return expert.flatten().bincount(minlength=case.experts).max().item() * case.experts / expert.numel()


Layer = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""An implementation, and its arguments that have a gradient: tokens, weights of the choices, matrices."""


def variants(case: Case, operands: Operands, tiles: Tiles) -> Iterator[Variant]:
    """Ours, torch's grouped products compiled and not, ours in fp8, and SonicMoE where it is installed."""
    plain = partial(moe_experts, experts=cpu.experts_grouped)
    given: dict[str, Callable[[], Layer]] = {
        OURS: lambda: layer(operands, partial(fused_experts, tiles=tiles)),
        # a graph that compiles anew for every number of rows would measure the compiler
        PEER: lambda: layer(operands, torch.compile(plain, dynamic=False)),
        "grouped_mm": lambda: layer(operands, plain),
    }
    if case.hidden % fp8.BLOCK == case.width % fp8.BLOCK == 0:
        given[NARROW] = lambda: layer(operands, partial(moe_experts_fp8, tiles=tiles))
    if importlib.util.find_spec("sonicmoe") is not None:
        given["SonicMoE"] = lambda: sonic(operands)
    yield from built(operands, given)


def formats(operands: Operands, tiles: Tiles) -> Iterator[Variant]:
    """Ours in bf16 and in fp8; hidden size and width are multiples of 128."""
    yield from built(
        operands,
        {
            OURS: lambda: layer(operands, partial(fused_experts, tiles=tiles)),
            NARROW: lambda: layer(operands, partial(moe_experts_fp8, tiles=tiles)),
        },
    )


def layer(operands: Operands, which: Callable[..., Any]) -> Layer:
    """An implementation that takes the matrices as ours does."""
    return partial(operands.apply, which), operands.leaves()


def built(operands: Operands, given: Mapping[str, Callable[[], Layer]]) -> Iterator[Variant]:
    """Each implementation when its turn comes, its error beside one truth."""
    truth = exact(operands)
    for name, build in given.items():
        apply, leaves = build()

        def forward(apply: Any = apply, leaves: Any = leaves) -> Tensor:
            with torch.no_grad():
                return apply(*leaves)

        def both(apply: Any = apply, leaves: Any = leaves) -> tuple[Tensor, ...]:
            y = apply(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, operands.grad_output)

        def error(both: Callable[[], tuple[Tensor, ...]] = both) -> float:
            y, dx, dweight, *_ = both()
            return relative_error((y[:SAMPLE], dx[:SAMPLE], dweight[:SAMPLE]), truth)

        yield Variant(name=name, forward=forward, both=both, error=error)


def sonic(operands: Operands) -> Layer:
    """SonicMoE (arXiv:2512.14080) on the same choices; its matrices have rows of gate and value in turn.

    Its first call tunes for minutes; `QUACK_CACHE_AUTOTUNING=1` keeps what it finds for the next process.
    """
    theirs: Any = importlib.import_module("sonicmoe.functional")
    activation: Any = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    tokens, k = operands.expert.shape
    source = torch.arange(tokens * k, device=operands.x.device, dtype=torch.int32) // k
    expert, experts = operands.expert.flatten().to(torch.int32), operands.up.shape[0]
    up, down = operands.up.detach(), operands.down.detach()
    # gate 0, value 0, gate 1, ...
    w1 = up.permute(0, 3, 2, 1).flatten(1, 2).contiguous().requires_grad_()
    w2 = down.mT.contiguous().requires_grad_()

    def apply(x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        arguments = (w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, experts, stream, activation)
        return theirs.moe_general_routing_inputs(x, weight.flatten(), source, expert, *arguments)[0]

    return apply, (operands.x, operands.weight, w1, w2)


def exact(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradients of the input and of the weights of the first tokens, in fp64."""
    x, weight = (tensor[:SAMPLE].detach().double().requires_grad_() for tensor in (operands.x, operands.weight))
    routing = Routing(operands.expert[:SAMPLE], weight)
    up, down = (tensor.detach().double() for tensor in (operands.up, operands.down))
    y = moe_experts(x, routing, up, down)[0]
    dx, dweight = torch.autograd.grad(y, (x, weight), operands.grad_output[:SAMPLE].double())
    return y.detach(), dx, dweight
