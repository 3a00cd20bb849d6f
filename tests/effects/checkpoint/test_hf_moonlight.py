"""Moonlight's own folder: the `config.json` that Moonshot publishes, its remote code, weights all in bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from nmoe.cli import main
from nmoe.config import load
from nmoe.effects.checkpoint import hf_verify
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.hf_export import open_source
from nmoe.pure.model import hf
from tests.configs import ROOT

PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
TINY: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 24, "kv_lora_rank": 8, "moe_intermediate_size": 12, "vocab_size": 50},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"num_hidden_layers": 3, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    **{"bos_token_id": 48, "eos_token_id": 49, "max_position_embeddings": 64},
}


def test_the_preset_is_what_the_published_config_says() -> None:
    """Every key of the shape; the rest of the preset is for training."""
    read = hf.model_of(PUBLISHED)
    preset = hf.settings(load(ROOT / "configs" / "moonlight.toml", {}, ()).config.model)
    own = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert {key: value for key, value in hf.settings(read).items() if key not in own} == {
        key: value for key, value in preset.items() if key not in own
    }


def test_a_folder_of_moonlights_layout_comes_in_and_goes_out(tmp_path: Path) -> None:
    """Their code is not run, gains and routers are bf16 there; the logits of transformers, and every value again."""
    folder, config = tmp_path / "moonlight", PUBLISHED | TINY
    torch.manual_seed(0)
    others = ("architectures", "auto_map", "model_type", "torch_dtype", "transformers_version")
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**{key: config[key] for key in config if key not in others}))
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)
    theirs.bfloat16().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('run')\n")
    assert main(["import", "hf", str(folder), str(tmp_path / "imported")]) == 0
    source = open_source(Disk(), tmp_path / "imported")
    found = hf_verify.compare(folder, source, hf_verify.load(folder, torch.float32))
    assert found.choices == 0
    assert max(found.forced, found.natural) < 1e-4  # theirs norms the latent with 1e-6 whatever the config says
    assert main(["export", "hf", str(tmp_path / "imported"), str(tmp_path / "out"), "--no-verify"]) == 0
    before, after = (
        {name: tensor for path in each.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for each in (folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name].float(), after[name].float())} == set()
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = {key for key in PUBLISHED if key in said} - {"bos_token_id", "eos_token_id"}
    assert {key: said[key] for key in kept} == {key: config[key] for key in kept}
