"""nmoe: a trainer for Mixture-of-Experts language models.

`import nmoe` gives a research script the pure functions and records it composes, and `nmoe.config`, the section classes
that describe a model. They are imported on first use, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmoe import config
    from nmoe.pure import attention, experts, flops, layout, loss, norm, optim, plan, rope, route, schedule, tree
    from nmoe.pure.init import init, normal, ones, residual
    from nmoe.pure.key import Key
    from nmoe.pure.model import (
        Batch,
        Block,
        Dense,
        Model,
        Moe,
        RouterReport,
        Shared,
        block,
        dims,
        forward,
        moe,
        objective,
        rope_table,
        specs,
    )
    from nmoe.pure.ops import REFERENCE, Env, Ops
    from nmoe.pure.spec import POLICY, Role, Spec, blueprint, param
    from nmoe.pure.tree import record

__all__ = [
    "POLICY",
    "REFERENCE",
    "Batch",
    "Block",
    "Dense",
    "Env",
    "Key",
    "Model",
    "Moe",
    "Ops",
    "Role",
    "RouterReport",
    "Shared",
    "Spec",
    "attention",
    "block",
    "blueprint",
    "config",
    "dims",
    "experts",
    "flops",
    "forward",
    "init",
    "layout",
    "loss",
    "moe",
    "normal",
    "norm",
    "objective",
    "ones",
    "optim",
    "param",
    "plan",
    "record",
    "residual",
    "rope",
    "rope_table",
    "route",
    "schedule",
    "specs",
    "tree",
]

_MODULES = frozenset(
    ("attention", "experts", "flops", "layout", "loss", "norm", "optim", "plan", "rope", "route", "schedule", "tree")
)
_HOME = MappingProxyType(
    {
        **dict.fromkeys(("init", "normal", "ones", "residual"), "nmoe.pure.init"),
        **dict.fromkeys(("Key",), "nmoe.pure.key"),
        **dict.fromkeys(("REFERENCE", "Env", "Ops"), "nmoe.pure.ops"),
        **dict.fromkeys(("POLICY", "Role", "Spec", "blueprint", "param"), "nmoe.pure.spec"),
        **dict.fromkeys(("record",), "nmoe.pure.tree"),
        **dict.fromkeys(
            ("Batch", "Block", "Dense", "Model", "Moe", "RouterReport", "Shared", "block", "dims", "forward", "moe")
            + ("objective", "rope_table", "specs"),
            "nmoe.pure.model",
        ),
    }
)


def __getattr__(name: str) -> Any:
    """Import what is asked for. A submodule of `nmoe.pure` comes as itself."""
    if name in _MODULES:
        return import_module(f"nmoe.pure.{name}")
    if name == "config":
        return import_module("nmoe.config")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nmoe' has no attribute '{name}'")
