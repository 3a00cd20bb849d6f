"""The command line, in processes of its own."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from nmoe.cli import build_parser
from nmoe.cli.parser import under
from nmoe.cli.reference import reference
from nmoe.config import Shards, dump, load, schema
from tests.effects.train.tiny import tiny

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.toml"
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("NMOE_")} | {
    "PYTHONPATH": str(ROOT)
}


def nmoe(*arguments: str | Path, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nmoe", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRON | environ,
        stdin=subprocess.DEVNULL,
        timeout=300,  # a verb that goes on where it should refuse
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 2, and for each pattern one line on stderr, in order; nothing else."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    told = done.stderr.splitlines()
    assert len(told) == len(expected), done.stderr
    for line, pattern in zip(told, expected, strict=True):
        assert re.fullmatch(f"nmoe: {pattern}", line), line


def with_line(text: str, old: str, new: str) -> str:
    assert len(re.findall(old, text, re.MULTILINE)) == 1, old
    return re.sub(old, new, text, flags=re.MULTILINE)


BAD_CONFIGS = {
    "unknown key": (
        r"^\[train\]",
        "[train]\nzebra = 1",
        [r"x.toml:\d+: train.zebra: expected a known key, got \"zebra\"; known keys: .*"],
    ),
    "misspelt key": (
        r"^sequence_length =",
        "sequence_lenght =",
        [
            r"x.toml:\d+: train.sequence_length: expected a value, got nothing; add it .*",
            r"x.toml:\d+: train.sequence_lenght: expected a known key, .*; did you mean train.sequence_length\?",
        ],
    ),
    "wrong type": (
        r"^sequence_length = .*",
        'sequence_length = "256"',
        [r"x.toml:\d+: train.sequence_length: expected an integer, .*"],
    ),
    "syntax": (r"^sequence_length = .*", "sequence_length 256", [r"x.toml:\d+: expected TOML, got .*; fix column \d+"]),
    "impossible sizes": (
        r"^top_k = .*",
        "top_k = 60_000\nnum_groups = -1",
        [
            r"x.toml:\d+: model.moe.num_groups: expected at least 1, got -1; raise it",
            r"x.toml:\d+: model.moe.top_k: expected at most num_experts = \d+, got 60000; lower top_k",
            r"x.toml: model.moe.top_k_groups: expected at most num_groups = -1, got 1; .*",
        ],
    ),
    "unknown attention": (
        r'^kind = "mla"',
        'kind = "flash"',
        [
            r'x.toml:\d+: model.attention.kind: expected one of "mla", "gqa", "kda", "nsa", "dsa", "mixed", '
            r'got "flash"; .*'
        ],
    ),
}


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(verb: str, name: str, tmp_path: Path) -> None:
    old, new, expected = BAD_CONFIGS[name]
    (tmp_path / "x.toml").write_text(with_line(QUICKSTART.read_text(), old, new))
    refused(nmoe(verb, "x.toml", cwd=tmp_path), *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    refused(
        nmoe("run", "absent.toml", cwd=tmp_path), "absent.toml: expected an existing file, got none; check the path"
    )
    refused(nmoe("run", ".", cwd=tmp_path), r"\.: expected a TOML file, got a directory; name a file in it")
    refused(nmoe("run", "latin.toml", cwd=tmp_path), "latin.toml:1: expected text in UTF-8, got the byte 0xe9; .*")
    refused(nmoe("run", "new\nline.toml", cwd=tmp_path), r"new\\nline.toml: expected an existing file, got none; .*")
    assert [path.name for path in tmp_path.iterdir()] == ["latin.toml"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("rnu", "x.toml"), r"command line: expected a verb, one of run, .*, got rnu; did you mean nmoe run\?"),
        (("config", "chekc"), r"config: expected a verb, .*, got chekc; did you mean nmoe config check\?"),
        (("run",), "run: the following arguments are required: CONFIG; see `nmoe run --help`"),
        (("plan", QUICKSTART, "--train.steps", "10"), "--train.steps: .*; write --train.steps=10"),
        (("plan", "--train.steps", "10", QUICKSTART), "--train.steps: .*; write --train.steps=10"),
        (
            ("plan", QUICKSTART, "--steps=10"),
            "plan: .*--section.key=value, got --steps=10; did you mean --train.steps=10\\?",
        ),
        (("plan", QUICKSTART, "train.steps=100"), "plan: .*, got train.steps=100; did you mean --train.steps=100\\?"),
        (("run", QUICKSTART, "--lr=1e-3"), "run: .*, got --lr=1e-3; did you mean --optim.dense.lr=1e-3\\?"),
        (("run", QUICKSTART, "--hidden-size=8"), "run: .*; did you mean --model.hidden_size=8\\?"),
        (("run", QUICKSTART, "--seq_len=8"), "run: .*; did you mean --train.sequence_length=8\\?"),
        (("run", QUICKSTART, "--resume"), "run: .*; did you mean --train.resume=VALUE\\?"),
        (("run", QUICKSTART, "--dry-run"), "run: .*, got --dry-run; `nmoe plan` says what .*"),
        (("plan", QUICKSTART, "extra"), "plan: .*, got extra; see .*"),
        (("plan", QUICKSTART, "--gpu", "2"), "plan: .*, got --gpu; did you mean --gpus\\?"),
        (
            ("plan", QUICKSTART, "--gpus", "two"),
            "plan: argument --gpus: invalid int value: 'two'; see `nmoe plan --help`",
        ),
        (("plan", QUICKSTART, "--gpus", "0"), "--gpus: .*"),
        (("doctor", "--train.steps=10"), "doctor: expected no overrides, got --train.steps=10; remove it"),
        (("config", "diff", QUICKSTART), "config diff: the following arguments are required: B; see .*"),
    ],
    ids=lambda each: " ".join(map(str, each))[:40] if isinstance(each, tuple) else "",
)
def test_bad_arguments(arguments: tuple[str | Path, ...], expected: str) -> None:
    done = nmoe(*arguments)
    if arguments[-2:] == ("--gpu", "2"):
        refused(done, expected, "plan: .*, got 2; see .*")
    else:
        refused(done, expected)


def test_a_plan_for_more_gpus_is_checked_for_them() -> None:
    refused(
        nmoe("plan", "configs/dsv3.toml", "--gpus", "3"),
        r"configs/dsv3.toml:\d+: model.moe.num_experts: expected a multiple of the 3 ranks, got 256; .*",
        r"configs/dsv3.toml:\d+: train.batch_size: expected a multiple of ranks \* microbatch_size = 3 \* 1, got .*",
    )


@pytest.mark.parametrize(
    ("text", "remedy"), [("quickstrat", r"did you mean quickstart\?"), ("foo", r"a file of that name is \./foo")]
)
def test_an_unknown_preset_is_refused(text: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / text).write_text(QUICKSTART.read_text())
    presets = ", ".join(sorted(path.stem for path in QUICKSTART.parent.glob("*.toml")))
    refused(
        nmoe("config", "check", text, cwd=tmp_path),
        f"config check: argument CONFIG: expected a TOML file or a preset, one of {presets}, got '{text}'; {remedy}; "
        "see `nmoe config check --help`",
    )
    assert nmoe("config", "check", f"./{text}", cwd=tmp_path).returncode == 0


def test_bad_environment() -> None:
    done = nmoe("config", "check", QUICKSTART, NMOE_TRAIN__STEP="1", NMOE_HOME="/nowhere")
    refused(done, r"environment NMOE_TRAIN__STEP: train.step: .*; did you mean train.steps\?")


def test_config_verbs() -> None:
    done = nmoe("config", "show", QUICKSTART, "--train.steps=7", NMOE_LOG__EVERY="3")
    expected = load(QUICKSTART, {"NMOE_LOG__EVERY": "3"}, ("--train.steps=7",))
    shown, _, absent = done.stdout.partition("\n\n# ")
    assert (done.returncode, done.stderr, f"{shown}\n") == (0, "", dump(expected.config))
    assert "parallel.experts" in absent and "not set: name of the run folder; absent: config name" in absent
    done = nmoe("config", "show", QUICKSTART, "--sources", "--train.steps=7", NMOE_LOG__EVERY="3")
    assert tomli.loads(done.stdout) == tomli.loads(dump(expected.config))
    assert re.search(r"^train.steps = 7 +# command line --train.steps=7$", done.stdout, re.MULTILINE)
    assert re.search(r"^log.every = 3 +# environment NMOE_LOG__EVERY$", done.stdout, re.MULTILINE)
    done = nmoe("config", "check", QUICKSTART)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(
        f"{QUICKSTART}: valid for 1 rank, fingerprint "
    )


def test_config_diff() -> None:
    same = nmoe("config", "diff", QUICKSTART, QUICKSTART)
    assert (same.returncode, same.stdout) == (0, "")
    other = nmoe("config", "diff", "configs/moonlet.toml", "configs/moonlet-16b.toml", NMOE_MODEL__NUM_LAYERS="5")
    assert other.returncode == 1
    assert "model.num_layers: 12 -> 27" in other.stdout.splitlines()
    kinds = nmoe("config", "diff", QUICKSTART, "moonlight")
    assert 'data.source.kind: "stdlib" -> "shards"' in kinds.stdout.splitlines()
    assert 'data.source.path: absent -> "data/pretrain"' in kinds.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "same"),
    [((), ("--help",)), (("config",), ("config", "--help")), (("help", "run"), ("run", "--help"))],
)
def test_help_is_what_a_verb_alone_prints(arguments: tuple[str, ...], same: tuple[str, ...]) -> None:
    printed, wanted = nmoe(*arguments), nmoe(*same)
    assert printed.returncode == 0 and printed.stderr == ""
    assert printed.stdout == wanted.stdout and printed.stdout.startswith("usage: nmoe")


def test_command_line_reference_is_the_committed_page() -> None:
    assert reference() == (ROOT / "docs" / "cli.md").read_text(), "make docs"


def test_config_reference_is_the_committed_page_and_names_every_key() -> None:
    page = nmoe("config", "reference").stdout
    assert page == (ROOT / "docs" / "config.md").read_text(), "nmoe config reference > docs/config.md"
    rows = {line.split(" | ")[0].strip("|` "): line for line in page.splitlines() if line.startswith("| `")}
    assert rows["steps"] == ("| `steps` | integer | required |  | 1 to 1_000_000_000 | free | optimizer steps |")
    assert rows["hidden_size"].split(" | ")[5] == "fixed" and rows["weight_decay"].split(" | ")[5] == "accept"
    described = {*rows, "kind"}
    for name, part in schema()["$defs"].items():
        plain = {key for key, about in part["properties"].items() if "$ref" not in str(about)}
        assert plain <= described, name


def test_config_explain() -> None:
    done = nmoe("config", "explain", "train.steps", "quickstart", "--train.steps=7")
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("train.steps  optimizer steps", "bounds       1 to 1_000_000_000", "on resume    free"):
        assert line in done.stdout.splitlines()
    assert "train.steps  = 7, from command line --train.steps=7" in done.stdout.splitlines()
    both = nmoe("config", "explain", "data.source.path").stdout
    assert 'kind = "shards"' in both and 'kind = "mixture"' in both
    assert "model.moe.top_k" in nmoe("config", "explain", "model.moe").stdout
    refused(nmoe("config", "explain", "train.step"), r"train.step: expected a key .*; did you mean train.steps\?")
    refused(nmoe("config", "explain", "lr"), r"lr: expected a key .*; did you mean optim.dense.lr\?")
    refused(nmoe("config", "explain", "top_k"), r"top_k: expected a key .*; did you mean model.moe.top_k\?")
    refused(
        nmoe("config", "explain", "train.steps", "--a.b=1"), r"config explain: expected a CONFIG before overrides.*"
    )


def test_config_schema_is_the_committed_file() -> None:
    assert nmoe("config", "schema").stdout == (ROOT / "configs" / "nmoe.schema.json").read_text()
    assert "extends" in schema()["properties"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("config", "show", "quickstart"),
        ("config", "list"),
        ("runs", "list", "--root", "."),
    ],
    ids=str,
)
def test_what_needs_no_torch_does_not_import_it(arguments: tuple[str, ...], tmp_path: Path) -> None:
    program = f"import sys; from nmoe.cli import main; main({arguments!r}); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=ENVIRON, check=False
    )
    assert done.stdout.splitlines()[-1] == "False", done


@pytest.mark.parametrize(
    "verb", ["run", "plan", "doctor", "config show", "runs export", "generate", "eval", "bench step", "export hf"]
)
def test_each_verb_has_help_with_an_example(verb: str) -> None:
    done = nmoe(*verb.split(), "--help")
    assert done.returncode == 0
    assert f"example: nmoe {verb} " in done.stdout


def test_each_parser_has_help_that_can_be_printed() -> None:
    """Those of groups too: argparse formats what their verbs are about, in which a per cent sign is a placeholder."""
    parsers: list[argparse.ArgumentParser] = [build_parser()[0]]
    for parser in parsers:
        assert parser.format_help().startswith("usage: nmoe")
        named = [Path(word) for word in (parser.epilog or "").split() if word.startswith(("configs/", "docs/"))]
        assert all((ROOT / path).exists() for path in named), named
        parsers.extend(under(parser).values())
    assert len(parsers) > 40


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
UNSET = {name: value for name, value in ENVIRON.items() if name not in WAITING}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, ["passive", "1000"]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", None]),
        ({"GOMP_SPINCOUNT": "7"}, ["passive", "7"]),
    ],
)
def test_how_threads_wait_is_the_users_choice(given: dict[str, str], kept: list[str | None]) -> None:
    program = f"import os; from nmoe.cli import main; main(['--version']); print([*map(os.environ.get, {WAITING})])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=UNSET | given, check=False
    )
    assert done.stdout.splitlines()[-1] == str(kept), done


@pytest.mark.long
def test_how_threads_wait_changes_no_bit(sources: Path, tmp_path: Path) -> None:
    source = Shards(path=str(sources))
    config = tiny(vocab_size=300, batch_size=16, microbatch_size=16, sequence_length=64, steps=2, source=source)
    (tmp_path / "tiny.toml").write_text(dump(config))
    weights: list[bytes] = []
    for policy, spins in (("passive", "1000"), ("passive", "0"), ("active", "unset")):
        chosen = {"OMP_WAIT_POLICY": policy} | ({} if spins == "unset" else {"GOMP_SPINCOUNT": spins})
        done = subprocess.run(
            [sys.executable, "-m", "nmoe", "run", "tiny.toml", f"--run.name={policy}{spins}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=UNSET | chosen | {"OMP_NUM_THREADS": "2"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (
            f"threads        2 on the CPU, OMP_WAIT_POLICY={policy} GOMP_SPINCOUNT={spins}" in done.stdout.splitlines()
        )
        weights.append((tmp_path / "runs" / f"{policy}{spins}" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


def test_interrupted_while_reading(tmp_path: Path) -> None:
    fifo = tmp_path / "config.toml"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "nmoe", "config", "show", str(fifo)]

    def heed_signals() -> None:  # which whoever started the tests may have told its children to ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=ENVIRON, preexec_fn=heed_signals) as process:
        with open(fifo, "wb"):  # returns when the process has opened it, and waits for text
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_gone_ends_it_quietly(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nmoe", "config", "show", str(QUICKSTART)]
    environ = ENVIRON | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environ, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_command_in_a_config_from_elsewhere_is_said_before_the_first_step(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        text = with_line(QUICKSTART.read_text(), r"^\[log\]", '[log]\nalert_command = "curl evil"')
        (folder / "x.toml").write_text(text)
    done = nmoe("run", there / "x.toml", "--train.resume=absent", cwd=here)
    assert done.returncode == 2
    assert f"{there / 'x.toml'}:" in done.stdout and 'has each alert run "curl evil"' in done.stdout
    done = nmoe("run", "x.toml", "--train.resume=absent", cwd=here)
    assert done.returncode == 2 and "curl" not in done.stdout
    refused(
        nmoe("run", "x.toml", "--no-commands", cwd=here),
        r'x.toml:\d+: log.alert_command: expected no command with --no-commands, got "curl evil"; remove the key',
    )


def test_a_run_says_something_before_torch_is_imported(tmp_path: Path) -> None:
    """Its import takes two seconds of a quiet machine, ten of a busy one. One that cannot be imported shows when."""
    (tmp_path / "torch.py").write_text("raise SystemExit(9)\n")
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "nmoe", "run", "quickstart"]
    ours, screen = os.openpty()
    done = subprocess.run(command, cwd=tmp_path, env=environ, stdout=screen, stderr=subprocess.PIPE, check=False)
    os.close(screen)
    with open(ours, "rb", buffering=0) as read:
        assert read.read(1000) == b"config         quickstart is checked; loading torch\r\n", done.stderr
    assert done.returncode == 9


def test_a_script_reads_the_version_that_the_command_prints() -> None:
    import nmoe as package

    assert re.fullmatch(r"\d+\.\d+\.\d+", package.__version__)
    assert nmoe("--version").stdout == f"nmoe {package.__version__}\n"
