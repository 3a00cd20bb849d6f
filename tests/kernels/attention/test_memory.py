"""Memory of a layer of every kind from 4 k to 128 k tokens: linear, with the slope that docs/attention.md states."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest
import torch

from nmoe.effects.kernels import attention, norm
from tests import attention_layers as layers
from tests.configs import ROOT
from tests.kernels.attention.test_dsa import Silent
from tests.memory import Peak


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do nothing, of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    packages = pkgutil.walk_packages(attention.__path__, f"{attention.__name__}.")
    for module in (norm, *(importlib.import_module(package.name) for package in packages)):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Silent())


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", layers.LAYERS)
def test_memory_is_linear(name: str) -> None:
    """Of tensors without values, forward and backward; nothing that grows with the square has room at 128 k."""
    for length in layers.LENGTHS:
        run = layers.both_ways(layers.LAYERS[name], length, torch.device("meta"))
        with Peak() as peak:
            run()
        assert 0 <= peak.bytes - layers.SLOPES[name] * length <= layers.WORKSPACE, length


def test_the_slopes_are_those_of_the_docs() -> None:
    text = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert [f"{slope / 1000:.1f} KB" for slope in layers.SLOPES.values()] == re.findall(r"\| ([\d.]+ KB) a token", text)
