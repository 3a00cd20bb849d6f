"""Tile tables: what is called measured was measured, and what is no table is refused."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

from nmoe.config import load
from nmoe.effects.device import ops
from nmoe.effects.device.process import Runtime
from nmoe.effects.kernels import tables
from nmoe.effects.kernels.attention import dsa, dsa_dense, nsa
from nmoe.effects.kernels.attention.convolve import convolve_heads
from nmoe.effects.kernels.attention.gated_norm import gated_norm
from nmoe.effects.kernels.attention.kda import kda_attention
from nmoe.effects.kernels.moe import moe_fp8
from nmoe.effects.train import run
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.model.attention import KINDS
from nmoe.pure.model.attention.dsa import DsaOps
from nmoe.pure.model.attention.gqa import GqaOps
from nmoe.pure.model.attention.mla import MlaOps
from nmoe.pure.model.attention.nsa import NsaOps
from nmoe.pure.model.experts import mlp
from nmoe.pure.model.low_precision import RECIPES, emulated
from tests.configs import ROOT


def test_no_entry_claims_a_measurement_on_a_b200() -> None:
    entries = tables.load((10, 0)).entries
    assert [entry.measured for sizes in entries.values() for entry in sizes.values()].count(True) == 0


def test_a_size_without_an_entry_is_not_measured() -> None:
    table = tables.load((9, 0))
    assert tables.find(table, "moe", 2048, 1408).measured and tables.find(table, "mla", 128, 64, 128).measured
    other = tables.find(table, "moe", 64, 64)
    assert not other.measured and other.size == tables.DEFAULT and other.group == 8


def test_each_kind_runs_on_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with and without a window on tiles of their own; a line for each that nobody measured."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    grouped, latent = (load(ROOT / "configs" / f"{name}.toml", {}, ()).config.model for name in ("gpt-oss-20b", "dsv3"))
    device = torch.device("cuda", 0)
    attention = ops.build(device, grouped).attention
    assert isinstance(attention, GqaOps) and isinstance(ops.build(device, latent).attention, MlaOps)
    tiles: Any = ops._gpu_gqa(device, KINDS[type(grouped.attention)], grouped.attention).attend
    assert tiles.keywords["tiles"] == {128: ops.gqa_tiles(device, 64, 128), None: ops.gqa_tiles(device, 64)}
    assert [line for line in ops.unmeasured(device, grouped) if line.startswith("gqa")] == [
        "gqa: no measured tiles for 64 in sm_90.toml, those of entry '64' are used"
    ]
    assert not [line for line in ops.unmeasured(device, latent) if not line.startswith("moe")]


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        (
            32768,
            "precision: experts in fp8 were 1.13 times as fast as in bf16 on one H200 with 32,768 tokens at 2048x1408",
        ),
        (
            4096,
            "precision: fp8 is slower than bf16 at this size: its experts took 1.14 times as long on one H200 with",
        ),
    ],
)
def test_a_run_in_fp8_says_whether_it_is_slower(monkeypatch: pytest.MonkeyPatch, tokens: int, line: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rt = Runtime(device=torch.device("cuda", 0), rank=0, world=1, peak_flops=1.0)
    smaller = (f"--train.microbatch_size={tokens // 4096}", "--train.batch_size=8")
    low, wide = (
        run._unmeasured(
            load(ROOT / "configs" / "moonlet.toml", {}, (f"--precision.compute={name}", *smaller)).config, rt
        )
        for name in ("fp8", "bf16")
    )
    assert low[1:] == wide and low[0].startswith(line)


def test_experts_of_a_gpu_are_in_the_format_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routed and shared ones: by kernels of fp8, emulated, or in bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(ops, "labelled", lambda built: built)
    model, device = load(ROOT / "configs" / "moonlet.toml", {}, ()).config.model, torch.device("cuda", 0)
    low = emulated(RECIPES["nvfp4"], Key(0))
    narrow, wide = (ops.build(device, model, fp8=fp8) for fp8 in (True, False))
    other = ops.build(device, model, low=low)
    assert called(narrow.experts) is moe_fp8.moe_experts_fp8 and called(narrow.shared) is moe_fp8.shared_experts_fp8
    emulates: Any = other.experts
    assert emulates.keywords == {"experts": low.experts} and called(other.shared) is called(low.shared)
    assert called(wide.experts) is ops._experts and called(wide.shared) is mlp


def called(op: Any) -> Any:
    """The function of an op, without what is given to it beforehand."""
    return op.func if isinstance(op, partial) else op


def test_layers_of_kimi_linear_run_on_the_kernels_of_either_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    device = torch.device("cuda", 0)
    model = load(ROOT / "configs" / "kimi-linear-48b.toml", {}, ()).config.model
    delta, latent = ops._by_part(model, KINDS, lambda kind, c: ops._gpu_attention(device, kind, c, True, True)).parts
    assert isinstance(latent, MlaOps)
    assert delta.convolve is convolve_heads and delta.gated_norm is gated_norm and delta.attend.func is kda_attention
    assert delta.attend.keywords == {"tiles": ops.kda_tiles(device, 128)}
    assert [line for line in ops.unmeasured(device, model) if line.startswith("kda")] == [
        "kda: no measured tiles for 128 in sm_90.toml, those of entry 'default' are used"
    ]


def test_sparse_latent_attention_runs_on_its_kernels_in_both_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    c, device = load(ROOT / "configs" / "deepseek-v3.2.toml", {}, ()).config.model.attention, torch.device("cuda", 0)
    kind = KINDS[type(c)]
    chosen = ops._gpu_attention(device, kind, c, True, False)
    assert isinstance(chosen, DsaOps)
    sparse: list[Any] = [chosen.select, chosen.attend]
    assert [op.func for op in sparse] == [dsa.select, dsa.dsa_attention]
    assert all(op.keywords == {"tiles": ops.dsa_tiles(device, 128, 512, 64)} for op in sparse)
    dense: Any = chosen.dense
    assert dense.func is dsa_dense.dense_attention
    tiles = {"tiles": ops.dsa_dense_tiles(device), "attention": ops.mla_tiles(device, 128, 64, 128)}
    assert dense.keywords == tiles


def test_native_sparse_attention_runs_on_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    c, device = load(ROOT / "configs" / "quickstart-nsa.toml", {}, ()).config.model.attention, torch.device("cuda", 0)
    found = ops._gpu_attention(device, KINDS[type(c)], c, True, True)
    assert isinstance(found, NsaOps)
    chosen: list[Any] = [found.compressed, found.selected, found.window]
    assert [op.func for op in chosen] == [nsa.compressed, nsa.selected, nsa.window]
    assert all(op.keywords == {"tiles": ops.nsa_tiles(device, 32, 32)} for op in chosen)


def test_a_kind_without_kernels_runs_its_reference_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    model, device = load(ROOT / "configs" / "gpt-oss-20b.toml", {}, ()).config.model, torch.device("cuda", 0)
    plain = attrs.evolve(
        KINDS[type(model.attention)], kernel_kept_bytes=None, tile_sizes=lambda c: (), reference=SimpleNamespace()
    )
    kinds = {type(model.attention): plain}
    assert ops._gpu_attention(device, plain, model.attention, True, False) is plain.reference
    assert [line for line in ops.unmeasured(device, model, kinds=kinds) if "plain torch" in line] == [
        "attention: Gqa has no kernels, it runs as plain torch: right, and slow"
    ]


def test_each_device_gets_the_tiles_of_its_own_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host with one GPU of each; what is asked is this device, never the current one or the first."""
    capabilities = {0: (9, 0), 1: (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=100 + device.index)
    )
    chosen: list[tuple[Any, Any]] = []
    for index, capability in capabilities.items():
        table, device = tables.load(capability), torch.device("cuda", index)
        moe, attention = ops.mixture_tiles(device, 2048, 1408), ops.mla_tiles(device, 128, 64, 128)
        entry = tables.find(table, "moe", 2048, 1408)
        assert {name: getattr(moe, name) for name in entry.tiles} == dict(entry.tiles)
        assert (moe.group, moe.programs) == (entry.group, 100 + index)
        sizes = tables.find(table, "mla", 128, 64, 128).tiles
        assert attrs.asdict(attention, recurse=False) == {**sizes, "hopper": capability == (9, 0)}
        chosen.append((moe, attention))
    (moe, attention), (other_moe, other_attention) = chosen
    assert attention != other_attention or attrs.evolve(moe, programs=0) != attrs.evolve(other_moe, programs=0)
    capabilities[1] = (8, 0)
    with pytest.raises(InputError, match=r"sm_80\.toml: expected a table of tiles"):
        ops.mixture_tiles(torch.device("cuda", 1), 2048, 1408)


GEMM = {"block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"up": GEMM},
        {"measured": 1, "up": GEMM},
        {"measured": True, "group": 0, "up": GEMM},
        {"measured": True, "up": {**GEMM, "block_k": 0}},
        {"measured": True, "up": {**GEMM, "heads": 2}},
        {"measured": True, "up": [16, 16, 16, 4, 2]},
    ],
)
def test_what_is_no_entry(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError, KeyError)):
        tables.entry(tables.GemmTile, "default", fields)
