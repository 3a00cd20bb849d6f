"""What a config will cost, before anything runs: parameters, FLOPs, memory, time."""

from __future__ import annotations

import math

import attrs

from nmoe.config import sections
from nmoe.config.sections import Config
from nmoe.pure import flops, model
from nmoe.pure.flops import Flops, Parameters
from nmoe.pure.layout import ArenaLayout, layout
from nmoe.pure.spec import Dims

__all__ = ["PEAK_FLOPS", "Memory", "Plan", "activation_bytes", "plan"]

PEAK_FLOPS = 989.5e12
"""Dense bf16 FLOP/s of one H100 or H200, the unit of MFU on a GPU (NVIDIA's data sheet, without sparsity)."""


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    remainders: int  # low halves of the fp32 master
    gradients: int
    moments: int
    activations: int  # kept for the backward pass of one microbatch; an estimate
    logits: int  # of one chunk of the loss

    def total(self) -> int:
        """All kinds."""
        return sum(attrs.astuple(self))


@attrs.frozen(kw_only=True)
class Plan:
    """A config in numbers."""

    parameters: Parameters
    flops: Flops  # forward, a token, causal
    flops_executed: Flops  # forward, a token, as the reference executes them
    memory: Memory
    staging: int  # bytes of host memory on one rank: the copy a checkpoint is written from
    checkpoint: int  # bytes of one checkpoint, all ranks
    ranks: int
    expert_ranks: int  # ranks the experts are shared out to
    tokens_per_step: int
    tokens: int
    microbatches: int  # a rank, a step
    flop_total: float  # of the whole training
    mfu: float
    peak_flops: float  # of one rank

    def tokens_per_second(self) -> float:
        """Of all ranks, at the stated MFU."""
        return self.ranks * self.peak_flops * self.mfu / self.flops.training()

    def seconds(self) -> float:
        """Of the whole training, at the stated MFU."""
        return self.tokens / self.tokens_per_second()


def activation_bytes(
    c: sections.Model, dims: Dims, *, tokens: int, sequence_length: int, element: int, square: bool
) -> int:
    """What autograd keeps of the reference for the backward pass of one microbatch.

    Counted op by op along `model.block`: inputs of every product and norm, both halves of every gate, rows of the
    chosen experts. Rotations and norms keep fp32 copies.

    element  bytes of an activation
    square   whether attention keeps its probabilities
    """
    width, wide = c.hidden_size, 4
    heads = dims["H"]
    query = dims.get("Q", 0)
    attention = (
        2 * width * wide  # norm: input in fp32, scaled input
        + width * element  # input of `down`
        + 2 * (query + dims["R"]) * wide
        + (query + dims["R"]) * element
        + heads * (2 * dims["C"] + dims["U"]) * element  # q, k, v
        + heads * dims["U"] * element * 2  # output, and its copy for `out`
        + (heads * sequence_length * element if square else heads * wide)
    )
    ffn_norm = 2 * width * wide + width * element
    dense = 4 * dims["I"] * element
    rows = c.moe.top_k * (width * 2 + 4 * dims["F"]) * element + c.moe.top_k * width * wide
    routed = width * wide + 6 * dims["E"] * wide + rows + 4 * dims["S"] * element
    mixtures = c.num_layers - c.num_dense_layers
    a_token = c.num_layers * (attention + ffn_norm) + c.num_dense_layers * dense + mixtures * routed
    return tokens * (a_token + 3 * width * wide)


def kernel_activation_bytes(c: sections.Model, dims: Dims, *, tokens: int, recompute: str) -> int:
    """What the GPU's kernels keep, bf16, for the backward pass of one microbatch, and what that pass holds on top.

    A norm keeps its input, a product its input, attention q, k, v, its output and one number a row, the experts their
    pre-activation; a router works in fp32.

    recompute  train.recompute
    """
    width, wide, element = c.hidden_size, 4, 2
    heads, query = dims["H"], dims.get("Q", 0)
    made_again = 2 * width + query + dims["R"]  # norms
    kept = (
        2 * width  # residual stream, before each norm
        + dims["A"]
        + heads * (dims["C"] + dims["Z"] + dims["U"])
        + dims["P"]
    ) * element + heads * wide
    dense, shared = dims["I"], dims["S"]
    routed = c.moe.top_k * 2 * dims["F"] * element + width * wide + 6 * dims["E"] * wide
    mixtures = c.num_layers - c.num_dense_layers
    a_token = (
        c.num_layers * kept + c.num_dense_layers * 2 * dense * element + mixtures * (routed + 2 * shared * element)
    )
    again = (c.num_layers * made_again + c.num_dense_layers * dense + mixtures * shared) * element
    if recompute == "none":
        a_token += again
    elif recompute == "full":
        a_token = c.num_layers * width * element + (a_token + again) // c.num_layers
    # of one mixture at a time: gradients of pre-activation and rows, and the activation
    passing = c.moe.top_k * (3 * dims["F"] + width) * element
    return tokens * (a_token + passing + 2 * width * element)


def held(arena: ArenaLayout, ranks: int) -> int:
    """Elements whose moments and remainders one rank keeps, and saves: its experts, 1/ranks of the rest (ZeRO-2)."""
    return arena.size if arena.policy.shard else math.ceil(arena.size / ranks)


def saved_bytes(arena: ArenaLayout) -> int:
    """Bytes of an element in a checkpoint: value, remainder, both moments."""
    return arena.storage.itemsize + 2 * arena.has_remainder() + 2 * arena.moments.itemsize


def memory(arenas: tuple[ArenaLayout, ...], ranks: int, activations: int, logits: int) -> Memory:
    """Bytes on one rank."""
    return Memory(
        parameters=sum(arena.size * arena.storage.itemsize for arena in arenas),
        remainders=sum(held(arena, ranks) * 2 for arena in arenas if arena.has_remainder()),
        gradients=sum(arena.size * arena.gradient.itemsize for arena in arenas),
        moments=sum(held(arena, ranks) * 2 * arena.moments.itemsize for arena in arenas),
        activations=activations,
        logits=logits,
    )


def plan(config: Config, *, ranks: int, mfu: float, peak_flops: float = PEAK_FLOPS) -> Plan:
    """What training this config on `ranks` ranks costs.

    Experts are shared out to as many ranks as divide both counts.

    mfu         model FLOPs utilisation to assume, causal count
    peak_flops  FLOP/s of one rank
    """
    c, train = config.model, config.train
    specs, dims = model.specs(c), model.dims(c)
    expert_ranks = math.gcd(ranks, c.moe.num_experts)
    microbatches = max(1, train.batch_size // (ranks * train.microbatch_size))
    arenas = layout(
        specs,
        dims,
        compute=config.precision.compute,
        moments=config.precision.moments,
        accumulate=microbatches > 1,
        world=expert_ranks,
    )
    element = 4 if config.precision.compute == "fp32" else 2
    tokens = train.microbatch_size * train.sequence_length
    rows, head = min(train.loss_chunk, tokens) * c.vocab_size, c.vocab_size * c.hidden_size
    if config.run.device == "cuda":
        activations = kernel_activation_bytes(c, dims, tokens=tokens, recompute=train.recompute)
        # logits become their own gradient; the head's gradient is summed in fp32
        logits = rows * element + head * 4
    else:
        length = train.sequence_length
        activations = activation_bytes(c, dims, tokens=tokens, sequence_length=length, element=element, square=True)
        # fp32 logits, their exponentials and gradient, and the gradient in the compute format
        logits = rows * (3 * 4 + element) + head * (4 + element)
    causal = flops.forward_flops(c, specs, dims, sequence_length=train.sequence_length, causal=True)
    total = train.steps * train.batch_size * train.sequence_length
    return Plan(
        parameters=flops.parameters(specs, dims, top_k=c.moe.top_k),
        flops=causal,
        flops_executed=flops.forward_flops(c, specs, dims, sequence_length=train.sequence_length, causal=False),
        memory=memory(arenas, ranks, activations, logits),
        staging=sum(held(arena, ranks) * saved_bytes(arena) for arena in arenas),
        checkpoint=sum(
            slot.size() * (expert_ranks if arena.policy.shard else 1) * saved_bytes(arena)
            for arena in arenas
            for slot in arena.slots
        ),
        ranks=ranks,
        expert_ranks=expert_ranks,
        tokens_per_step=train.batch_size * train.sequence_length,
        tokens=total,
        microbatches=microbatches,
        flop_total=float(total) * causal.training(),
        mfu=mfu,
        peak_flops=peak_flops,
    )
