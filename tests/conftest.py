"""What every test may rely on: one thread, caches of its own, the environment of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# As the command line does, before torch is imported: threads that spin take the cores from what runs beside.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
from hypothesis import HealthCheck, settings

from nmoe.soak import soak
from tests.kernels import interpreter
from tests.poison import poison_everything_

# The first call of a torch function takes far longer than the second, which hypothesis would call flaky; and an input
# that takes long to draw, beside another lane of tests, is no fault either.
settings.register_profile("nmoe", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@pytest.fixture(scope="session", autouse=True)
def signals_as_at_a_terminal() -> Iterator[None]:
    """Started by nohup or in the background, a process and its children ignore signals that tests send."""
    ignored = [number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module", autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where kernels run, what they do not write shows: outputs and workspaces are full of NaN before."""
    with pytest.MonkeyPatch.context() as patch:
        if of_kernels(request.path):
            poison_everything_(patch)
        yield


def of_kernels(path: Path) -> bool:
    """Whether the tests of a file launch kernels."""
    folders = [Path(__file__).parent / name for name in ("kernels", "gpu", "bench")]
    return any(path.is_relative_to(folder) for folder in folders)


OF_THE_INTERPRETER = (
    # numpy's view of how Triton 3.6 reads the bounds of a loop
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
    # numpy warns of what a GPU does without a word: infinity less infinity, exp beyond the range
    "ignore::RuntimeWarning:triton.runtime.interpreter",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the interpreter warns of, itself, is no error where kernels run in it."""
    for item in items:
        if of_kernels(item.path):
            for text in OF_THE_INTERPRETER:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package's own sources as shards, with a tokenizer of 300 trained on them."""
    folder = tmp_path_factory.mktemp("sources") / "shards"
    soak.write_corpus(folder)
    return folder


class Doubled:
    """The module `torch`, except that the names of fp32 mean fp64."""

    float32 = torch.float64
    float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers' DeepSeeks, gpt-oss and Kimi Linear in fp64.

    They cast to a literal fp32 inside RMSNorm, the router, the softmax and the rotation. Honest, because every line of
    theirs still runs as written: only the format those four lines round to is wider, so the formula is the only thing
    left to disagree about. `test_parity.test_single_precision` runs theirs untouched.
    """
    from transformers import modeling_rope_utils
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3
    from transformers.models.deepseek_v32 import modeling_deepseek_v32
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.kimi_linear import modeling_kimi_linear

    deepseeks = (modeling_deepseek_v2, modeling_deepseek_v3, modeling_deepseek_v32)
    for module in (*deepseeks, modeling_gpt_oss, modeling_kimi_linear, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", Doubled())
    rotate = modeling_deepseek_v2.apply_rotary_emb

    def rotate_doubled(*given: Any) -> Any:
        """V2 casts queries and keys by a method."""
        with monkeypatch.context() as inner:
            inner.setattr(torch.Tensor, "float", torch.Tensor.double)
            return rotate(*given)

    monkeypatch.setattr(modeling_deepseek_v2, "apply_rotary_emb", rotate_doubled)
    yield
