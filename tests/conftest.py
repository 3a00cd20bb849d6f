"""What every test may rely on: one thread, caches of its own, the environment of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.kernels import interpreter

# The first call of a torch function takes far longer than the second, which hypothesis would call flaky.
settings.register_profile("nmoe", settings.default, deadline=None)
settings.load_profile("nmoe")

# Where nothing could run a compiled kernel, all are interpreted, whichever test imports them first.
if not torch.cuda.is_available():
    interpreter.turn_on()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """How a sum is cut up among threads is in its last bits, so tests compute on one, whatever the machine has."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the caller's environment changes what nmoe does, and its caches are not touched."""
    with pytest.MonkeyPatch.context() as patch:
        for name in tuple(os.environ):
            if name.startswith("NMOE_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                patch.delenv(name)
        patch.setenv("NMOE_HOME", str(tmp_path_factory.mktemp("home")))
        yield
