"""SonicMoE as a peer: only where it is installed, and given its own layout of the same matrices."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.bench.kernels import moe
from tests.kernels.moe.test_moe import TILES

CASE = moe.Case(tokens=96, hidden=32, width=16, experts=8, top_k=2, routing="natural")
CPU = torch.device("cpu")


def theirs(
    x: Tensor, score: Tensor, token: Tensor, expert: Tensor, w1: Tensor, b1: None, w2: Tensor, *rest: Any
) -> Any:
    """What their function computes, in the layout they document: rows of gate and value in turn, [2 F D E], [D F E]."""
    assert (token.diff() >= 0).all() and token.dtype is expert.dtype is torch.int32
    h = torch.einsum("pd,pfd->pf", x[token], w1.permute(2, 0, 1)[expert])
    y = torch.einsum("pf,pdf->pd", torch.nn.functional.silu(h[:, ::2]) * h[:, 1::2], w2.permute(2, 0, 1)[expert])
    return torch.zeros_like(x).index_add(0, token, y * score[:, None]), None


def named() -> list[str]:
    return [variant.name for variant in moe.variants(CASE, moe.Operands.of(CASE, CPU), TILES)]


def test_it_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert "SonicMoE" not in named()
    package, functional, enums = (types.ModuleType(f"sonicmoe{part}") for part in ("", ".functional", ".enums"))
    package.__spec__ = types.SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    functional.moe_general_routing_inputs = theirs  # pyright: ignore[reportAttributeAccessIssue]
    enums.ActivationType = types.SimpleNamespace(SWIGLU="swiglu")  # pyright: ignore[reportAttributeAccessIssue]
    for module in (package, functional, enums):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    variants = list(moe.variants(CASE, moe.Operands.of(CASE, CPU), TILES))
    sonic = variants[-1]
    assert sonic.name == "SonicMoE" and sonic.error is not None
    assert sonic.error() < 1e-5, "the same mixture, output and gradients"
