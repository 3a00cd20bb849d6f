"""`nmoe export hf` and `nmoe import hf`: bytes, logits, and what is refused."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
)

from nmoe.cli import main
from nmoe.config import sections
from nmoe.config.layers import load_model
from nmoe.effects.checkpoint import hf_export, hf_verify, tensor_file, weights
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.hf_export import INDEX, open_source
from nmoe.effects.checkpoint.writer import open_writer
from nmoe.effects.data import hf_tokenizer, tokenizer
from nmoe.effects.record.names import WEIGHTS
from nmoe.effects.train import generate
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import share, whole
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.model import hf, model
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.ops import environment
from tests import shapes
from tests.effects.checkpoint.hf_models import DELTA, LATENT, MODELS, without_scales, write
from tests.effects.checkpoint.saves import on_ranks
from tests.effects.train import trainings
from tests.effects.train.tiny import tiny

# torch says so of the shared experts' matrices where there are none
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an exported folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("compute", ("fp32", "bf16"))
@pytest.mark.parametrize("name", MODELS)
def test_export_import_export_gives_equal_bytes(name: str, compute: str, tmp_path: Path) -> None:
    c = MODELS[name]
    write(tmp_path / "run", c, compute=compute)
    size = ("--no-verify", "--shard-bytes=3000")
    assert run("export", "hf", tmp_path / "run", tmp_path / "one", *size) == 0
    assert run("import", "hf", tmp_path / "one", tmp_path / "imported") == 0
    assert run("export", "hf", tmp_path / "imported", tmp_path / "two", *size) == 0
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    read, precision = load_model(tmp_path / "imported" / "config.toml")
    assert (read, precision.compute) == (without_scales(c), compute)
    if read == c:
        ours, back = (load_file(tmp_path / each / WEIGHTS) for each in ("run", "imported"))
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[key], back[key]) and ours[key].dtype == back[key].dtype for key in ours)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_from_memory_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    """For weight sync: every name once, the same bytes, in the order of the files."""
    c = MODELS[name]
    write(tmp_path / "run", c, compute="bf16")
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 0
    specs = model.specs(c)
    formats = weights.formats_of(specs, model.dims(c), torch.bfloat16)
    found = list(hf.tensors(*weights.read(tmp_path / "run", specs, formats), c))
    expected = tensors_of(tmp_path / "out")
    assert len(found) == len(expected) and dict(found).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) and value.dtype == expected[key].dtype for key, value in found)


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_transformers_in_double_precision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder as it is on disk, loaded by them; rounding of fp32 weights is the same on both sides."""
    if name.startswith("kimi linear"):  # which casts the decay by a method
        monkeypatch.setattr(Tensor, "float", Tensor.double)
    write(tmp_path / "run", MODELS[name])
    source = open_source(Disk(), tmp_path / "run")
    hf_export.export(source, tmp_path / "out", shard_bytes=5000, extra={}, end_of_text=None, verify=None)
    found = hf_verify.compare(tmp_path / "out", source, hf_verify.load(tmp_path / "out", torch.float64))
    # their table of rotations is in fp64 here, ours rounded once to fp32; folded scales are rounded once to fp32
    assert max(found.forced, found.natural) < 2e-7
    assert found.choices == 0


def test_verify_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is; with a router bias that was lost, which only natural routing shows; with another weight."""
    write(tmp_path / "run", MODELS["query latent, no dense layer"])
    assert run("export", "hf", tmp_path / "run", tmp_path / "out") == 0
    assert "0.00% of the choices of experts differ" in capsys.readouterr().out
    source = open_source(Disk(), tmp_path / "run")
    hf_verify.verify(tmp_path / "out", source)
    rewrite(tmp_path / "out", lambda name, tensor: tensor * 0 if name.endswith("e_score_correction_bias") else tensor)
    found = hf_verify.compare(tmp_path / "out", source, hf_verify.load(tmp_path / "out", torch.float32))
    assert found.forced < 1e-4 < hf_verify.TOLERANCE < found.natural and found.choices > hf_verify.CHOICES
    with pytest.raises(InputError, match="expected logits within"):
        hf_verify.verify(tmp_path / "out", source)
    rewrite(tmp_path / "out", lambda name, tensor: None if name == "model.norm.weight" else tensor)
    with pytest.raises(InputError, match="missing_keys model.norm.weight"):
        hf_verify.verify(tmp_path / "out", source)


def test_verify_of_scales_in_bf16(tmp_path: Path) -> None:
    """A scale that is no power of two is rounded once, as in the forward pass: only fp32 arithmetic differs."""
    write(tmp_path / "run", MODELS["scales"], compute="bf16")
    assert run("export", "hf", tmp_path / "run", tmp_path / "out") == 0
    source = open_source(Disk(), tmp_path / "run")
    found = hf_verify.compare(tmp_path / "out", source, hf_verify.load(tmp_path / "out", torch.float32))
    assert max(found.natural, found.forced) < 1e-5


def test_what_loaders_ask_of_the_folder(tmp_path: Path) -> None:
    """The keys that vLLM's and SGLang's deepseek_v3 read beside those of transformers; the index; the formats."""
    write(tmp_path / "run", MODELS["plain"], compute="bf16")
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify", "--shard-bytes=4000") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    asked = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    }
    assert {key: config.get(key, ...) for key in asked} == asked
    assert "auto_map" not in config
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = tensors_of(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert index["weight_map"].keys() == tensors.keys()
    wide = {name.split(".")[-2] + "." + name.split(".")[-1] for name, each in tensors.items() if each.itemsize == 4}
    gains = {"input_layernorm.weight", "post_attention_layernorm.weight", "kv_a_layernorm.weight", "norm.weight"}
    assert wide == {*gains, "gate.weight", "gate.e_score_correction_bias"}


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Change every tensor of an exported folder; None drops it."""
    for path in folder.glob("*.safetensors"):
        changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}, path)


@pytest.mark.parametrize("world", (1, 2, 4))
@pytest.mark.parametrize("name", MODELS)
def test_what_ranks_saved_is_what_one_would_write(
    name: str, world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has a part of the experts, biases and everything else; the newest checkpoint is taken, not the weights.

    A file is read in several groups, of which some hold one tensor.
    """
    monkeypatch.setattr(hf_export, "READ_BYTES", 1000)
    write(tmp_path / "one", MODELS[name], compute="bf16")
    save_by_ranks(tmp_path / "one", tmp_path / "more", world=world, chunk_bytes=700)
    (checkpoint,) = (tmp_path / "more" / "checkpoints").glob("step-*")
    for path, out in (("one", "of one"), ("more", "of the run"), (checkpoint, "of the checkpoint")):
        assert run("export", "hf", tmp_path / path, tmp_path / out, "--no-verify", "--shard-bytes=4000") == 0
    assert bytes_of(tmp_path / "of one") == bytes_of(tmp_path / "of the run")
    assert bytes_of(tmp_path / "of one") == bytes_of(tmp_path / "of the checkpoint")


def save_by_ranks(run: Path, to: Path, *, world: int, chunk_bytes: int) -> None:
    """A run folder with one checkpoint, of the weights of another, saved by ranks that are threads."""
    tensors = load_file(run / WEIGHTS)
    (to / "checkpoints").mkdir(parents=True)
    (to / "config.toml").write_text((run / "config.toml").read_text())
    states: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        states[weights.stored_name(name)] = tensor
        if tensor.dtype is torch.bfloat16:
            states[f"param/{name}/remainder"] = torch.zeros(tensor.shape, dtype=torch.int16)

    def save(rank: int, all_gather_text: Any) -> None:
        pieces = [share(whole(name, tensor), rank, world) for name, tensor in states.items()]
        with open_writer(
            Disk(),
            to / "checkpoints",
            keep=Keep(),
            rank=rank,
            world=world,
            all_gather_text=all_gather_text,
            chunk_bytes=chunk_bytes,
        ) as writer:
            writer.save(pieces, step=1, meta={})

    assert on_ranks(world, save) == [None] * world


@pytest.mark.parametrize("place", (0.2, 0.5, 0.8))
def test_a_checkpoint_of_which_a_byte_changed_is_refused(
    place: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it is, it is found by its digest, and the file is named."""
    write(tmp_path / "one", MODELS["plain"])
    save_by_ranks(tmp_path / "one", tmp_path / "more", world=2, chunk_bytes=700)
    (path, *_) = sorted((tmp_path / "more" / "checkpoints").glob("step-*/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    assert run("export", "hf", tmp_path / "more", tmp_path / "out", "--no-verify") == 2
    assert path.name in capsys.readouterr().err
    assert {each.name for each in tmp_path.iterdir()} == {"one", "more"}


@pytest.mark.parametrize("kind", ("checkpoint", "file"))
def test_memory_is_that_of_one_shard(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 MB of weights, 52 of them one tensor, in files of 2 MB: never as much more of private memory as that one.

    Up to 41 MB were seen, buffers that are used again and the heaps of the threads that read ahead among them.
    """
    c = shapes.config(
        vocab_size=64,
        hidden_size=128,
        num_layers=2,
        moe=shapes.mixture(num_experts=128, intermediate_size=400),
        attention=shapes.attention(),
    )
    write(tmp_path / "run", c)
    source = tmp_path / "run"
    if kind == "checkpoint":
        source = tmp_path / "saved"
        save_by_ranks(tmp_path / "run", source, world=2, chunk_bytes=1 << 18)
    # what the libraries take when they are first used is not counted
    write(tmp_path / "small", MODELS["plain"])
    save_by_ranks(tmp_path / "small", tmp_path / "first", world=1, chunk_bytes=1 << 18)
    assert run("export", "hf", tmp_path / "first", tmp_path / "warm", "--no-verify") == 0
    assert run("import", "hf", tmp_path / "warm", tmp_path / "warmer") == 0
    gc.collect()
    peak: list[int] = []
    before = private_bytes()
    write_file = tensor_file.write

    def write_watched(path: Path, formats: Any, parts: Any, flush: Any) -> None:
        write_file(path, formats, (part for part in parts if not peak.append(private_bytes())), flush)

    monkeypatch.setattr(tensor_file, "write", write_watched)
    assert run("export", "hf", source, tmp_path / "out", "--no-verify", "--shard-bytes=2000000") == 0
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) > 75e6
    assert run("import", "hf", tmp_path / "out", tmp_path / "back") == 0
    assert max(peak) - before < 50e6


def private_bytes() -> int:
    """Memory of this process that is not a file's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_what_was_imported_starts_a_training(tmp_path: Path) -> None:
    config = tiny(compute="bf16", q_lora_rank=5)
    write(tmp_path / "run", config.model, compute="bf16")
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 0
    assert run("import", "hf", tmp_path / "out", tmp_path / "imported") == 0
    start = weights.of_path(Disk(), tmp_path / "imported", make_blueprint(config))
    expected = load_file(tmp_path / "run" / WEIGHTS)
    assert torch.equal(start.router_bias, expected["router_bias"])
    assert torch.equal(start.params.blocks[1].ffn.up, expected["blocks.1.ffn.up"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is right."""
    folder = tmp_path_factory.mktemp("hf")
    write(folder / "run", MODELS["plain"])
    assert run("export", "hf", folder / "run", folder / "out", "--no-verify", "--shard-bytes=3000") == 0
    return folder / "out"


def edit_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json; ... removes one."""
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def cut(folder: Path) -> None:
    first(folder).write_bytes(first(folder).read_bytes()[:-1])


def pickled(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def indexed(name: Any) -> Callable[[Path], None]:
    """The index names another file."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


def three(folder: Path) -> None:
    """One renamed, one of another shape, one of another format."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "lm_head.weight": lambda tensor: tensor.T,
        BIAS: lambda tensor: tensor.half(),
    }
    for path in folder.glob("*.safetensors"):
        tensors = {
            ("renamed" if name == GATE else name): changes.get(name, lambda tensor: tensor)(tensor).contiguous()
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path)


def twice(folder: Path) -> None:
    last = max(folder.glob("*.safetensors"))
    save_file({**load_file(last), "model.embed_tokens.weight": torch.zeros(37, 16)}, last)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "three tensors": (
        three,
        (
            f"expected '{GATE}', got nothing by that name",
            "expected 'lm_head.weight' as F32 [37, 16], got F32 [16, 37]",
            f"expected '{BIAS}' as F32 [8], got F16 [8]",
            "expected no tensor 'renamed', got one",
        ),
    ),
    "a tensor twice": (twice, ("expected 'model.embed_tokens.weight' once, got it in",)),
    "truncated": (cut, ("model-00001-of-00022.safetensors: expected a whole safetensors file, got ",)),
    "a file is missing": (lambda f: first(f).unlink(), ("model-00001-of-00022.safetensors: expected a safetensors",)),
    "pickles": (pickled, ("got pytorch_model.bin, pickles, which may run code; convert",)),
    "index to a pickle": (indexed("x.bin"), ("expected names of .safetensors files in the folder, got x.bin",)),
    "index leads out": (indexed("../x.safetensors"), ("in the folder, got ../x.safetensors",)),
    "index of no names": (indexed(3), ("in the folder, got 3",)),
    "index of nothing": (lambda f: (f / INDEX).write_text("{}"), ("expected a weight_map, got None",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: expected a Hugging Face folder",)),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ("config.json: expected JSON, got ",)),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), ("expected a JSON object, got []",)),
    "values": (
        lambda f: edit_config(
            f,
            tie_word_embeddings=True,
            scoring_func="softmax",
            hidden_act="gelu",
            attention_bias=True,
            num_key_value_heads=1,
            quantization_config={"fmt": "e4m3"},
            hidden_size=...,
            kv_lora_rank=...,
            rope_scaling={"type": "linear", "factor": 2.0},
        ),
        (
            "tie_word_embeddings: expected false, got true; nmoe has no other",
            'scoring_func: expected "sigmoid", got "softmax"; nmoe has no other',
            'hidden_act: expected "silu", got "gelu"',
            "attention_bias: expected false, got true",
            "num_key_value_heads: expected num_attention_heads = 3, got 1",
            'quantization_config: expected {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", ',
            "hidden_size: expected a value, got nothing",
            "kv_lora_rank: expected a value, got nothing",
            'rope_scaling.type: expected "default" or "yarn", got "linear"',
        ),
    ),
    "another model": (
        lambda f: edit_config(f, model_type="llama"),
        ("model_type: expected one of deepseek_v3, deepseek_v2, deepseek_v32, kimi_linear, gpt_oss, got llama",),
    ),
    "types": (
        lambda f: edit_config(f, num_hidden_layers="3", n_routed_experts=True),
        ("num_hidden_layers: expected an integer", "n_routed_experts: expected an integer"),
    ),
    "no values": (
        lambda f: edit_config(f, rms_norm_eps=None, n_group=[1], v_head_dim={"a": None}, tie_word_embeddings=True),
        (
            "rms_norm_eps: expected one value, got null",
            "n_group: expected one value, got [1]",
            "v_head_dim.a: expected one value, got null",
            "tie_word_embeddings: expected false",
        ),
    ),
    "a further layer that is not there": (
        lambda f: edit_config(f, num_nextn_predict_layers=1),
        ("expected 'model.layers.3.eh_proj.weight', got nothing by that name",),
    ),
    "half a further layer": (
        lambda f: edit_config(f, num_nextn_predict_layers=0.5),
        ("num_nextn_predict_layers: expected an integer, got 0.5",),
    ),
    "fewer than no further layers": (
        lambda f: edit_config(f, num_nextn_predict_layers=-1),
        ("mtp.depth: expected at least 1, got -1",),
    ),
    "no such routing": (lambda f: edit_config(f, num_experts_per_tok=9), ("model.moe.top_k: expected at most",)),
    "bounds": (lambda f: edit_config(f, vocab_size=10**12), ("model.vocab_size: expected at most",)),
    "yarn": (
        lambda f: edit_config(f, rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": 1.0}),
        ("rope_scaling.mscale: expected a value, got nothing", "rope_scaling.attention_factor: expected a key of yarn"),
    ),
    "format": (lambda f: edit_config(f, torch_dtype="float16"), ("torch_dtype: expected float32 or bfloat16, got ",)),
    "format of the tensors": (
        lambda f: edit_config(f, torch_dtype="bfloat16"),
        ("expected 'lm_head.weight' as BF16 [37, 16], got F32 [37, 16]",),
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_refused(
    name: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything at once, a line each, exit code 2, nothing written, nothing run."""
    change, expected = BAD_FOLDERS[name]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in" / "hf"
    shutil.copytree(exported, folder)
    change(folder)
    capsys.readouterr()
    assert run("import", "hf", folder, tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("nmoe: ") and str(folder) in line for line in said)
    assert [part for part in expected if not any(part in line for line in said)] == []
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_leaves_nothing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", MODELS["plain"])
    write_file = tensor_file.write

    def write_three(path: Path, formats: Any, parts: Any, flush: Any) -> None:
        if "00003" in path.name or path.name == WEIGHTS:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_file(path, formats, parts, flush)

    monkeypatch.setattr(tensor_file, "write", write_three)
    before = sorted(tmp_path.iterdir())
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify", "--shard-bytes=3000") == 2
    assert run("import", "hf", exported, tmp_path / "out") == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ("no room", "a flush"))
def test_what_the_disk_refuses_while_it_is_written_leaves_nothing(
    kind: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system takes no file of more than 16 kB, or says when it is flushed that it lost what was written."""
    write(tmp_path / "run", MODELS["plain"])
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    if kind == "no room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
    else:
        monkeypatch.setattr(os, "fsync", lost)
    try:
        codes = [
            run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify"),
            run("import", "hf", exported, tmp_path / "out"),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert codes == [2, 2]
    reason = "File too large" if kind == "no room" else "Input/output error"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nmoe: ")]
    assert len(told) == 2 and all(f"expected to write the folder, got {reason}; free space" in line for line in told)
    assert sorted(tmp_path.iterdir()) == before


def lost(_: int) -> None:
    """In the place of `os.fsync`."""
    raise OSError(errno.EIO, "Input/output error")


def test_a_tensor_that_has_no_name_in_theirs_is_an_error(tmp_path: Path) -> None:
    """Nothing of ours is left out; one of no elements need not be there."""
    write(tmp_path / "run", MODELS["plain"])
    source = open_source(Disk(), tmp_path / "run")
    further = {"blocks.0.gate": ("F32", (2, 3)), "head.scale": ("BF16", (1,)), "empty": ("F32", (0, 4))}
    with pytest.raises(InputError) as caught:
        hf_export.plan(attrs.evolve(source, formats={**source.formats, **further}), 1 << 30, fp8=False)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["blocks.0.gate", "head.scale"]


def taken(folder: Path) -> None:
    (folder / "out").mkdir()


def another_config(folder: Path) -> None:
    path = folder / "run" / "config.toml"
    path.write_text(path.read_text().replace("vocab_size = 37", "vocab_size = 38"))


BAD_RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "out exists": (taken, "out: expected a name that is free, got what is there"),
    "nothing there": (lambda f: shutil.rmtree(f / "run"), "expected the name of a run in runs, or a path, got"),
    "no config": (lambda f: (f / "run" / "config.toml").unlink(), "config.toml: expected an existing file, got none"),
    "another config": (another_config, "expected 'embed' as F32 [38, 16], got F32 [37, 16]"),
    "truncated": (
        lambda f: (f / "run" / WEIGHTS).write_bytes((f / "run" / WEIGHTS).read_bytes()[:-9]),
        "expected a whole safetensors file",
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_bad_run_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = BAD_RUNS[name]
    write(tmp_path / "run", MODELS["plain"])
    change(tmp_path)
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


FP8 = ("plain", "query latent, no dense layer", "wide", "indexed, yarn, groups", "two further tokens")
WIDE = shapes.config(hidden_size=300, intermediate_size=200, moe=shapes.mixture(intermediate_size=130))
"""Blocks at the ends are smaller."""


@pytest.mark.parametrize("compute", ("fp32", "bf16"))
@pytest.mark.parametrize("name", FP8)
def test_fp8_blocks_out_in_and_out_again(name: str, compute: str, tmp_path: Path) -> None:
    """The same bytes; every matrix of a block within half a step of fp8, everything else as it was."""
    write(tmp_path / "run", WIDE if name == "wide" else MODELS[name], compute=compute)
    size = ("--no-verify", "--shard-bytes=100000")
    assert run("export", "hf", tmp_path / "run", tmp_path / "plain", *size) == 0
    assert run("export", "hf", tmp_path / "run", tmp_path / "one", "--fp8", *size) == 0
    assert run("import", "hf", tmp_path / "one", tmp_path / "imported") == 0
    assert run("export", "hf", tmp_path / "imported", tmp_path / "two", "--fp8", *size) == 0
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert run("export", "hf", tmp_path / "imported", tmp_path / "back", *size) == 0
    plain, narrow, back = (tensors_of(tmp_path / each) for each in ("plain", "one", "back"))
    assert plain.keys() == back.keys()
    scales = {key for key in narrow if key.endswith("_scale_inv")}
    assert narrow.keys() == plain.keys() | scales
    quantised = {key.removesuffix("_scale_inv") for key in scales}
    for key, exact in plain.items():
        if key not in quantised:
            assert torch.equal(narrow[key], exact) and torch.equal(back[key], exact), key
            continue
        assert narrow[key].dtype is torch.float8_e4m3fn
        rows, columns = exact.shape
        assert narrow[f"{key}_scale_inv"].shape == (-(-rows // 128), -(-columns // 128))
        for row in range(0, rows, 128):
            for column in range(0, columns, 128):
                block = (slice(row, row + 128), slice(column, column + 128))
                right, got = exact[block].double(), back[key][block].double()
                # three bits behind the point, and steps of 2^-9 below 2^-6, where 448 is the largest; bf16 adds 2^-9
                step = right.abs() * (2.0**-4 + 2.0**-9) + right.abs().max() / 448 * 2.0**-10
                assert ((got - right).abs() <= step * 1.001).all(), key
    ends = {key.rsplit(".", 2)[-2] for key in quantised}
    assert ends >= {"gate_proj", "up_proj", "down_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert not ends & {"gate", "weights_proj", "eh_proj", "embed_tokens", "lm_head"}
    assert ("indexed" in name) == ({"wq_b", "wk"} <= ends)


def test_bad_fp8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scale that is missing, one of another shape, another format; a model type that nobody reads in fp8."""
    write(tmp_path / "run", WIDE, compute="bf16")
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--fp8") == 0
    key = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    down = "model.layers.0.mlp.down_proj.weight_scale_inv"
    rewrite(tmp_path / "out", lambda name, tensor: None if name == key else tensor.T if name == down else tensor)
    capsys.readouterr()
    assert run("import", "hf", tmp_path / "out", tmp_path / "back") == 2
    told = capsys.readouterr().err
    assert f"expected '{key}', got nothing by that name" in told
    assert f"expected '{down}' as F32 [3, 2], got F32 [2, 3]" in told
    edit_config(tmp_path / "out", quantization_config={"quant_method": "gptq"})
    assert run("import", "hf", tmp_path / "out", tmp_path / "back") == 2
    assert 'got {"quant_method": "gptq"}; nmoe reads no other format' in capsys.readouterr().err
    write(tmp_path / "kimi", MODELS["kimi linear"])
    assert run("export", "hf", tmp_path / "kimi", tmp_path / "narrow", "--fp8") == 2
    assert "--fp8: expected a model of deepseek_v3 or deepseek_v32, got kimi_linear" in capsys.readouterr().err
    assert run("export", "hf", tmp_path / "run", tmp_path / "narrow", "--fp8", "--verify") == 2
    assert not (tmp_path / "narrow").exists()


def test_what_kimi_linear_says_of_its_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and keys as Moonshot publishes them; layers that are said twice, a gate of another kind."""
    write(tmp_path / "run", MODELS["kimi linear"], compute="bf16")
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 0
    names = tensors_of(tmp_path / "out")
    assert {name.removeprefix("model.layers.0.self_attn.") for name in names if "layers.0.self_attn" in name} == {
        *(f"{each}_proj.weight" for each in ("q", "k", "v", "f_a", "f_b", "g_a", "g_b", "b", "o")),
        *(f"{each}_conv1d.weight" for each in "qkv"),
        *("A_log", "dt_bias", "o_norm.weight"),
    }
    assert {
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.0.mlp.down_proj.weight",
    } <= names.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = config["linear_attn_config"]
    assert (said["kda_layers"], said["full_attn_layers"]) == ([1, 2], [3])
    capsys.readouterr()
    edit_config(tmp_path / "out", linear_attn_config={**said, "kda_layers": [1, 3], "gate_lower_bound": -5.0})
    assert run("import", "hf", tmp_path / "out", tmp_path / "back") == 2
    told = capsys.readouterr().err
    assert "expected each layer from 1 to 3 once in kda_layers or full_attn_layers, got [[1, 3], [3]]" in told
    assert "linear_attn_config.gate_lower_bound: expected a key that nmoe knows, got -5.0" in told


def test_what_gpt_oss_says_of_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and keys as OpenAI publishes them; then what it cannot be."""
    write(tmp_path / "run", MODELS["gpt-oss"], compute="bf16")
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 0
    names = tensors_of(tmp_path / "out")
    first_layer = "model.layers.0."
    assert {name.removeprefix(first_layer) for name in names if name.startswith(first_layer)} == {
        *("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.sinks"),
        *(f"self_attn.{each}_proj.{kind}" for each in "qkvo" for kind in ("weight", "bias")),
        *("mlp.router.weight", "mlp.router.bias"),
        *(f"mlp.experts.{each}_proj{kind}" for each in ("gate_up", "down") for kind in ("", "_bias")),
    }
    ours = load_file(tmp_path / "run" / WEIGHTS)["blocks.0.ffn.up"]
    assert torch.equal(names["model.layers.0.mlp.experts.gate_up_proj"][..., ::2], ours[:, :, 0])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    published = {"experts_per_token": 3, "router_aux_loss_coef": 0.9, "swiglu_alpha": ..., "rope_parameters": ...}
    edit_config(tmp_path / "out", **published)
    assert run("import", "hf", tmp_path / "out", tmp_path / "back") == 0
    assert load_model(tmp_path / "back" / "config.toml")[0] == without_scales(MODELS["gpt-oss"])
    capsys.readouterr()
    edit_config(
        tmp_path / "out",
        layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"],
        experts_per_token=2,
        swiglu_limit=None,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []},
    )
    assert run("import", "hf", tmp_path / "out", tmp_path / "again") == 2
    told = capsys.readouterr().err
    assert "layer_types: expected sliding_attention, and full_attention in every so many-th of 4 layers, got" in told
    assert "experts_per_token: expected num_experts_per_tok = 3, got 2; remove one" in told
    assert "moe.swiglu_limit: expected one value, got null" in told
    assert "quantization_config: expected no key, because weights are read in bf16 or fp32, got mxfp4" in told


UNEXPRESSED: dict[str, tuple[sections.Model, str]] = {
    "grouped queries": (
        attrs.evolve(MODELS["gpt-oss"], moe=attrs.evolve(MODELS["gpt-oss"].moe, score="sigmoid")),
        'model.moe.score: expected "softmax", which gpt_oss has, got "sigmoid"; it cannot be exported',
    ),
    "a dense layer before gpt-oss": (
        attrs.evolve(MODELS["gpt-oss"], num_dense_layers=1),
        "model.num_dense_layers: expected 0, which gpt_oss has, got 1; it cannot be exported",
    ),
    "an expert without biases": (
        attrs.evolve(MODELS["gpt-oss"], moe=attrs.evolve(MODELS["gpt-oss"].moe, biases=False)),
        "model.moe.biases: expected true, which gpt_oss has, got false; it cannot be exported",
    ),
    "an expert without a clamp": (
        attrs.evolve(MODELS["gpt-oss"], moe=attrs.evolve(MODELS["gpt-oss"].moe, swiglu_limit=None)),
        "model.moe.swiglu_limit: expected 7.0, which gpt_oss has, got null; it cannot be exported",
    ),
    "a bounded gate": (
        shapes.config(attention=sections.Mixed(pattern="ab", a=attrs.evolve(DELTA, decay_limit=5.0), b=LATENT)),
        "model.attention.a.decay_limit: expected null, which kimi_linear has, got 5.0; it cannot be exported",
    ),
    "latent attention with a rotation": (
        shapes.config(attention=sections.Mixed(pattern="ab", a=DELTA, b=shapes.attention())),
        'model.attention.b.position: expected "none", which kimi_linear has, got null; it cannot be exported',
    ),
    "further tokens of a kimi": (
        shapes.config(attention=MODELS["kimi linear"].attention, mtp=sections.Mtp(depth=1)),
        "num_nextn_predict_layers: expected 0, got 1; nmoe has no other for kimi_linear",
    ),
    "no position": (
        shapes.config(attention=shapes.attention(position="none")),
        'model.attention.position: expected null, which deepseek_v3 has, got "none"; it cannot be exported',
    ),
    "a softmax of weights that sum to one": (
        shapes.config(moe=shapes.mixture(score="softmax")),
        "model.moe.normalize: expected false, which deepseek_v2 has, got true; it cannot be exported",
    ),
}


@pytest.mark.parametrize("name", UNEXPRESSED)
def test_what_no_model_type_has_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c, expected = UNEXPRESSED[name]
    write(tmp_path / "run", c)
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nmoe: {expected}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_router_bias_that_deepseek_v2_has_not_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What training moved away from zero."""
    write(tmp_path / "run", MODELS["softmax"])
    tensors = load_file(tmp_path / "run" / WEIGHTS)
    save_file({**tensors, "router_bias": tensors["router_bias"] + 0.1}, tmp_path / "run" / WEIGHTS)
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 2
    assert "router_bias: expected zeros, because this model type has no such tensor" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_transformers_saved_is_imported(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite's shape, its config in their words, the experts apart; the same logits."""
    settings: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
    settings |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "intermediate_size": 20}
    settings |= {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    torch.manual_seed(0)
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(first_k_dense_replace=1, max_position_embeddings=64, **settings))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "saved")
    assert run("import", "hf", tmp_path / "saved", tmp_path / "imported") == 0
    source = open_source(Disk(), tmp_path / "imported")
    found = hf_verify.compare(tmp_path / "saved", source, hf_verify.load(tmp_path / "saved", torch.float32))
    assert found.choices == 0
    assert max(found.forced, found.natural) < 1e-5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"logit_scale": 0.5}, "model.logit_scale: expected 1.0 beside model.mtp, got 0.5; "),
        ({"num_dense_layers": 3}, "model.num_dense_layers: expected below num_layers = 3 beside model.mtp, got 3; "),
    ],
)
def test_multi_token_prediction_that_they_cannot_say_is_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", shapes.config(mtp=sections.Mtp(depth=1), **changes))
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--no-verify") == 2
    assert f"nmoe: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_further_layers_share_embedding_and_head(copy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", MODELS["two further tokens"])
    assert run("export", "hf", tmp_path / "run", tmp_path / "out") == 0, "transformers leaves the further layers out"
    name = f"model.layers.4.{copy}.weight"
    rewrite(tmp_path / "out", lambda each, tensor: tensor + 1 if each == name else tensor)
    assert run("import", "hf", tmp_path / "out", tmp_path / "back") == 2
    assert f"{name}: expected the values of " in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_shards_of_no_bytes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", MODELS["plain"])
    assert run("export", "hf", tmp_path / "run", tmp_path / "out", "--shard-bytes=0") == 2


@pytest.mark.usefixtures("doubled")
def test_a_trained_model_says_the_same_in_transformers(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its newest checkpoint, with its tokenizer; their greedy text is ours, token for token, in double precision:
    after three steps the best two logits may lie closer than the rounding of fp32."""
    config = trainings.config(tmp_path, "trained", sources, 3)
    assert trainings.train(config)[0] == 0
    folder = trainings.folder(config)
    assert run("export", "hf", folder, tmp_path / "out") == 0
    assert "logits differ by" in capsys.readouterr().out
    language, theirs = hf_verify.load(tmp_path / "out", torch.float64), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert language.generation_config.eos_token_id == language.config.eos_token_id == tokenizer.load(folder).end_of_text
    network, _ = generate.open_network(folder, "cpu")
    network = attrs.evolve(
        network,
        params=tree.map(lambda _, leaf: leaf.double(), network.params),
        env=environment(network.config, network.config.max_positions),
    )
    prompt = theirs("def main(", return_tensors="pt")
    said = language.generate(**prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    (start,) = prompt["input_ids"].tolist()
    for cached in (True, False):
        columns = generate.steps(network, [start], num_tokens=24, sampling=Sampling(), keys=[Key(0)], cached=cached)
        assert said[0].tolist() == [*start, *(column[0] for column in columns)]

    # in again: the tokenizer comes along, and what a run can do the imported folder can
    assert run("import", "hf", tmp_path / "out", tmp_path / "imported") == 0
    assert tokenizer.load(tmp_path / "imported").identity == tokenizer.load(folder).identity
    capsys.readouterr()
    texts: list[str] = []
    for each in (folder, tmp_path / "imported"):
        assert run("generate", each, "--prompt=def main(", "--tokens=12", "--device=cpu") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert run("eval", tmp_path / "imported", "--suite=probes", "--limit=2", "--device=cpu") == 0
    trained: list[bytes] = []
    for name, start in (("again", tmp_path / "imported"), ("from the run", folder)):
        again = trainings.changed(trainings.config(tmp_path, name, sources, 1), warm_start=str(start))
        code, last = trainings.train(again)
        assert code == 0, last
        trained.append((trainings.folder(again) / WEIGHTS).read_bytes())
    assert trained[0] == trained[1], "a step further from the same weights"


@pytest.mark.parametrize(
    ("change", "expected"),
    (
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}}, "as model, got Unigram"),
        ({}, "expected at most vocab_size = 37 ids, got 258; take the files of one model"),
    ),
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    change: dict[str, Any], expected: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    ours = tokenizer.make("bytes", tokenizer.PATTERN, [bytes([byte]) for byte in range(256)], end_of_text=257, size=258)
    said = json.loads(hf_tokenizer.convert(ours, ())["tokenizer.json"]) | change
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(said))
    assert run("import", "hf", tmp_path / "hf", tmp_path / "out") == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
