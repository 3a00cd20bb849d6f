"""Where a run comes from: code, versions, machine, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w
import torch

PACKAGES = ("nmoe", "torch", "triton", "numpy", "attrs", "cattrs", "safetensors", "tiktoken", "tokenizers")


def installed(package: str) -> str:
    """Version of an installed package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def git(*arguments: str) -> str | None:
    """Output of git in the checkout this package lies in; None where it is no checkout or git is not there."""
    folder = Path(__file__).parents[3]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code() -> dict[str, Any]:
    """Commit and dirtiness of the checkout."""
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit is None or status is None:
        return {"commit": "not a git checkout"}
    return {"commit": commit, "dirty": bool(status), "changed_files": sorted(line[3:] for line in status.splitlines())}


def versions() -> dict[str, str]:
    """What computes: the code of nmoe, and torch."""
    commit = git("rev-parse", "HEAD") or "not a git checkout"
    return {"nmoe's version": f"{installed('nmoe')} {commit}", "torch's version": installed("torch")}


def describe(device: torch.device, command: Sequence[str], **facts: Any) -> str:
    """`provenance.toml` of a run.

    command  the argument vector that started it
    facts    what else belongs to it: identities of config, tokenizer and data
    """
    hardware: dict[str, Any] = {
        "host": platform.node(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["cuda"] = str(torch.version.cuda)  # pyright: ignore[reportAttributeAccessIssue]
    return tomli_w.dumps(
        {
            "command": shlex.join(command),
            "python": sys.version.split()[0],
            **facts,
            "code": code(),
            "versions": {package: installed(package) for package in PACKAGES},
            "hardware": hardware,
        }
    )
