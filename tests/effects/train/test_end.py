"""How a run ends: what is only shown decides nothing; what the machine refuses is one line, and the record is true."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.config import dump
from nmoe.config.sections import Config
from nmoe.effects.record import log
from nmoe.effects.record.names import WEIGHTS
from nmoe.effects.train import generate, outcome, run
from nmoe.errors import InputError
from nmoe.pure.model.decode import Sampling
from nmoe.soak import soak
from tests.effects.train import trainings
from tests.effects.train.trainings import changed, events, folder, train

ROOT = Path(__file__).parents[3]


def config_of(sources: Path, work: Path, steps: int = 3) -> Config:
    """A run of a few steps, validated and sampled at its end."""
    return trainings.config(work, "end", sources, steps)


def status(config: Config) -> dict[str, Any]:
    return json.loads((folder(config) / "run.json").read_text())


def command(config: Config, work: Path, *arguments: str) -> list[str]:
    """A run of this config as a process of its own."""
    path = work / "end.toml"
    path.write_text(dump(config))
    return [sys.executable, "-m", "nmoe", "run", str(path), *arguments]


def environment(**change: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **change}


def test_a_sample_of_weights_that_are_not_finite_is_left_out(sources: Path, tmp_path: Path) -> None:
    """One step at a rate that overflows: the loss of the step is finite, validation and logits are not."""
    config = config_of(sources, tmp_path, steps=1)
    group = attrs.evolve(config.optim.dense, lr=1e30)
    config = attrs.evolve(
        config,
        optim=attrs.evolve(config.optim, dense=group),
        schedule=attrs.evolve(config.schedule, warmup_tokens=0),
    )
    code, output = train(config)
    assert code == 0, output
    end = events(config, "end")[-1]
    assert (end["status"], end["exit_code"]) == ("finished", 0) and status(config)["status"] == "finished"
    (line,) = [line for line in output.splitlines() if "all is saved" in line]
    assert "expected the sample, got InputError: weights: expected finite logits" in line
    assert "Traceback" not in output and (folder(config) / WEIGHTS).is_file()


def _refuse(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("this terminal is on fire")


@pytest.mark.parametrize("place", ["sample", "show"])
def test_what_is_only_shown_decides_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(outcome, place, _refuse)
    config = config_of(sources, tmp_path)
    code, output = train(config)
    assert code == 0 and output.count("RuntimeError: this terminal is on fire; all is saved") == 1, output
    assert events(config, "end")[-1]["status"] == status(config)["status"] == "finished"


def full(after: Callable[[str], bool]) -> Callable[..., int]:
    """`os.write` of a disk with no room for a line for which `after` is true."""
    write = os.write

    def refusing(descriptor: int, data: bytes) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".jsonl") and after(f"{name} {bytes(data).decode()}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    return refusing


def test_no_room_for_the_last_event_is_no_failure(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is saved: run.json says how it ended, a line says what is not in events.jsonl."""
    monkeypatch.setattr(log.os, "write", full(lambda text: '"event": "end"' in text))
    config = config_of(sources, tmp_path)
    code, output = train(config)
    assert code == 0 and "expected the end in events.jsonl, got InputError: " in output, output
    assert status(config)["status"] == "finished"


@pytest.mark.parametrize("also", ["", "events.jsonl"])
def test_no_room_for_metrics_is_one_line(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also: str
) -> None:
    """The record says what the process says, in events.jsonl or where that has no room either in run.json."""

    def after(text: str) -> bool:
        return ('"step": 2' in text and "metrics.rank0" in text) or bool(
            also and also in text and '"event": "end"' in text
        )

    monkeypatch.setattr(log.os, "write", full(after))
    config = config_of(sources, tmp_path)
    code, output = train(config)
    path = folder(config) / "metrics.rank0.jsonl"
    assert code == 2 and "Traceback" not in output, output
    assert f"nmoe: {path}: expected room for one more line, got No space left on device; free space" in output
    assert status(config)["status"] == "failed"
    if not also:
        assert (events(config, "end")[-1]["status"], events(config, "end")[-1]["exit_code"]) == ("failed", 2)
    monkeypatch.undo()
    assert train(config)[0] == 0, "the same command goes on"
    assert [line["step"] for line in soak.metrics(folder(config)) if "loss" in line] == [1, 2, 3]


def test_a_limit_of_file_size_is_one_line(sources: Path, tmp_path: Path) -> None:
    """A real one, below what the metrics of 3 steps take but above every other file of the start."""
    config = config_of(sources, tmp_path, steps=200)
    config = attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, every=0))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = subprocess.run(
        command(config, tmp_path), capture_output=True, text=True, env=environment(), preexec_fn=limited, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "metrics.rank0.jsonl: expected room for one more line, got File too large" in done.stderr
    end = events(config, "end")[-1]
    assert (end["status"], end["exit_code"], status(config)["status"]) == ("failed", 2, "failed")


def test_a_line_there_is_no_room_for_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half a line and then is full."""
    write, calls = os.write, 0

    def half(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2])

    with log.open_log(tmp_path, attempt=1) as opened:
        opened.event("before")
        with monkeypatch.context() as patch:
            patch.setattr(log.os, "write", half)
            with pytest.raises(InputError, match="expected room for one more line, got No space left on device"):
                opened.event("long", text="x" * 100)
        opened.event("after")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["before", "after"]


def test_no_room_for_the_weights_is_one_line(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outcome.weights, "save_file", no_room)
    config = config_of(sources, tmp_path)
    code, output = train(config)
    assert code == 2 and f"nmoe: {folder(config) / WEIGHTS}: expected room for the weights, got No space" in output
    assert "Traceback" not in output and events(config, "end")[-1]["exit_code"] == 2
    last = (folder(config) / "console.log").read_text().splitlines()[-1]
    assert last.startswith(f"nmoe: {folder(config) / WEIGHTS}: expected room for the weights, got No space"), last


@contextmanager
def started(config: Config, work: Path, **popen: Any) -> Iterator[subprocess.Popen[str]]:
    """A long run that has taken some steps; it writes nothing to standard error."""
    with open(work / "err.txt", "w", encoding="utf-8") as errors:
        process = subprocess.Popen(command(config, work), text=True, env=environment(), stderr=errors, **popen)
    metrics = folder(config) / "metrics.rank0.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with process:
        yield process
    assert (work / "err.txt").read_text() == ""


def ended(config: Config, process: subprocess.Popen[str], name: str) -> None:
    """It saved its last step, and says so in the record and by its exit code."""
    assert process.wait(60) == 75
    end = events(config, "end")[-1]
    assert (end["status"], end["exit_code"], end["signal"]) == ("interrupted", 75, name)
    assert status(config)["status"] == "interrupted" and soak.newest(folder(config)).step == end["step"]


def endless(sources: Path, work: Path) -> Config:
    config = config_of(sources, work, steps=100_000)
    return attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, every=0))


def test_a_terminal_that_hangs_up_ends_it_as_sigterm_does(sources: Path, tmp_path: Path) -> None:
    config = endless(sources, tmp_path)
    with started(config, tmp_path, stdout=subprocess.DEVNULL) as process:
        process.send_signal(signal.SIGHUP)
        ended(config, process, "SIGHUP")


def test_nohup_outlives_its_terminal(sources: Path, tmp_path: Path) -> None:
    config = changed(config_of(sources, tmp_path), steps=40)

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started(config, tmp_path, stdout=subprocess.DEVNULL, preexec_fn=nohup) as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0
    assert events(config, "end")[-1]["status"] == "finished"


def test_a_reader_that_goes_ends_it_as_sigterm_does(sources: Path, tmp_path: Path) -> None:
    """`nmoe run | head`: both ends of the pipe are this test's."""
    config = endless(sources, tmp_path)
    with started(config, tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        ended(config, process, "SIGPIPE")
    assert train(changed(config, steps=soak.newest(folder(config)).step + 1))[0] == 0, "the same command goes on"


def test_an_encoding_that_cannot_print_the_sample(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, whose sample is Greek and whose terminal is not."""
    config = config_of(sources, tmp_path)
    path = tmp_path / "end.toml"
    path.write_text(dump(config))
    greek = "from nmoe.effects.train import outcome; outcome.sample = lambda *_: '\u03bb x'; import sys, nmoe.cli; "
    done = subprocess.run(
        [sys.executable, "-c", f"{greek}sys.exit(nmoe.cli.main(['run', {str(path)!r}]))"],
        capture_output=True,
        env=environment(PYTHONIOENCODING="iso-8859-1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u03bb x" in done.stdout and events(config, "sample")[-1]["text"] == "\u03bb x"
    assert events(config, "end")[-1]["status"] == "finished"


def test_no_text_is_generated_with_the_weights_of_an_earlier_step(sources: Path, tmp_path: Path) -> None:
    """Trained to step 3, resumed, killed after step 5: `generate` refuses, and the weights of step 3 are kept."""
    config = config_of(sources, tmp_path)
    assert train(config)[0] == 0
    before = (folder(config) / WEIGHTS).read_bytes()

    def killed(inner: Any) -> Any:
        def read(cursor: int) -> Any:
            if cursor == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(cursor)

        return read

    assert train(changed(config, steps=8), world=run.World(read=killed))[0] == -signal.SIGKILL
    with pytest.raises(InputError, match=r"weights.safetensors: .*got no such file"):
        generate.main(folder(config), ["def "], num_tokens=1, sampling=Sampling())
    assert (folder(config) / "attempts" / "1" / WEIGHTS).read_bytes() == before
    assert train(changed(config, steps=8))[0] == 0
    assert generate.main(folder(config), ["def "], num_tokens=1, sampling=Sampling()) == 0


def test_a_second_interrupt_is_recorded_as_the_process_ends(sources: Path, tmp_path: Path) -> None:
    def twice(inner: Any) -> Any:
        def read(cursor: int) -> Any:
            if cursor == 4:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return inner(cursor)

        return read

    config = config_of(sources, tmp_path)
    code, output = train(config, world=run.World(read=twice))
    end = events(config, "end")[-1]
    assert (code, end["status"], end["exit_code"]) == (130, "interrupted", 130), output


def test_a_home_folder_is_one_everywhere(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in every path of a config; none makes a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(sources)
    config = config_of(sources, tmp_path)
    data = attrs.evolve(config.data, source=attrs.evolve(config.data.source, path="~/data"))
    home = attrs.evolve(config, data=data, run=attrs.evolve(config.run, root="~/runs", name="home"))
    code, output = train_at(home, tmp_path)
    assert code == 0, output
    again = attrs.evolve(home, run=attrs.evolve(home.run, name="again"))
    code, output = train_at(changed(again, resume="~/runs/home", steps=4), tmp_path)
    assert code == 0 and "resume         at step 3" in output, output
    warm = attrs.evolve(home, run=attrs.evolve(home.run, name="warm"))
    assert train_at(changed(warm, warm_start="~/runs/home"), tmp_path)[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["again", "home", "warm"]
    assert not (tmp_path / "~").exists()
    code, output = train_at(attrs.evolve(home, run=attrs.evolve(home.run, root="~nobody-here/runs")), tmp_path)
    assert code == 2 and "~nobody-here/runs: expected the home folder of a user, got none" in output


def train_at(config: Config, work: Path) -> tuple[int, str]:
    """As `train`, with the output beside the run root."""
    output = work / "out.txt"
    code = trainings.forked(lambda: run.main(config, {}, ("nmoe", "run"), "x"), output)
    return code, output.read_text()


def test_samples_on_the_way_change_no_bit(sources: Path, tmp_path: Path) -> None:
    """One after each step but the last, whose own comes at the end; a prompt of nothing begins at the end of text."""
    weights: list[bytes] = []
    for name, every, prompt in (("without", 0, "def "), ("with", 1, "class "), ("empty", 2, "")):
        config = config_of(sources, tmp_path)
        run_ = attrs.evolve(config.run, name=name)
        config = attrs.evolve(config, run=run_, sample=attrs.evolve(config.sample, every=every, prompt=prompt))
        code, output = train(config)
        assert code == 0, output
        samples = events(config, "sample")
        assert [event["step"] for event in samples] == {0: [3], 1: [1, 2, 3], 2: [2, 3]}[every]
        assert all(event["prompt"] == prompt and event["text"] for event in samples)
        said = (folder(config) / "console.log").read_text()
        assert said.count(f"{prompt!r} continued:") == len(samples)
        weights.append((folder(config) / WEIGHTS).read_bytes())
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_of_a_run_has_the_mode_of_the_umask(sources: Path, tmp_path: Path, umask: int) -> None:
    """What safetensors writes too, so that a group that may read the folder may read the weights."""
    config = config_of(sources, tmp_path)
    before = os.umask(umask)
    try:
        code, output = train(config)
    finally:
        os.umask(before)
    assert code == 0, output
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder(config).rglob("*") if path.is_file()}
    assert WEIGHTS in modes and {name: oct(mode) for name, mode in modes.items() if mode != 0o666 & ~umask} == {}


def test_a_sample_that_fails_on_the_way_ends_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "sample", _refuse)
    config = config_of(sources, tmp_path)
    config = attrs.evolve(config, sample=attrs.evolve(config.sample, every=2))
    code, output = train(config)
    assert code == 0 and events(config, "end")[-1]["status"] == "finished"
    assert "step 2: expected a sample, got RuntimeError: this terminal is on fire; training continues" in output


def test_a_screen_that_cannot_be_recorded_ends_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has no room for the line of step 2: one warning, no later line, and the training is whole."""
    write = os.write

    def refusing(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("console.log") and b"step 2/3" in data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(log.os, "write", refusing)
    config = config_of(sources, tmp_path)
    code, output = train(config)
    assert code == 0, output
    output = (Path(config.run.root) / f"{config.run.name}.txt").read_text()
    assert output.count("No space left on device") == 1 and "; the screen is recorded no further" in output
    kept = (folder(config) / "console.log").read_text()
    assert "step 1/3" in kept and "step 2/3" not in kept and "finished" not in kept


def test_a_narrow_terminal_gets_whole_lines_and_the_record_no_control_codes(sources: Path, tmp_path: Path) -> None:
    """A real terminal of 60 columns, with the live footer on it."""
    config = config_of(sources, tmp_path)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environ = {name: value for name, value in environment(TERM="xterm").items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command(config, tmp_path), stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        screen = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the terminal's other end is closed
                break
            if not part:
                break
            screen += part
        os.close(ours)
    said = (folder(config) / "console.log").read_text()
    assert process.returncode == 0, screen.decode()
    assert b"\x1b[" in screen and "\x1b" not in said, "the footer is on the screen alone"
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3", "3"] and max(map(len, lines)) <= 60, lines
    assert all("loss" in line and "tok/s" in line and "eta" in line for line in lines[:3])
    assert all(line.encode() in screen for line in lines)
