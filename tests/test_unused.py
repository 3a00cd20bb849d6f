"""No file, function, class or constant of nmoe is there for its own tests alone: by names, as vulture finds them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from tests.test_architecture import imports, modules, within

KEPT = (
    ("nmoe.__main__", "python -m nmoe"),
    ("nmoe.cli.reference", "make docs"),
    ("nmoe.effects.parallel.torchrun", "the command nmoe-torchrun of pyproject.toml, which `nmoe launch` writes"),
    *(
        (f"nmoe.effects.evals.harness.{name}", "called by lm-eval")
        for name in ("tok_encode", "loglikelihood_rolling", "generate_until")
    ),
    ("nmoe.effects.kernels.moe.block_scaled", "the product of MXFP8 and NVFP4: compiled for sm_100, not run yet"),
)
"""What nothing of nmoe names, and why it is there."""


def named(node: ast.AST) -> Iterator[str]:
    """Names that a text reads of its own module."""
    yield from (x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load))


def reached(node: ast.AST) -> Iterator[str]:
    """Names of anybody's that a text mentions: imported, behind a dot, or in a string that could be one."""
    for part in ast.walk(node):
        if isinstance(part, ast.ImportFrom):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and re.fullmatch(r"[\w.:]+", part.value):
            yield from re.split(r"[.:]", part.value)


def defined(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.AST | None]]:
    """Names of functions, classes and methods, with their texts, and of the module's constants.

    A method of a class that extends a library's is left out: the library calls it.
    """
    others = [
        name for _, name in imports(ast.unparse(tree), module) if not within(name, "nmoe", "abc", "enum", "typing")
    ]
    foreign = {name.rpartition(".")[2] for name in others}
    called_by_others: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(x).split(".")[0] in foreign for x in node.bases):
            called_by_others.update(node.body)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node not in called_by_others:
            yield node.name, node
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from ((target.id, None) for target in targets if isinstance(target, ast.Name))


def within_itself(name: str, inside: ast.AST | None) -> int:
    """How often a definition mentions its own name."""
    return 0 if inside is None else Counter((*named(inside), *reached(inside)))[name]


def unused(texts: Mapping[str, str]) -> list[str]:
    """What no text of a package names outside its own definition, and modules that none imports."""
    trees = {module: ast.parse(text) for module, text in texts.items()}
    mentions = Counter(name for tree in trees.values() for name in reached(tree))
    imported = {name for module, text in texts.items() for _, name in imports(text, module)}
    parents = {name.rpartition(".")[0] for name in imported}
    found = [
        f"{module}.{name}"
        for module, tree in trees.items()
        for own in (Counter(named(tree)),)
        for name, inside in defined(tree, module)
        if not name.startswith("__") and own[name] + mentions[name] <= within_itself(name, inside)
    ]
    packages = {module.rpartition(".")[0] for module in texts}
    return found + [module for module in texts if module not in imported | parents | packages]


def test_everything_is_used() -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules("nmoe").items()}
    found = unused(texts)
    assert [name for name in found if not within(name, *(kept for kept, _ in KEPT))] == []
    assert [kept for kept, _ in KEPT if not any(within(name, kept) for name in found)] == [], "no longer unused"


PACKAGE = {
    "p": "",
    "p.a": "from p.b import used\nLIMIT = 3\nused(LIMIT)",
    "p.b": "def used():\n    ...\nclass Kind:\n    def way(self): ...\nKind().way()",
}


def test_what_is_used_is_left_alone() -> None:
    assert unused({**PACKAGE, "p.c": "from p import a"}) == ["p.c"]
    library = "from asyncio import Protocol\nclass A(Protocol):\n    def data_received(self): ...\nA()"
    assert unused({**PACKAGE, "p.c": library + "\nfrom p import a"}) == ["p.c"]


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("def f(): ...", "f"),
        ("def f():\n    return f()", "f"),
        ("class A:\n    def used(self): ...\n    def g(self): ...\nA()", "g"),
        ("class A: ...", "A"),
        ("LOST = 1", "LOST"),
        ("LOST: int = 1", "LOST"),
        ("def f(): ...\nf = 3", "f"),
    ],
)
def test_what_is_dead_is_seen(text: str, dead: str) -> None:
    assert f"p.c.{dead}" in unused(
        {**PACKAGE, "p.c": text, "p.d": "from p import c\ng = LOST = f = A = 1\ng(f, A, LOST)"}
    )


def test_a_file_that_nobody_imports_is_seen() -> None:
    assert "p.c" in unused({**PACKAGE, "p.c": "from p.a import LIMIT\nprint(LIMIT)"})
