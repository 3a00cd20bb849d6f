"""One file a kind of attention; `Kind` is what the model, the plan, the export and the shell ask it for.

A new kind is a section class, a file here, a file of kernels, and a line in `KINDS`. A script passes its own:
`kinds = {**KINDS, Section: Kind(...)}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.model.attention import dsa, gqa, mla, nsa
from nmoe.pure.model.hf_leaf import Leaf


@attrs.frozen(kw_only=True)
class Hf:
    """A kind of attention in the words of `transformers`."""

    settings: Callable[[Any], dict[str, Any]]  # of the section
    leaves: Callable[[Any], dict[str, Leaf]]  # of the section; path in the parameter record -> what it is there
    section: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]  # of their settings; undoes `settings`
    keys: tuple[str, ...]  # of theirs that `section` reads


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
    tile_sizes         (c) -> the key of this kind in the table of tiles, () when its kernels have none
    hf                 its settings and tensors in `transformers`; None: it has no such attention
    """

    specs: Callable[[Any], Any]
    dims: Callable[[Any], dict[str, int]]
    tables: Callable[[Any, int], Any]
    apply: Callable[..., Tensor | tuple[Tensor, Tensor]]
    flops: Callable[..., int]
    kept_bytes: Callable[..., int]
    reference: Any
    kernel_kept_bytes: Callable[[Any], tuple[int, int]] | None = None
    at_layer: Callable[[Any, int], Any] = lambda c, layer: c
    at_tokens: Callable[[Any, int], Any] = lambda c, tokens: c
    tile_sizes: Callable[[Any], tuple[int, ...]] = lambda c: ()
    hf: Hf | None = None


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
        ),
        sections.Gqa: Kind(
            specs=gqa.specs,
            dims=gqa.dims,
            at_layer=gqa.at_layer,
            tables=gqa.tables,
            apply=gqa.gqa,
            flops=gqa.flops,
            kept_bytes=gqa.kept_bytes,
            reference=gqa.REFERENCE,
        ),
        sections.Nsa: Kind(
            specs=nsa.specs,
            dims=nsa.dims,
            tables=nsa.tables,
            apply=nsa.nsa,
            flops=nsa.flops,
            kept_bytes=nsa.kept_bytes,
            reference=nsa.REFERENCE,
        ),
        sections.Dsa: Kind(
            specs=dsa.specs,
            dims=dsa.dims,
            at_tokens=dsa.at_tokens,
            tables=mla.tables,
            apply=dsa.dsa,
            flops=dsa.flops,
            kept_bytes=dsa.kept_bytes,
            reference=dsa.REFERENCE,
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
