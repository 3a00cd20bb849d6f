"""Where a run comes from: code, versions, machine, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import attrs
import tomli_w
import torch

CHECKOUT = Path(__file__).parents[3]
"""The folder this package lies in; a git checkout unless it was installed."""

DIFF_BYTES = 1_000_000
"""Most that is kept of what a checkout differs in from its commit."""


@attrs.frozen(kw_only=True)
class Code:
    """What is computed with.

    commit   or why it is not known
    changed  files that differ from it, new ones too
    diff     of the files that git knows, its first `DIFF_BYTES`
    """

    commit: str
    changed: tuple[str, ...] = ()
    diff: str = ""

    def facts(self) -> dict[str, Any]:
        """The same as a table, without the diff."""
        return {"commit": self.commit, "dirty": bool(self.changed), "changed_files": list(self.changed)}


def code(checkout: Path = CHECKOUT) -> Code:
    """The commit of a checkout, and what differs from it."""
    if not (checkout / ".git").exists():
        return Code(commit="unknown: not a git checkout")
    try:
        commit = _git(checkout, "rev-parse", "HEAD").decode().strip()
        status = _git(checkout, "status", "--porcelain", "-z")
        return Code(commit=commit, changed=_changed(status), diff=_cut(_git(checkout, "diff", "HEAD")))
    except FileNotFoundError:
        return Code(commit="unknown: git is not installed")
    except subprocess.CalledProcessError as error:
        return Code(commit=f"unknown: {error.stderr.decode(errors='replace').strip().partition(chr(10))[0]}")


def versions() -> dict[str, str]:
    """What computes: the code of nmoe, and torch."""
    try:
        installed = version("nmoe")
    except PackageNotFoundError:
        installed = "not installed"
    return {"nmoe's version": f"{installed} {code().commit}", "torch's version": version("torch")}


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
            "code": code().facts(),
            "versions": _packages(),
            "hardware": hardware,
        }
    )


def _packages() -> dict[str, str]:
    """Version of every installed package, by its name as PyPI has it; of several on the path the one imported."""
    versions: dict[str, str] = {}
    for package in distributions():
        versions.setdefault(re.sub(r"[-_.]+", "-", package.name).lower(), package.version)
    return dict(sorted(versions.items()))


def _changed(status: bytes) -> tuple[str, ...]:
    """The files in `git status --porcelain -z`: `XY path`, where X or Y is R or C followed by the path it had."""
    entries = iter(status.decode(errors="replace").split("\0")[:-1])
    changed: list[str] = []
    for entry in entries:
        changed.append(entry[3:])
        if "R" in entry[:2] or "C" in entry[:2]:
            next(entries)
    return tuple(sorted(changed))


def _cut(diff: bytes) -> str:
    """A diff as text, of one that is too long the first part and a line that says so."""
    text = diff[:DIFF_BYTES].decode(errors="replace")
    return text if len(diff) <= DIFF_BYTES else f"{text}\n[the first {DIFF_BYTES} bytes of {len(diff)}]\n"


def _git(checkout: Path, *arguments: str) -> bytes:
    """What git says of a checkout.

    Raises:  FileNotFoundError without git, CalledProcessError when it refuses.
    """
    # Named in full, because GIT_DIR in the environment, as in a hook, would mean another repository.
    where = (f"--git-dir={checkout / '.git'}", f"--work-tree={checkout}")
    command = ["git", "--no-optional-locks", *where, *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, check=True).stdout
