"""Who may import whom, and what nmoe never does. Each rule reads a source text and says what breaks it, line by line.

A rule is trusted because it bites: `BAD` holds a text for each clause of each rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

ORDER = (
    *("errors", "config", "pure.units", "pure.core", "pure.formats"),
    "pure.model pure.optim pure.data pure.parallel pure.checkpoint pure.watch pure.cluster",
    *("pure.cost", "effects.files effects.terminal", "effects.kernels", "effects.parallel effects.record"),
    *("effects.device effects.checkpoint", "effects.data", "effects.train effects.runs", "effects.evals bench soak"),
    "cli",
)
"""The rooms. One imports those of earlier entries; rooms of one entry do not import each other."""

FLOOR = MappingProxyType({room: level for level, rooms in enumerate(ORDER) for room in rooms.split()})

KERNELS_MAY = ("__future__", "collections", "typing", "types", "tomllib", "pathlib", "attrs", "torch", "triton", "nmoe")
"""What a file of kernels may import."""

PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
NEVER_IN_PURE = (
    *("nmoe.effects", "nmoe.cli", "triton", "torch.distributed", "os", "sys", "time", "logging", "threading"),
    *("pathlib", "io"),
)

Rule = Callable[[str, str], list[str]]


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, anywhere in the text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of `packages` or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def room(module: str) -> str:
    """The room of `ORDER` that a dotted name lies in; empty for what lies in none."""
    inside = module.removeprefix("nmoe.")
    return max((name for name in FLOOR if within(inside, name)), key=len, default="")


def may_import(module: str, name: str) -> bool:
    """Whether `module` of nmoe may import `name`."""
    own, other = room(module), room(name)
    if module in ("nmoe", "nmoe.__main__"):
        return True
    if within(module, "nmoe.pure") and within(name, *NEVER_IN_PURE):
        return False
    if within(module, "nmoe.pure.core.tree") and within(name, "nmoe"):
        return False
    if within(module, "nmoe.config") and within(name, "torch"):
        return False
    if within(module, "nmoe.effects.kernels") and not within(name, *KERNELS_MAY):
        return False
    return not within(name, "nmoe") or (other != "" and (own == other or FLOOR[other] < FLOOR.get(own, -1)))


def imports_only_what_it_may(source: str, module: str) -> list[str]:
    """Who may import whom."""
    return [f"{line}: imports {name}" for line, name in imports(source, module) if not may_import(module, name)]


def asserts_nothing(source: str, module: str) -> list[str]:
    """`python -O` removes asserts, so conditions raise."""
    return [f"{node.lineno}: assert" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def swallows_nothing(source: str, module: str) -> list[str]:
    """An exception is caught by name and dealt with; who catches all raises again."""
    problems = [
        f"{line}: contextlib.suppress" for line, name in imports(source, module) if name == "contextlib.suppress"
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "contextlib.suppress":
            problems.append(f"{node.lineno}: contextlib.suppress")
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = set(names(node.type)) if node.type else set()
        if node.type is None:
            problems.append(f"{node.lineno}: bare except")
        elif caught & {"Exception", "BaseException"} and not any(isinstance(x, ast.Raise) for x in ast.walk(node)):
            problems.append(f"{node.lineno}: catches everything and does not raise")
        if all(isinstance(x, ast.Pass) or is_constant(x) for x in node.body):
            problems.append(f"{node.lineno}: handler that does nothing")
    return problems


def names(node: ast.AST) -> list[str]:
    """The last part of each name in an expression."""
    found = [x.id for x in ast.walk(node) if isinstance(x, ast.Name)]
    return found + [x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)]


def is_constant(node: ast.stmt) -> bool:
    """`...` or a string alone on its line."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def computes_only(source: str, module: str) -> list[str]:
    """Pure waits for no device, prints nothing, opens nothing, writes into nothing."""
    problems: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global | ast.Nonlocal):
            problems.append(f"{node.lineno}: {type(node).__name__.lower()}")
        elif isinstance(node, ast.Attribute):
            if node.attr in ("item", "tolist", "cpu", "cuda"):
                problems.append(f"{node.lineno}: .{node.attr}")
            if ast.unparse(node) in ("torch.compile", "os.environ"):
                problems.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Name) and node.id in ("print", "open"):
            problems.append(f"{node.lineno}: {node.id}")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name.endswith("_") and not name.endswith("__"):
                problems.append(f"{node.lineno}: {name}() writes into its argument")
    return problems + [f"{line}: {name}" for line, name in imports(source, module) if name == "torch.compile"]


def shares_no_mutable_state(source: str, module: str) -> list[str]:
    """What a module binds is constant, and no cache grows without bound."""
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    builders = ("list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque")
    problems: list[str] = []
    for node in outside_functions(ast.parse(source)):
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) else None
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if value is None or "__all__" in (getattr(target, "id", None) for target in targets):
            continue
        for part in value.elts if isinstance(value, ast.Tuple) else [value]:
            built = isinstance(part, ast.Call) and ast.unparse(part.func).rpartition(".")[2] in builders
            if isinstance(part, containers) or built:
                problems.append(f"{node.lineno}: a mutable {ast.unparse(part)[:40]}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "functools.cache":
            problems.append(f"{node.lineno}: functools.cache")
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "lru_cache":
            sizes = node.args + [keyword.value for keyword in node.keywords if keyword.arg == "maxsize"]
            if any(isinstance(size, ast.Constant) and size.value is None for size in sizes[:1]):
                problems.append(f"{node.lineno}: lru_cache without bound")
    return problems + [f"{line}: {name}" for line, name in imports(source, module) if name == "functools.cache"]


def prints_in_one_place(source: str, module: str) -> list[str]:
    """What a person reads goes through `terminal`, where one line decides how; the command line may print itself."""
    if within(module, "nmoe.effects.terminal", "nmoe.cli"):
        return []
    calls = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Name) and x.id == "print"]
    return [f"{call.lineno}: print" for call in calls]


def rebinds_no_global(source: str, module: str) -> list[str]:
    """What a module binds stays."""
    return [f"{node.lineno}: global" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Global)]


def moves_to_no_device(source: str, module: str) -> list[str]:
    """Pure computes where its arguments lie; `.to` changes a dtype alone."""
    problems: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to"):
            continue
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        strings = [x for value in values for x in ast.walk(value) if isinstance(x, ast.Constant)]
        named = any("device" in names(value) for value in values) or any(x.arg == "device" for x in node.keywords)
        if named or any(isinstance(x.value, str) for x in strings):
            problems.append(f"{node.lineno}: {ast.unparse(node)[:40]}")
    return problems


def outside_functions(node: ast.AST) -> Iterator[ast.stmt | ast.NamedExpr]:
    """Statements that run at import and bind names of the module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(child, ast.stmt | ast.NamedExpr):
            yield child
        yield from outside_functions(child)


def reads_no_pickle(source: str, module: str) -> list[str]:
    """A file may come from anybody, and a pickle is a program."""
    calls = ("torch.load", "torch.save")
    problems = [f"{line}: imports {name}" for line, name in imports(source, module) if within(name, *PICKLES, *calls)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in calls:
            problems.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            problems.append(f"{node.value.lineno}: allow_pickle")
    return problems


def is_documented(source: str, module: str) -> list[str]:
    """Each public module, function and class says what it is; an empty file has nothing to say."""
    tree = ast.parse(source)
    definitions = [x for x in tree.body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    silent = [x for x in definitions if not x.name.startswith("_") and not ast.get_docstring(x)]
    problems = [f"{x.lineno}: {x.name} without a docstring" for x in silent]
    return problems if ast.get_docstring(tree) or not tree.body else ["1: module without a docstring", *problems]


def is_read_in_one_sitting(source: str, module: str) -> list[str]:
    """No file is longer than 500 lines."""
    length = len(source.splitlines())
    return [f"{length}: lines"] if length > 500 else []


RULES: tuple[tuple[Rule, str], ...] = (
    (imports_only_what_it_may, "nmoe"),
    (asserts_nothing, "nmoe"),
    (swallows_nothing, "nmoe"),
    (computes_only, "nmoe.pure"),
    (moves_to_no_device, "nmoe.pure"),
    (prints_in_one_place, "nmoe"),
    (rebinds_no_global, "nmoe"),
    (shares_no_mutable_state, "nmoe"),
    (reads_no_pickle, "nmoe"),
    (is_documented, "nmoe.pure"),
    (is_read_in_one_sitting, "nmoe"),
)


def modules(package: str) -> dict[str, Path]:
    """Every module of a package of this repository, by dotted name."""
    found: dict[str, Path] = {}
    for path in sorted((REPOSITORY / "nmoe").rglob("*.py")):
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        if within(name, package):
            found[name] = path
    return found


@pytest.mark.parametrize(("rule", "package"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_rule_holds(rule: Rule, package: str) -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules(package).items()}
    assert texts
    problems = [f"{name}:{problem}" for name, text in texts.items() for problem in rule(text, name)]
    assert problems == [], "\n".join(problems)


def circles(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    reached = {module: set(others) for module, others in graph.items()}
    for middle in graph:
        for module in graph:
            if middle in reached[module]:
                reached[module] |= reached[middle]
    return sorted(module for module in graph if module in reached[module])


def test_no_circle() -> None:
    known = modules("nmoe")
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        names = {name for _, name in imports(path.read_text(encoding="utf-8"), module)}
        graph[module] = {name if name in known else name.rpartition(".")[0] for name in names} & known.keys() - {"nmoe"}
    assert circles(graph) == []


def test_a_circle_is_seen() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == ["b", "c"]


BAD: tuple[tuple[Rule, str, str], ...] = (
    *(
        (imports_only_what_it_may, module, text)
        for module, text in (
            ("nmoe.pure.core.tree", "from nmoe.pure import spec"),
            ("nmoe.pure.core.tree", "from .spec import Role"),
            ("nmoe.pure.model.norm", "import nmoe"),
            ("nmoe.pure.core.spec", "from nmoe.pure.model import norm"),
            ("nmoe.pure.model.norm", "from nmoe.pure.optim import adamw"),
            ("nmoe.pure.model.norm", "from nmoe.pure.cost.flops import forward_flops"),
            ("nmoe.pure.lost", "from nmoe.pure.core import tree"),
            ("nmoe.pure.model.model", "def f():\n    from nmoe.effects import run"),
            ("nmoe.pure.model.model", "import nmoe.effects.train.run as r"),
            ("nmoe.pure.model.attention.mla", "from ....effects.device import ops"),
            ("nmoe.pure.model.norm", "import triton.language as tl"),
            ("nmoe.pure.model.norm", "import torch.distributed as dist"),
            ("nmoe.pure.model.norm", "from torch import distributed"),
            *(
                ("nmoe.pure.model.norm", f"import {name}")
                for name in ("os", "sys", "time", "logging", "threading", "io")
            ),
            ("nmoe.pure.model.norm", "from pathlib import Path"),
            ("nmoe.pure.model.norm", "from os.path import join"),
            ("nmoe.config.toml", "import torch"),
            ("nmoe.config.toml", "from torch import nn"),
            ("nmoe.config.toml", "from nmoe.pure.core.spec import Role"),
            ("nmoe.config", "from nmoe.effects import files"),
            ("nmoe.effects.kernels.norm", "import os"),
            ("nmoe.effects.kernels.norm", "from nmoe.effects.device import process"),
            ("nmoe.effects.kernels.norm", "import tritonbench"),
            ("nmoe.effects.files", "from nmoe.effects import terminal"),
            ("nmoe.effects.record.log", "from nmoe.effects.parallel.ranks import Ranks"),
            ("nmoe.effects.record.log", "def f():\n    from nmoe.effects.train import run"),
            ("nmoe.effects.checkpoint.fs", "from nmoe.effects.device import process"),
            ("nmoe.effects.data.loader", "from nmoe.effects.train import step"),
            ("nmoe.effects.data.store.shards", "from ...train.run import main"),
            ("nmoe.effects.runs.show", "from nmoe.effects.train import run"),
            ("nmoe.effects.train.step", "import nmoe.bench.step"),
            ("nmoe.effects.train.step", "import nmoe.effects"),
            ("nmoe.bench.step", "from nmoe.soak import soak"),
            ("nmoe.effects.train.run", "from nmoe.cli import main"),
        )
    ),
    (asserts_nothing, "nmoe.x", "def f(x):\n    assert x"),
    *(
        (swallows_nothing, "nmoe.x", text)
        for text in (
            "try:\n    f()\nexcept:\n    raise",
            "try:\n    f()\nexcept Exception:\n    x = 1",
            "try:\n    f()\nexcept (ValueError, BaseException) as error:\n    log(error)",
            "try:\n    f()\nexcept builtins.Exception:\n    x = 1",
            "try:\n    f()\nexcept ValueError:\n    pass",
            "try:\n    f()\nexcept ValueError:\n    ...",
            "try:\n    f()\nexcept* ValueError:\n    'never mind'",
            "from contextlib import suppress",
            "import contextlib\nwith contextlib.suppress(ValueError):\n    f()",
        )
    ),
    *(
        (computes_only, "nmoe.pure.x", text)
        for text in (
            *("x.item()", "x.sum().tolist()", "x.cpu()", "x.cuda()", "print(x)", "open('x')", "get = x.item"),
            *("torch.compile(f)", "@torch.compile\ndef f(x): ...", "from torch import compile", "os.environ['A']"),
            *("x.add_(1)", "relu_(x)", "torch.nn.init.zeros_(x)", "x.t().copy_(y)"),
            "x = 1\ndef f():\n    global x\n    x = 2",
            "def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = 2",
        )
    ),
    *(
        (shares_no_mutable_state, "nmoe.x", text)
        for text in (
            *("A = []", "A: dict[str, int] = {}", "A = {1}", "A = [x for x in y]", "A = {x: x for x in y}"),
            *("A = {x for x in y}", "A = dict(a=1)", "A = collections.defaultdict(int)", "A = (1, [])", "f(A := [])"),
            *("if x:\n    A = []", "try:\n    A = list()\nfinally:\n    f()", "A = B = set()"),
            *("@functools.cache\ndef f(): ...", "from functools import cache"),
            *("@lru_cache(maxsize=None)\ndef f(): ...", "@functools.lru_cache(None)\ndef f(): ..."),
        )
    ),
    *(
        (moves_to_no_device, "nmoe.pure.x", text)
        for text in (
            "x.to(device)",
            "x.to(y.device, y.dtype)",
            "x.to('cuda')",
            "x.to(device=d)",
            "x.to(torch.device(d))",
        )
    ),
    (prints_in_one_place, "nmoe.effects.train.run", "def f():\n    print(x)"),
    (prints_in_one_place, "nmoe.effects.train.run", "say = print"),
    (rebinds_no_global, "nmoe.x", "x = 1\ndef f():\n    global x\n    x = 2"),
    *(
        (reads_no_pickle, "nmoe.x", text)
        for text in (
            *("import pickle", "from pickle import loads", "import shelve as s", "def f():\n    import joblib"),
            *("torch.load(path)", "from torch import load", "save = torch.save", "np.load(f, allow_pickle=True)"),
        )
    ),
    *(
        (is_documented, "nmoe.pure.x", text)
        for text in (
            "x = 1",
            '"""Doc."""\ndef f(): ...',
            '"""Doc."""\nclass C:\n    x: int',
        )
    ),
    (is_read_in_one_sitting, "nmoe.x", "x = 1\n" * 501),
)


@pytest.mark.parametrize(("rule", "module", "text"), BAD)
def test_rule_bites(rule: Rule, module: str, text: str) -> None:
    assert rule(text, module)


GOOD: tuple[tuple[Rule, str, str], ...] = (
    *(
        (imports_only_what_it_may, module, text)
        for module, text in (
            ("nmoe.pure.core.tree", "import attrs, torch"),
            ("nmoe.pure.model.model", "from nmoe.config import sections"),
            ("nmoe.pure.model.attention.mla", "from nmoe.config.sections import Mla"),
            ("nmoe.pure.model.norm", "import torch.nn.functional as F\nimport osmium"),
            ("nmoe.pure.model.attention.mla", "from ..norm import upcast"),
            ("nmoe.config.toml", "from nmoe.errors import InputError\nimport torchless"),
            ("nmoe.effects.kernels.norm", "import triton.language as tl\nfrom nmoe.pure.model.norm import rms_norm"),
            ("nmoe.effects.device.ops", "from nmoe.effects.kernels import norm"),
            ("nmoe.effects.data.loader", "from nmoe.effects import files\nimport nmoe.effects.device.process"),
            ("nmoe.effects.data.store.shards", "from nmoe.effects.data import records\nfrom . import tokenizer"),
            (
                "nmoe.effects.train.run",
                "from nmoe.effects.data.loader import open_stream\nimport nmoe.effects.train.step",
            ),
            ("nmoe.soak.soak", "from nmoe.effects.train import run"),
            ("nmoe.cli.train", "from nmoe.effects.train import run"),
        )
    ),
    (
        swallows_nothing,
        "nmoe.x",
        "try:\n    f()\nexcept BaseException as e:\n    log(e)\n    raise\nexcept OSError:\n    return_(1)",
    ),
    (
        computes_only,
        "nmoe.pure.x",
        "class C:\n    def __init__(self):\n        super().__init__()\nreopen(x)\nx.items()",
    ),
    (
        shares_no_mutable_state,
        "nmoe.x",
        "__all__ = ['A']\nA = MappingProxyType({})\nB = (1, 2)\nclass C:\n    x = []\n"
        "C = frozenset({1})\n@lru_cache(8)\ndef f():\n    x = []",
    ),
    (moves_to_no_device, "nmoe.pure.x", "x.to(y.dtype)\nx.to(torch.int16)\nx.to(dtype=torch.float32)"),
    (prints_in_one_place, "nmoe.effects.terminal", "def say(x):\n    print(x)"),
    (prints_in_one_place, "nmoe.cli.plan", "print(x)"),
    (prints_in_one_place, "nmoe.x", "say(x)\nconsole.print(x)"),
    (rebinds_no_global, "nmoe.x", "x = 1\ndef f():\n    x = 2"),
    (reads_no_pickle, "nmoe.x", "from safetensors.torch import load\nnp.load(f, allow_pickle=False)\nself.load(x)"),
    (is_documented, "nmoe.pure.x", '"""Doc."""\ndef _f(): ...\nclass _C:\n    def f(self): ...'),
    (is_documented, "nmoe.pure", ""),
    (is_read_in_one_sitting, "nmoe.x", "x = 1\n" * 500),
)


@pytest.mark.parametrize(("rule", "module", "text"), GOOD)
def test_rule_lets_the_rest_be(rule: Rule, module: str, text: str) -> None:
    assert rule(text, module) == []


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
import numpy, torch

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
