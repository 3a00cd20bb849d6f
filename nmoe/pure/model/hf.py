"""The model in the words of Hugging Face: settings, names and shapes of `deepseek_v3`, both ways.

Values only: `transformers` is not imported here, and nothing is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.config.check import validate_model
from nmoe.config.convert import structure
from nmoe.config.fields import flat
from nmoe.config.toml import dotted
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.model import model
from nmoe.pure.model.attention import KINDS, Hf
from nmoe.pure.model.hf_leaf import Leaf, gated, matrix, repeated, same, scaled, stacked
from nmoe.pure.model.model import Transformer

ROUTER_BIAS = "router_bias"
"""The router bias [L E] among the parameters' paths."""

KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vocab_size": ("vocab_size",),
        "hidden_size": ("hidden_size",),
        "num_hidden_layers": ("num_layers",),
        "first_k_dense_replace": ("num_dense_layers",),
        "intermediate_size": ("intermediate_size",),
        "max_position_embeddings": ("max_positions",),
        "rms_norm_eps": ("norm_eps",),
        "n_routed_experts": ("moe", "num_experts"),
        "num_experts_per_tok": ("moe", "top_k"),
        "n_shared_experts": ("moe", "num_shared_experts"),
        "moe_intermediate_size": ("moe", "intermediate_size"),
        "n_group": ("moe", "num_groups"),
        "topk_group": ("moe", "top_k_groups"),
        "norm_topk_prob": ("moe", "normalize"),
        "routed_scaling_factor": ("moe", "route_scale"),
    }
)
"""Key of `config.json` -> where it is in the section Model."""

FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
)
"""Keys of `config.json` of which there is one value here. vLLM takes softmax, and no bias, where the two of the router
are absent."""


DEPTH = "num_nextn_predict_layers"
"""Key of `config.json`: layers of multi-token prediction, of which the weights follow those of the last layer."""


@attrs.frozen(kw_only=True)
class Part:
    """A tensor of ours, or one row of it along the first axis, and what it is in their folder."""

    path: str  # of the parameter, or ROUTER_BIAS
    index: int | None  # row; None: the whole
    shape: tuple[int, ...]  # of the row or the whole
    leaf: Leaf

    def theirs(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in their folder."""
        split = self.leaf.split(torch.empty(self.shape, device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in split.items()}


def settings(c: sections.Model) -> dict[str, Any]:
    """`config.json` but for the number format, which is also keyword arguments of `transformers.DeepseekV3Config`.

    The ids of special tokens are the tokenizer's business and None here.
    """
    values = {theirs: _at(c, path) for theirs, path in KEYS.items()}
    return {
        **values,
        **FIXED,
        DEPTH: c.depth(),
        **_names(c.attention).settings(c.attention),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def parts(c: sections.Model) -> tuple[Part, ...]:
    """Every tensor of ours with its place in their folder, those of one path side by side in the order of their rows.

    What they have no setting for is folded into the weights. `embedding_scale` multiplies the embedding, which gives
    the bits that `forward` computes; `logit_scale` multiplies the gain of the last norm, which is fp32 here. A layer of
    multi-token prediction has copies of embedding and head there.

    Raises:  InputError for multi-token prediction that they cannot say: behind a `logit_scale`, or without experts.
    """
    if c.mtp is not None and c.logit_scale != 1:
        raise InputError(
            f"model.logit_scale: expected 1.0 beside model.mtp, got {c.logit_scale}; deepseek_v3 has no such factor, "
            "and its layer of multi-token prediction would read the hidden state times it"
        )
    if c.mtp is not None and not c.mixtures():
        raise InputError(
            f"model.num_dense_layers: expected below num_layers = {c.num_layers} beside model.mtp, got "
            f"{c.num_dense_layers}; in deepseek_v3 a layer of multi-token prediction has experts"
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
    for layer in range(c.num_layers + c.depth()):
        depth = layer - c.num_layers
        ours, theirs = f"mtp.{depth}.block." if depth >= 0 else f"blocks.{layer}.", f"model.layers.{layer}."
        leaves = {"attention_norm": same("input_layernorm.weight"), "ffn_norm": same("post_attention_layernorm.weight")}
        for path, leaf in _names(c.attention).leaves(c.attention).items():
            leaves[f"attention.{path}"] = leaf.under("self_attn.")
        if layer not in mixtures:
            leaves |= {f"ffn.{path}": leaf.under("mlp.") for path, leaf in MLP.items()}
            experts = {}
        else:
            leaves["ffn.router"] = matrix("mlp.gate.weight")
            if c.moe.num_shared_experts:
                leaves |= {f"ffn.shared.{path}": leaf.under("mlp.shared_experts.") for path, leaf in MLP.items()}
            experts = MLP
        parts += [whole(ours + path, leaf.under(theirs)) for path, leaf in leaves.items()]
        for path in experts:
            num_experts, *shape = sizes[f"{ours}ffn.{path}"]
            for expert in range(num_experts):
                leaf = _expert(path, expert, shared=c.moe.num_shared_experts > 0).under(f"{theirs}mlp.")
                parts.append(Part(path=f"{ours}ffn.{path}", index=expert, shape=tuple(shape), leaf=leaf))
    for depth, theirs in enumerate(further):
        parts += [whole(f"mtp.{depth}.{path}", leaf.under(theirs)) for path, leaf in AHEAD.items()]
    parts.append(whole("norm", scaled("model.norm.weight", c.logit_scale)))
    head = repeated(matrix("lm_head.weight"), *(f"{theirs}shared_head.head.weight" for theirs in further))
    parts.append(whole("head", head))
    for row, layer in enumerate(mixtures):
        leaf = same(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        parts.append(Part(path=ROUTER_BIAS, index=row, shape=(c.moe.num_experts,), leaf=leaf))
    return tuple(parts)


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


MLP: Mapping[str, Leaf] = MappingProxyType(
    {"up": gated("gate_proj.weight", "up_proj.weight"), "down": matrix("down_proj.weight")}
)
"""A gated MLP."""

AHEAD: Mapping[str, Leaf] = MappingProxyType(
    {
        "embed_norm": same("enorm.weight"),
        "hidden_norm": same("hnorm.weight"),
        "project": stacked("eh_proj.weight", 2),
        "norm": same("shared_head.norm.weight"),
    }
)
"""Of a layer of multi-token prediction, what stands beside its block."""


def _expert(path: str, index: int, *, shared: bool) -> Leaf:
    """One routed expert's `path`. Without shared experts theirs have zero width, and go with the first routed one."""
    leaf = MLP[path].under(f"experts.{index}.")
    if shared or index:
        return leaf
    empty = MLP[path].under("shared_experts.")

    def split(ours: Tensor) -> dict[str, Tensor]:
        return leaf.split(ours) | empty.split(ours[..., :0] if path == "up" else ours[:0])

    return Leaf(split=split, join=leaf.join)


def state_dict(p: Transformer, bias: Tensor, c: sections.Model) -> dict[str, Tensor]:
    """Every parameter, and the router bias, under the names of `DeepseekV3ForCausalLM` in memory (transformers 5).

    The experts of a layer are one tensor there, and multi-token prediction is left out.

    bias     [L E] f32   router bias, one row a mixture layer
    returns  tensors in the formats of `p`, many of them views of it
    """
    leaves = dict(tree.leaves(p)) | {ROUTER_BIAS: bias}
    named: dict[str, Tensor] = {}
    c = attrs.evolve(c, mtp=None)  # they read multi-token prediction nowhere
    for part in parts(c):
        named |= part.leaf.split(leaves[part.path] if part.index is None else leaves[part.path][part.index])
    for layer in range(c.num_dense_layers, c.num_layers):
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
    names = _names()
    problems = [f"{key}: expected a value, got nothing; write it" for key in ("model_type", *KEYS) if key not in config]
    problems += [
        f"{key}: expected {json.dumps(value)}, got {json.dumps(config[key])}; nmoe has no other"
        for key, value in FIXED.items()
        if config.get(key, value) != value
    ]
    attention, wrong = names.section(config)
    problems += wrong
    known = {*KEYS, *FIXED, *names.keys, *BOOKKEEPING, DEPTH}
    problems += [
        f"{key}: expected a key of deepseek_v3 that nmoe knows, got {json.dumps(value)}; remove it if no logit changes"
        for key, value in config.items()
        if key not in known
    ]
    tables: dict[str, Any] = {"attention": {"kind": "mla", **attention}, "moe": {}}
    for key, path in KEYS.items():
        (tables["moe"] if path[0] == "moe" else tables)[path[-1]] = config.get(key, 0)
    if config.get(DEPTH, 0) != 0:
        tables["mtp"] = {"depth": config[DEPTH]}
    problems += [
        f"{_theirs(path)}: expected one value, got {json.dumps(value)}; write a number"
        for path, value in flat(tables)
        if not isinstance(value, bool | int | float | str)
    ]
    if problems:
        raise InputError(*problems)
    section = structure(tables, sections.Model)
    if isinstance(section, tuple):
        raise InputError(*(f"{_theirs(fault.path)}: {fault.text}" for fault in section))
    if unfit := validate_model(section):
        raise InputError(*unfit)
    return section


def _theirs(path: tuple[str, ...]) -> str:
    """The key of `config.json` behind a path in the section Model, where it is not the same word."""
    named = {**KEYS, DEPTH: ("mtp", "depth")}
    return next((key for key, ours in named.items() if ours == path), dotted(path))


def _names(c: Any = None) -> Hf:
    """What a kind of attention, that of `deepseek_v3` or of a section, is in a Hugging Face folder.

    Raises:  InputError for one that they do not have.
    """
    section = sections.Mla if c is None else type(c)
    names = KINDS[section].hf if section in KINDS else None
    if names is None:
        raise InputError(
            f"model.attention: expected a kind that deepseek_v3 has, got {section.__name__}; only mla can be exported"
        )
    if isinstance(c, sections.Mla) and c.position == "none":
        raise InputError(
            'model.attention: expected a kind that deepseek_v3 has, got position = "none"; it rotates every key'
        )
    return names


def _at(c: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        c = getattr(c, name)
    return c
