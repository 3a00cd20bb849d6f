"""What a config will cost, before anything runs: parameters, FLOPs, memory, time."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from nmoe.config import sections
from nmoe.config.sections import Config
from nmoe.pure.core.blueprint import Blueprint, Parameters
from nmoe.pure.core.layout import WIDENED, ArenaLayout
from nmoe.pure.core.spec import Dims
from nmoe.pure.cost import flops
from nmoe.pure.cost.flops import Flops
from nmoe.pure.cost.machines import H200
from nmoe.pure.cost.traffic import distinct_ranks
from nmoe.pure.model.attention import KINDS, Kind, Kinds, layers
from nmoe.pure.model.attention.qk_clip import score_bytes
from nmoe.pure.model.low_precision import RECIPES
from nmoe.pure.model.route import BINS
from nmoe.pure.optim.muon import kernel_bytes, matrices, temporary_bytes
from nmoe.pure.optim.update import joint_settings, rule
from nmoe.pure.parallel import exchange_arena
from nmoe.pure.parallel.slots import slots

CAPACITY = 2.0
"""Rows a rank has room for, over the mean, where a config does not say."""


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    remainders: int  # low halves of the fp32 master
    gradients: int  # of one rank, and the sums over ranks that it has
    moments: int
    activations: int  # kept for the backward pass of one microbatch; an estimate
    logits: int  # of one chunk of the loss
    exchange: int  # symmetric memory to receive rows in
    landing: int  # symmetric memory to receive gradients in, of ranks of one host; else the fp32 form of what NCCL sums
    update: int  # temporaries of what is updated as a whole, when activations are gone

    def total(self) -> int:
        """The most at once."""
        passing = self.activations + self.logits
        return sum(attrs.astuple(self)) - min(passing, self.update)


@attrs.frozen(kw_only=True)
class Plan:
    """A config in numbers."""

    parameters: Parameters
    flops: Flops  # forward, a token, causal
    flops_executed: Flops  # forward, a token, as the reference executes them
    memory: Memory
    arena: exchange_arena.Fields | None  # None: a single rank exchanges nothing
    distinct: float  # ranks a token has to reach, on average
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
    lowered: int  # of the forward FLOPs a token, in products of fewer bits, where the config has them

    def tokens_per_second(self) -> float:
        """Of all ranks, at the stated MFU."""
        return self.ranks * self.peak_flops * self.mfu / self.flops.training()

    def seconds(self) -> float:
        """Of the whole training, at the stated MFU."""
        return self.tokens / self.tokens_per_second()


def activation_bytes(
    c: sections.Model,
    dims: Dims,
    *,
    tokens: int,
    sequence_length: int,
    element: int,
    square: bool,
    kinds: Kinds = KINDS,
) -> int:
    """What autograd keeps of the reference for the backward pass of one microbatch.

    Counted op by op along `model.block`: inputs of every product and norm, both halves of every gate, rows of the
    chosen experts. Rotations and norms keep fp32 copies. A depth of multi-token prediction keeps a block, three norms,
    the input of its product and the loss's gradient of the hidden state.

    element  bytes of an activation
    square   whether attention keeps its probabilities
    """
    width, fp32 = c.hidden_size, 4
    shape = {"hidden": width, "sequence_length": sequence_length, "element": element, "square": square}
    attention = sum(kind.kept_bytes(section, **shape) for kind, section in layers(c, kinds))
    norms = 2 * 2 * width * fp32 + width * element  # both keep their input in fp32 and the scaled input
    dense = 4 * dims["I"] * element
    # a SwiGLU keeps both halves, silu and its result; a clamped one also both clamped, the sigmoid and gate * sigmoid
    gates = (4 if c.moe.swiglu_limit is None else 7) * dims["F"]
    rows = c.moe.top_k * (width * 2 + gates) * element + c.moe.top_k * width * fp32
    routed = width * fp32 + 6 * dims["E"] * fp32 + rows + 4 * dims["S"] * element
    mixtures, depth = len(c.mixtures()), c.depth()
    blocks = c.num_layers + depth
    a_token = attention + blocks * norms + (blocks - mixtures) * dense + mixtures * routed
    ahead = 3 * (2 * width * fp32) + 2 * width * element + width * element
    return tokens * (a_token + 3 * width * fp32 + depth * ahead)


def kernel_activation_bytes(
    c: sections.Model,
    dims: Dims,
    *,
    tokens: int,
    sequence_length: int,
    rows: int,
    recompute: str,
    kinds: Kinds = KINDS,
) -> int:
    """What the GPU's kernels keep, bf16, for the backward pass of one microbatch, and what that pass holds on top.

    A norm keeps its input, a product its input, attention q, k, v, its output and one number a row, the experts their
    pre-activation; a router works in fp32.

    rows       (token, expert) pairs the rank's experts have room for
    recompute  train.recompute
    """
    width, fp32, element = c.hidden_size, 4, 2
    kept = [_kernel_attention_bytes(*layer, sequence_length=sequence_length) for layer in layers(c, kinds)]
    attention, norms = zip(*kept, strict=True)
    mixtures, depth = len(c.mixtures()), c.depth()
    blocks = c.num_layers + depth
    num_dense = blocks - mixtures
    made_again = 2 * width * element * blocks + sum(norms)
    dense, shared = dims["I"], dims["S"]
    routed = rows * 2 * dims["F"] * element
    a_token = (
        blocks * 2 * width * element  # the residual stream before each norm
        + num_dense * 2 * dense * element
        + mixtures * (width * fp32 + 6 * dims["E"] * fp32 + 2 * shared * element)
    )
    others = tokens * a_token + mixtures * routed
    again = tokens * (made_again + (num_dense * dense + mixtures * shared) * element)
    total = others + tokens * sum(attention)
    if recompute == "none":
        total += again
    elif recompute == "full":
        largest = tokens * max(attention)
        total = tokens * blocks * width * element + (others + again) // blocks + largest
    # of multi-token prediction, outside its blocks: inputs of three norms, of the product, and the loss's gradient
    total += tokens * depth * (3 + 2 + 1) * width * element
    # of one mixture at a time: gradients of pre-activation and rows, and the activation
    passing = rows * (3 * dims["F"] + width) * element
    # or of one attention: what its kernels hold beside what they keep
    held = (
        kind.kernel_passing_bytes(section, tokens=tokens, sequence_length=sequence_length)
        for kind, section in layers(c, kinds)
    )
    passing = max(passing, *held)
    return total + passing + tokens * 2 * width * element


def fp8_bytes(dims: Dims, *, tokens: int, landing: int, rows: int, expert_ranks: int) -> int:
    """What products in fp8 hold at once of one mixture, of the routed experts or of the shared ones: codes of the
    weights and of the output's gradient, and either that once more in rows, or codes of the pre-activation's gradient,
    a byte each.

    tokens   of the rank, which its shared experts see
    landing  tokens whose gradients its routed experts quantise: the same, or those that land here
    rows     (token, expert) pairs they have room for
    """
    width, inner, shared = dims["D"], dims["F"], dims["S"]
    routed = dims["E"] // expert_ranks * 3 * width * inner + landing * width + rows * max(width, 2 * inner)
    return max(routed, 3 * width * shared + tokens * (width + 2 * shared))


def emulation_bytes(dims: Dims, *, tokens: int, rows: int, expert_ranks: int, noisy: bool) -> int:
    """What emulated products hold at once, of the largest one of a block: its operands in fp32 four times, as given,
    scaled, rounded and back, and as often again where gradients are rounded stochastically: with noise between
    neighbours.

    tokens  of the rank, which its shared experts see
    rows    (token, expert) pairs its routed experts have room for
    """
    width, inner, shared = dims["D"], 2 * dims["F"], 2 * dims["S"]
    routed = dims["E"] // expert_ranks * width * inner + rows * (width + inner)
    return 4 * (8 if noisy else 4) * max(routed, width * shared + tokens * (width + shared))


def _kernel_attention_bytes(kind: Kind, section: Any, *, sequence_length: int) -> tuple[int, int]:
    """Bytes a token that attention keeps on a GPU in one layer, and those of its norms that recompute makes again.

    A kind without kernels runs its reference, whose input is the norm's output and counted there.
    """
    if kind.kernel_kept_bytes is None:
        return kind.kept_bytes(section, hidden=0, sequence_length=sequence_length, element=2, square=True), 0
    return kind.kernel_kept_bytes(section)


def saved_bytes(arena: ArenaLayout) -> int:
    """Bytes of an element in a checkpoint: value, remainder, moments."""
    return arena.storage.itemsize + 2 * arena.has_remainder() + moment_bytes(arena)


def update_bytes(arena: ArenaLayout, dims: Dims, optim: sections.Optim, *, kernels: bool) -> int:
    """Temporaries of updates of whole parameters: by the rule one at a time, by kernels all of a rank's in a bucket."""
    bf16, most = arena.has_remainder(), 0
    if not kernels:
        return max(temporary_bytes(slot.size(), bf16=bf16) for slot in arena.slots)
    how = {"bf16": bf16, "heads_apart": optim.muon_heads == "apart"}
    for own in (own for part in range(arena.parts) for own in arena.owned(part) if own):
        cut = joint_settings(arena.policy.optimizer, own, dims, **how)["by_matrix"]
        size = own[-1].offset + own[-1].size() - own[0].offset
        most = max(most, kernel_bytes(matrices(cut, size), 2 if bf16 else 4))
    return most


def moment_bytes(arena: ArenaLayout) -> int:
    """Bytes of the moments of an element."""
    return len(rule(arena.policy.optimizer).moments) * arena.moments.itemsize


def plan(
    config: Config,
    blueprint: Blueprint,
    *,
    mfu: float,
    peak_flops: float = H200.peak_flops,
    dedup: bool = False,
    capacity: float = CAPACITY,
    kinds: Kinds = KINDS,
) -> Plan:
    """What training this config on the ranks of its blueprint costs.

    mfu           model FLOPs utilisation to assume, causal count, of a rank that waits for no other
    peak_flops    FLOP/s of one rank
    dedup         whether a token goes once to each rank, instead of once to each of its experts
    capacity      rows a rank has room for, over the mean
    kinds         of attention
    """
    c, train = config.model, config.train
    specs, dims, arenas = blueprint.specs, blueprint.dims, blueprint.layouts
    ranks, expert_ranks = blueprint.world, blueprint.expert_ranks
    microbatches = max(1, train.batch_size // (ranks * train.microbatch_size))
    element = 4 if config.precision.compute == "fp32" else 2
    tokens = train.microbatch_size * train.sequence_length
    distinct = distinct_ranks(
        num_experts=c.moe.num_experts,
        top_k=c.moe.top_k,
        ranks=expert_ranks,
        num_groups=c.moe.num_groups,
        top_k_groups=c.moe.top_k_groups,
    )
    sizes = exchange_arena.sizes(
        ranks=expert_ranks,
        experts=c.moe.num_experts,
        top_k=c.moe.top_k,
        hidden_size=c.hidden_size,
        tokens=tokens,
        capacity=capacity,
        dedup=dedup,
        dtype=torch.float32 if element == 4 else torch.bfloat16,
        staged=config.parallel.transport == "nvshmem",
        fp8=config.precision.kernels_fp8(),
    )
    arena, rows = exchange_arena.fields(sizes) if expert_ranks > 1 else None, sizes.capacity
    buckets = sorted(4 * (high - low) for each in arenas if each.has_sums() for low, high in each.buckets())
    landing = sum(buckets[-WIDENED:])
    logit_rows, head = min(train.loss_chunk, tokens) * c.vocab_size, c.vocab_size * c.hidden_size
    kernels = config.run.device == "cuda" and config.run.kernels == "triton"
    if kernels:
        activations = kernel_activation_bytes(
            c,
            dims,
            tokens=tokens,
            sequence_length=train.sequence_length,
            rows=rows,
            recompute=train.recompute,
            kinds=kinds,
        )
        # logits become their own gradient; the head's gradient is summed in fp32
        logits = logit_rows * element + (1 + c.depth()) * head * 4
        # among hosts, and beside NVSHMEM, NCCL moves them
        if ranks <= H200.gpus_per_host and not (arena and sizes.staged):
            landing = sum(slots(size).allocated() for size in {ranks, ranks // expert_ranks} - {1})
    else:
        length = train.sequence_length
        shape = {"tokens": tokens, "sequence_length": length}
        activations = activation_bytes(c, dims, **shape, element=element, square=True, kinds=kinds)
        # fp32 logits, their exponentials and gradient, and the gradient in the compute format
        logits = logit_rows * (3 * 4 + element) + head * (4 + element) + c.depth() * head * element
    if c.moe.balance == "quantile":
        # histograms of margins: of each layer, stacked, and their sum over microbatches
        activations += 3 * len(c.mixtures()) * c.moe.num_experts * BINS * 8
    if config.optim.qk_clip is not None:
        activations += score_bytes(c.attention, train.microbatch_size, train.sequence_length, element=element)
    if config.precision.kernels_fp8() and c.mixtures():
        landed = sizes.landing() if expert_ranks > 1 else tokens
        activations += fp8_bytes(dims, tokens=tokens, landing=landed, rows=rows, expert_ranks=expert_ranks)
    if config.precision.emulate and c.mixtures():
        noisy = RECIPES[config.precision.compute].noisy
        activations += emulation_bytes(dims, tokens=tokens, rows=rows, expert_ranks=expert_ranks, noisy=noisy)
    causal = flops.forward_flops(c, specs, dims, sequence_length=train.sequence_length, causal=True, kinds=kinds)
    total = config.tokens()
    shares = [(arena, arena.held()) for arena in arenas]
    return Plan(
        parameters=blueprint.parameters,
        flops=causal,
        flops_executed=flops.forward_flops(
            c, specs, dims, sequence_length=train.sequence_length, causal=False, kinds=kinds
        ),
        memory=Memory(
            parameters=sum(arena.size * arena.storage.itemsize for arena in arenas),
            remainders=sum(share * 2 for arena, share in shares if arena.has_remainder()),
            gradients=sum(
                arena.size * arena.gradient.itemsize + 4 * share * arena.has_sums() for arena, share in shares
            ),
            moments=sum(share * moment_bytes(arena) for arena, share in shares),
            activations=activations,
            logits=logits,
            exchange=arena.allocated() if arena else 0,
            landing=landing,
            update=max(
                (update_bytes(arena, dims, config.optim, kernels=kernels) for arena in arenas if arena.whole()),
                default=0,
            ),
        ),
        arena=arena,
        distinct=distinct,
        staging=sum(share * saved_bytes(arena) for arena, share in shares),
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
        lowered=flops.lowered_flops(c, specs, dims),
    )
