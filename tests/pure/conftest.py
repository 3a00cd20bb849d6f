"""What every test of the core runs under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# How long one example takes says how busy the machine is, not whether the result is right
settings.register_profile("nmoe", deadline=None)
settings.load_profile("nmoe")


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Tensors here are tiny: further threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
