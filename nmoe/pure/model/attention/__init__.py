"""One file a kind of attention; `Kind` is what the model, the plan, the export and the shell ask it for.

A new kind is a section class, a file here, a file of kernels, and a line in `KINDS`. A script passes its own:
`kinds = {**KINDS, Section: Kind(...)}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.model.attention import dsa, gqa, kda, mixed, mla, nsa, nsa_cost
from nmoe.pure.model.hf_leaf import Leaf


@attrs.frozen(kw_only=True)
class Hf:
    """A kind of attention in the words of `transformers`."""

    settings: Callable[[Any], dict[str, Any]]  # of the section
    leaves: Callable[[Any], dict[str, Leaf]]  # of the section; path in the parameter record -> what it is there
    section: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]  # of their settings; undoes `settings`
    keys: tuple[str, ...]  # of theirs that `section` reads


@attrs.frozen(kw_only=True)
class Cache:
    """How a kind of attention continues from earlier tokens without computing them again; `c` is a layer's section.

    A cache is a record of tensors [B ...] of one layer whose shapes never change: a step can be recorded.
    Both functions are pure, but for what `new.store` does: `extend` returns a new cache.

    empty   (c, num_sequences, num_tokens, like) -> the cache before the first token, with room for so many; `like`
            gives format and device
    extend  (p, x [B T D], cache, new, tables, norm, ops, c, *, eps) -> ([B T D], cache)
            what `Kind.apply` gives for the last T tokens of rows that begin with the cached ones; `new`: `cached.New`.
            Every row has seen equally many tokens; where one begins later, those before its `start` are padding and may
            change nothing.
    """

    empty: Callable[[Any, int, int, Tensor], Any]
    extend: Callable[..., tuple[Tensor, Any]]


@attrs.frozen(kw_only=True)
class Kind:
    """The contract of a kind of attention; `c` is its section.

    specs              (c) -> the parameter record of a block, a Spec where each tensor will be
    dims               (c) -> size of each axis letter that only this kind has
    at_layer           (c, layer) -> the section of one layer, counted from 0; `apply`, `flops` and `kept_bytes` get it
    at_tokens          (c, tokens) -> the section after so many tokens of the run; training and validation pass it on
    tables             (c, num_positions) -> constant tensors, a record, or () for none
    apply              (p, x [B T D], tables, norm, ops, c, documents, *, eps) -> [B T D], or a pair of it and
                       a weighted loss of its own, 0-d, summed over tokens; the objective adds its mean
    flops              (c, *, sequence_length, causal) -> FLOPs a token and layer that are no product with a parameter
    kept_bytes         (c, *, hidden, sequence_length, element, square) -> bytes a token and layer that autograd keeps
    kernel_kept_bytes  (c) -> the same of the kernels, and the bytes of norms that train.recompute makes again; None: it
                       has no kernels, a GPU runs the reference
    reference          record of ops in plain torch; a device gives its own record of the same class
    kernel_passing_bytes  (c, *, tokens, sequence_length) -> bytes that the kernels hold beside that during the
                       backward pass of one layer
    tile_sizes         (c) -> the key of a layer in the table of tiles, () when its kernels have none
    hf                 its settings and tensors in `transformers`; None: it has no such attention
    cache              how text is generated without reading all of it again for each token; None: it is read again, by
                       who asks for that (`nmoe generate --no-cache`)
    """

    specs: Callable[[Any], Any]
    dims: Callable[[Any], dict[str, int]]
    tables: Callable[[Any, int], Any]
    apply: Callable[..., Any]
    flops: Callable[..., int]
    kept_bytes: Callable[..., int]
    reference: Any
    kernel_kept_bytes: Callable[[Any], tuple[int, int]] | None = None
    kernel_passing_bytes: Callable[..., int] = lambda c, *, tokens, sequence_length: 0
    at_layer: Callable[[Any, int], Any] = lambda c, layer: c
    at_tokens: Callable[[Any, int], Any] = lambda c, tokens: c
    tile_sizes: Callable[[Any], tuple[int, ...]] = lambda c: ()
    hf: Hf | None = None
    cache: Cache | None = None


Kinds = Mapping[type, Kind]
"""Section class -> Kind."""

KINDS: Kinds = MappingProxyType(
    {
        sections.Mla: Kind(
            specs=mla.specs,
            dims=mla.dims,
            tables=mla.tables,
            apply=mla.mla,
            flops=mla.flops,
            kept_bytes=mla.kept_bytes,
            kernel_kept_bytes=mla.kernel_kept_bytes,
            reference=mla.REFERENCE,
            tile_sizes=lambda c: (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim),
            hf=Hf(
                settings=mla.hf_settings,
                leaves=mla.hf_leaves,
                section=mla.hf_section,
                keys=(*mla.HF_KEYS, *mla.HF_FIXED, *mla.HF_OTHERS),
            ),
            cache=Cache(empty=mla.empty_cache, extend=mla.extend),
        ),
        sections.Gqa: Kind(
            specs=gqa.specs,
            dims=gqa.dims,
            at_layer=gqa.at_layer,
            tables=gqa.tables,
            apply=gqa.gqa,
            flops=gqa.flops,
            kept_bytes=gqa.kept_bytes,
            kernel_kept_bytes=gqa.kernel_kept_bytes,
            reference=gqa.REFERENCE,
            tile_sizes=lambda c: (c.head_dim,) if c.window is None else (c.head_dim, c.window),
            cache=Cache(empty=gqa.empty_cache, extend=gqa.extend),
            hf=Hf(
                settings=gqa.hf_settings,
                leaves=gqa.hf_leaves,
                section=gqa.hf_section,
                keys=(*gqa.HF_KEYS, *gqa.HF_OTHERS),
            ),
        ),
        sections.Kda: Kind(
            specs=kda.specs,
            dims=kda.dims,
            tables=lambda c, num_positions: (),
            apply=kda.kda,
            flops=kda.flops,
            kept_bytes=kda.kept_bytes,
            kernel_kept_bytes=kda.kernel_kept_bytes,
            reference=kda.REFERENCE,
            tile_sizes=lambda c: (c.head_dim,),
            cache=Cache(empty=kda.empty_cache, extend=kda.extend),
            hf=Hf(settings=kda.hf_settings, leaves=kda.hf_leaves, section=kda.hf_section, keys=(kda.HF,)),
        ),
        sections.Nsa: Kind(
            specs=nsa.specs,
            dims=nsa.dims,
            tables=nsa.tables,
            apply=nsa.nsa,
            flops=nsa_cost.flops,
            kept_bytes=nsa_cost.kept_bytes,
            kernel_kept_bytes=nsa_cost.kernel_kept_bytes,
            kernel_passing_bytes=nsa_cost.kernel_passing_bytes,
            reference=nsa.REFERENCE,
            tile_sizes=lambda c: (c.head_dim, c.v_head_dim),
            cache=Cache(empty=nsa.empty_cache, extend=nsa.extend),
        ),
        sections.Dsa: Kind(
            specs=dsa.specs,
            dims=dsa.dims,
            at_tokens=dsa.at_tokens,
            tables=mla.tables,
            apply=dsa.dsa,
            flops=dsa.flops,
            kept_bytes=dsa.kept_bytes,
            kernel_kept_bytes=dsa.kernel_kept_bytes,
            kernel_passing_bytes=dsa.kernel_passing_bytes,
            reference=dsa.REFERENCE,
            tile_sizes=lambda c: (c.num_heads, c.kv_lora_rank, c.qk_rope_head_dim),
            cache=Cache(empty=dsa.empty_cache, extend=dsa.extend),
            hf=Hf(
                settings=dsa.hf_settings,
                leaves=dsa.hf_leaves,
                section=dsa.hf_section,
                keys=(*mla.HF_KEYS, *mla.HF_FIXED, *mla.HF_OTHERS, *dsa.HF_KEYS),
            ),
        ),
    }
)


def kind_of(section: Any, kinds: Kinds = KINDS) -> Kind:
    """The kind of a section.

    Raises:  ValueError for a section class that `kinds` does not have.
    """
    if type(section) not in kinds:
        known = ", ".join(known.__name__ for known in kinds)
        name = type(section).__name__
        raise ValueError(
            f"model.attention: expected a section of one of the kinds {known}, got {name}; "
            f"pass kinds={{**KINDS, {name}: Kind(...)}}"
        )
    return kinds[type(section)]


def attention_of(c: sections.Model, kinds: Kinds = KINDS) -> Kind:
    """The kind of a model's attention; of a mixed one the kind that chooses, by layer, among its parts.

    Raises:  ValueError for a section class that `kinds` does not have.
    """
    if not isinstance(c.attention, sections.Mixed):
        return kind_of(c.attention, kinds)
    parts = mixed.parts(c.attention, partial(kind_of, kinds=kinds))
    layers = tuple(parts[letter] for letter in c.attention.letters(c.num_layers))
    return Kind(
        specs=mixed.specs,
        dims=lambda c: mixed.dims(parts),
        at_layer=lambda c, layer: mixed.at_layer(c, layers[layer], layer),
        at_tokens=lambda c, tokens: mixed.at_tokens(c, parts, tokens),
        tables=lambda c, num_positions: mixed.tables(parts, num_positions),
        apply=mixed.apply,
        flops=lambda c, **shape: c.kind.flops(c.section, **shape),
        kept_bytes=lambda c, **shape: c.kind.kept_bytes(c.section, **shape),
        reference=mixed.MixedOps(tuple(part.kind.reference for part in parts.values())),
        cache=None
        if any(part.kind.cache is None for part in parts.values())
        else Cache(empty=mixed.empty_cache, extend=mixed.extend),
    )


def layers(c: sections.Model, kinds: Kinds = KINDS) -> tuple[tuple[Kind, Any], ...]:
    """Kind and section of the attention of each layer; the blocks of multi-token prediction have that of the last."""
    kind, last = attention_of(c, kinds), c.num_layers - 1
    by_layer = (kind.at_layer(c.attention, min(layer, last)) for layer in range(c.num_layers + c.depth()))
    return tuple((at.kind, at.section) if isinstance(at, mixed.Part) else (kind, at) for at in by_layer)
