"""`nmoe bench gate` on rows that were made up: what fell is named, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nmoe.bench import kernels as kernel_bench
from nmoe.bench.kernels import attention, dsa, gate, gqa, loss, moe, nsa, optimizer
from nmoe.cli import main
from nmoe.errors import InputError
from nmoe.pure.cost import fp8
from tests.configs import ROOT

H200 = "NVIDIA H200, torch 2.11.0"


def row(variant: str, ratio: Any, *, machine: str = H200, case: str = "tokens 8") -> dict[str, Any]:
    return {"machine": machine, "what": "moe", "case": case, "variant": variant, "beside": "peer", "ratio": ratio}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def judged(tmp_path: Path, shipped: list[dict[str, Any]], now: list[dict[str, Any]]) -> tuple[int, list[str]]:
    against, rows = written(tmp_path / "against", *shipped), written(tmp_path / "rows", *now)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_bench, "say", said.append)
        return kernel_bench.gated(rows, against, None), said[0].splitlines()


def test_what_fell_by_more_than_five_percent_is_named(tmp_path: Path) -> None:
    shipped = [row("a", 1.0), row("b", 1.0), row("c", 2.0), row("peer", None)]
    code, said = judged(tmp_path, shipped, [row("a", 0.951), row("b", 0.949), row("c", 2.5), row("new", 0.1)])
    assert code == 1
    assert said == ["NVIDIA H200: moe  tokens 8  b: 0.95 x peer, shipped at 1.00 x: fell by 5 %"]


def test_a_kernel_that_is_not_measured_any_more_is_named(tmp_path: Path) -> None:
    code, said = judged(tmp_path, [row("a", 1.0), row("a", 1.5, case="tokens 9")], [row("a", 1.0)])
    assert code == 1 and said == ["NVIDIA H200: moe  tokens 9  a: shipped at 1.50 x peer, not measured"]


def test_nothing_fell(tmp_path: Path) -> None:
    code, said = judged(tmp_path, [row("a", 1.0)], [row("a", 0.4), row("a", 1.2)])
    assert code == 0 and said == ["no kernel fell by more than 5 % beside its peer"], "the last of several runs counts"


def test_another_gpu_has_ratios_of_its_own(tmp_path: Path) -> None:
    shipped = [row("a", 1.0), row("a", 5.0, machine="NVIDIA B200, torch 2.11.0")]
    assert judged(tmp_path, shipped, [row("a", 1.0)])[0] == 0
    with pytest.raises(InputError, match=r"of which ratios are known \(NVIDIA B200, NVIDIA H200\), got NVIDIA A100"):
        judged(tmp_path, shipped, [row("a", 1.0, machine="NVIDIA A100, torch 2.11.0")])


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "null",
        "{}",
        json.dumps(row("a", "1")),
        json.dumps(row("a", -1.0)),
        json.dumps(row("a", float("nan"))),
        json.dumps({**row("a", 1.0), "machine": 7}),
        json.dumps({key: value for key, value in row("a", 1.0).items() if key != "beside"}),
    ],
)
def test_a_file_of_another_form_is_refused_at_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text(json.dumps(row("a", 1.0)) + "\n" + text + "\n")
    with pytest.raises(InputError, match=r"rows:2: expected a row of `nmoe bench kernels --jsonl`, got"):
        gate.ratios(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file one may read, got No such file"):
        gate.ratios(tmp_path / "none")


@pytest.mark.parametrize("rows", [[], [row("peer", None)]], ids=["empty", "the peer alone"])
def test_a_measurement_without_a_kernel_passes_no_gate(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """One that was killed before its first row."""
    with pytest.raises(InputError, match="rows: expected rows of .* with a ratio, got none; measure anew"):
        judged(tmp_path, [row("a", 1.0)], rows)
    with pytest.raises(InputError, match="against: expected rows of .* with a ratio, got none; measure anew"):
        judged(tmp_path, rows, [row("a", 1.0)])


def test_of_rows_that_were_measured_nothing_is_written(tmp_path: Path) -> None:
    rows, told = written(tmp_path / "rows", row("a", 1.0)), tmp_path / "new.jsonl"
    with pytest.raises(InputError, match=r"^--jsonl: expected none beside --rows, got .*new.jsonl; remove one"):
        kernel_bench.gated(rows, rows, told)
    assert not told.exists()


def test_a_gpu_that_nothing_is_known_of_is_refused_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[torch.device] = []

    def measure(device: torch.device, kinds: Any, jsonl: Path | None) -> list[dict[str, Any]]:
        measured.append(device)
        return [row("a", 1.0)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_bench, "measured", measure)
    monkeypatch.setattr(kernel_bench, "say", lambda text: None)
    against = written(tmp_path / "against", row("a", 1.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with pytest.raises(InputError, match=r"of which ratios are known \(NVIDIA H200\), got NVIDIA H100"):
        kernel_bench.gated(None, against, None)
    assert measured == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert kernel_bench.gated(None, against, None) == 0 and measured == [torch.device("cuda", 0)]


@pytest.mark.parametrize(
    ("verb", "advice"),
    [
        ("gate", "run it on a machine that has one, or pass --rows FILE"),
        ("moe", "run it on a machine that has one"),
        ("kernels", "run it on a machine that has one"),
        ("kernels --tune", "run it on a machine that has one"),
        ("exchange", "run it on a machine that has one"),
    ],
)
def test_without_a_gpu_a_verb_says_what_it_needs(
    verb: str, advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not which key of a config would have chosen the device: there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *verb.split()]) == 2
    assert capsys.readouterr().err == f"nmoe: bench {verb}: expected a GPU that torch can use, got none; {advice}\n"


def test_a_gpu_that_the_kernels_are_not_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(
        InputError, match=r"^bench moe: expected .* \(9.0, 10.0\), got 8.0 \(NVIDIA A100\); run it on one"
    ):
        kernel_bench.kernels(("moe",), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "2048x1408"], "--size: expected --tune beside it, got 2048x1408 alone; add it, or remove --size"),
        (
            ["--tune", "--jsonl", "new"],
            "--jsonl: expected none beside --tune, got new; remove it, tuning prints a table",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", *options]) == 2
    assert capsys.readouterr().err == f"nmoe: {message}\n"


def test_the_shipped_ratios_are_of_kernels_and_cases_that_are_measured() -> None:
    known = {
        (what, kernel_bench.described(case), peer)
        for what, cases, peer in (
            ("moe", moe.CASES, moe.PEER),
            ("precision", moe.CROSSOVER, moe.OURS),
            *(("attention", kind.CASES, kind.PEER) for kind in (attention, gqa, nsa, dsa)),
            ("loss", loss.CASES, loss.PEER),
            ("optimizer", optimizer.CASES, optimizer.PEER),
        )
        for case in cases
    }
    shipped = gate.ratios(gate.SHIPPED)
    assert shipped.keys() == {"NVIDIA H200"}
    assert {(what, case, beside) for what, case, _, beside in shipped["NVIDIA H200"]} <= known
    assert {kernel[0] for kernel in shipped["NVIDIA H200"]} == set(kernel_bench.KINDS), "no kind goes ungated"


def test_the_shipped_ratios_of_fp8_are_those_that_the_docs_say() -> None:
    """The table of docs/precision.md: a line for hidden, expert, E and K, a column for each number of tokens."""
    text = (ROOT / "docs" / "precision.md").read_text()
    lines = re.findall(r"^\| (\d+), (\d+), (\d+), (\d+) \| (.*) \|$", text, re.MULTILINE)
    table = {tuple(map(int, sizes)): cells.split(" | ") for *sizes, cells in lines}
    shipped = gate.ratios(gate.SHIPPED)["NVIDIA H200"]
    for case in moe.CROSSOVER:
        ratio = shipped["precision", kernel_bench.described(case), moe.NARROW, moe.OURS]
        said = table[case.hidden, case.width, case.experts, case.top_k][(4096, 8192, 16384, 32768).index(case.tokens)]
        assert f"{ratio:.2f}" == said, case
        assert ratio == fp8.MEASURED[case.hidden, case.width][case.tokens], "what a run says"


def test_the_command_judges_rows_without_a_gpu(tmp_path: Path) -> None:
    shipped = [json.loads(line) for line in gate.SHIPPED.read_text().splitlines()]
    rows = written(tmp_path / "rows", *({**each, "ratio": each["ratio"] * 0.9} for each in shipped))
    run = [sys.executable, "-m", "nmoe", "bench", "gate", "--rows", str(rows)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and done.stdout.count("fell by 10 %") == len(shipped), done.stderr
