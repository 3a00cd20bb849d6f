"""AdamW and the gradient's norm over an arena, beside torch's own; what limits them is memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from nmoe.bench.kernels.meter import Variant, draw, relative_error
from nmoe.effects.kernels.optim import adamw
from nmoe.pure.formats import master
from nmoe.pure.optim import adamw as optim

PEER = "torch.optim, fused"

NUMBERS: Mapping[str, Any] = MappingProxyType({"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1})
RATE = 1e-3
UPDATES = 3


@attrs.frozen(kw_only=True)
class Case:
    """Size and format."""

    size: int  # elements
    pass_: str  # "AdamW" or "norm"
    moments: torch.dtype  # AdamW's

    def flop(self) -> float:
        """Not what limits it."""
        return 0.0

    def moved_bytes(self) -> float:
        """Value, remainder, both moments and the gradient, read and written; the norm reads the gradient."""
        return 2.0 * self.size if self.pass_ == "norm" else self.size * (12.0 + 4 * self.moments.itemsize)


CASES = (
    Case(size=1 << 28, pass_="AdamW", moments=torch.bfloat16),
    Case(size=1 << 28, pass_="AdamW", moments=torch.float32),
    Case(size=1 << 28, pass_="norm", moments=torch.bfloat16),
)

SAMPLE = 1 << 16


def variants(case: Case, device: torch.device) -> Iterator[Variant]:
    """Ours and torch's, which keeps the value in fp32 and moves other amounts; the ratio is of times."""
    gradient = draw(device, case.size, name="gradient", scale=1e-3).detach()
    if case.pass_ == "norm":
        truth = gradient.double().norm()[None]
        norms: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: adamw.global_norm([gradient]),
            PEER: lambda: torch.linalg.vector_norm(gradient, dtype=torch.float32),
        }
        for name, norm in norms.items():
            error = partial(lambda norm: relative_error((norm()[None],), (truth,)), norm)
            yield Variant(name=name, forward=None, both=norm, error=error)
        return
    weights = torch.randn(case.size, generator=torch.Generator(device).manual_seed(3), device=device)
    yield our_variant(case, weights, gradient)
    first, second = (torch.zeros_like(weights) for _ in range(2))
    step = torch.full((), float(UPDATES - 1), device=device)
    upcast = gradient.float()

    def theirs() -> None:
        with torch.no_grad():
            torch_adamw(
                [weights], [upcast], [first], [second], [], [step], fused=True, amsgrad=False, lr=RATE, maximize=False,
                beta1=NUMBERS["beta1"], beta2=NUMBERS["beta2"], eps=NUMBERS["eps"], weight_decay=NUMBERS["decay"],
            )  # fmt: skip

    # value and both moments read and written, the gradient read
    yield Variant(name=PEER, forward=None, both=theirs, error=None, moved_bytes=28.0 * case.size)


def our_variant(case: Case, weights: Tensor, given: Tensor) -> Variant:
    """Our pass over an arena of its own; the error is of the change it makes to the value."""
    value, remainder = master.split(weights)
    first, second = (torch.zeros(case.size, dtype=case.moments, device=weights.device) for _ in range(2))
    gradient = given.clone()
    scalars: dict[str, Any] = {
        "allowed": torch.tensor(True, device=weights.device),
        "shrink": torch.tensor(1.0, device=weights.device),
        "updates": torch.tensor(UPDATES, device=weights.device),
        "lr": torch.tensor(RATE, device=weights.device, dtype=torch.float64),
    }
    update = partial(adamw.adamw_, value, remainder, first, second, gradient, **scalars, **NUMBERS)

    def error() -> float:
        old = master.join(value[:SAMPLE], remainder[:SAMPLE]).double()
        zeros = torch.zeros_like(old)
        scalar_arguments: dict[str, Any] = {"updates": scalars["updates"], "lr": scalars["lr"], **NUMBERS}
        new, _ = optim.adamw(old, given[:SAMPLE].double(), optim.Moments(zeros, zeros), **scalar_arguments)
        update()
        return relative_error((master.join(value[:SAMPLE], remainder[:SAMPLE]).double() - old,), (new - old,))

    return Variant(name="ours", forward=None, both=update, error=error)
