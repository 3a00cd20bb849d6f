"""The parameter records of the network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nmoe.pure.core.init import normal, ones, residual, zeros
from nmoe.pure.core.spec import Role
from nmoe.pure.core.tree import param, record


@record
class Dense:
    """Gated MLP of a block without experts."""

    up: Tensor = param("D 2 I", Role.MATRIX, normal("D"))
    down: Tensor = param("I D", Role.MATRIX, residual("I"))


@record
class Shared:
    """All shared experts as one wide gated MLP."""

    up: Tensor = param("D 2 S", Role.SHARED, normal("D"))
    down: Tensor = param("S D", Role.SHARED, residual("S"))


@record
class Biases:
    """Of the products of the router and the routed experts of one block."""

    router: Tensor = param("E", Role.GAIN, zeros)
    up: Tensor = param("E 2 F", Role.BIAS, zeros)
    down: Tensor = param("E D", Role.BIAS, zeros)


@record
class Moe:
    """Routed experts of one block, the shared ones or (), and biases or ().

    A script may put a record of its own in the place of `router`; its `Ops.route` reads it.
    """

    router: Any = param("D E", Role.ROUTER, normal("D"))
    up: Tensor = param("E D 2 F", Role.EXPERT, normal("D"))
    down: Tensor = param("E F D", Role.EXPERT, residual("F"))
    shared: Shared | tuple[()]
    biases: Biases | tuple[()]


@record
class Block:
    """One layer."""

    attention_norm: Tensor = param("D", Role.GAIN, ones)
    attention: Any  # the record of the kind of attention
    ffn_norm: Tensor = param("D", Role.GAIN, ones)
    ffn: Dense | Moe


@record
class Mtp:
    """One depth of multi-token prediction; embedding and head are the main model's.

    `project` has the rows of the embedding first, then those of the hidden state, as the published weights.
    """

    embed_norm: Tensor = param("D", Role.GAIN, ones)
    hidden_norm: Tensor = param("D", Role.GAIN, ones)
    project: Tensor = param("2 D D", Role.MATRIX, normal("2", "D"))
    block: Block
    norm: Tensor = param("D", Role.GAIN, ones)


@record
class Transformer:
    """All parameters."""

    embed: Tensor = param("V D", Role.EMBED, normal("D"))
    blocks: tuple[Block, ...]
    norm: Tensor = param("D", Role.GAIN, ones)
    head: Tensor = param("D V", Role.HEAD, normal("D"))
    mtp: tuple[Mtp, ...]  # one a depth
