"""nmoe: a trainer for Mixture-of-Experts language models.

`import nmoe` gives a research script the pure functions and records it composes, and `nmoe.config`, the section classes
that describe a model; `load` reads a trained model and `metrics` what a run measured. All of it is imported on first
use, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from nmoe import config
    from nmoe.effects.runs.records import metrics
    from nmoe.effects.train.trained import load
    from nmoe.pure.core import layout, tree
    from nmoe.pure.core.init import init, normal, ones, residual
    from nmoe.pure.core.key import Key
    from nmoe.pure.core.spec import POLICY, Role, Spec, spec_tree
    from nmoe.pure.core.tree import param, record
    from nmoe.pure.cost import flops, plan
    from nmoe.pure.model import attention, experts, hf, loss, norm, rope, route
    from nmoe.pure.model.attention import KINDS, Hf, Kind, kind_of
    from nmoe.pure.model.blueprint import make_blueprint
    from nmoe.pure.model.model import (
        Batch,
        Block,
        Dense,
        Moe,
        RouterReport,
        Shared,
        Transformer,
        block,
        dims,
        forward,
        moe,
        objective,
        specs,
    )
    from nmoe.pure.model.ops import Env, Ops, environment, labelled, reference
    from nmoe.pure.model.rope import Documents
    from nmoe.pure.model.route import Routed, Routing
    from nmoe.pure.optim import adamw, schedule
    from nmoe.pure.optim.update import tree_state, tree_update

__all__ = [
    "Batch",
    "Block",
    "Dense",
    "Documents",
    "Env",
    "Hf",
    "KINDS",
    "Key",
    "Kind",
    "Moe",
    "Ops",
    "POLICY",
    "Role",
    "Routed",
    "RouterReport",
    "Routing",
    "Shared",
    "Spec",
    "Transformer",
    "adamw",
    "attention",
    "block",
    "config",
    "dims",
    "environment",
    "experts",
    "flops",
    "forward",
    "hf",
    "init",
    "kind_of",
    "labelled",
    "layout",
    "load",
    "loss",
    "make_blueprint",
    "metrics",
    "moe",
    "norm",
    "normal",
    "objective",
    "ones",
    "param",
    "plan",
    "record",
    "reference",
    "residual",
    "rope",
    "route",
    "schedule",
    "spec_tree",
    "specs",
    "tree",
    "tree_state",
    "tree_update",
]

_MODULES = MappingProxyType(
    {
        **dict.fromkeys(("layout", "tree"), "nmoe.pure.core"),
        **dict.fromkeys(("attention", "experts", "hf", "loss", "norm", "rope", "route"), "nmoe.pure.model"),
        **dict.fromkeys(("flops", "plan"), "nmoe.pure.cost"),
        **dict.fromkeys(("adamw", "schedule"), "nmoe.pure.optim"),
    }
)
_HOME = MappingProxyType(
    {
        **dict.fromkeys(("init", "normal", "ones", "residual"), "nmoe.pure.core.init"),
        **dict.fromkeys(("Key",), "nmoe.pure.core.key"),
        **dict.fromkeys(("Env", "Ops", "environment", "labelled", "reference"), "nmoe.pure.model.ops"),
        **dict.fromkeys(("POLICY", "Role", "Spec", "spec_tree"), "nmoe.pure.core.spec"),
        "make_blueprint": "nmoe.pure.model.blueprint",
        **dict.fromkeys(("tree_state", "tree_update"), "nmoe.pure.optim.update"),
        **dict.fromkeys(("param", "record"), "nmoe.pure.core.tree"),
        **dict.fromkeys(
            (
                "Batch",
                "Block",
                "Dense",
                "Moe",
                "RouterReport",
                "Shared",
                "Transformer",
                "block",
                "dims",
                "forward",
                "moe",
            )
            + ("objective", "specs"),
            "nmoe.pure.model.model",
        ),
        **dict.fromkeys(("KINDS", "Hf", "Kind", "kind_of"), "nmoe.pure.model.attention"),
        **dict.fromkeys(("Routed", "Routing"), "nmoe.pure.model.route"),
        **dict.fromkeys(("Documents",), "nmoe.pure.model.rope"),
        "load": "nmoe.effects.train.trained",
        "metrics": "nmoe.effects.runs.records",
    }
)


def __getattr__(name: str) -> Any:
    """Import what is asked for. A submodule of `nmoe.pure` comes as itself."""
    if name == "__version__":
        return import_module("nmoe.cli").version()
    if name in _MODULES:
        return import_module(f"{_MODULES[name]}.{name}")
    if name == "config":
        return import_module("nmoe.config")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nmoe' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names, before any of them was imported."""
    return sorted({*globals(), *__all__})
