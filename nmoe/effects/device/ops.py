"""Which implementation of each op this device runs, and the optimizer's passes over arenas: it only chooses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.config.check import kernel_sizes
from nmoe.config.sections import Mixed, Model
from nmoe.effects.device import cpu
from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.parallel.exchange import Exchange, host
from nmoe.errors import InputError
from nmoe.pure.core.tree import record
from nmoe.pure.model.attention import KINDS, Kind, Kinds, attention_of, kind_of
from nmoe.pure.model.attention import layers as attention_layers
from nmoe.pure.model.attention.dsa import DsaOps
from nmoe.pure.model.attention.gqa import GqaOps
from nmoe.pure.model.attention.kda import KdaOps
from nmoe.pure.model.attention.mixed import MixedOps
from nmoe.pure.model.attention.mla import MlaOps, attend_new, scale
from nmoe.pure.model.attention.nsa import NsaOps
from nmoe.pure.model.experts import add_all, mlp
from nmoe.pure.model.low_precision import Emulated
from nmoe.pure.model.ops import Ops, labelled, reference
from nmoe.pure.model.route import Routed, Routing, route_tokens
from nmoe.pure.optim.clip import global_norm
from nmoe.pure.optim.muon import matrices, turns
from nmoe.pure.optim.update import rule

if TYPE_CHECKING:
    from nmoe.effects.kernels.attention import dsa, dsa_dense, gqa, kda, mla, nsa
    from nmoe.effects.kernels.moe import moe as mixtures


PLAIN_CHUNK = 1 << 24
"""Elements of a pass of the optimizer in plain torch on a GPU: their temporaries take some hundred MB."""


def build(
    device: torch.device,
    c: Model,
    *,
    deterministic: bool = True,
    documents: bool = False,
    exchange: Exchange | None = None,
    accumulator: Accumulator | None = None,
    kinds: Kinds = KINDS,
    kernels: str = "triton",
    low: Emulated | None = None,
    fp8: bool = False,
) -> Ops:
    """The ops of a device for a model.

    On a CPU the reference, but for experts on their own rows and fused attention; on a GPU kernels, or with
    `kernels="torch"` what a CPU runs, by torch on that GPU.

    documents  whether attention keeps inside documents, which cuDNN's kernels cannot
    exchange   with the ranks that hold the other experts; None: all are here
    accumulator  takes the weight gradients that kernels write themselves; a CPU leaves all to autograd
    kinds      of attention
    low        experts in fewer bits, emulated; None: by kernels, or in the format of the weights
    fp8        whether the kernels of the experts multiply in fp8; of routed ones on several ranks the exchange says so

    Raises:  InputError for sizes that a kernel does not take.
    """
    if device.type == "cpu" or kernels == "torch":
        on_rows = low.experts if low else cpu.experts_grouped
        plain = attrs.evolve(
            reference(attention_of(c, kinds)),
            norm=cpu.rms_norm,
            add_norm=cpu.add_rms_norm,
            attention=_by_part(c, kinds, lambda kind, section: _cpu_attention(kind)),
            experts=partial(cpu.moe_experts, experts=on_rows)
            if exchange is None
            else partial(_then_added, partial(host.mixture, exchange=exchange, experts=on_rows)),
            shared=low.shared if low else mlp,
        )
        # Ranges for a profiler take 13 % of a generated token on a CPU: `nmoe run --profile` puts them in there.
        return plain if device.type == "cpu" else labelled(plain)
    # only here: triton is not everywhere
    from nmoe.effects.kernels import loss as cross_entropy
    from nmoe.effects.kernels import norm as rms_norm
    from nmoe.effects.kernels.moe import few, moe_fp8, report, router, swiglu
    from nmoe.effects.kernels.moe import moe as mixtures
    from nmoe.effects.parallel.exchange import device as exchanged

    if problems := tuple(kernel_sizes(c, device="cuda", compute="bf16")):
        raise InputError(*problems)
    tiles = mixture_tiles(device, c.hidden_size, c.moe.intermediate_size)
    return labelled(
        Ops(
            norm=rms_norm.rms_norm,
            add_norm=rms_norm.add_rms_norm,
            swiglu=swiglu.swiglu,
            attention=_by_part(
                c, kinds, lambda kind, section: _gpu_attention(device, kind, section, deterministic, documents)
            ),
            route=partial(
                _route,
                few=few.route,
                plain=router.route,
                many=partial(
                    route_tokens, score=router.scores, softmax_score=router.softmax_scores, select=router.top_k
                ),
                pairs=few.PAIRS,
            ),
            report=report.report,
            experts=partial(cpu.moe_experts, experts=low.experts)
            if low is not None
            else partial(moe_fp8.moe_experts_fp8, tiles=tiles, accumulator=accumulator)
            if exchange is None and fp8
            else partial(
                _experts,
                few=partial(_then_added, few.moe_experts),
                many=partial(mixtures.moe_experts, tiles=tiles, accumulator=accumulator),
                pairs=few.PAIRS,
            )
            if exchange is None
            else partial(exchanged.mixture, exchange=exchange, tiles=tiles, accumulator=accumulator),
            shared=low.shared if low is not None else partial(moe_fp8.shared_experts_fp8, tiles=tiles) if fp8 else mlp,
            linear_cross_entropy=cross_entropy.linear_cross_entropy,
        )
    )


def single_(device: torch.device, c: Model) -> Callable[..., Any] | None:
    """`decode.extend` of one token of one row that writes into its caches, where kernels know the whole model; else
    None.

    It stands for all ops of `build` with their defaults: who puts another in the place of one has no use for it.
    """
    if device.type == "cpu":
        return None
    # only here: triton is not everywhere
    from nmoe.effects.device import token

    return token.extend_ if token.fits(c) else None


def greedy(device: torch.device) -> Callable[[Tensor, int, float], Tensor] | None:
    """The most likely token of each row by kernels, `pick.greedy`; None on a CPU."""
    if device.type == "cpu":
        return None
    # only here: triton is not everywhere
    from nmoe.effects.kernels import pick

    return pick.greedy


def _route(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    shift: Tensor | tuple[()] = (),
    *,
    few: Callable[..., Routed],
    plain: Callable[..., Routed],
    many: Callable[..., Routed],
    pairs: int,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    recorded: Any,
    softmax: bool,
    **how: Any,
) -> Routed:
    """`route_tokens` by what is made for so many pairs and such scores; `few` has no gradients."""
    if num_groups > 1 or not isinstance(recorded, tuple):
        groups = {"num_groups": num_groups, "top_k_groups": top_k_groups}
        return many(x, router, bias, shift, top_k=top_k, **groups, recorded=recorded, softmax=softmax, **how)
    if len(x) * top_k <= pairs and not torch.is_grad_enabled():
        return few(x, router, bias, shift, top_k=top_k, softmax=softmax, **how)
    if softmax or isinstance(shift, Tensor):
        return many(x, router, bias, shift, top_k=top_k, softmax=softmax, **how)
    return plain(x, router, bias, top_k=top_k, **how)


def _experts(
    x: Tensor,
    routing: Routing,
    *weights: Tensor,
    few: Callable[..., tuple[Tensor, Tensor]],
    many: Callable[..., tuple[Tensor, Tensor]],
    pairs: int,
    **form: Any,
) -> tuple[Tensor, Tensor]:
    """The routed experts by what is made for so many pairs; `few` knows no gradients."""
    small = routing.expert.numel() <= pairs and not torch.is_grad_enabled()
    return (few if small else many)(x, routing, *weights, **form)


def _then_added(
    experts: Callable[..., tuple[Tensor, Tensor]], *arguments: Any, added: tuple[Tensor, ...], **form: Any
) -> tuple[Tensor, Tensor]:
    """The routed experts by what adds nothing to their sums, and what is added to them."""
    y, count = experts(*arguments, **form)
    return add_all(y, added), count


def _by_part(c: Model, kinds: Kinds, ops: Callable[[Kind, Any], Any]) -> Any:
    """The ops of the model's attention, those of each part where kinds are mixed."""
    parts = tuple(ops(kind_of(section, kinds), section) for section in c.attentions().values())
    return MixedOps(parts) if isinstance(c.attention, Mixed) else parts[0]


def _cpu_attention(kind: Kind) -> Any:
    """The kind's ops on a CPU: the reference, but where torch has something faster."""
    if isinstance(kind.reference, MlaOps):
        return attrs.evolve(kind.reference, attend=cpu.attend_mla_padded, attend_new=cpu.attend_new)
    return kind.reference


def _gpu_attention(device: torch.device, kind: Kind, c: Any, deterministic: bool, documents: bool) -> Any:
    """The kind's ops on a GPU: its kernels, or the reference of a kind that has none."""
    if isinstance(kind.reference, GqaOps):
        return _gpu_gqa(device, kind, c)
    if isinstance(kind.reference, KdaOps):
        return _gpu_kda(device, kind, c)
    if isinstance(kind.reference, DsaOps):
        return _gpu_dsa(device, kind, c)
    if isinstance(kind.reference, NsaOps):
        return _gpu_nsa(device, kind, c)
    if not isinstance(kind.reference, MlaOps):
        return kind.reference
    from nmoe.effects.kernels.attention import mla as attention
    from nmoe.effects.kernels.attention import mla_cached, project

    attend = attention.mla_attention_cudnn
    if deterministic or documents:
        forward = "triton" if documents else "cudnn"
        attend = partial(attention.mla_attention, forward=forward, tiles=mla_tiles(device, *kind.tile_sizes(c)))
    return MlaOps(
        project=project.project,
        query=project.query,
        attend=attend,
        attend_new=partial(_attend_new, one=mla_cached.attend_new),
    )


def _attend_new(
    p: Any, x: Tensor, cache: Tensor, new: Any, rope: Any, *rest: Any, eps: float, one: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """`attend_new`; of one token a row by `one`."""
    if x.shape[1] != 1:
        return attend_new(p, x, cache, new, rope, *rest, eps=eps)
    return one(p, x, cache, new, rope, eps=eps, scale=scale(rest[-1]))


def _gpu_gqa(device: torch.device, kind: Kind, c: Any) -> GqaOps:
    """Grouped-query attention; layers with and without the window have tiles of their own."""
    from nmoe.effects.kernels.attention import gqa as attention

    layers = (attrs.evolve(c, window=window, global_every=None) for window in {c.window, None})
    tiles = {layer.window: gqa_tiles(device, *kind.tile_sizes(layer)) for layer in layers}
    return GqaOps(project=attention.project, attend=partial(attention.gqa_attention, tiles=tiles))


def _gpu_kda(device: torch.device, kind: Kind, c: Any) -> KdaOps:
    """Kimi delta attention."""
    from nmoe.effects.kernels.attention import convolve, gated_norm
    from nmoe.effects.kernels.attention import kda as attention

    tiles = kda_tiles(device, *kind.tile_sizes(c))
    return KdaOps(
        convolve=convolve.convolve_heads,
        attend=partial(attention.kda_attention, tiles=tiles),
        gated_norm=gated_norm.gated_norm,
    )


def _gpu_dsa(device: torch.device, kind: Kind, c: Any) -> DsaOps:
    """Sparse latent attention; its dense stage runs on the kernels of latent attention."""
    from nmoe.effects.kernels.attention import dsa as attention
    from nmoe.effects.kernels.attention import dsa_dense, project

    tiles = dsa_tiles(device, *kind.tile_sizes(c))
    heads = mla_tiles(device, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
    return DsaOps(
        query=project.query,
        select=partial(attention.select, tiles=tiles),
        attend=partial(attention.dsa_attention, tiles=tiles),
        dense=partial(dsa_dense.dense_attention, tiles=dsa_dense_tiles(device), attention=heads),
    )


def _gpu_nsa(device: torch.device, kind: Kind, c: Any) -> NsaOps:
    """Native sparse attention."""
    from nmoe.effects.kernels.attention import nsa as attention

    tiles = nsa_tiles(device, *kind.tile_sizes(c))
    return NsaOps(
        compressed=partial(attention.compressed, tiles=tiles),
        selected=partial(attention.selected, tiles=tiles),
        window=partial(attention.window, tiles=tiles),
    )


def mixture_tiles(device: torch.device, hidden: int, width: int) -> mixtures.Tiles:
    """How a mixture of these sizes is cut up on this GPU."""
    from nmoe.effects.kernels.moe import moe as mixtures

    entry = tuning.find(shipped(device), "moe", hidden, width)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return mixtures.Tiles(**entry.tiles, group=entry.group, programs=programs, hopper=hopper)


def mla_tiles(device: torch.device, nope: int, rope: int, value: int) -> mla.Tiles:
    """How latent attention over heads of these sizes is cut up on this GPU."""
    from nmoe.effects.kernels.attention import mla

    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return mla.Tiles(**tuning.find(shipped(device), "mla", nope, rope, value).tiles, hopper=hopper)


def gqa_tiles(device: torch.device, head_dim: int, *window: int) -> gqa.Tiles:
    """How grouped-query attention over heads of this size, in a window or not, is cut up on this GPU."""
    from nmoe.effects.kernels.attention import gqa

    return gqa.Tiles(**tuning.find(shipped(device), "gqa", head_dim, *window).tiles)


def kda_tiles(device: torch.device, head_dim: int) -> kda.Tiles:
    """How the delta rule over heads of this size is cut up on this GPU."""
    from nmoe.effects.kernels.attention import kda

    return kda.Tiles(**tuning.find(shipped(device), "kda", head_dim).tiles)


def dsa_tiles(device: torch.device, heads: int, rank: int, rope: int) -> dsa.Tiles:
    """How sparse latent attention over so many heads and channels is cut up on this GPU."""
    from nmoe.effects.kernels.attention import dsa

    return dsa.Tiles(**tuning.find(shipped(device), "dsa", heads, rank, rope).tiles)


def dsa_dense_tiles(device: torch.device) -> dsa_dense.Tiles:
    """How the indexer's loss of the dense stage is cut up on this GPU."""
    from nmoe.effects.kernels.attention import dsa_dense

    return dsa_dense.Tiles(**tuning.find(shipped(device), "dsa_dense").tiles)


def nsa_tiles(device: torch.device, head_dim: int, value: int) -> nsa.Tiles:
    """How native sparse attention over heads of these sizes is cut up on this GPU."""
    from nmoe.effects.kernels.attention import nsa

    return nsa.Tiles(**tuning.find(shipped(device), "nsa", head_dim, value).tiles)


def unmeasured(device: torch.device, c: Model, *, kinds: Kinds = KINDS, kernels: str = "triton") -> tuple[str, ...]:
    """A line for each op without kernels, or whose tiles nobody measured for these sizes: right, and maybe slow."""
    if device.type == "cpu":
        return ()
    if kernels == "torch":
        return ('kernels        none, run.kernels is "torch": every operation runs as plain torch, which is slower',)
    layers = attention_layers(c, kinds)
    without = dict.fromkeys(type(section).__name__ for kind, section in layers if kind.kernel_kept_bytes is None)
    used = dict.fromkeys((type(section).__name__.lower(), kind.tile_sizes(section)) for kind, section in layers)
    table = shipped(device)
    entries = (
        (op, tuning.find(table, op, *sizes), "x".join(map(str, sizes)))
        for op, sizes in (("moe", (c.hidden_size, c.moe.intermediate_size)), *used)
        if sizes
    )
    return (
        *(f"attention: {name} has no kernels, it runs as plain torch: right, and slow" for name in without),
        *(
            f"{op}: no measured tiles for {size} in {table.where}, those of entry {entry.size!r} are used"
            + (f"; `nmoe bench kernels --tune --size {size}` finds better ones" if op == "moe" else "")
            for op, entry, size in entries
            if not entry.measured
        ),
    )


def shipped(device: torch.device) -> tuning.Table:
    """The table that ships for this GPU."""
    return tuning.load(torch.cuda.get_device_capability(device))


@record
class ArenaOps:
    """The optimizer's passes over arenas."""

    global_norm: Callable[[Sequence[Tensor]], Tensor]
    update_: Callable[[str], Callable[..., Tensor]]  # by the optimizer's name; `adamw_` shows the arguments
    chunk: int  # elements of a pass
    joint: bool  # whether a pass over whole parameters is one of all that lie side by side


def arena_ops(device: torch.device, kernels: str = "triton") -> ArenaOps:
    """The passes of a device: few launches an arena on a GPU, pieces that stay in the cache on a CPU.

    kernels  as of `build`
    """
    if device.type == "cpu" or kernels == "torch":
        chunk = cpu.CHUNK if device.type == "cpu" else PLAIN_CHUNK
        return ArenaOps(_ranged("global_norm", global_norm), _updating({"adamw": cpu.adamw_}), chunk, joint=False)
    from nmoe.effects.kernels.optim import adamw, muon

    passes = {"adamw": adamw.adamw_, "muon": partial(_in_turns, muon.muon_)}
    return ArenaOps(_ranged("global_norm", adamw.global_norm), _updating(passes), sys.maxsize, joint=True)


def _in_turns(
    update: Callable[..., Tensor],
    value: Tensor,
    *rest: Any,
    by_matrix: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    **keywords: Any,
) -> Tensor:
    """`update` with the places of the parameters' matrices, in that of what takes them apart."""
    return update(value, *rest, turns=tuple(turns(matrices(by_matrix, value.numel()))), **keywords)


def _ranged(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` inside a profiler range."""

    def run(*arguments: Any, **keywords: Any) -> Tensor:
        with record_function(name):
            return function(*arguments, **keywords)

    return run


def _updating(kernels: Mapping[str, Callable[..., Tensor]]) -> Callable[[str], Callable[..., Tensor]]:
    """The in-place update of an optimizer: its kernel, or its rule as torch runs it where there is no kernel."""

    def update(name: str) -> Callable[..., Tensor]:
        return _ranged(f"{name}_", kernels.get(name, partial(cpu.update_, rule(name))))

    return update
