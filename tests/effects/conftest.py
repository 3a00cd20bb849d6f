"""What several tests of effects train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmoe.soak import soak


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package's own sources as shards, with a tokenizer of 300 trained on them."""
    folder = tmp_path_factory.mktemp("sources") / "shards"
    soak.write_corpus(folder)
    return folder
