"""A browser and a server of one run of each kind, for the tests of the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.effects.runs import viz_runs as runs
from tests.effects.runs.viz_server import Server, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """An installed Chromium. Without one the tests of the page do not run, and are counted so; in CI they fail."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        lacks = "the tests of the page did NOT run: no Chromium is installed; apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lacks)
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
