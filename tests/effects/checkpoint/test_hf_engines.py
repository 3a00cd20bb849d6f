"""The names that the loaders of vLLM and SGLang expect of a `deepseek_v3` folder, as facts, without either of them.

Both keep some matrices joined in memory and find the joined one by a part of the name on disk; a name that they find
nothing for is an error in one and dropped in the other. The facts are from `deepseek_v2.py` of both.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import pytest
from safetensors.torch import load_file

from nmoe.cli import main
from nmoe.pure.model import hf
from tests.effects.checkpoint.hf_models import MODELS, write

Shape = tuple[int, ...]


@attrs.frozen(kw_only=True)
class Engine:
    """What a loader joins: part of the name on disk -> part of the name in memory, in the order of the rows."""

    latents: str  # name of the joined products of the block input
    indexer: dict[str, str]  # what is joined in the indexer

    def joined(self, config: dict[str, Any]) -> dict[str, str]:
        """Only with a latent of the query are the two products of the block input joined."""
        low = {"q_a_proj": self.latents, "kv_a_proj_with_mqa": self.latents}
        return (
            {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
            | (low if config["q_lora_rank"] is not None else {})
            | self.indexer
        )


ENGINES = {
    "vllm": Engine(
        latents="fused_qkv_a_proj",
        indexer={"indexer.wk.": "indexer.wk_weights_proj.", "weights_proj": "wk_weights_proj"},
    ),
    "sglang": Engine(latents="fused_qkv_a_proj_with_mqa", indexer={}),
}


def in_memory(name: str, engine: Engine, config: dict[str, Any]) -> str:
    """The parameter that a tensor of the folder goes into."""
    if ".mlp.experts." in name:
        head, _, rest = name.partition(".mlp.experts.")
        _, kind, _ = rest.split(".")
        return f"{head}.mlp.experts.{'w2' if kind == 'down_proj' else 'w13'}_weight"
    for part, whole in engine.joined(config).items():
        if part in name:
            return name.replace(part, whole)
    return name


def parameters(config: dict[str, Any], engine: Engine) -> dict[str, Shape]:
    """Every parameter of the main model in memory, from `config.json` alone."""
    d, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    low: Any = config["q_lora_rank"]
    width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    made: dict[str, Shape] = {
        "model.embed_tokens.weight": (config["vocab_size"], d),
        "lm_head.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        made |= {f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,)}
        attention: dict[str, Shape] = {
            "kv_a_layernorm.weight": (latent,),
            "kv_b_proj.weight": (heads * (nope + value), latent),
            "o_proj.weight": (d, heads * value),
        }
        if low is None:
            attention |= {"q_proj.weight": (heads * (nope + rope), d), "kv_a_proj_with_mqa.weight": (latent + rope, d)}
        else:
            attention[f"{engine.latents}.weight"] = (low + latent + rope, d)
            attention |= {"q_a_layernorm.weight": (low,), "q_b_proj.weight": (heads * (nope + rope), low)}
        if "index_topk" in config:
            many, wide = config["index_n_heads"], config["index_head_dim"]
            attention |= {"indexer.wq_b.weight": (many * wide, low)}
            attention |= {"indexer.k_norm.weight": (wide,), "indexer.k_norm.bias": (wide,)}
            if engine.indexer:
                attention["indexer.wk_weights_proj.weight"] = (wide + many, d)
            else:
                attention |= {"indexer.wk.weight": (wide, d), "indexer.weights_proj.weight": (many, d)}
        made |= {f"{at}self_attn.{name}": shape for name, shape in attention.items()}
        if layer < config["first_k_dense_replace"]:
            mlp: dict[str, Shape] = {
                "gate_up_proj.weight": (2 * config["intermediate_size"], d),
                "down_proj.weight": (d, config["intermediate_size"]),
            }
        else:
            shared = width * config["n_shared_experts"]
            mlp = {
                "gate.weight": (experts, d),
                "experts.w13_weight": (experts, 2 * width, d),
                "experts.w2_weight": (experts, d, width),
                "shared_experts.gate_up_proj.weight": (2 * shared, d),
                "shared_experts.down_proj.weight": (d, shared),
            }
            if config["topk_method"] == "noaux_tc":
                mlp["gate.e_score_correction_bias"] = (experts,)
        made |= {f"{at}mlp.{name}": shape for name, shape in mlp.items()}
    return made


DEEPSEEKS = [name for name, c in MODELS.items() if hf.family_of(c)[0].startswith("deepseek")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DEEPSEEKS)
def test_every_tensor_is_read_and_every_parameter_filled(name: str, engine: str, tmp_path: Path) -> None:
    """By name, and by the number of elements that all tensors of a parameter bring together."""
    write(tmp_path / "run", MODELS[name], compute="bf16")
    assert main(["export", "hf", str(tmp_path / "run"), str(tmp_path / "out"), "--no-verify"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    further = tuple(f"model.layers.{config['num_hidden_layers'] + depth}." for depth in range(4))
    filled: Counter[str] = Counter()
    for file in (tmp_path / "out").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if not key.startswith(further):  # of multi-token prediction, which is another model there
                filled[in_memory(key, ENGINES[engine], config)] += tensor.numel()
    expected = {key: math.prod(shape) for key, shape in parameters(config, ENGINES[engine]).items()}
    assert dict(filled) == expected


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
