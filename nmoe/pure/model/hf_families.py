"""The model types of Hugging Face that nmoe has: what differs between their `config.json` and names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs

from nmoe.config import sections
from nmoe.pure.model.attention import KINDS, Hf, gqa
from nmoe.pure.model.hf_leaf import Leaf, gated, interleaved, matrix, same

GATED = MappingProxyType({"up": gated("gate_proj.weight", "up_proj.weight"), "down": matrix("down_proj.weight")})
"""A gated MLP."""

ROUTER = MappingProxyType({"router": matrix("gate.weight")})


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
    read: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]
    known: tuple[str, ...]  # keys that `read` reads
    canonical: Callable[[sections.Model], sections.Model] = lambda c: c
    mixture: str = "mlp."  # before the names of a mixture
    whole: Mapping[str, Leaf] = ROUTER  # tensors of a mixture that are one there
    expert: Mapping[str, Leaf] = GATED  # and those that are one an expert
    has_bias: bool = True  # whether there is a router bias
    fp8: bool = False  # whether it is published in fp8 blocks
    ahead: bool = True  # whether there may be multi-token prediction


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

KIMI: Mapping[str, str] = MappingProxyType(
    {
        "max_position_embeddings": "model_max_length",
        "n_routed_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "n_shared_experts": "num_shared_experts",
        "n_group": "num_expert_group",
        "norm_topk_prob": "moe_renormalize",
    }
)
"""Key of DeepSeek-V3 -> of Kimi Linear."""

DENSE = ("first_k_dense_replace", "intermediate_size")

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


def _read_v32(config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`transformers` writes the kind of each layer's MLP and attention too."""
    attention, problems = hf_of(sections.Dsa).section(config)
    layers, dense = config.get("num_hidden_layers"), config.get("first_k_dense_replace")
    if isinstance(layers, int) and isinstance(dense, int):
        expected = {
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
            "layer_types": ["indexed_attention"] * layers,
        }
        problems += [
            f"{key}: expected those of {layers} layers of which the first {dense} are dense, got others; nmoe has no "
            "other order"
            for key, value in expected.items()
            if config.get(key, value) != value
        ]
    return {"attention": {"kind": "dsa", **attention}}, problems


def _settings_kimi(c: sections.Model) -> dict[str, Any]:
    """Layers are counted from 1 there."""
    attention = _mixed(_canonical_kimi(c))
    letters = attention.letters(c.num_layers)
    layers = {letter: [at for at, each in enumerate(letters, 1) if each == letter] for letter in "ab"}
    delta = hf_of(sections.Kda).settings(attention.a)["linear_attn_config"]
    latent = {key: value for key, value in MLA.settings(attention.b).items() if key != "rope_scaling"}
    return latent | {"linear_attn_config": {**delta, "kda_layers": layers["a"], "full_attn_layers": layers["b"]}}


def _mixed(c: sections.Model) -> sections.Mixed:
    if not isinstance(c.attention, sections.Mixed):
        raise ValueError(f"hf: expected mixed attention, got {type(c.attention).__name__}")
    return c.attention


def _canonical_kimi(c: sections.Model) -> sections.Model:
    """Table `a` is delta attention, `b` latent without a rotation, and the pattern has a letter a layer."""
    given = _mixed(c)
    letter_of = {type(part): letter for letter, part in given.parts().items()}
    delta, latent = letter_of[sections.Kda], letter_of[sections.Mla]
    pattern = given.letters(c.num_layers).translate({ord(delta): "a", ord(latent): "b"})
    unused = attrs.fields(sections.Mla).rope_theta.default
    still = attrs.evolve(getattr(given, latent), rope_theta=unused)
    return attrs.evolve(c, attention=sections.Mixed(pattern=pattern, a=getattr(given, delta), b=still))


def _read_kimi(config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    delta, problems = hf_of(sections.Kda).section(config)
    latent, wrong = MLA.section(config)
    problems += wrong
    given: Any = config.get("linear_attn_config")
    pattern, layers = "", config.get("num_hidden_layers")
    if isinstance(given, dict) and isinstance(layers, int):
        places: list[Any] = [given.get(key) for key in ("kda_layers", "full_attn_layers")]
        if sorted(_numbers(places)) == list(range(1, layers + 1)):
            pattern = "".join("a" if at in places[0] else "b" for at in range(1, layers + 1))
        else:
            problems.append(
                f"linear_attn_config: expected each layer from 1 to {layers} once in kda_layers or full_attn_layers, "
                f"got {json.dumps(places)}; copy it again"
            )
    latent.pop("rope_theta", None)
    parts = {"a": {"kind": "kda", **delta}, "b": {"kind": "mla", **latent, "position": "none"}}
    return {"attention": {"kind": "mixed", "pattern": pattern, **parts}}, problems


GQA = hf_of(sections.Gqa)

SWIGLU = MappingProxyType({"swiglu_limit": 7.0, "swiglu_alpha": 1.702})
"""Keys of gpt_oss, and of the section Moe -> what holds where they are absent."""

ALIASES = MappingProxyType({"experts_per_token": "num_experts_per_tok"})
"""Second names of keys in what OpenAI publishes."""


QUANTISED = "quantization_config"


def _settings_gpt_oss(c: sections.Model) -> dict[str, Any]:
    attention: Any = c.attention
    layers = gqa.hf_layers(attention, c.num_layers)
    gate = {key: getattr(c.moe, key) or value for key, value in SWIGLU.items()}
    return GQA.settings(c.attention) | gate | {"layer_types": layers}


def _canonical_gpt_oss(c: sections.Model) -> sections.Model:
    """Without dense layers their width says nothing."""
    return attrs.evolve(c, intermediate_size=c.moe.intermediate_size)


def _read_gpt_oss(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    attention, problems = GQA.section(config)
    problems += [
        f"{alias}: expected {key} = {json.dumps(config.get(key))}, got {json.dumps(config[alias])}; remove one"
        for alias, key in ALIASES.items()
        if alias in config and config[alias] != config.get(key)
    ]
    if QUANTISED in config:
        given: Any = config[QUANTISED]
        method = given.get("quant_method") if isinstance(given, dict) else given
        got = method if isinstance(method, str) else json.dumps(method)
        problems.append(
            f"{QUANTISED}: expected no key, because weights are read in bf16 or fp32, got {got}; convert the folder"
        )
    moe = {key: config.get(key, value) for key, value in SWIGLU.items()}
    moe |= {"score": "softmax", "biases": True}
    dense = {"num_dense_layers": 0, "intermediate_size": config.get("intermediate_size")}
    return {"attention": {"kind": "gqa", **attention}, "moe": moe, **dense}, problems


def _numbers(places: list[Any]) -> list[int]:
    return [at for each in places if isinstance(each, list) for at in each if isinstance(at, int)]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v3": Family(
            architecture="DeepseekV3ForCausalLM",
            keys=KEYS,
            fixed=FIXED,
            settings=lambda c: MLA.settings(c.attention),
            read=lambda config: _of_attention("mla", MLA, config),
            known=MLA.keys,
            fp8=True,
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
            ahead=False,
        ),
        "deepseek_v32": Family(
            architecture="DeepseekV32ForCausalLM",
            keys=KEYS,
            fixed=FIXED,
            settings=lambda c: hf_of(sections.Dsa).settings(c.attention),
            read=_read_v32,
            known=(*hf_of(sections.Dsa).keys, "mlp_layer_types", "layer_types", "mlp_bias"),
            fp8=True,
        ),
        "kimi_linear": Family(
            architecture="KimiLinearForCausalLM",
            keys=MappingProxyType({KIMI.get(key, key): path for key, path in KEYS.items()}),
            fixed=MappingProxyType(
                {
                    **{"hidden_act": "silu", "tie_word_embeddings": False, "moe_layer_freq": 1, "mla_use_nope": True},
                    **{"moe_router_activation_func": "sigmoid", "use_grouped_topk": True},
                }
            ),
            settings=_settings_kimi,
            read=_read_kimi,
            known=(*MLA.keys, *hf_of(sections.Kda).keys),
            canonical=_canonical_kimi,
            mixture="block_sparse_moe.",
            expert=MappingProxyType({"up": gated("w1.weight", "w3.weight"), "down": matrix("w2.weight")}),
            ahead=False,
        ),
        "gpt_oss": Family(
            architecture="GptOssForCausalLM",
            keys=MappingProxyType(
                {
                    **{key: path for key, path in KEYS.items() if len(path) == 1 and key not in DENSE},
                    "num_local_experts": ("moe", "num_experts"),
                    "num_experts_per_tok": ("moe", "top_k"),
                    "intermediate_size": ("moe", "intermediate_size"),
                }
            ),
            fixed=MappingProxyType({"hidden_act": "silu", "tie_word_embeddings": False}),
            settings=_settings_gpt_oss,
            read=_read_gpt_oss,
            known=(*GQA.keys, *SWIGLU, *ALIASES, "router_aux_loss_coef", QUANTISED),
            canonical=_canonical_gpt_oss,
            whole=MappingProxyType(
                {
                    "router": matrix("router.weight"),
                    "biases.router": same("router.bias"),
                    "up": interleaved("experts.gate_up_proj"),
                    "biases.up": interleaved("experts.gate_up_proj_bias"),
                    "down": same("experts.down_proj"),
                    "biases.down": same("experts.down_proj_bias"),
                }
            ),
            expert=MappingProxyType({}),
            has_bias=False,
            ahead=False,
        ),
    }
)
"""Model type -> what it is here."""


def _of_attention(kind: str, names: Hf, config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    section, problems = names.section(config)
    return {"attention": {"kind": kind, **section}}, problems


def type_of(c: sections.Model) -> str | None:
    """The model type of a section; None where there is none."""
    kinds = {type(section) for section in c.attentions().values()}
    if isinstance(c.attention, sections.Mixed):
        return "kimi_linear" if kinds == {sections.Kda, sections.Mla} and c.attention.c is None else None
    types = {
        (sections.Mla, "sigmoid"): "deepseek_v3",
        (sections.Mla, "softmax"): "deepseek_v2",
        (sections.Dsa, "sigmoid"): "deepseek_v32",
        (sections.Gqa, "sigmoid"): "gpt_oss",  # whose settings name the softmax among what is another there
        (sections.Gqa, "softmax"): "gpt_oss",
    }
    return types.get((kinds.pop(), c.moe.score))
