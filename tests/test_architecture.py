"""Who may import whom, and what nmoe never does. Each rule reads a source text and says what breaks it, line by line.

A rule is trusted because it bites: `BAD` holds a text for each clause of each rule.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

ORDER = (
    *("errors", "config", "pure.units", "pure.core", "pure.formats"),
    "pure.model pure.optim pure.data pure.parallel pure.checkpoint pure.watch pure.cluster pure.evals",
    *("pure.cost", "effects.files effects.terminal", "effects.kernels", "effects.parallel effects.record"),
    *("effects.device effects.checkpoint", "effects.data", "effects.train effects.runs", "effects.evals bench soak"),
    "cli",
)
"""The rooms. One imports those of earlier entries; rooms of one entry do not import each other."""

FLOOR = MappingProxyType({room: level for level, rooms in enumerate(ORDER) for room in rooms.split()})

KERNELS_MAY = (
    *("__future__", "collections", "functools", "typing", "types", "tomllib", "pathlib", "attrs", "torch", "triton"),
    "nmoe",
)
"""What a file of kernels may import."""

PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
NEVER_IN_PURE = (
    *("nmoe.effects", "nmoe.cli", "triton", "torch.distributed", "os", "sys", "time", "logging", "threading"),
    *("pathlib", "io"),
)

STARTERS = (
    *("nmoe.effects.parallel.launch", "nmoe.effects.record.alert_command", "nmoe.effects.record.provenance"),
    *("nmoe.effects.data.prepare.execute", "nmoe.effects.evals.sandbox", "nmoe.effects.evals.jail"),
    *("nmoe.bench", "nmoe.soak"),
)
"""Who starts processes: ranks, an alert's command, git, workers that prepare data, graded programs, measurements."""

PROCESSES = (
    *("subprocess", "multiprocessing", "concurrent.futures.ProcessPoolExecutor", "pty"),
    *(f"os.{name}" for name in ("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp")),
    *(f"os.{verb}{how}" for verb in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
)
"""What starts one."""

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
    nodes = list(ast.walk(ast.parse(source)))
    problems = [f"{node.lineno}: global" for node in nodes if isinstance(node, ast.Global)]
    parts = [x for x in nodes if isinstance(x, ast.Subscript | ast.Attribute) and ast.unparse(x.value) == "globals()"]
    return problems + [f"{part.lineno}: {ast.unparse(part)}" for part in parts]


def moves_to_no_device(source: str, module: str) -> list[str]:
    """Pure computes where its arguments lie; `.to` changes a dtype alone, and says so in the call."""
    problems: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            if len(values) != 1 or not is_dtype(values[0]):
                problems.append(f"{node.lineno}: {ast.unparse(node)[:40]}")
    return problems


def is_dtype(node: ast.expr) -> bool:
    """`x.dtype`, `torch.float32` and its kin, or a promotion; a name could be a device or a tensor."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "torch.promote_types"
    return isinstance(node, ast.Attribute) and (node.attr == "dtype" or hasattr(np, node.attr.removeprefix("b")))


def starts_processes_in_few_places(source: str, module: str) -> list[str]:
    """A process costs 10 ms and its output is nobody's: who starts one is listed."""
    if within(module, *STARTERS):
        return []
    problems = [f"{line}: imports {name}" for line, name in imports(source, module) if within(name, *PROCESSES)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and within(ast.unparse(node), *PROCESSES):
            problems.append(f"{node.lineno}: {ast.unparse(node)}")
    return problems


def raises_what_it_catches(source: str, module: str) -> list[str]:
    """A kernel that fails, fails: no handler puts something else in its place."""
    return [
        f"{node.lineno}: except {ast.unparse(node.type) if node.type else ''} that goes on"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise)
    ]


def says_what_it_expected(source: str, module: str) -> list[str]:
    """An error of the user's reads `<where>: expected <what>, got <value>; <what to do>`."""
    errors = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and called(node) == "InputError"
    ]
    nodes = [node for error in errors for node in ast.walk(error)]
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = [node for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in parts]
    return [
        f"{node.lineno}: {text}"
        for node, text in ((node, ast.unparse(node)) for node in texts)
        if ", got " in text and "expected " not in text
    ]


def called(call: ast.Call) -> str:
    """Name of what a call calls, without the module."""
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def borrows_records_alone(source: str, module: str) -> list[str]:
    """A kernel takes records of the reference, never its functions: it does not compute by it."""
    return [
        f"{line}: imports {name}"
        for line, name in imports(source, module)
        if within(name, "nmoe.pure") and not name.rpartition(".")[2][0].isupper()
    ]


def refuses_second_derivatives(source: str, module: str) -> list[str]:
    """A backward pass by kernels has no derivative, and says so when it is asked for one."""
    return [
        f"{node.lineno}: {node.name}.{method.name} without first_order"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name in ("backward", "vjp", "jvp")
        if "first_order" not in (ast.unparse(x) for x in method.decorator_list)
    ]


def acts_when_called(source: str, module: str) -> list[str]:
    """Importing binds names and does nothing else: no call for its effect, no loop, no attribute of another module."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    problems: list[str] = []
    for node in ast.parse(source).body if not within(module, "nmoe.__main__") else ():
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not (isinstance(node, allowed) or is_constant(node) or for_types):
            problems.append(f"{node.lineno}: {ast.unparse(node)[:40]}")
        elif any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
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
    (starts_processes_in_few_places, "nmoe"),
    (acts_when_called, "nmoe"),
    (borrows_records_alone, "nmoe.effects.kernels"),
    (refuses_second_derivatives, "nmoe.effects"),
    (says_what_it_expected, "nmoe"),
    (raises_what_it_catches, "nmoe.effects.kernels"),
    (raises_what_it_catches, "nmoe.effects.device.ops"),
    (raises_what_it_catches, "nmoe.pure.model"),
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
            "cos.to(where)",
            "x.to(y)",
            "x.to(other=y)",
            "x.to(torch.float32, non_blocking=True)",
            "x.to(y.device)",
            "x.to(torch.get_default_device())",
            "x.to()",
        )
    ),
    (prints_in_one_place, "nmoe.effects.train.run", "def f():\n    print(x)"),
    (prints_in_one_place, "nmoe.effects.train.run", "say = print"),
    *(
        (rebinds_no_global, "nmoe.effects.x", text)
        for text in (
            "x = 1\ndef f():\n    global x\n    x = 2",
            "global x\nx = 1",
            "globals()['x'] = 1",
            "globals().update(x=1)",
        )
    ),
    *(
        (starts_processes_in_few_places, "nmoe.effects.record.telemetry", text)
        for text in (
            *("import subprocess", "from subprocess import run", "def f():\n    from subprocess import Popen as P"),
            *("import os\nos.system('nvidia-smi')", "from os import popen", "os.execvp('a', [])", "os.fork()"),
            *("import multiprocessing.pool", "from concurrent.futures import ProcessPoolExecutor"),
            "import concurrent.futures\nconcurrent.futures.ProcessPoolExecutor()",
        )
    ),
    *(
        (says_what_it_expected, "nmoe.x", f"def f():\n    raise {error}")
        for error in (
            "InputError('a: at least 1, got 0; raise it')",
            "errors.InputError(f'{a}: at least {b}, got {c}; raise it')",
            "InputError(*(f'{a}: at least {b}, got {c}' for a in more))",
        )
    ),
    *(
        (raises_what_it_catches, "nmoe.effects.kernels.x", f"def f():\n    try:\n        k()\n    except {rest}")
        for rest in (
            "RuntimeError:\n        return pure(x)",
            "(KeyError, OSError) as error:\n        x = pure(x)",
            "OSError:\n        if a:\n            raise",
        )
    ),
    *(
        (borrows_records_alone, "nmoe.effects.kernels.x", text)
        for text in (
            *(
                "from nmoe.pure.model.norm import rms_norm",
                "from nmoe.pure.model import norm",
                "import nmoe.pure.model.norm",
            ),
            "def f():\n    from nmoe.pure.model.route import Routing, top_k",
        )
    ),
    *(
        (
            refuses_second_derivatives,
            "nmoe.effects.kernels.x",
            f"class F(torch.autograd.Function):\n    @staticmethod\n    {decorator}\n    def backward(ctx, *g): ...",
        )
        for decorator in ("", "@once_differentiable")
    ),
    *(
        (acts_when_called, "nmoe.effects.x", text)
        for text in (
            *("triton.set_allocator(f)", "import triton\ntriton.knobs.compilation.x = 1", "os.environ['A'] = 'b'"),
            *("for x in y:\n    f(x)", "with a:\n    x = 1", "if x:\n    f()", "torch.x.y: int = 1", "x += 1"),
            "try:\n    import pynvml\nexcept ImportError:\n    pynvml = None",
        )
    ),
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
    (
        moves_to_no_device,
        "nmoe.pure.x",
        "x.to(y.dtype)\nx.to(torch.int16)\nx.to(dtype=torch.float32)\nx.to(torch.bfloat16)\n"
        "x.to(torch.promote_types(x.dtype, torch.float32))",
    ),
    (starts_processes_in_few_places, "nmoe.effects.record.provenance", "import subprocess"),
    (
        starts_processes_in_few_places,
        "nmoe.x",
        "from concurrent.futures import ThreadPoolExecutor\nimport os\nos.open(p, 0)",
    ),
    (
        says_what_it_expected,
        "nmoe.x",
        "raise InputError(f'{where}: expected 1 to {most}, got {n}; lower it', *(f'{p}; fix' for p in problems))\n"
        "raise InputError(*problems)\nx = 'a, got b'",
    ),
    (
        raises_what_it_catches,
        "nmoe.effects.kernels.x",
        "try:\n    f()\nexcept OSError as e:\n    g()\n    raise E from e",
    ),
    (
        borrows_records_alone,
        "nmoe.effects.kernels.x",
        "from nmoe.pure.model.route import Routing\nfrom nmoe.effects.kernels import norm",
    ),
    (
        refuses_second_derivatives,
        "nmoe.effects.kernels.x",
        "class F(torch.autograd.Function):\n    @staticmethod\n    @first_order\n    def backward(ctx, *g): ...",
    ),
    (
        acts_when_called,
        "nmoe.x",
        "'Doc.'\nfrom a import b\nif TYPE_CHECKING:\n    import c\nA: int = f()\n'What it is.'\ndef f():\n    g()",
    ),
    (prints_in_one_place, "nmoe.effects.terminal", "def say(x):\n    print(x)"),
    (prints_in_one_place, "nmoe.cli.plan", "print(x)"),
    (prints_in_one_place, "nmoe.x", "say(x)\nconsole.print(x)"),
    (rebinds_no_global, "nmoe.x", "x = 1\ndef f():\n    x = 2\n    return sorted(globals())"),
    (reads_no_pickle, "nmoe.x", "from safetensors.torch import load\nnp.load(f, allow_pickle=False)\nself.load(x)"),
    (is_documented, "nmoe.pure.x", '"""Doc."""\ndef _f(): ...\nclass _C:\n    def f(self): ...'),
    (is_documented, "nmoe.pure", ""),
    (is_read_in_one_sitting, "nmoe.x", "x = 1\n" * 500),
)


@pytest.mark.parametrize(("rule", "module", "text"), GOOD)
def test_rule_lets_the_rest_be(rule: Rule, module: str, text: str) -> None:
    assert rule(text, module) == []
