"""What importing nmoe does: nothing, to the process or the machine, and what it needs: nothing optional."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from struct import Struct
from types import FunctionType, MappingProxyType, ModuleType, SimpleNamespace
from typing import TypeVar

import attrs
import pytest
import torch
from packaging.requirements import Requirement

from tests.test_architecture import REPOSITORY, modules, within

IMPORT_WATCHED = """
import ast, contextlib, importlib, io, logging, os, random, signal, sys, threading, warnings
from pathlib import Path

root, package = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(root))
names = []
for path in sorted((root / package).rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    if parts[-1] == "__main__":
        continue
    names.append(".".join(parts).removesuffix(".__init__"))
    for node in ast.parse(path.read_text()).body:  # what others do when they are imported is not ours to answer for
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            of = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            if not any(name.split(".")[0] in (package, "__future__") for name in of):
                exec(ast.unparse(node))
import numpy, torch, triton
from triton import knobs
from triton.runtime import _allocation

FORBIDDEN = ("os.", "shutil.", "socket.", "subprocess.", "tempfile.", "urllib.", "_thread.start", "pty.", "fcntl.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
seen, watching = [], False

def watch(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        seen.append(f"{event} {arguments[:2]}")

def state():
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "import path": sys.path[:],
        "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "threads": threading.active_count(),
        "warning filters": warnings.filters[:],
        "loggers": [(x.name, x.level, list(x.handlers)) for x in loggers if x.handlers or x.level],
        "random state": random.getstate(),
        "random state of numpy": str(numpy.random.get_state()),
        "random state of torch": torch.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradient mode": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads of torch": torch.get_num_threads(),
        "allocator of triton": repr(_allocation._allocator.get()),
        "knobs of triton": repr([vars(x) for x in vars(knobs).values() if isinstance(x, knobs.base_knobs)]),
    }

sys.addaudithook(watch)
for name in names:
    seen, before, out = [], state(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        watching = True
        importlib.import_module(name)
        watching = False
    after = state()
    seen += [f"changed {key}" for key in before if before[key] != after[key]]
    seen += [f"printed {line}" for line in out.getvalue().splitlines()]
    print(*(f"{name}: {effect}\\n" for effect in seen), sep="", end="")
"""


def effects_at_import(root: Path, package: str) -> list[str]:
    """What importing each module of a package does to the process and the machine."""
    command = [sys.executable, "-B", "-c", IMPORT_WATCHED, str(root), package]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_importing_does_nothing() -> None:
    assert effects_at_import(REPOSITORY, "nmoe") == []


def test_an_effect_at_import_is_seen(tmp_path: Path) -> None:
    effects = (
        ("open('x', 'w').close()", "open ('x', 'w')"),
        ("import os\nos.makedirs('y')", "os.mkdir"),
        ("import os\nos.environ['A'] = 'b'", "changed environment"),
        ("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()", "changed threads"),
        ("import socket\nsocket.socket().close()", "socket.__new__"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
        ("import logging\nlogging.basicConfig()", "changed loggers"),
        ("import logging\nlogging.getLogger('a').addHandler(logging.NullHandler())", "changed loggers"),
        ("import torch\ntorch.set_default_dtype(torch.float64)", "changed default dtype"),
        ("import torch\ntorch.manual_seed(1)", "changed random state of torch"),
        ("import numpy as np\nnp.random.seed(1)", "changed random state of numpy"),
        ("import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)", "changed signal handlers"),
        ("import triton\ntriton.set_allocator(lambda size, alignment, stream: None)", "changed allocator of triton"),
        ("import triton\ntriton.knobs.compilation.always_compile = True", "changed knobs of triton"),
        ("print('hello')", "printed hello"),
    )
    (tmp_path / "sample").mkdir()
    for index, (text, _) in enumerate(effects):
        (tmp_path / "sample" / f"m{index:02d}.py").write_text(text)
    (tmp_path / "sample" / "harmless.py").write_text("x = open(__file__).read()")
    seen = effects_at_import(tmp_path, "sample")
    for index, (_, told) in enumerate(effects):
        assert any(line.startswith(f"sample.m{index:02d}: {told}") for line in seen), told
    assert not any("harmless" in line for line in seen)


def imports_torch(module: str) -> bool:
    """Whether importing a module brings torch along."""
    command = [sys.executable, "-c", f"import sys, {module}; print('torch' in sys.modules)"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout == "True\n"


@pytest.mark.parametrize(
    "module", ["nmoe", "nmoe.cli", "nmoe.config", "nmoe.effects.runs.show", "nmoe.effects.device.doctor"]
)
def test_starts_without_torch(module: str) -> None:
    assert not imports_torch(module)


def test_torch_is_seen_where_it_is_imported() -> None:
    assert imports_torch("nmoe.pure.model.norm")


CONSTANTS = (re.Pattern, PurePath, torch.dtype, Struct, TypeVar, Enum)
"""Types of what never changes, beside those of the language itself."""

OF_OTHERS = (
    *("builtins", "types", "typing", "collections", "_collections", "datetime", "inspect", "functools", "_abc"),
    *("__future__", "triton"),
)
"""Modules whose own objects stay, or are none of ours: what they hold, like compiled kernels, is theirs to bound."""

CONTAINERS = (list, dict, set, bytearray, deque, SimpleNamespace)


def held(module: ModuleType, name: str = "") -> Iterator[tuple[str, object]]:
    """What a module, its functions and its classes hold on to, by dotted name."""
    for key, value in vars(module).items():
        where = f"{module.__name__}.{key}"
        if key.startswith("__"):
            continue
        yield where, value
        if isinstance(value, type | FunctionType) and value.__module__ == module.__name__:
            # what Python itself keeps: __dunder__, _sunder_ of an enum, the defaults of a named tuple
            own = re.compile(r"(__.*|_\w+_|_field_defaults)")
            yield from ((f"{where}.{k}", v) for k, v in vars(value).items() if not own.fullmatch(k))


def changeable(value: object) -> list[str]:
    """Types of the parts of a value that may change, or that nobody knows to stay."""
    if isinstance(value, tuple | frozenset):
        return [name for part in value for name in changeable(part)]
    if isinstance(value, MappingProxyType):
        return [name for part in value.values() for name in changeable(part)]
    if isinstance(value, partial):
        return [name for part in (*value.args, *value.keywords.values()) for name in changeable(part)]
    if attrs.has(type(value)) and type(value).__setattr__ is not object.__setattr__:
        return [name for field in attrs.fields(type(value)) for name in changeable(getattr(value, field.name))]
    stays = isinstance(value, (*CONSTANTS, type)) or within(type(value).__module__, *OF_OTHERS)
    return [] if stays and not isinstance(value, CONTAINERS) else [f"{type(value).__name__}"]


def say_changeable(names: Sequence[str]) -> None:
    """Print what modules hold that may change."""
    for name in names:
        for where, value in held(importlib.import_module(name)):
            if kinds := changeable(value):
                print(f"{where}: {', '.join(kinds)}")


def test_modules_hold_constants_alone() -> None:
    # in a process of its own: Triton's interpreter puts its own names into the modules of the kernels it runs
    names = [name for name in modules("nmoe") if not within(name, "nmoe.__main__")]
    command = [sys.executable, "-c", "import sys, tests.test_imports as t; t.say_changeable(sys.argv[1:])", *names]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize(
    "text",
    [
        "class Cache:\n    def __init__(self):\n        self.kept = {}\nCACHE = Cache()",
        "from weakref import WeakValueDictionary\nCACHE = WeakValueDictionary()",
        "from collections import deque\nRECENT = deque(maxlen=3)",
        "class A:\n    seen = {}",
        "def f(): ...\nf.calls = []",
        "from types import MappingProxyType\nA = MappingProxyType({'a': []})",
        "from functools import partial\nf = partial(print, [])",
        "import attrs\n@attrs.frozen\nclass A:\n    b: object\na = A([])",
        "import attrs\n@attrs.define\nclass A:\n    b: int\na = A(1)",
        "import threading\nLOCK = threading.Lock()",
        "from contextvars import ContextVar\ncurrent = ContextVar('current')",
        "import torch\nZERO = torch.zeros(1)",
        "A = (1, [2])",
    ],
)
def test_what_may_change_is_seen(text: str) -> None:
    module = ModuleType("sample")
    exec(text, vars(module))
    assert [value for _, value in held(module) if changeable(value)]


EXTRAS = MappingProxyType({"nvidia-ml-py": "pynvml", "mlflow-skinny": "mlflow"})
"""What an optional distribution is imported as, where not by its name."""

NEED = MappingProxyType(
    {
        "nmoe.effects.runs.viz.server": "duckdb",
        "nmoe.effects.runs.viz.listen": "uvicorn",
        "nmoe.bench.kernels": "triton",
        "nmoe.bench.exchange": "triton",
        "nmoe.effects.kernels": "triton",
        "nmoe.effects.device.token": "triton",
        "nmoe.effects.parallel.exchange.device": "triton",
        "nmoe.effects.parallel.exchange.products": "triton",
    }
)
"""Modules that are imported where their feature is asked for, and what they need."""

WITHOUT = """
import importlib, sys

blocked, names = sys.argv[1].split(","), sys.argv[2].split(",")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(f"{name} needs {error.name}")
import nmoe.cli
nmoe.cli.main(["--version"])
"""


def optional() -> set[str]:
    """Packages that a plain installation lacks, as they are imported; triton is not everywhere."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {Requirement(text).name for texts in project["optional-dependencies"].values() for text in texts}
    return {EXTRAS.get(name, name) for name in extras} | {"triton"}


def test_nothing_optional_is_needed_to_import() -> None:
    needed = optional()
    assert {"zstandard", "pynvml", "mlflow", "wandb", "duckdb"} <= needed
    names = [name for name in modules("nmoe") if not within(name, "nmoe.__main__")]
    command = [sys.executable, "-c", WITHOUT, ",".join(needed), ",".join(names)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, version = done.stdout.splitlines()
    assert version.startswith("nmoe ")
    allowed = [(name, f" needs {package}") for name, package in NEED.items()]
    assert [line for line in lines if not any(line.startswith(a) and line.endswith(b) for a, b in allowed)] == []
