"""The network: its parameter records, and the functions from tokens to loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.init import normal, ones, residual
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model import route
from nmoe.pure.model.attention import mla
from nmoe.pure.model.experts import mlp
from nmoe.pure.model.ops import Env
from nmoe.pure.model.rope import Rope, table


@record
class Batch:
    """Tokens and what follows each; a negative target does not count. [B T], or [M B T] for a whole step.

    With `start`, a token sees only its own document: it is the index in the row of that document's first token, 0 for a
    document that began before the row.
    """

    tokens: Tensor  # i64
    targets: Tensor  # i64
    start: Tensor | tuple[()]  # i32


@record
class Dense:
    """Gated MLP of a block before the first mixture."""

    up: Tensor = param("D 2 I", Role.MATRIX, normal("D"))
    down: Tensor = param("I D", Role.MATRIX, residual("I"))


@record
class Shared:
    """All shared experts as one wide gated MLP."""

    up: Tensor = param("D 2 S", Role.MATRIX, normal("D"))
    down: Tensor = param("S D", Role.MATRIX, residual("S"))


@record
class Moe:
    """Routed experts of one block, and the shared ones or ()."""

    router: Tensor = param("D E", Role.ROUTER, normal("D"))
    up: Tensor = param("E D 2 F", Role.EXPERT, normal("D"))
    down: Tensor = param("E F D", Role.EXPERT, residual("F"))
    shared: Shared | tuple[()]


@record
class Block:
    """One layer."""

    attention_norm: Tensor = param("D", Role.GAIN, ones)
    attention: mla.Mla
    ffn_norm: Tensor = param("D", Role.GAIN, ones)
    ffn: Dense | Moe


@record
class Model:
    """All parameters."""

    embed: Tensor = param("V D", Role.EMBED, normal("D"))
    blocks: tuple[Block, ...]
    norm: Tensor = param("D", Role.GAIN, ones)
    head: Tensor = param("D V", Role.HEAD, normal("D"))


@record
class RouterReport:
    """What the routers did with a batch; one row a mixture layer once stacked."""

    load: Tensor  # [E] i64, tokens each expert was chosen by
    entropy: Tensor  # 0-d f32, nats
    imbalance: Tensor  # 0-d f32, sequence-wise imbalance summed over sequences; carries a gradient


def specs(c: sections.Model) -> Model:
    """The model with a Spec where each parameter will be."""

    def ffn(layer: int) -> Dense | Moe:
        if layer < c.num_dense_layers:
            return spec_tree(Dense)
        return spec_tree(Moe, shared=spec_tree(Shared) if c.moe.num_shared_experts else ())

    blocks = (spec_tree(Block, attention=mla.specs(c.attention), ffn=ffn(layer)) for layer in range(c.num_layers))
    return spec_tree(Model, blocks=tuple(blocks))


def dims(c: sections.Model) -> dict[str, int]:
    """Size of every axis letter.

    V vocabulary · D width · L layers · I, F, S hidden widths of a dense MLP, an expert, the shared experts
    E experts · attention's own letters: `attention.mla.dims`
    """
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "L": c.num_layers,
        "I": c.intermediate_size,
        "E": c.moe.num_experts,
        "F": c.moe.intermediate_size,
        "S": c.moe.num_shared_experts * c.moe.intermediate_size,
        **mla.dims(c.attention),
    }


def rope_table(c: sections.Model, num_positions: int) -> Rope:
    """The rotation table of this model's attention."""
    return table(num_positions, c.attention.qk_rope_head_dim, theta=c.attention.rope_theta, yarn=c.attention.yarn)


def moe(p: Moe, x: Tensor, bias: Tensor, env: Env, c: sections.Moe) -> tuple[Tensor, RouterReport]:
    """Sum of the chosen experts' outputs and the shared experts'.

    x        [B T D]   normed block input
    bias     [E] f32   router bias of this layer
    returns  [B T D] and what the router did
    Source:  DeepSeek-V3 (arXiv:2412.19437) eq. 12.
    """
    flat = x.flatten(0, -2)
    score, routing = env.ops.route(
        flat,
        p.router,
        bias,
        top_k=c.top_k,
        num_groups=c.num_groups,
        top_k_groups=c.top_k_groups,
        scale=c.route_scale,
    )
    y, count = env.ops.mixture(flat, routing, p.up, p.down)
    y = y.view_as(x)
    if isinstance(p.shared, Shared):
        y = y + mlp(x, p.shared.up, p.shared.down, env.ops.swiglu)
    report = RouterReport(
        count,
        route.entropy(score.detach()),
        route.sequence_imbalance(score.unflatten(0, x.shape[:-1]), top_k=c.top_k, first=env.ops.first),
    )
    return y, report


def block(
    p: Block, x: Tensor, bias: Tensor | tuple[()], env: Env, c: sections.Model, start: Tensor | tuple[()] = ()
) -> tuple[Tensor, RouterReport | tuple[()]]:
    """One pre-norm layer: attention, then a dense MLP or a mixture.

    x        [B T D]
    bias     [E] f32 of this layer, () for a dense one
    start    [B T] i32 or ()   first token of each token's document
    """
    y = env.ops.norm(x, p.attention_norm, eps=c.norm_eps)
    ops = env.ops
    y = mla.mla(p.attention, y, env.rope, ops.norm, ops.rotate_mla, ops.attend_mla, c.attention, start, eps=c.norm_eps)
    x, y = ops.add_norm(x, y, p.ffn_norm, eps=c.norm_eps)
    if isinstance(p.ffn, Moe) and isinstance(bias, Tensor):
        y, report = moe(p.ffn, y, bias, env, c.moe)
        return x + y, report
    if isinstance(p.ffn, Dense):
        return x + mlp(y, p.ffn.up, p.ffn.down, env.ops.swiglu), ()
    raise ValueError("block: a mixture has a router bias, got (); pass the layer's row of the router bias")


def forward(
    p: Model,
    tokens: Tensor,
    bias: Tensor,
    env: Env,
    c: sections.Model,
    start: Tensor | tuple[()] = (),
    *,
    run: Callable[..., tuple[Tensor, Any]] = block,
) -> tuple[Tensor, RouterReport]:
    """The last hidden state, normed; multiply by `p.head` and `logit_scale` for logits.

    tokens   [B T] i64
    bias     [L E] f32   router bias, one row a mixture layer
    start    [B T] i32 or ()   first token of each token's document, as in Batch; (): rows are read whole
    run      `block`, or a wrapper around it (compile, recompute)
    returns  [B T D] and the reports of all mixture layers, stacked
    """
    x = F.embedding(tokens, p.embed) * c.embedding_scale
    reports: list[RouterReport] = []
    for layer, parameters in enumerate(p.blocks):
        row = bias[layer - c.num_dense_layers] if layer >= c.num_dense_layers else ()
        x, report = run(parameters, x, row, env, c, start)
        if isinstance(report, RouterReport):
            reports.append(report)
    stacked = RouterReport(
        torch.stack([report.load for report in reports]),
        torch.stack([report.entropy for report in reports]),
        torch.stack([report.imbalance for report in reports]),
    )
    return env.ops.norm(x, p.norm, eps=c.norm_eps), stacked


def objective(
    p: Model,
    batch: Batch,
    bias: Tensor,
    env: Env,
    c: sections.Model,
    *,
    num_targets: Tensor,
    num_sequences: int,
    chunk: int,
    z_loss: float = 0.0,
    run: Callable[..., tuple[Tensor, Any]] = block,
) -> tuple[Tensor, Tensor, RouterReport]:
    """This batch's share of the mean over the global batch: what is differentiated, and what is read.

    batch          [B T]
    num_targets    0-d   targets that count in the global batch
    num_sequences  sequences in the global batch
    returns        (loss, nll, report): loss = (nll + z-loss) / num_targets + balance · mean imbalance; nll is the sum
                   over this batch, without gradient
    """
    x, report = forward(p, batch.tokens, bias, env, c, batch.start, run=run)
    total, nll = env.ops.linear_cross_entropy(
        x.flatten(0, 1), p.head, batch.targets.flatten(), chunk=chunk, logit_scale=c.logit_scale, z_loss=z_loss
    )
    auxiliary = c.moe.sequence_balance * report.imbalance.sum() / num_sequences
    return total / num_targets + auxiliary, nll, report
