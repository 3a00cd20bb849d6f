"""What a user configures: TOML in, frozen sections out, and everything that can be said of them without a model."""

from __future__ import annotations

from nmoe.config.canonical import Difference, annotated, diff, dump, identity, identity_diff, identity_values, unset
from nmoe.config.check import validate
from nmoe.config.json_schema import schema
from nmoe.config.layers import Loaded, load, load_valid
from nmoe.config.sections import (
    Checkpoint,
    Config,
    Data,
    Gqa,
    Group,
    Log,
    Mixture,
    Mla,
    Model,
    Moe,
    Nsa,
    Optim,
    Parallel,
    Precision,
    Run,
    Schedule,
    Shards,
    Stdlib,
    Train,
    Validation,
    Yarn,
)

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Difference",
    "Group",
    "Loaded",
    "Log",
    "Gqa",
    "Mixture",
    "Mla",
    "Model",
    "Moe",
    "Nsa",
    "Optim",
    "Parallel",
    "Precision",
    "Run",
    "Schedule",
    "Shards",
    "Stdlib",
    "Train",
    "Validation",
    "Yarn",
    "annotated",
    "diff",
    "dump",
    "identity",
    "identity_diff",
    "identity_values",
    "load",
    "load_valid",
    "schema",
    "unset",
    "validate",
]
