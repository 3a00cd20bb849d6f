"""Weight gradients that a kernel writes into the gradient arenas itself, in the place of autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import attrs
from torch import Tensor


def nobody(parameter: Tensor) -> None:
    """Nobody waits for the gradient."""


@attrs.define(kw_only=True)
class Accumulator:
    """The gradient buffers of a training, for the ops that write weight gradients where they belong.

    Autograd takes a bf16 gradient, casts it to the fp32 of the arena and adds it: 28 bytes an element beside the 4 that
    are stored here. With 2.8 B expert parameters that was 17 of 295 ms a step on two H200 (docs/log.md, 2026-11-28).

    buffers  gradient of each parameter, by the address of its values; shaped as the parameter
    first    whether the microbatch is a step's first: its gradients are stored, later ones are added
    added    called with each parameter whose gradient of the microbatch is complete
    stored   addresses of the parameters whose gradients are stored at a step's first microbatch: nobody clears them
    """

    buffers: Mapping[int, Tensor] = MappingProxyType({})
    first: bool = True
    added: Callable[[Tensor], None] = nobody
    stored: set[int] = attrs.field(factory=set)
