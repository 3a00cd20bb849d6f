"""Small trainings in processes of their own, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from nmoe.config.sections import Config
from nmoe.effects.train import run
from nmoe.effects.train.world import World
from nmoe.soak import soak
from nmoe.soak.forked import forked


def config(work: Path, name: str, corpus: Path, steps: int, **checkpoint: Any) -> Config:
    """The training that is soaked, saved at every step unless said otherwise."""
    base = soak.training(work, name, corpus, steps)
    settings = {"every": 1, "keep_last": steps, "on_error": "stop", **checkpoint}
    return attrs.evolve(base, checkpoint=attrs.evolve(base.checkpoint, **settings))


def changed(config: Config, **train: Any) -> Config:
    """A config with other values in its table `train`."""
    return attrs.evolve(config, train=attrs.evolve(config.train, **train))


def train(config: Config, *, accept: Sequence[str] = (), world: World | None = None) -> tuple[int, str]:
    """Exit code and what an attempt wrote to the terminal."""
    folder = Path(config.run.root)
    folder.mkdir(exist_ok=True, parents=True)
    output = folder / f"{config.run.name}.txt"
    code = forked(lambda: run.main(config, {}, ("nmoe", "run"), "x", accept, world), output)
    return code, output.read_text(errors="replace").removesuffix("\n")


def folder(config: Config) -> Path:
    """The run folder."""
    return Path(config.run.root) / str(config.run.name)


def events(config: Config, *names: str) -> list[dict[str, Any]]:
    """Events of a run, of these names if any."""
    lines = (folder(config) / "events.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if not names or each["event"] in names]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but the lease, which each attempt writes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "LEASE"
    }
