"""How kernels reach the mathematics: a record of functions, and the constant tables they read.

`REFERENCE` is the plain implementation of each. The shell builds the record for a device; tests pass `REFERENCE` or a
stub.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nmoe.pure.core.tree import record
from nmoe.pure.model import experts, loss, norm, route
from nmoe.pure.model.attention import mla
from nmoe.pure.model.rope import Rope
from nmoe.pure.model.route import Routing


@record
class Ops:
    """One function a field; each has the signature of its reference."""

    norm: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    rotate_mla: Callable[..., tuple[Tensor, Tensor]]
    attend_mla: Callable[..., Tensor]
    route: Callable[..., tuple[Tensor, Routing]]
    first: Callable[[Tensor, int], Tensor]
    mixture: Callable[..., tuple[Tensor, Tensor]]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Ops(
    norm.rms_norm,
    norm.add_rms_norm,
    experts.swiglu,
    mla.rotate_mla,
    mla.attend_mla,
    route.choose,
    route.first,
    experts.mixture,
    loss.linear_cross_entropy,
)


@record
class Env:
    """What the model needs besides parameters and tokens."""

    ops: Ops
    rope: Rope
