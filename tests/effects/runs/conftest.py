"""A browser and a server of one run of each kind, for the tests of the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from nmoe.effects.data import tokenizer
from nmoe.effects.data.store import shard_writer
from tests.effects.runs import viz_runs as runs
from tests.effects.runs.viz_server import Server, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """An installed Chromium. Without one the tests of the page do not run, and are counted so; in CI they fail."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        lacks = "the tests of the page did NOT run: no Chromium is installed; apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lacks)
    expect.set_options(timeout=60_000)  # milliseconds: beside the other lane of tests a page takes its time
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("runs")
    runs.everything(root)
    with serving(root) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, with a link that leads out of it to a file that nobody may see."""
    base = tmp_path_factory.mktemp("data")
    (base / "secret").write_text("CANARY-8c1f")
    folder = base / "inside" / "prepared"
    trained = tokenizer.train(["the cat sat on the mat. the cat sat. the mat sat. " * 4], 265, lambda text: None)
    encoding = tokenizer.encoding(trained)
    documents = [np.array(encoding.encode_ordinary(text)) for text in ("the cat", "sat on <b>é</b>", "the mat")]
    shard_writer.write(folder, trained, {"train": documents, "validation": documents[:1]})
    out = base / "inside" / "linked"
    shutil.copytree(folder, out)
    (out / "train" / "shard-00000.npy").unlink()
    (out / "train" / "shard-00000.npy").symlink_to(base / "secret")
    return base / "inside"
