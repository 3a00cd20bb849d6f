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
    ("nmoe.effects.kernels.exchange.nvshmem", "puts between hosts: compiled, and no exchange opens with them yet"),
    ("nmoe.pure.model.loss.setup_context", "torch calls it"),
)
"""What nothing of nmoe names, and why it is there."""


def named(node: ast.AST) -> Iterator[str]:
    """Names that a text mentions; a string that could be one counts, an import or a definition does not."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and re.fullmatch(r"[\w.:]+", part.value):
            yield from re.split(r"[.:]", part.value)


def defined(tree: ast.Module) -> Iterator[tuple[str, ast.AST | None]]:
    """Names of functions, classes and methods, with their texts, and of the module's constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from ((target.id, None) for target in targets if isinstance(target, ast.Name))


def unused(texts: Mapping[str, str]) -> list[str]:
    """What no text of a package names outside its own definition, and modules that none imports."""
    trees = {module: ast.parse(text) for module, text in texts.items()}
    mentions = Counter(name for tree in trees.values() for name in named(tree))
    imported = {name for module, text in texts.items() for _, name in imports(text, module)}
    parents = {name.rpartition(".")[0] for name in imported}
    found = [
        f"{module}.{name}"
        for module, tree in trees.items()
        for name, inside in defined(tree)
        if not name.startswith("__") and mentions[name] <= (Counter(named(inside))[name] if inside else 0)
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
    assert f"p.c.{dead}" in unused({**PACKAGE, "p.c": text, "p.d": "from p.c import f, A, LOST"})


def test_a_file_that_nobody_imports_is_seen() -> None:
    assert "p.c" in unused({**PACKAGE, "p.c": "from p.a import LIMIT\nprint(LIMIT)"})
