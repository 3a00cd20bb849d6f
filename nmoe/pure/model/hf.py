"""The model in the words of Hugging Face: settings, names and shapes of a model type, both ways.

Values only: `transformers` is not imported here, and nothing is read or written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.config.check import validate_model
from nmoe.config.convert import structure
from nmoe.config.fields import flat, table
from nmoe.config.toml import dotted
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.formats import blocks
from nmoe.pure.formats.blocks import BLOCK
from nmoe.pure.model import model
from nmoe.pure.model.attention import layers
from nmoe.pure.model.hf_families import FAMILIES, GATED, Family, hf_of, type_of
from nmoe.pure.model.hf_families import QUANTISED as QUANTISED
from nmoe.pure.model.hf_leaf import Leaf, matrix, repeated, same, scaled, stacked, zeros
from nmoe.pure.model.model import Transformer

ROUTER_BIAS = "router_bias"
"""The router bias [L E] among the parameters' paths."""


SCALE = "_scale_inv"
"""Behind the name of a matrix in fp8 blocks: that of their scales."""

DEPTH = "num_nextn_predict_layers"
"""Key of `config.json`: layers of multi-token prediction, of which the weights follow those of the last layer."""


@attrs.frozen(kw_only=True)
class Part:
    """A tensor of ours, or one row of it along the first axis, and what it is in their folder."""

    path: str  # of the parameter, or ROUTER_BIAS
    index: int | None  # row; None: the whole
    shape: tuple[int, ...]  # of the row or the whole
    leaf: Leaf

    def theirs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Names in their folder with tensors of their formats and shapes, which hold nothing, where ours is `dtype`."""
        return self.leaf.split(torch.empty(self.shape, device="meta", dtype=dtype))


TRAINING = (
    *("embedding_scale", "logit_scale", "moe.balance", "moe.bias_update_rate", "moe.bias_decay"),
    *("moe.sequence_balance", "attention.index_loss", "attention.index_warmup_tokens"),
    *("mtp.weight", "mtp.later_weight", "mtp.switch_tokens"),
)
"""Keys of the section Model that are for training, or are folded into the weights: they are in no `config.json`."""


def settings(c: sections.Model) -> dict[str, Any]:
    """`config.json` but for the number format, which is also keyword arguments of the config class of `transformers`.

    The ids of special tokens are the tokenizer's business and None here.

    Raises:  InputError when no model type has the model, with each key that is another there.
    """
    name, family = family_of(c)
    said = {
        "model_type": name,
        **{theirs: _at(c, path) for theirs, path in family.keys.items()},
        **family.fixed,
        DEPTH: c.depth(),
        **family.settings(c),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    ours, back = (
        {dotted(path): value for path, value in flat(table(each))} for each in (family.canonical(c), model_of(said))
    )
    wrong = [key for key in ours | back if key not in TRAINING and ours.get(key) != back.get(key)]
    if wrong:
        raise InputError(
            *(
                f"model.{key}: expected {json.dumps(back.get(key))}, which {name} has, got "
                f"{json.dumps(ours.get(key))}; it cannot be exported"
                for key in wrong
            )
        )
    return said


def family_of(c: sections.Model) -> tuple[str, Family]:
    """The model type that a model is exported as.

    Raises:  InputError when there is none.
    """
    name = type_of(c)
    if name is None:
        kinds = ", ".join(type(section).__name__ for section in c.attentions().values())
        raise InputError(
            f"model.attention: expected the attention of one of {', '.join(FAMILIES)}, got {kinds}; no other can be "
            "exported"
        )
    return name, FAMILIES[name]


def fp8_settings() -> dict[str, Any]:
    """What `config.json` says under `QUANTISED` of fp8 blocks; V3.2 adds how it rounds scales, `scale_fmt`."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


FP8_NAMES = re.compile(
    r"model\.layers\.\d+\.(self_attn|mlp)\.(.*\.)?((?!weights_)\w+_proj(_with_mqa)?|wq_b|wk)\.weight"
)
"""What DeepSeek publishes in fp8: products of the blocks, but not routers and the indexer's weights."""


def _in_fp8(leaf: Leaf) -> Leaf:
    """The same with matrices of the blocks in fp8, their scales beside them."""

    def split(ours: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, tensor in leaf.split(ours).items():
            if FP8_NAMES.fullmatch(name):
                named[name], named[f"{name}{SCALE}"] = blocks.quantise(tensor)
            else:
                named[name] = tensor
        return named

    def join(theirs: Mapping[str, Tensor]) -> Tensor:
        scaled = {name.removesuffix(SCALE): scale for name, scale in theirs.items() if name.endswith(SCALE)}
        return leaf.join(
            {
                name: blocks.dequantise(tensor, scaled[name]) if name in scaled else tensor
                for name, tensor in theirs.items()
                if not name.endswith(SCALE)
            }
        )

    return Leaf(split=split, join=join, views=False)


def check_fp8(c: sections.Model) -> None:
    """Raises: InputError for a model whose type is not published in fp8 blocks."""
    name, family = family_of(c)
    if not family.fp8:
        types = " or ".join(name for name, family in FAMILIES.items() if family.fp8)
        raise InputError(f"--fp8: expected a model of {types}, got {name}, which nobody reads in fp8; leave it out")


def parts(c: sections.Model, *, fp8: bool = False) -> tuple[Part, ...]:
    """Every tensor of ours with its place in their folder, those of one path side by side in the order of their rows.

    What they have no setting for is folded into the weights. `embedding_scale` multiplies the embedding, which gives
    the bits that `forward` computes; `logit_scale` multiplies the gain of the last norm, which is fp32 here. A layer of
    multi-token prediction has copies of embedding and head there.

    fp8      whether their matrices are in fp8 blocks, as DeepSeek publishes V3
    Raises:  InputError for multi-token prediction that they cannot say: behind a `logit_scale`, or without experts.
    """
    name, family = family_of(c)
    if c.mtp is not None and c.logit_scale != 1:
        raise InputError(
            f"model.logit_scale: expected 1.0 beside model.mtp, got {c.logit_scale}; {name} has no such factor, "
            "and its layer of multi-token prediction would read the hidden state times it"
        )
    if c.mtp is not None and not c.mixtures():
        raise InputError(
            f"model.num_dense_layers: expected below num_layers = {c.num_layers} beside model.mtp, got "
            f"{c.num_dense_layers}; in {name} a layer of multi-token prediction has experts"
        )
    dims, mixtures = model.dims(c), c.mixtures()
    sizes = {path: spec.shape(dims) for path, spec in tree.leaves(model.specs(c))}

    def whole(path: str, leaf: Leaf) -> Part:
        return Part(path=path, index=None, shape=sizes[path], leaf=leaf)

    further = [f"model.layers.{c.num_layers + depth}." for depth in range(c.depth())]
    embed = repeated(
        scaled("model.embed_tokens.weight", c.embedding_scale), *(f"{at}embed_tokens.weight" for at in further)
    )
    parts = [whole("embed", embed)]
    for layer, (_, section) in enumerate(layers(c)):
        depth = layer - c.num_layers
        ours, theirs = f"mtp.{depth}.block." if depth >= 0 else f"blocks.{layer}.", f"model.layers.{layer}."
        leaves = {"attention_norm": same("input_layernorm.weight"), "ffn_norm": same("post_attention_layernorm.weight")}
        for path, leaf in hf_of(type(section)).leaves(section).items():
            leaves[f"attention.{path}"] = leaf.under("self_attn.")
        if layer not in mixtures:
            leaves |= {f"ffn.{path}": leaf.under("mlp.") for path, leaf in GATED.items()}
            experts = {}
        else:
            leaves |= {f"ffn.{path}": leaf.under(family.mixture) for path, leaf in family.whole.items()}
            if c.moe.num_shared_experts:
                prefix = f"{family.mixture}shared_experts."
                leaves |= {f"ffn.shared.{path}": leaf.under(prefix) for path, leaf in GATED.items()}
            experts = family.expert
        parts += [whole(ours + path, leaf.under(theirs)) for path, leaf in leaves.items()]
        for path in experts:
            num_experts, *shape = sizes[f"{ours}ffn.{path}"]
            for expert in range(num_experts):
                leaf = experts[path].under(f"experts.{expert}.")
                if not expert and not c.moe.num_shared_experts:
                    leaf = _with_no_shared(leaf, path)
                leaf = leaf.under(theirs + family.mixture)
                parts.append(Part(path=f"{ours}ffn.{path}", index=expert, shape=tuple(shape), leaf=leaf))
    for depth, theirs in enumerate(further):
        parts += [whole(f"mtp.{depth}.{path}", leaf.under(theirs)) for path, leaf in AHEAD.items()]
    parts.append(whole("norm", scaled("model.norm.weight", c.logit_scale)))
    head = repeated(matrix("lm_head.weight"), *(f"{theirs}shared_head.head.weight" for theirs in further))
    parts.append(whole("head", head))
    for row, layer in enumerate(mixtures):
        leaf = same("gate.e_score_correction_bias") if family.has_bias else zeros(ROUTER_BIAS, (c.moe.num_experts,))
        leaf = leaf.under(f"model.layers.{layer}.{family.mixture}")
        parts.append(Part(path=ROUTER_BIAS, index=row, shape=(c.moe.num_experts,), leaf=leaf))
    return tuple(attrs.evolve(part, leaf=_in_fp8(part.leaf)) for part in parts) if fp8 else tuple(parts)


def tensors(p: Transformer, router_bias: Tensor, c: sections.Model) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of their folder from parameters in memory, one at a time: for weight sync into an engine.

    Experts come one by one, by the names on disk: engines drop fused names without a word. A tensor is a view of ours
    where that is possible, on our device and in our format; the caller copies what it keeps.

    router_bias  [L E] f32
    """
    ours = {**dict(tree.leaves(p)), ROUTER_BIAS: router_bias}
    for part in parts(c):
        value: Tensor = ours[part.path]
        yield from part.leaf.split(value if part.index is None else value[part.index]).items()


AHEAD: Mapping[str, Leaf] = MappingProxyType(
    {
        "embed_norm": same("enorm.weight"),
        "hidden_norm": same("hnorm.weight"),
        "project": stacked("eh_proj.weight", 2),
        "norm": same("shared_head.norm.weight"),
    }
)
"""Of a layer of multi-token prediction, what stands beside its block."""


def _with_no_shared(leaf: Leaf, path: str) -> Leaf:
    """A routed expert's, with the shared experts' of zero width, which theirs have where ours has none."""
    empty = GATED[path].under("shared_experts.")

    def split(ours: Tensor) -> dict[str, Tensor]:
        return leaf.split(ours) | empty.split(ours[..., :0] if path == "up" else ours[:0])

    return Leaf(split=split, join=leaf.join, views=leaf.views)


def state_dict(p: Transformer, bias: Tensor, c: sections.Model) -> dict[str, Tensor]:
    """Every parameter, and the router bias, under the names of a DeepSeek or gpt-oss in memory (transformers 5).

    The experts of a layer are one tensor there, and multi-token prediction is left out.

    bias     [L E] f32   router bias, one row a mixture layer
    returns  tensors in the formats of `p`, many of them views of it
    """
    leaves = dict(tree.leaves(p)) | {ROUTER_BIAS: bias}
    named: dict[str, Tensor] = {}
    c = attrs.evolve(c, mtp=None)  # they read multi-token prediction nowhere
    for part in parts(c):
        named |= part.leaf.split(leaves[part.path] if part.index is None else leaves[part.path][part.index])
    for layer in c.mixtures() if family_of(c)[1].expert else ():
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = [
            {kind: named.pop(f"{prefix}{expert}.{kind}_proj.weight") for kind in ("gate", "up", "down")}
            for expert in range(c.moe.num_experts)
        ]
        named[f"{prefix}gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in experts])
        named[f"{prefix}down_proj"] = torch.stack([e["down"] for e in experts])
    return named


BOOKKEEPING = (
    *("architectures", "auto_map", "_name_or_path", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("initializer_range", "output_router_logits", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"),
    *("ep_size", "seq_aux", "aux_loss_alpha", "head_dim", "qk_head_dim"),
)
"""Keys of `config.json` that change no logit, or follow from others."""


def model_of(config: Mapping[str, Any]) -> sections.Model:
    """The section Model of a `config.json`.

    Raises:  InputError with every key that is missing, unknown, or has a value that nmoe has no model for.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        got = name if isinstance(name, str) else json.dumps(name)
        raise InputError(f"model_type: expected one of {', '.join(FAMILIES)}, got {got}; nmoe has no other")
    family = FAMILIES[name]
    problems = [f"{key}: expected a value, got nothing; write it" for key in family.keys if key not in config]
    problems += [
        f"{key}: expected {json.dumps(value)}, got {json.dumps(config[key])}; nmoe has no other"
        for key, value in family.fixed.items()
        if config.get(key, value) != value
    ]
    if not family.ahead and config.get(DEPTH, 0) != 0:
        problems.append(f"{DEPTH}: expected 0, got {json.dumps(config[DEPTH])}; nmoe has no other for {name}")
    own, wrong = family.read(config)
    problems += wrong
    blocks = fp8_settings()
    given: Any = config.get(QUANTISED, blocks)
    if family.fp8 and (not isinstance(given, dict) or {**given, "scale_fmt": None} != {**blocks, "scale_fmt": None}):
        problems.append(
            f"{QUANTISED}: expected {json.dumps(blocks)}, got {json.dumps(given)}; nmoe reads no other format"
        )
    known = {
        "model_type",
        *((QUANTISED,) if family.fp8 else ()),
        *family.keys,
        *family.fixed,
        *family.known,
        *BOOKKEEPING,
        DEPTH,
    }
    problems += [
        f"{key}: expected a key of {name} that nmoe knows, got {json.dumps(value)}; remove it if no logit changes"
        for key, value in config.items()
        if key not in known
    ]
    tables: dict[str, Any] = {**own, "moe": dict(own.get("moe", {}))}
    for key, path in family.keys.items():
        (tables["moe"] if path[0] == "moe" else tables)[path[-1]] = config.get(key, 0)
    if config.get(DEPTH, 0) != 0:
        tables["mtp"] = {"depth": config[DEPTH]}
    problems += [
        f"{_theirs(path, family)}: expected one value, got {json.dumps(value)}; write a number"
        for path, value in flat(tables)
        if not isinstance(value, bool | int | float | str)
    ]
    if problems:
        raise InputError(*problems)
    section = structure(tables, sections.Model)
    if isinstance(section, tuple):
        raise InputError(*(f"{_theirs(fault.path, family)}: {fault.text}" for fault in section))
    if unfit := validate_model(section):
        raise InputError(*unfit)
    return section


def _theirs(path: tuple[str, ...], family: Family) -> str:
    """The key of `config.json` behind a path in the section Model, where it is not the same word."""
    named = {**family.keys, DEPTH: ("mtp", "depth")}
    return next((key for key, ours in named.items() if ours == path), dotted(path))


def _at(c: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        c = getattr(c, name)
    return c
