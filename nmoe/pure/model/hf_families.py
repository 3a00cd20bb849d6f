"""The model types of Hugging Face that nmoe has: what differs between their `config.json` and names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs

from nmoe.config import sections
from nmoe.pure.model.attention import KINDS, Hf
from nmoe.pure.model.hf_leaf import Leaf, gated, matrix

GATED = MappingProxyType({"up": gated("gate_proj.weight", "up_proj.weight"), "down": matrix("down_proj.weight")})
"""A gated MLP."""


@attrs.frozen(kw_only=True)
class Family:
    """One model type.

    settings   keys of `config.json` beside those of `keys` and `fixed`, of a section Model
    read       undoes it: tables of the section Model, values unchecked, and what nmoe cannot express
    canonical  a section Model in the form that `read` gives
    """

    architecture: str  # class of `transformers`
    keys: Mapping[str, tuple[str, ...]]  # key of `config.json` -> where it is in the section Model
    fixed: Mapping[str, Any]  # keys of which there is one value here
    settings: Callable[[sections.Model], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], tuple[dict[str, dict[str, Any]], list[str]]]
    known: tuple[str, ...]  # keys that `read` reads
    canonical: Callable[[sections.Model], sections.Model] = lambda c: c
    mixture: str = "mlp."  # before the names of a mixture
    expert: Mapping[str, Leaf] = GATED
    has_bias: bool = True  # whether there is a router bias


def hf_of(section: type) -> Hf:
    """A kind of attention in their words.

    Raises:  ValueError for one that has none.
    """
    names = KINDS[section].hf
    if names is None:
        raise ValueError(f"hf: expected a kind of attention that a model type has, got {section.__name__}")
    return names


MLA = hf_of(sections.Mla)

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
"""Of DeepSeek-V3."""

FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
)
"""Of DeepSeek-V3. vLLM takes softmax, and no bias, where the two of the router are absent."""

DEPTH = "num_nextn_predict_layers"
"""Key of `config.json`: layers of multi-token prediction, of which the weights follow those of the last layer."""

ROUTER_V2 = ("topk_method", "n_group", "topk_group")


def _settings_v2(c: sections.Model) -> dict[str, Any]:
    """Greedy choice among all experts, or among those of the groups with the best single expert."""
    limited = c.moe.num_groups > 1
    return MLA.settings(c.attention) | {
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": c.moe.num_groups,
        "topk_group": c.moe.top_k_groups,
    }


def _read_v2(config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    method = config.get("topk_method", "greedy")
    attention, problems = MLA.section(config)
    moe: dict[str, Any] = {"score": "softmax", "normalize": False}
    if method == "group_limited_greedy":
        moe |= {"num_groups": config.get("n_group"), "top_k_groups": config.get("topk_group")}
    elif method != "greedy":
        problems.append(
            f'topk_method: expected "greedy" or "group_limited_greedy", got {json.dumps(method)}; nmoe has no other'
        )
    return {"attention": {"kind": "mla", **attention}, "moe": moe}, problems


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v3": Family(
            architecture="DeepseekV3ForCausalLM",
            keys=KEYS,
            fixed=FIXED,
            settings=lambda c: MLA.settings(c.attention) | {DEPTH: c.depth()},
            read=lambda config: _of_attention("mla", MLA, config),
            known=(*MLA.keys, DEPTH),
        ),
        "deepseek_v2": Family(
            architecture="DeepseekV2ForCausalLM",
            keys=MappingProxyType(
                {key: path for key, path in KEYS.items() if key not in (*ROUTER_V2, "norm_topk_prob")}
            ),
            fixed=MappingProxyType(
                {
                    **{key: value for key, value in FIXED.items() if key != "topk_method"},
                    "scoring_func": "softmax",
                    "norm_topk_prob": False,
                    "mlp_bias": False,
                }
            ),
            settings=_settings_v2,
            read=_read_v2,
            known=(*MLA.keys, *ROUTER_V2),
            has_bias=False,
        ),
    }
)
"""Model type -> what it is here."""


def _of_attention(kind: str, names: Hf, config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    section, problems = names.section(config)
    ahead = {"mtp": {"depth": config[DEPTH]}} if config.get(DEPTH, 0) != 0 else {}
    return {"attention": {"kind": kind, **section}, **ahead}, problems


def type_of(c: sections.Model) -> str | None:
    """The model type of a section; None where there is none."""
    if isinstance(c.attention, sections.Mla) and type(c.attention) is sections.Mla:
        return "deepseek_v2" if c.moe.score == "softmax" else "deepseek_v3"
    return None
