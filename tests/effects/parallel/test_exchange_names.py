"""A function of the exchange that writes into other ranks' memory ends in `_`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
KERNELS = ("kernels/exchange/push.py",)
PROTOCOLS = ("parallel/exchange/device.py", "parallel/exchange/host.py")


def functions(source: str) -> list[ast.FunctionDef]:
    """Functions of a module; not methods, whose names autograd fixes."""
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def launches(node: ast.FunctionDef) -> bool:
    """Whether it hands the table of peers' addresses to a kernel."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)]
    return any(isinstance(value, ast.Name) and value.id == "addresses" for call in calls for value in call.args)


def called(node: ast.FunctionDef) -> set[str]:
    """Last part of the name of everything it calls."""
    calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {ast.unparse(function).rpartition(".")[2] for function in calls}


def misnamed(kernels: str, protocol: str) -> list[str]:
    """Functions that write into peers' memory, themselves or by one they call, and do not end in `_`."""
    writers = {node.name for node in functions(kernels) if launches(node)}
    own = functions(protocol)
    writers |= {node.name for node in own if "e.peers" in ast.unparse(node)}
    while more := {node.name for node in own if called(node) & writers} - writers:
        writers |= more
    return sorted(name for name in writers if not name.endswith("_"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_writes_into_peers_ends_in_an_underscore(protocol: str) -> None:
    (kernels,) = [(REPOSITORY / "nmoe/effects" / name).read_text() for name in KERNELS]
    text = (REPOSITORY / "nmoe/effects" / protocol).read_text()
    assert misnamed(kernels, text) == []
    for bad in ("def send(e):\n    push_(e)", "def put(e):\n    e.peers[0].fill_(1)"):
        assert misnamed(kernels, f"{text}\n{bad}\n"), bad
    assert misnamed(kernels.replace("def push_(", "def push("), text) == ["push"]
