"""The names that the loaders of vLLM and SGLang expect of an exported folder, as facts, without either of them.

Both keep some matrices joined in memory and find the joined one by a part of the name on disk; a name that they find
nothing for is an error in one and dropped in the other. The facts are from `deepseek_v2.py`, `kimi_linear.py` with
`kda.py`, and `gpt_oss.py` of both.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from safetensors.torch import load_file

from nmoe.cli import main
from nmoe.pure.model import hf
from tests.effects.checkpoint.hf_models import MODELS, write

Shape = tuple[int, ...]
Said = Mapping[str, Any]
"""What `config.json` says."""

GATED = {".gate_proj.": ".gate_up_proj.", ".up_proj.": ".gate_up_proj."}
EXPERT = (
    {"gate_proj": "w13_weight", "up_proj": "w13_weight", "down_proj": "w2_weight"},
    {"w1": "w13_weight", "w3": "w13_weight", "w2": "w2_weight"},
)
"""Of DeepSeek; of Kimi."""
QKV = {f".{each}_proj.": ".qkv_proj." for each in "qkv"}


@attrs.frozen(kw_only=True)
class Engine:
    """What a loader renames or joins: part of the name on disk -> part of the name in memory."""

    latents: str  # name of DeepSeek's joined products of the block input
    indexer: Mapping[str, str]  # what is joined in its indexer
    delta: Mapping[str, str]  # in a layer of Kimi's delta attention
    gpt_oss: Mapping[str, str]  # the longest that is found first


ENGINES = {
    "vllm": Engine(
        latents="fused_qkv_a_proj",
        indexer={"indexer.wk.": "indexer.wk_weights_proj.", "weights_proj": "wk_weights_proj"},
        delta={},
        gpt_oss={
            **{f".self_attn{each}": f".attn{joined}" for each, joined in QKV.items()},
            **{".self_attn.": ".attn.", ".embed_tokens.": ".embedding."},
            **{".gate_up_proj_bias": ".w13_bias", ".down_proj_bias": ".w2_bias"},
            **{".gate_up_proj": ".w13_weight", ".down_proj": ".w2_weight"},
        },
    ),
    "sglang": Engine(
        latents="fused_qkv_a_proj_with_mqa",
        indexer={},
        delta={
            **{f".{each}_proj.": ".fused_qkvbfg_a_proj." for each in ("q", "k", "v", "b", "f_a", "g_a")},
            **{f".{each}_b_proj.": ".fused_fg_b_proj." for each in "fg"},
            **{f".{each}_conv1d.": ".qkv_conv1d." for each in "qkv"},
        },
        gpt_oss={
            **QKV,
            **{".gate_up_proj_bias": ".w13_weight_bias", ".down_proj_bias": ".w2_weight_bias"},
            **{".gate_up_proj": ".w13_weight", ".down_proj": ".w2_weight"},
        },
    ),
}


def is_delta(layer: int, said: Said) -> bool:
    """Whether a layer of Kimi's has delta attention; it counts from 1."""
    return layer + 1 in said["linear_attn_config"]["kda_layers"]


def in_memory(name: str, engine: Engine, said: Said) -> str:
    """The parameter that a tensor of the folder goes into."""
    kind, layer = said["model_type"], int(name.split(".")[2]) if name.startswith("model.layers.") else -1
    if ".experts." in name and kind != "gpt_oss":
        head, _, rest = name.partition(".experts.")
        _, which, _ = rest.split(".")
        return f"{head}.experts.{EXPERT[kind == 'kimi_linear'].get(which, which)}"
    if kind == "gpt_oss":
        joined = dict(engine.gpt_oss)
    elif kind == "kimi_linear":
        joined = {**GATED, **(engine.delta if is_delta(layer, said) else {})}
    else:  # only with a latent of the query are the two products of the block input joined
        low = {"q_a_proj": engine.latents, "kv_a_proj_with_mqa": engine.latents}
        joined = {**GATED, **(low if said["q_lora_rank"] is not None else {}), **engine.indexer}
    for part, whole in joined.items():
        if part in name:
            return name.replace(part, whole)
    return name


def latent_attention(said: Said, engine: Engine) -> dict[str, Shape]:
    """Of DeepSeek; of Kimi, whose query has no latent."""
    d: int = said["hidden_size"]
    heads, latent = said["num_attention_heads"], said["kv_lora_rank"]
    rope, nope, value = said["qk_rope_head_dim"], said["qk_nope_head_dim"], said["v_head_dim"]
    low: int = said["q_lora_rank"] or 0
    made: dict[str, Shape] = {
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (nope + value), latent),
        "o_proj.weight": (d, heads * value),
    }
    if not low:
        made["q_proj.weight"] = (heads * (nope + rope), d)
        made["kv_a_proj_with_mqa.weight"] = (latent + rope, d)
    else:
        made[f"{engine.latents}.weight"] = (low + latent + rope, d)
        made["q_a_layernorm.weight"] = (low,)
        made["q_b_proj.weight"] = (heads * (nope + rope), low)
    if "index_topk" in said:
        many, wide = said["index_n_heads"], said["index_head_dim"]
        made["indexer.wq_b.weight"] = (many * wide, low)
        made |= {"indexer.k_norm.weight": (wide,), "indexer.k_norm.bias": (wide,)}
        if engine.indexer:
            made["indexer.wk_weights_proj.weight"] = (wide + many, d)
        else:
            made |= {"indexer.wk.weight": (wide, d), "indexer.weights_proj.weight": (many, d)}
    return made


def delta_attention(said: Said, engine: Engine) -> dict[str, Shape]:
    """Of Kimi."""
    d: int = said["hidden_size"]
    own = said["linear_attn_config"]
    heads, wide, taps = own["num_heads"], own["head_dim"], own["short_conv_kernel_size"]
    inner = heads * wide
    made: dict[str, Shape] = {
        "A_log": (1, 1, heads, 1),
        "dt_bias": (inner,),
        "o_norm.weight": (wide,),
        "o_proj.weight": (d, inner),
    }
    if engine.delta:
        made["fused_qkvbfg_a_proj.weight"] = (3 * inner + heads + 2 * wide, d)
        made["fused_fg_b_proj.weight"] = (2, inner, wide)
        made["qkv_conv1d.weight"] = (3 * inner, 1, taps)
        return made
    for each in "qkv":
        made |= {f"{each}_proj.weight": (inner, d), f"{each}_conv1d.weight": (inner, 1, taps)}
    for each in "fg":
        made |= {f"{each}_a_proj.weight": (wide, d), f"{each}_b_proj.weight": (inner, wide)}
    return made | {"b_proj.weight": (heads, d)}


def grouped_attention(said: Said, name: str) -> dict[str, Shape]:
    """Of gpt-oss. vLLM has the biases whatever `attention_bias` says."""
    d, wide, heads = said["hidden_size"], said["head_dim"], said["num_attention_heads"]
    rows = (heads + 2 * said["num_key_value_heads"]) * wide
    biases: dict[str, Shape] = {"qkv_proj.bias": (rows,), "o_proj.bias": (d,)}
    return {
        **{"sinks": (heads,), "qkv_proj.weight": (rows, d), "o_proj.weight": (d, heads * wide)},
        **(biases if name == "vllm" or said["attention_bias"] else {}),
    }


def mixture(said: Said, name: str) -> dict[str, Shape]:
    """Of the engine of that name; gpt-oss is stored with the axes of a matrix the other way round, and turned there."""
    d: int = said["hidden_size"]
    if said["model_type"] == "gpt_oss":
        count, width = said["num_local_experts"], said["intermediate_size"]
        bias = "bias" if name == "vllm" else "weight_bias"
        return {
            **{"router.weight": (count, d), "router.bias": (count,)},
            **{"experts.w13_weight": (count, d, 2 * width), f"experts.w13_{bias}": (count, 2 * width)},
            **{"experts.w2_weight": (count, width, d), f"experts.w2_{bias}": (count, d)},
        }
    kimi = said["model_type"] == "kimi_linear"
    count, width = said["num_experts" if kimi else "n_routed_experts"], said["moe_intermediate_size"]
    shared = width * said["num_shared_experts" if kimi else "n_shared_experts"]
    made: dict[str, Shape] = {
        "gate.weight": (count, d),
        "experts.w13_weight": (count, 2 * width, d),
        "experts.w2_weight": (count, d, width),
        "shared_experts.gate_up_proj.weight": (2 * shared, d),
        "shared_experts.down_proj.weight": (d, shared),
    }
    if kimi or said["topk_method"] == "noaux_tc":
        made["gate.e_score_correction_bias"] = (count,)
    return made


def parameters(said: Said, name: str) -> dict[str, Shape]:
    """Every parameter of the main model in memory of the engine of that name, from `config.json` alone."""
    engine, kind, d = ENGINES[name], said["model_type"], said["hidden_size"]
    embed = "embedding" if (kind, name) == ("gpt_oss", "vllm") else "embed_tokens"
    made: dict[str, Shape] = {
        f"model.{embed}.weight": (said["vocab_size"], d),
        "lm_head.weight": (said["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    for layer in range(said["num_hidden_layers"]):
        attention, experts = "self_attn", "mlp"
        if kind == "gpt_oss":
            attention, own = "attn" if name == "vllm" else attention, grouped_attention(said, name)
        elif kind == "kimi_linear" and is_delta(layer, said):
            own = delta_attention(said, engine)
        else:
            own = latent_attention(said, engine)
        if layer < said.get("first_k_dense_replace", 0):
            width: int = said["intermediate_size"]
            after: dict[str, Shape] = {"gate_up_proj.weight": (2 * width, d), "down_proj.weight": (d, width)}
        else:
            after, experts = mixture(said, name), "block_sparse_moe" if kind == "kimi_linear" else experts
        of_layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        of_layer |= {f"{attention}.{path}": shape for path, shape in own.items()}
        of_layer |= {f"{experts}.{path}": shape for path, shape in after.items()}
        made |= {f"model.layers.{layer}.{path}": shape for path, shape in of_layer.items()}
    return made


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_read_and_every_parameter_filled(name: str, engine: str, tmp_path: Path) -> None:
    """By name; by shape where one tensor is one parameter, else by the number of elements that they bring together."""
    write(tmp_path / "run", MODELS[name], compute="bf16")
    assert main(["export", "hf", str(tmp_path / "run"), str(tmp_path / "out"), "--no-verify"]) == 0
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == hf.family_of(MODELS[name])[0]
    further = tuple(f"model.layers.{said['num_hidden_layers'] + depth}." for depth in range(4))
    filled: Counter[str] = Counter()
    alone: dict[str, Shape] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if key.startswith(further):  # of multi-token prediction, which is another model there
                continue
            path = in_memory(key, ENGINES[engine], said)
            filled[path] += tensor.numel()
            if path == key or said["model_type"] == "gpt_oss" and ".experts." in key:
                alone[path] = tuple(tensor.shape)
    expected = parameters(said, engine)
    if engine == "vllm" and not said.get("attention_bias", True) and said["model_type"] == "gpt_oss":
        lacking = [key for key in expected if key.endswith(("qkv_proj.bias", "o_proj.bias"))]
        assert [expected.pop(key) for key in lacking], "docs/interop.md says that vLLM takes no such model"
    assert dict(filled) == {key: math.prod(shape) for key, shape in expected.items()}
    assert alone == {key: expected[key] for key in alone}


AHEAD = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight"}


def test_a_layer_of_multi_token_prediction_is_a_block_and_what_joins_it(tmp_path: Path) -> None:
    """Both read it as a block of experts, and beside it these names."""
    write(tmp_path / "run", MODELS["two further tokens"])
    assert main(["export", "hf", str(tmp_path / "run"), str(tmp_path / "out"), "--no-verify"]) == 0
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    last, further = "model.layers.2.", ("model.layers.3.", "model.layers.4.")
    block = {name.removeprefix(last) for name in names if name.startswith(last)}
    for at in further:
        own = {name.removeprefix(at) for name in names if name.startswith(at)}
        assert own == block | AHEAD | {"embed_tokens.weight"}
