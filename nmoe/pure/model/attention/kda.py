"""Kimi delta attention: a linear recurrence that forgets by channel and corrects its memory by the delta rule.

B sequences · T tokens · D width · H heads · C channels of a head's query, key and value · G low rank of the gates
W taps of the short convolutions · N chunks of L tokens
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.init import normal, ones, residual, zeros
from nmoe.pure.core.spec import Dims, Role, Spec, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model.attention.cached import New
from nmoe.pure.model.hf_leaf import Leaf, along, columns, matrix, same, shaped
from nmoe.pure.model.norm import upcast
from nmoe.pure.model.rope import Documents

CHUNK = 64
"""Tokens whose pairs are scored at once; a power of two."""

UNIT_EPS = 1e-6
"""Added to the squared norm of a query and key, as Kimi Linear has it."""


def _log_rates(generator: torch.Generator, shape: tuple[int, ...], dims: Dims) -> Tensor:
    """Logarithms of rates that are uniform between 1 and 16."""
    return (1 + 15 * torch.rand(shape, generator=generator, device=generator.device)).log()


def _decay_biases(generator: torch.Generator, shape: tuple[int, ...], dims: Dims) -> Tensor:
    """Values whose softplus is between 0.001 and 0.1, log-uniform: memories of ten to a thousand tokens at rate one."""
    low, high = math.log(1e-3), math.log(1e-1)
    step = torch.rand(shape, generator=generator, device=generator.device).mul(high - low).add(low).exp()
    return step + (-torch.expm1(-step)).log()


@record
class Kda:
    """Attention of one block.

    `low` makes, in one product, [latent of the decay | latent of the output gate | logit of the step size].
    """

    qkv: Tensor = param("D 3 (H C)", Role.MATRIX, normal("D"))
    taps: Tensor = param("3 H C W", Role.GAIN, normal("W"))
    low: Tensor = param("D G+G+H", Role.MATRIX, normal("D"))
    decay: Tensor = param("G (H C)", Role.MATRIX, normal("G"))
    decay_bias: Tensor = param("H C", Role.GAIN, _decay_biases)
    log_rate: Tensor = param("H", Role.GAIN, _log_rates)
    gate: Tensor = param("G (H C)", Role.MATRIX, normal("G"))
    norm: Tensor = param("C", Role.GAIN, ones)
    out: Tensor = param("(H C) D", Role.MATRIX, residual("H", "C"))


def specs(c: sections.Kda) -> Kda:
    """Specs of one block's attention; under a bounded gate rates start at 1, which keeps its sigmoid off its ends."""
    return spec_tree(Kda) if c.decay_limit is None else spec_tree(Kda, log_rate=Spec(("H",), Role.GAIN, zeros))


def dims(c: sections.Kda) -> dict[str, int]:
    """Sizes of the axes that only attention has; the gates' low rank is the width of a head."""
    return {"H": c.num_heads, "C": c.head_dim, "G": c.head_dim, "W": c.conv_size}


@record
class KdaOps:
    """What a device implements of Kimi delta attention; a field has the signature of its reference."""

    convolve: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attend: Callable[..., tuple[Tensor, Tensor]]
    gated_norm: Callable[..., Tensor]


@record
class KdaState:
    """What a layer remembers of the tokens before a row, whatever their number."""

    inputs: Tensor  # [B W-1 J] of the short convolutions, J = 3·H·C
    memory: Tensor  # [B H C C] in fp32 at least, keys before values


def kda(
    p: Kda,
    x: Tensor,
    tables: tuple[()],
    norm: Callable[..., Tensor],
    ops: KdaOps,
    c: sections.Kda,
    documents: Documents | tuple[()] = (),
    *,
    eps: float,
) -> Tensor:
    """Kimi delta attention of each sequence, or each of its documents, over itself.

    x          [B T D]   normed block input
    documents  where the document of each token begins; (): rows are whole
    returns    [B T D]
    """
    return kda_after(p, x, (), norm, ops, c, documents, eps=eps)[0]


def kda_after(
    p: Kda,
    x: Tensor,
    before: KdaState | tuple[()],
    norm: Callable[..., Tensor],
    ops: KdaOps,
    c: sections.Kda,
    documents: Documents | tuple[()] = (),
    *,
    eps: float,
) -> tuple[Tensor, KdaState]:
    """`kda` of rows that continue where others ended, and the state after them; with T = 1 a step of generation.

    x        [B T D]   normed block input
    before   what the rows continue from; (): nothing. A document that begins at 0 began before the row
    returns  [B T D] and the state after the last token
    Source:  Kimi Linear (arXiv:2510.26692), sections 3 and 4; the bounded gate as in Kimi K3.
    """
    start = documents.start if isinstance(documents, Documents) else ()
    inputs, memory = (before.inputs, before.memory) if isinstance(before, KdaState) else ((), ())
    rank, heads = c.head_dim, (c.num_heads, c.head_dim)
    projected = x @ p.qkv.flatten(1)
    q, k, v = ops.convolve(projected, p.taps, start, inputs)
    low_decay, low_gate, step = (x @ p.low).split((rank, rank, c.num_heads), dim=-1)
    gate = (low_decay @ p.decay.flatten(1)).unflatten(-1, heads), p.decay_bias, p.log_rate
    o, memory = ops.attend(q, k, v, *gate, upcast(step).sigmoid(), start, memory, limit=c.decay_limit)
    o = ops.gated_norm(o, p.norm, (low_gate @ p.gate.flatten(1)).unflatten(-1, heads), norm=norm, eps=eps)
    return o.flatten(-2) @ p.out.flatten(0, 1), KdaState(
        _last_inputs(projected, inputs, start, c.conv_size - 1), memory
    )


def empty_cache(c: sections.Kda, num_sequences: int, num_tokens: int, like: Tensor) -> KdaState:
    """The state before the first token, in the format of `like`, of one size; the memory in fp32 at least."""
    inputs = like.new_zeros(num_sequences, c.conv_size - 1, 3 * c.num_heads * c.head_dim)
    return KdaState(inputs, upcast(like.new_zeros(num_sequences, c.num_heads, c.head_dim, c.head_dim)))


def extend(
    p: Kda,
    x: Tensor,
    cache: KdaState,
    new: New,
    tables: tuple[()],
    norm: Callable[..., Tensor],
    ops: KdaOps,
    c: sections.Kda,
    *,
    eps: float,
) -> tuple[Tensor, KdaState]:
    """`kda` of new tokens that also read what the state remembers.

    x        [B T D]   normed block input of the new tokens
    returns  [B T D], and the state after the last of them
    """
    documents = new.documents
    earlier = documents.start[:, :1] + documents.position[:, :1]
    goes_on = documents.position[:, 0] > 0  # else the first new token begins its document, and remembers nothing
    before = KdaState(
        cache.inputs.where(goes_on[:, None, None], 0), cache.memory.where(goes_on[:, None, None, None], 0)
    )
    here = Documents((documents.start - earlier).clamp(min=0), documents.position)
    return kda_after(p, x, before, norm, ops, c, here, eps=eps)


def _last_inputs(x: Tensor, before: Tensor | tuple[()], start: Tensor | tuple[()], count: int) -> Tensor:
    """The last inputs of the convolutions, [B count J]: zeros before the first token of the last one's document."""
    last = _preceded(x, before, count)[:, x.shape[1] :]
    if not isinstance(start, Tensor):
        return last
    place, begins = torch.arange(-count, 0, device=x.device) + x.shape[1], start[:, -1:]
    return last.masked_fill(((place < begins) & (begins > 0))[..., None], 0)


def _preceded(x: Tensor, before: Tensor | tuple[()], count: int) -> Tensor:
    """`x` [B T J] behind `count` earlier tokens: [B count+T J]."""
    return torch.cat((before, x), 1) if isinstance(before, Tensor) else F.pad(x, (0, 0, count, 0))


def convolve(x: Tensor, taps: Tensor, start: Tensor | tuple[()] = (), before: Tensor | tuple[()] = ()) -> Tensor:
    """SiLU of a causal convolution of each channel.

    x        [B T J]
    taps     [J W]             the last one weighs the token itself
    start    [B T] i32 or ()   no tap reaches before the first token of the document
    before   [B W-1 J] or ()   inputs before the row; (): zeros
    returns  [B T J]           in the format of `x`; summed in fp32 at least
    """
    length, width = x.shape[1], taps.shape[-1]
    reach = _preceded(x, before, width - 1)
    total = reach[:, width - 1 :] * taps[:, -1]
    for back in range(1, width):
        part = reach[:, width - 1 - back :][:, :length]
        if isinstance(start, Tensor):
            outside = torch.arange(length, device=x.device) - back < start
            part = part.masked_fill((outside & (start > 0))[..., None], 0)
        total = total + part * taps[:, -1 - back]
    return F.silu(total).to(x.dtype)


def convolve_heads(
    x: Tensor, taps: Tensor, start: Tensor | tuple[()] = (), before: Tensor | tuple[()] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """`convolve` with taps [3 H C W]: queries, keys and values, each [B T H C]."""
    q, k, v = convolve(x, taps.flatten(0, 2), start, before).unflatten(-1, taps.shape[:3]).unbind(2)
    return q, k, v


def log_decay(x: Tensor, bias: Tensor, log_rate: Tensor, limit: float | None) -> Tensor:
    """Logarithm of what each channel of the memory keeps of itself at a token.

    x         [B T H C]
    bias      [H C]
    log_rate  [H]
    limit     largest decay in nats; None: the softplus gate, without a bound
    returns   [B T H C] in fp32 at least, none above 0
    """
    x, rate = upcast(x) + bias, log_rate.exp()[:, None]
    return -rate * F.softplus(x) if limit is None else -limit * torch.sigmoid(rate * x)


def gated_norm(x: Tensor, gain: Tensor, gate: Tensor, *, norm: Callable[..., Tensor], eps: float) -> Tensor:
    """`norm` of x [... C] with gains [C], times the sigmoid of a gate [... C]; in the format of the gate."""
    return (norm(x, gain, eps=eps) * upcast(gate).sigmoid()).to(gate.dtype)


def attend_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    bias: Tensor,
    log_rate: Tensor,
    step: Tensor,
    start: Tensor | tuple[()] = (),
    memory: Tensor | tuple[()] = (),
    *,
    limit: float | None,
) -> tuple[Tensor, Tensor]:
    """`attend_kda` under the decays that `log_decay` makes of x, bias, log_rate and limit."""
    return attend_kda(q, k, v, log_decay(x, bias, log_rate, limit), step, start, memory)


def attend_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    step: Tensor,
    start: Tensor | tuple[()] = (),
    memory: Tensor | tuple[()] = (),
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over chunks of tokens: pairs within a chunk by products, the memory from chunk to chunk.

    Of token t, with queries and keys of unit length:

        S_t = (1 - step k kᵀ) diag(exp decay) S_{t-1} + step k vᵀ        o_t = C^-1/2 S_tᵀ q

    q, k, v  [B T H C]
    decay    [B T H C]           logarithms, none above 0
    step     [B T H]             between 0 and 1
    start    [B T] i32 or ()     a token reads and keeps nothing of another document; (): rows are whole
    memory   [B H C C] or ()     S before the row, which belongs to documents that begin at 0; (): zeros
    returns  [B T H C] in the format of `v`, and S after the row; computed in fp32 at least
    Cost:    `flops`; what exists at once grows linearly with T.
    """
    length, given = q.shape[1], v
    size = _chunk(length)

    def chunks(x: Tensor) -> Tensor:
        """[B T H C] -> [B H N L C]; tokens that fill up the last chunk are zeros: they keep all and add nothing."""
        return F.pad(upcast(x).transpose(1, 2), (0, 0, 0, -length % size)).unflatten(2, (-1, size))

    q, k, v, decay, step = map(chunks, (_unit(q) * q.shape[-1] ** -0.5, _unit(k), v, decay, step[..., None]))
    score, since, until = _scores(torch.stack((q, k), -2), k, decay)
    if isinstance(start, Tensor):
        same, sees, stays = (tensor[:, None] for tensor in _documents(start, size))
        score = score.masked_fill(~same[..., None, :], 0)
        since, until = since.masked_fill(~sees[..., None], -torch.inf), until.masked_fill(~stays[..., None], -torch.inf)
    weight, overlap = score.unbind(-2)
    decay = since.exp()
    entered, left, carried = q * decay, k * until.exp(), decay[..., -1, :, None]
    # the corrections of a chunk depend on one another: (1 + step · overlap below the diagonal) x = known
    known = torch.cat((step * v, step * k * decay), -1)
    solved = torch.linalg.solve_triangular(step * overlap, known, upper=False, unitriangular=True)
    value, correction = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    state = memory if isinstance(memory, Tensor) else q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    parts: list[Tensor] = []
    for n in range(q.shape[2]):
        fresh = value[:, :, n] - correction[:, :, n] @ state
        parts.append(entered[:, :, n] @ state + weight[:, :, n] @ fresh)
        state = carried[:, :, n] * state + left[:, :, n].mT @ fresh
    return torch.cat(parts, 2)[:, :, :length].transpose(1, 2).to(given.dtype), state


def _chunk(length: int) -> int:
    """Tokens of a chunk of a row: a power of two, the smallest that holds a short row."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def _unit(x: Tensor) -> Tensor:
    """`x` over its last axis scaled to length one, in fp32 at least."""
    x = upcast(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def _scores(rows: Tensor, keys: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of each row with the keys up to it, channels decayed on the way.

    Chunks are joined from halves. Of a pair across the middle, the key decays up to the middle and the row from there:
    both factors are exponentials of sums of decays, none above 1, so that nothing overflows and nothing cancels.

    rows     [B H N L R C]   R rows a token
    keys     [B H N L C]
    decay    [B H N L C]
    returns  scores [B H N L R L], zeros above the diagonal; decay from the chunk's begin through each token, and after
             each token to the chunk's end, both [B H N L C]
    """
    length = decay.shape[-2]
    score = (rows * keys.unsqueeze(-2)).sum(-1)[..., None, :, None]
    since, until = decay.unsqueeze(-2), torch.zeros_like(decay).unsqueeze(-2)
    for half in (1 << level for level in range((length - 1).bit_length())):
        pairs = (length // (2 * half), 2, half)
        row, key = rows.unflatten(-3, pairs).select(-4, 1), keys.unflatten(-2, pairs).select(-3, 0)
        (first, second), (rest, last) = (tensor.unflatten(-3, (-1, 2)).unbind(-3) for tensor in (since, until))
        row = (row * second.exp().unsqueeze(-2)).flatten(-3, -2)
        across = (row @ (key * rest.exp()).mT).unflatten(-2, (half, -1))
        earlier, later = score.unflatten(-4, (-1, 2)).unbind(-4)
        score = torch.cat((F.pad(earlier, (0, half)), torch.cat((across, later), -1)), -3)
        since = torch.cat((first, second + first[..., -1:, :]), -2)
        until = torch.cat((rest + second[..., -1:, :], last), -2)
    return score.squeeze(-4), since.squeeze(-3), until.squeeze(-3)


def _documents(start: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What documents let through, by chunk.

    returns  which keys are of a row's document [B N L L], which tokens see the memory that enters the chunk, and which
             are of the document that leaves it, both [B N L]
    """
    length = start.shape[1]
    start = torch.cat((start, start[:, -1:].expand(-1, -length % size)), 1).unflatten(1, (-1, size))
    position = torch.arange(start[0].numel(), device=start.device).view(start.shape[1:])
    sees = (start < position[:, :1]) | (start <= 0)
    return start[..., None] <= position[:, None], sees, start[..., -1:] <= position


REFERENCE = KdaOps(convolve_heads, attend_gated, gated_norm)


def flops(c: sections.Kda, *, sequence_length: int, causal: bool) -> int:
    """FLOPs of the delta rule, a token of one layer, rounded down; convolutions, gates and norms apart.

    causal  count pairs of tokens up to the diagonal only, and a row without its fill; False: as the reference computes
    """
    size, width = _chunk(sequence_length), c.head_dim
    tokens = sequence_length if causal else math.ceil(sequence_length / size) * size
    scores = 2 * width * (size - 1)  # of queries and keys with the keys before; the diagonal is no product
    solve = 2 * width * (size - 1) if causal else 0  # in torch's own routine, which its counter does not count
    weighted = width * (size + 1) if causal else 2 * width * size
    memory = 3 * 2 * width * width  # corrected, read, written
    return tokens * c.num_heads * (scores + solve + weighted + memory) // sequence_length


def kept_bytes(c: sections.Kda, *, hidden: int, sequence_length: int, element: int, square: bool) -> int:
    """Bytes a token that autograd keeps of the reference in one layer, its norm apart.

    element  bytes of an activation
    square   whether attention keeps its probabilities; those of a chunk, with `hidden` = 0 as well, are always counted
    """
    fp32, size, width = 4, _chunk(sequence_length), c.head_dim
    levels = size.bit_length() - 1
    unit = 3 * element if element == fp32 else 2 * fp32  # queries and keys as they come, or their fp32 copies
    channel = (
        5 * element + unit  # inputs of the convolutions, the output gate and `out`
        + (3 + 2) * fp32  # inputs of SiLU and softplus, the latter's output
        + (3 + 2.5 * levels) * fp32  # rows and keys; of each level decayed halves and their factors
        + (5 + 2 + 3) * fp32  # decayed queries, keys and values; the solution; corrections
        + 3 * fp32  # the head norm's input and scaled input; the output gate
    )  # fmt: skip
    head = width * channel + (5 + 3 * size + width * width // size) * fp32  # scores of pairs, and a memory a chunk
    return int(hidden * element + (2 * width + c.num_heads) * element + c.num_heads * head)


def kernel_kept_bytes(c: sections.Kda) -> tuple[int, int]:
    """Bytes a token that the kernels keep in one layer, bf16, and those of norms that recompute makes again: none.

    Of the last chunk's fill nothing is counted, which is less than a chunk a row.
    """
    fp32, element, size, width = 4, 2, CHUNK, c.head_dim
    channel = (
        (3 + 3) * element  # inputs and outputs of the convolutions
        + element  # the decay's gate
        + fp32 + (4 + 1) * element  # sums of decays; a chunk as prepared and what its tokens write; the output
        + 2 * element  # the output's gate, the input of `out`
    )  # fmt: skip
    # steps; weights and inverse of pairs; the memory that enters a chunk, and what it keeps
    head = width * channel + fp32 + 2 * size * element + (width * width * element + width * fp32) // size
    return (2 * width + c.num_heads) * element + c.num_heads * head, 0


HF = "linear_attn_config"
HF_KEYS: Mapping[str, str] = MappingProxyType(
    {"num_heads": "num_heads", "head_dim": "head_dim", "short_conv_kernel_size": "conv_size"}
)
"""Key of that table in the `config.json` of Kimi Linear -> field of the section."""

HF_LAYERS = ("kda_layers", "full_attn_layers")
"""Keys of that table that say which layers have this attention."""


def hf_settings(c: sections.Kda) -> dict[str, Any]:
    """The table of the `config.json` of Kimi Linear that describes this attention, layers apart."""
    return {HF: {theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()}}


def hf_section(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The table of this section in a `config.json`, values unchecked, and what this attention cannot express."""
    given = config.get(HF)
    if not isinstance(given, dict):
        return {}, [f"{HF}: expected an object, got {json.dumps(given)}; write it"]
    table: dict[str, Any] = given
    problems = [f"{HF}.{key}: expected a value, got nothing; write it" for key in HF_KEYS if key not in table]
    problems += [
        f"{HF}.{key}: expected a key that nmoe knows, got {json.dumps(value)}; remove it if no logit changes"
        for key, value in table.items()
        if key not in (*HF_KEYS, *HF_LAYERS)
    ]
    return {ours: table[theirs] for theirs, ours in HF_KEYS.items() if theirs in table}, problems


def hf_leaves(c: sections.Kda) -> dict[str, Leaf]:
    """What each parameter is in the folders of Kimi Linear."""
    heads = (c.num_heads, c.head_dim)
    wide = c.num_heads * c.head_dim
    low = {"f_a_proj.weight": c.head_dim, "g_a_proj.weight": c.head_dim, "b_proj.weight": c.num_heads}
    taps = [shaped(same(f"{each}_conv1d.weight"), (wide, 1, c.conv_size), (*heads, c.conv_size)) for each in "qkv"]
    return {
        "qkv": along([matrix(f"{each}_proj.weight", outs=heads) for each in "qkv"], 1),
        "taps": along(taps, 0),
        "low": columns(low),
        "decay": matrix("f_b_proj.weight", outs=heads),
        "decay_bias": shaped(same("dt_bias"), (wide,), heads),
        "log_rate": shaped(same("A_log"), (1, 1, c.num_heads, 1), (c.num_heads,)),
        "gate": matrix("g_b_proj.weight", outs=heads),
        "norm": same("o_norm.weight"),
        "out": matrix("o_proj.weight", ins=heads),
    }
