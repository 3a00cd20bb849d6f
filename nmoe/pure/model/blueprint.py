"""From a config to its Blueprint: the one place where specs, sizes and arena layouts of a training are made."""

from __future__ import annotations

from nmoe.config.sections import Config
from nmoe.pure.core.blueprint import Blueprint, count
from nmoe.pure.core.layout import layout
from nmoe.pure.model import model
from nmoe.pure.model.attention import KINDS, Kinds


def make_blueprint(config: Config, world: int = 1, expert_ranks: int = 1, *, kinds: Kinds = KINDS) -> Blueprint:
    """The parameters of `config` as one of `world` ranks holds them.

    Gradients are summed in fp32, over microbatches and over ranks. A rank with one microbatch has nothing to sum: it
    keeps its gradients in the format of the parameters, and the sum over ranks is fp32.

    expert_ranks  ranks that share one set of experts; divides `world` and the number of experts
    kinds         of attention
    Raises:       ValueError when it does not.
    """
    c, train = config.model, config.train
    if world % expert_ranks or c.moe.num_experts % expert_ranks:
        raise ValueError(
            f"make_blueprint: expected expert_ranks that divides {world} ranks and {c.moe.num_experts} experts, got "
            f"{expert_ranks}; take a common divisor"
        )
    specs, dims = model.specs(c, kinds=kinds), model.dims(c, kinds=kinds)
    return Blueprint(
        specs=specs,
        dims=dims,
        layouts=layout(
            specs,
            dims,
            optimizers=config.optim.optimizers(),
            compute=config.precision.storage(),
            moments=config.precision.moments,
            microbatches=train.batch_size // (train.microbatch_size * world),
            world=expert_ranks,
            replicas=world // expert_ranks,
        ),
        parameters=count(specs, dims, top_k=c.moe.top_k),
        world=world,
        expert_ranks=expert_ranks,
    )
