"""`nmoe export hf` and `nmoe import hf`: bytes, logits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nmoe.cli import main
from nmoe.config.layers import load_model
from nmoe.effects.checkpoint import hf_export, hf_verify
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.hf_export import open_source
from nmoe.effects.record.names import WEIGHTS
from tests.effects.checkpoint.hf_models import MODELS, without_scales, write

# torch says so of the shared experts' matrices where there are none
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
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
    model, precision = load_model(tmp_path / "imported" / "config.toml")
    assert (model, precision.compute) == (without_scales(c), compute)
    if model == c:
        ours, back = (load_file(tmp_path / each / WEIGHTS) for each in ("run", "imported"))
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[key], back[key]) and ours[key].dtype == back[key].dtype for key in ours)


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_transformers_in_double_precision(name: str, tmp_path: Path) -> None:
    """The folder as it is on disk, loaded by them; rounding of fp32 weights is the same on both sides."""
    write(tmp_path / "run", MODELS[name])
    source = open_source(Disk(), tmp_path / "run")
    hf_export.export(source, tmp_path / "out", shard_bytes=5000, extra={}, end_of_text=None, verify=None)
    found = hf_verify.compare(tmp_path / "out", source, hf_verify.load(tmp_path / "out", torch.float64))
    # their table of rotations is in fp64 here, ours rounded once to fp32; folded scales are rounded once to fp32
    assert max(found.forced, found.natural) < 2e-7
    assert found.choices == 0
