"""The network: the functions from tokens to loss, over the records of `parameters`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.spec import spec_tree
from nmoe.pure.core.tree import record
from nmoe.pure.model import route
from nmoe.pure.model.attention import KINDS, Kinds, attention_of
from nmoe.pure.model.experts import down_biases, mlp
from nmoe.pure.model.ops import Env
from nmoe.pure.model.parameters import Biases as Biases
from nmoe.pure.model.parameters import Block as Block
from nmoe.pure.model.parameters import Dense as Dense
from nmoe.pure.model.parameters import Moe as Moe
from nmoe.pure.model.parameters import Mtp as Mtp
from nmoe.pure.model.parameters import Shared as Shared
from nmoe.pure.model.parameters import Transformer as Transformer
from nmoe.pure.model.rope import Documents, documents
from nmoe.pure.model.route import Routing


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
class RouterReport:
    """What the routers did with a batch; one row an MoE layer once stacked."""

    load: Tensor  # [E] i64, tokens each expert was chosen by
    entropy: Tensor  # 0-d f32, nats
    imbalance: Tensor  # 0-d f32, sequence-wise imbalance summed over sequences; carries a gradient
    margins: Tensor  # [E BINS] i64, `route.margin_histogram`; [E 0] where balance = "sign" needs none
    routing: tuple[Routing, ...]  # choices and weights of each MoE layer, to be replayed
    attention: (
        Tensor | tuple[()]
    )  # 0-d f32, attention's own loss, summed over tokens and all layers, or (); has a gradient
    ahead: tuple[Tensor, ...]  # 0-d f32, nll of each depth of multi-token prediction, summed over its targets


def specs(c: sections.Model, *, kinds: Kinds = KINDS) -> Transformer:
    """The model with a Spec where each parameter will be."""
    kind = attention_of(c, kinds)

    def ffn(layer: int) -> Dense | Moe:
        if layer < c.num_dense_layers:
            return spec_tree(Dense)
        shared = spec_tree(Shared) if c.moe.num_shared_experts else ()
        return spec_tree(Moe, shared=shared, biases=spec_tree(Biases) if c.moe.biases else ())

    def block_at(layer: int) -> Block:
        return spec_tree(Block, attention=kind.specs(kind.at_layer(c.attention, layer)), ffn=ffn(layer))

    mtp = tuple(spec_tree(Mtp, block=block_at(c.num_layers - 1)) for _ in range(c.depth()))
    return spec_tree(Transformer, blocks=tuple(map(block_at, range(c.num_layers))), mtp=mtp)


def dims(c: sections.Model, *, kinds: Kinds = KINDS) -> dict[str, int]:
    """Size of every axis letter.

    V vocabulary · D width · L layers · I, F, S hidden widths of a dense MLP, an expert, the shared experts
    E experts · the kind of attention's own letters: its `dims`

    Raises:  ValueError when the attention gives one of these letters another meaning.
    """
    own = {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "L": c.num_layers,
        "I": c.intermediate_size,
        "E": c.moe.num_experts,
        "F": c.moe.intermediate_size,
        "S": c.moe.num_shared_experts * c.moe.intermediate_size,
    }
    attention = attention_of(c, kinds).dims(c.attention)
    if taken := sorted(own.keys() & attention.keys()):
        raise ValueError(
            f"dims: expected axis letters other than {', '.join(own)} from the attention, got {', '.join(taken)}; "
            "rename them in its dims and specs"
        )
    return own | attention


def model_at(c: sections.Model, env: Env, tokens: int) -> sections.Model:
    """The model after so many tokens of the run: its attention may have stages."""
    attention = env.kind.at_tokens(c.attention, tokens)
    return c if attention is c.attention else attrs.evolve(c, attention=attention)


def moe(
    p: Moe,
    x: tuple[Tensor, ...],
    bias: Tensor,
    env: Env,
    c: sections.Moe,
    recorded: Routing | Tensor | tuple[()] = (),
    residual: Tensor | tuple[()] = (),
) -> tuple[Tensor, RouterReport]:
    """`moe_output`, and what the router did."""
    y, (routed, count) = moe_output(p, x, bias, env, c, recorded, residual)
    routing = routed.routing
    score, favoured = (by_token.unflatten(0, y.shape[:-1]) for by_token in (routed.score, routed.favoured))
    entropy, imbalance, margins = env.ops.report(score, favoured, bias, routing.expert, margins=c.balance == "quantile")
    report = RouterReport(
        count,
        entropy,
        imbalance,
        margins,
        (Routing(routing.expert, routing.weight.detach()),),
        (),
        (),
    )
    return y, report


def readers(p: Moe) -> int:
    """How many functions read the input of a layer of experts: the router, the experts, and the shared ones if any."""
    return 2 + isinstance(p.shared, Shared)


def moe_output(
    p: Moe,
    x: tuple[Tensor, ...],
    bias: Tensor,
    env: Env,
    c: sections.Moe,
    recorded: Routing | Tensor | tuple[()] = (),
    residual: Tensor | tuple[()] = (),
) -> tuple[Tensor, tuple[route.Routed, Tensor]]:
    """Sum of the chosen experts' outputs and the shared experts'.

    x         [B T D] for each of its `readers`: the normed block input
    bias      [E] f32   router bias of this layer
    recorded  choices to take in the place of the router's
    residual  [B T D] or (): added to the result
    returns   [B T D], and the routing with its scores and the tokens of each expert [E]
    Source:   DeepSeek-V3 (arXiv:2412.19437) eq. 12.
    """
    shape, flat = x[0].shape, [each.flatten(0, -2) for each in x]
    shift, up_bias = (p.biases.router, p.biases.up) if isinstance(p.biases, Biases) else ((), ())
    # only where the model has them: the kernels in fp8 take neither
    form = {} if c.plain() else {"bias": up_bias, "limit": c.swiglu_limit, "alpha": c.swiglu_alpha}
    routed = env.ops.route(
        flat[0],
        p.router,
        bias,
        shift,
        top_k=c.top_k,
        num_groups=c.num_groups,
        top_k_groups=c.top_k_groups,
        scale=c.route_scale,
        normalize=c.normalize,
        softmax=c.score == "softmax",
        recorded=recorded,
    )
    added: list[Tensor] = []
    if isinstance(p.biases, Biases):
        added.append(down_biases(routed.routing, p.biases.down))
    if isinstance(p.shared, Shared):
        added.append(env.ops.shared(flat[2], p.shared.up, p.shared.down, env.ops.swiglu))
    if isinstance(residual, Tensor):
        added.append(residual.flatten(0, -2))
    y, count = env.ops.experts(flat[1], routed.routing, p.up, p.down, added=tuple(added), **form)
    return y.view(shape), (routed, count)


def block(
    p: Block,
    x: Tensor,
    bias: Tensor | tuple[()],
    env: Env,
    c: sections.Model,
    documents: Documents | tuple[()] = (),
    recorded: Routing | Tensor | tuple[()] = (),
) -> tuple[Tensor, RouterReport | tuple[()], Tensor | tuple[()]]:
    """One pre-norm layer: attention, then a dense MLP or routed experts.

    x          [B T D]
    bias       [E] f32 of this layer, () for a dense one
    documents  of the batch; (): rows are whole
    recorded   choices of this layer to take in the place of its router's
    returns    [B T D], what the router did, and the attention's own loss; () for what there is not
    Raises:    ValueError for a layer of experts without a router bias.
    """
    ops = env.ops
    x, y = ops.add_norm(x, (), p.attention_norm, eps=c.norm_eps)
    y = env.kind.apply(p.attention, y, env.tables, ops.norm, ops.attention, c.attention, documents, eps=c.norm_eps)
    y, loss = y if isinstance(y, tuple) else (y, ())
    _, x, report = feed_forward(p, x, y, bias, env, c, recorded, add=True)
    return x, report, loss


def feed_forward(
    p: Block,
    x: Tensor,
    y: Tensor,
    bias: Tensor | tuple[()],
    env: Env,
    c: sections.Model,
    recorded: Routing | Tensor | tuple[()] = (),
    mix: Callable[..., tuple[Tensor, Any]] = moe,
    *,
    add: bool = False,
) -> tuple[Tensor, Tensor, Any]:
    """The second half of a block: what attention gave is added, then a dense MLP or routed experts.

    x        [B T D]   residual stream
    y        [B T D]   output of the block's attention
    mix      `moe`, or `moe_output` for who reads no report
    add      whether the output is added to the stream, by the experts' own pass; False: that is left to the next norm
    returns  the residual stream [B T D] with attention's output, what is to be added to it, or their sum with `add`,
             and what `mix` gave beside its output; () for a dense MLP
    Raises:  ValueError as `block`.
    """
    several = readers(p.ffn) if isinstance(p.ffn, Moe) else 1
    x, *normed = env.ops.add_norm(x, y, p.ffn_norm, eps=c.norm_eps, readers=several)
    if isinstance(p.ffn, Moe) and isinstance(bias, Tensor):
        y, report = mix(p.ffn, tuple(normed), bias, env, c.moe, recorded, x if add else ())
        return x, y, report
    if isinstance(p.ffn, Dense):
        y = mlp(normed[0], p.ffn.up, p.ffn.down, env.ops.swiglu)
        return x, x + y if add else y, ()
    raise ValueError("block: expected a router bias for a layer of experts, got (); pass the layer's row of it")


def forward(
    p: Transformer,
    tokens: Tensor,
    bias: Tensor,
    env: Env,
    c: sections.Model,
    start: Tensor | tuple[()] = (),
    *,
    routing: tuple[Routing | Tensor, ...] = (),
    run: Callable[..., tuple[Tensor, Any, Any]] = block,
) -> tuple[Tensor, RouterReport]:
    """The last hidden state, normed; multiply by `p.head` and `logit_scale` for logits.

    tokens   [B T] i64
    bias     [L E] f32   router bias, one row an MoE layer; those of multi-token prediction, the last, are not read
    start    [B T] i32 or ()   first token of each token's document, as in Batch; (): rows are read whole
    routing  choices to replay, one an MoE layer, as `RouterReport.routing` has them; experts alone [B·T K] i64 get
             weights from this pass's scores, and gradients flow through them
    run      `block`, or a wrapper around it (compile, recompute)
    returns  [B T D] and the reports of all MoE layers but those of multi-token prediction, stacked
    Raises:  ValueError for tensors of other shapes.
    """
    _check(p, tokens, bias, start, routing, c)
    x = F.embedding(tokens, p.embed) * c.embedding_scale
    placed = documents(start)
    reports: list[RouterReport] = []
    losses: list[Tensor] = []
    for layer, parameters in enumerate(p.blocks):
        row = layer - c.num_dense_layers
        here = at_layer(c, env, layer)
        layer_bias = bias[row] if row >= 0 else ()
        recorded = routing[row] if routing and row >= 0 else ()
        x, report, loss = run(parameters, x, layer_bias, env, here, placed, recorded)
        if isinstance(report, RouterReport):
            reports.append(report)
        if isinstance(loss, Tensor):
            losses.append(loss)
    return env.ops.norm(x, p.norm, eps=c.norm_eps), _stacked(reports, losses, bias[: len(reports)])


def at_layer(c: sections.Model, env: Env, layer: int) -> sections.Model:
    """The section of one layer, counted from 0, with its own attention; after the last layer, that of the last."""
    attention = env.kind.at_layer(c.attention, min(layer, c.num_layers - 1))
    return c if attention is c.attention else attrs.evolve(c, attention=attention)


def _stacked(reports: list[RouterReport], losses: list[Tensor], bias: Tensor) -> RouterReport:
    """The reports of all MoE layers as one, with the attention's losses of all layers; no row for a dense model."""
    attention = torch.stack(losses).sum() if losses else ()
    if not reports:
        nothing, load = bias.new_zeros(0), bias.new_zeros(bias.shape, dtype=torch.int64)
        return RouterReport(load, nothing, nothing, load.new_zeros(*load.shape, route.BINS), (), attention, ())
    return RouterReport(
        torch.stack([report.load for report in reports]),
        torch.stack([report.entropy for report in reports]),
        torch.stack([report.imbalance for report in reports]),
        torch.stack([report.margins for report in reports]),
        tuple(layer for report in reports for layer in report.routing),
        attention,
        (),
    )


def _check(
    p: Transformer,
    tokens: Tensor,
    bias: Tensor,
    start: Tensor | tuple[()],
    routing: tuple[Routing | Tensor, ...],
    c: sections.Model,
) -> None:
    """Refuse what would broadcast silently or fail far from its cause."""
    layers = len(c.mixtures())
    for what, held, wanted in (("layers", p.blocks, c.num_layers), ("depths ahead", p.mtp, c.depth())):
        if len(held) != wanted:
            raise ValueError(
                f"forward: expected parameters of {wanted} {what}, got {len(held)}; pass the section of this model"
            )
    if tokens.ndim != 2 or tokens.dtype is not torch.int64:
        raise ValueError(
            f"forward: expected tokens [B T] in i64, got {list(tokens.shape)} in {tokens.dtype}; "
            "pass a batch of sequences of ids"
        )
    wanted = (layers, c.moe.num_experts)
    expect_shape(
        "forward: expected a router bias", bias.shape, wanted, "pass a row an MoE layer and a column an expert"
    )
    if isinstance(start, Tensor):
        expect_shape("forward: expected start", start.shape, tokens.shape, "pass one index a token")
    main = c.num_layers - c.num_dense_layers
    if routing and len(routing) not in (main, layers):
        raise ValueError(
            f"forward: expected a routing for each of the {main} MoE layers, got {len(routing)}; "
            "pass what RouterReport.routing held"
        )


def targets_ahead(batch: Batch, depth: int) -> Tensor:
    """The targets `depth` tokens further on: position i, which has read up to token i + depth, predicts the next.

    Where documents are kept apart a target counts only in the document of its position; the last of a row, whose
    document is not known, does not.

    returns  [B T] i64, negative where there is none
    """
    targets = F.pad(batch.targets[..., depth:], (0, depth), value=-1)
    if not isinstance(batch.start, Tensor):
        return targets
    its_start = F.pad(batch.start[..., depth + 1 :], (0, depth + 1), value=-1)
    return torch.where(its_start == batch.start, targets, -1)


def ahead(
    p: Transformer,
    x: Tensor,
    batch: Batch,
    bias: Tensor,
    env: Env,
    c: sections.Model,
    *,
    chunk: int,
    z_loss: float,
    routing: tuple[Routing | Tensor, ...] = (),
    run: Callable[..., tuple[Tensor, Any, Any]] = block,
) -> tuple[Tensor, RouterReport]:
    """Multi-token prediction: depth k joins the state of depth k - 1 and the embedding of the token k further on.

    The last k positions of a row, which have no such token, read the row's first ones; they have no target, and what
    is causal carries nothing from them to others.

    x        [B T D]    what `forward` gave
    bias     [D E]      router bias of these blocks; no row where the last block is dense
    routing  choices to replay, one a depth
    returns  loss with z-loss, summed over the targets of all depths, and the reports of the blocks, stacked
    Source:  DeepSeek-V3 (arXiv:2412.19437) eq. 21-25. The first depth reads the normed state and later ones the block's
             output before its norm, and the embedding comes first, as vLLM reads the published weights.
    """
    ops, placed = env.ops, documents(batch.start)
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    reports: list[RouterReport] = []
    losses: list[Tensor] = []
    nlls: list[Tensor] = []
    here = at_layer(c, env, c.num_layers)
    for place, part in enumerate(p.mtp):
        token = F.embedding(batch.tokens.roll(-1 - place, dims=-1), p.embed) * c.embedding_scale
        both = (
            ops.norm(token, part.embed_norm, eps=c.norm_eps),
            ops.norm(x, part.hidden_norm, eps=c.norm_eps),
        )
        y = torch.cat(both, dim=-1) @ part.project.flatten(0, 1)
        row = bias[place] if len(bias) else ()
        x, report, loss = run(part.block, y, row, env, here, placed, routing[place] if routing else ())
        if isinstance(report, RouterReport):
            reports.append(report)
        if isinstance(loss, Tensor):
            losses.append(loss)
        added, nll = ops.linear_cross_entropy(
            ops.norm(x, part.norm, eps=c.norm_eps).flatten(0, 1),
            p.head,
            targets_ahead(batch, place + 1).flatten(),
            chunk=chunk,
            logit_scale=c.logit_scale,
            z_loss=z_loss,
        )
        total = total + added
        nlls.append(nll)
    return total, attrs.evolve(_stacked(reports, losses, bias), ahead=tuple(nlls))


def _joined(one: RouterReport, other: RouterReport) -> RouterReport:
    """The reports of the main model and of multi-token prediction as one."""
    of_attention = [loss for loss in (one.attention, other.attention) if isinstance(loss, Tensor)]
    return RouterReport(
        torch.cat((one.load, other.load)),
        torch.cat((one.entropy, other.entropy)),
        torch.cat((one.imbalance, other.imbalance)),
        torch.cat((one.margins, other.margins)),
        one.routing + other.routing,
        torch.stack(of_attention).sum() if of_attention else (),
        other.ahead,
    )


def objective(
    p: Transformer,
    batch: Batch,
    bias: Tensor,
    env: Env,
    c: sections.Model,
    *,
    num_targets: Tensor,
    num_sequences: int,
    chunk: int,
    z_loss: float = 0.0,
    mtp_weight: Tensor | float = 0.0,
    routing: tuple[Routing | Tensor, ...] = (),
    run: Callable[..., tuple[Tensor, Any, Any]] = block,
) -> tuple[Tensor, Tensor, RouterReport]:
    """This batch's share of the mean over the global batch: what is differentiated, and what is read.

    batch          [B T]
    num_targets    0-d   targets that count in the global batch
    num_sequences  sequences in the global batch
    mtp_weight     of the mean loss of all depths of multi-token prediction, each over `num_targets` as well
    routing        choices to replay, as in `forward`, then those of multi-token prediction
    returns        (loss, nll, report): loss = (nll + z-loss) / num_targets + mtp_weight · the same, mean over depths +
                   balance · mean imbalance + mean of the attention's own loss over tokens; nll is the sum over this
                   batch of the next tokens alone, without gradient
    """
    expect_shape(
        "objective: expected targets", batch.targets.shape, batch.tokens.shape, "pass the token that follows each"
    )
    x, report = forward(p, batch.tokens, bias, env, c, batch.start, routing=routing, run=run)
    total, nll = env.ops.linear_cross_entropy(
        x.flatten(0, 1), p.head, batch.targets.flatten(), chunk=chunk, logit_scale=c.logit_scale, z_loss=z_loss
    )
    if p.mtp:
        main = c.num_layers - c.num_dense_layers
        further, others = ahead(
            p, x, batch, bias[main:], env, c, chunk=chunk, z_loss=z_loss, routing=routing[main:], run=run
        )
        total = total + mtp_weight / len(p.mtp) * further
        report = _joined(report, others)
    loss = total / num_targets + c.moe.sequence_balance * report.imbalance.sum() / num_sequences
    if isinstance(report.attention, Tensor):
        loss = loss + report.attention / (num_sequences * batch.tokens.shape[1])
    return loss, nll, report
