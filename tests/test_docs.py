"""The documents say what is: their programs run, their commands exist."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import nmoe
from nmoe.effects.record.names import METRICS
from tests.effects.train import trainings
from tests.notebook import code_cells, kept

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_compose_trains_saves_and_is_shown(tmp_path: Path) -> None:
    """As written: a plan, a loss that falls, weights that read back, a run folder that `nmoe runs show` reads."""
    (program,) = blocks("docs/compose.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 60
    check = """
again, again_bias = weights.load(folder, attrs.evolve(made, specs=specs))
same = all(torch.equal(a, b) for (_, a), (_, b) in zip(nmoe.tree.leaves(again), nmoe.tree.leaves(params), strict=True))
print("read back", same and torch.equal(again_bias, bias))
"""
    done = run("-c", program + check, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Memory(") and done.stdout.endswith("read back True\n")
    lines = (tmp_path / "composed" / "metrics.rank0.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 50 and losses[-1] < losses[0] / 2
    shown = run("-m", "nmoe", "runs", "show", "composed", "--root", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "finished" in shown.stdout and "step 50" in shown.stdout


def test_a_run_is_read_in_python(sources: Path, tmp_path: Path) -> None:
    config = trainings.config(tmp_path, "first", sources, 3)
    assert trainings.train(config)[0] == 0
    (program,) = blocks("docs/python.md", "python")
    done = run("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shape, following, loss = done.stdout.splitlines()
    assert shape.startswith(f"{config.model.num_layers} layers, ") and following.startswith("next: ")
    lines = map(json.loads, (trainings.folder(config) / METRICS).read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert loss == f"loss {losses[0]} -> {losses[-1]} nats a token"


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """One thread, so that tests beside each other do not wait for each other."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ, check=False)


def test_public_names_are_shown_and_there() -> None:
    assert set(nmoe.__all__) <= set(dir(nmoe))
    assert all(hasattr(nmoe, name) for name in nmoe.__all__)
    assert nmoe.config.Model.__name__ not in nmoe.__all__, "the parameters are a Transformer, Model is the section"


def test_the_notebook_prints_what_it_says_it_prints() -> None:
    """Text word by word; numbers to a tenth, as another processor sums in another order."""
    path = ROOT / "docs" / "compose.ipynb"
    notebook = json.loads(path.read_text())
    wanted = [kept(cell) for cell in code_cells(notebook)]
    program = "print(json.dumps(list(printed(json.load(open(sys.argv[1]))))))"
    done = run("-c", f"import json, sys\nfrom tests.notebook import printed\n{program}", str(path))
    assert done.returncode == 0, done.stderr
    number = re.compile(r"\d+\.\d+")
    got = json.loads(done.stdout)
    assert [number.sub("#", text) for text in got] == [number.sub("#", text) for text in wanted]
    pairs = [
        (float(mine), float(theirs))
        for texts in zip(got, wanted, strict=True)
        for mine, theirs in zip(*map(number.findall, texts), strict=True)
    ]
    assert len(pairs) == 4 and all(abs(mine - theirs) <= 0.1 * abs(theirs) + 0.1 for mine, theirs in pairs)


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def links(page: Path) -> list[tuple[str, str]]:
    """File and anchor of each link that stays in the repository; code is no text."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [(file, anchor) for file, _, anchor in (target.partition("#") for target in targets) if "://" not in file]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [file for file, _ in links(page) if not (page.parent / file).exists()]
    assert not missing
    wrong = [
        (file, anchor)
        for file, anchor in links(page)
        if anchor and anchor not in anchors(page.parent / file if file else page)
    ]
    assert not wrong


def test_every_page_is_in_the_navigation_once() -> None:
    lines = [line for tree in blocks("docs/index.md", "{toctree}") for line in tree.splitlines()]
    named = [line for line in lines if line and not line.startswith(":")]
    found = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in ROOT.glob("docs/**/*.md")]
    reached = [path for name in named for path in found if fnmatch.fnmatch(path, name)]
    assert sorted([*reached, "index"]) == sorted(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_code_are_code(page: Path) -> None:
    """Python compiles, TOML and YAML parse; every block is closed and names a language that is known here, or none."""
    text = page.read_text()
    languages = re.findall(r"^```(.*)$", text, flags=re.MULTILINE)
    assert len(languages) % 2 == 0 and not any(languages[1::2])
    assert set(languages) <= {"", "python", "toml", "yaml", "json", "{toctree}", "mermaid"}
    for program in blocks(str(page.relative_to(ROOT)), "python"):
        ast.parse(program)
    for table in blocks(str(page.relative_to(ROOT)), "toml"):
        tomllib.loads(table)
    for tree in blocks(str(page.relative_to(ROOT)), "yaml"):
        yaml.safe_load(tree)


@pytest.mark.parametrize("page", ["README.md", "AGENTS.md", "docs/architecture.md", "docs/extend.md"])
def test_named_files_exist(page: str) -> None:
    """Every `nmoe/...`, `configs/...`, `docs/...` path in backticks is there."""
    named = re.findall(r"`((?:nmoe|configs|docs|tests)/[\w./-]+)`", (ROOT / page).read_text())
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def templates(source: str) -> list[str]:
    """Every text of a program, with `…` for what an f-string fills in."""
    parts: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            pieces = (str(value.value) if isinstance(value, ast.Constant) else "…" for value in node.values)
            parts.append(re.sub("…+", "…", "".join(pieces)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts.append(node.value)
    return parts


def test_troubleshooting_quotes_messages_as_they_are() -> None:
    """Each line of a block is in the package, word by word, with `…` where a value is."""
    said = [text for path in (ROOT / "nmoe").rglob("*.py") for text in templates(path.read_text())]
    quoted = [line for block in blocks("docs/troubleshooting.md", "") for line in block.splitlines()]
    assert len(quoted) > 20
    assert [line for line in quoted if not any(line in text for text in said)] == []
