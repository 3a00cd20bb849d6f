"""What a launcher sees and does: real processes, real signals. The long ones are stopped, restarted and abandoned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import pytest

from nmoe.config import dump
from nmoe.config.sections import Config, Shards
from nmoe.effects.parallel import launch
from nmoe.effects.parallel.launch import from_environment
from nmoe.errors import InputError
from tests.effects.parallel.rank_runs import environment
from tests.effects.train.tiny import tiny

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0


def config_of(sources: Path, root: Path) -> Config:
    """A run that does not end by itself, saved at every fifth step."""
    config = tiny(vocab_size=304, source=Shards(path=str(sources)), batch_size=2, microbatch_size=1, steps=1_000_000)
    return attrs.evolve(
        config,
        run=attrs.evolve(config.run, root=str(root / "runs"), name="run"),
        log=attrs.evolve(config.log, every=1, footer=False),
        validation=attrs.evolve(config.validation, every=1000, tokens=32),
        checkpoint=attrs.evolve(config.checkpoint, every=5),
    )


class Started:
    """A launcher and what it wrote."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.output = folder / "runs" / "run", folder / "output.txt"
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(command, env=environ, stdout=file, stderr=file, start_new_session=True)

    def steps(self) -> int:
        """The last step that the first rank told."""
        path = self.folder / "metrics.rank0.jsonl"
        told = path.read_text().splitlines() if path.exists() else []
        return json.loads(told[-1])["step"] if told else 0

    def until(self, step: int) -> None:
        """Wait for a step."""
        end = time.monotonic() + PATIENCE_S
        while self.steps() < step:
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """Processes of the ranks, in their order."""
        found: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                told: dict[str, str] = {}
                for each in path.read_text().split("\0"):
                    name, _, value = each.partition("=")
                    told[name] = value
                words = (path.parent / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if "nmoe" in words and str(self.folder.parents[1] / "tiny.toml") in words and "RANK" in told:
                found[int(told["RANK"])] = int(path.parent.name)
        return [found[rank] for rank in sorted(found)]

    def wait(self, seconds: float = PATIENCE_S) -> int:
        return self.process.wait(seconds)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def last_line(self) -> str:
        return self.text().rstrip().splitlines()[-1]


@pytest.fixture
def started(sources: Path, tmp_path: Path) -> Iterator[list[Started]]:
    """Where a test puts what it started; all of it is ended."""
    (tmp_path / "tiny.toml").write_text(dump(config_of(sources, tmp_path)))
    found: list[Started] = []
    yield found
    for each in found:
        for pid in (*each.ranks(), each.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        each.process.wait()


def run(started: list[Started], folder: Path, *arguments: str) -> Started:
    command = [sys.executable, "-m", "nmoe", "run", str(folder / "tiny.toml"), "--gpus", "2", *arguments]
    started.append(Started(folder, command))
    return started[-1]


def test_a_dead_rank_ends_all_and_a_signal_to_the_launcher_saves_on_all(started: list[Started], tmp_path: Path) -> None:
    first = run(started, tmp_path)
    first.until(6)
    ranks = first.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert first.wait() == 128 + signal.SIGKILL
    assert first.ranks() == []
    assert first.last_line().startswith(
        "nmoe: rank 1: expected the end of all ranks together, got exit code -9 (SIGKILL); "
    )

    second = run(started, tmp_path)
    second.until(second.steps() + 3)
    os.kill(second.process.pid, signal.SIGTERM)
    assert second.wait() == 75, second.text()
    assert second.last_line().startswith("interrupted")
    events = [json.loads(line) for line in (second.folder / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert resumed["step"] >= 5 and resumed["step"] % 5 == 0, "of a checkpoint that was whole when the rank died"
    assert events[-1]["exit_code"] == 75 and events[-1]["signal"] == "SIGTERM"
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert saved[-1] == events[-1]["step"]


@pytest.mark.long
@pytest.mark.parametrize("experts", [1, 2])
def test_a_stopped_rank_is_named_and_killed_with_the_stacks_of_all(
    started: list[Started], tmp_path: Path, experts: int
) -> None:
    one = run(started, tmp_path, f"--parallel.experts={experts}", "--parallel.timeout_s=6")
    one.until(6)
    os.kill(one.ranks()[1], signal.SIGSTOP)
    began = time.monotonic()
    assert one.wait() == launch.EXIT_HUNG
    assert time.monotonic() - began > 5 and one.ranks() == []
    assert one.last_line().startswith(
        "nmoe: rank 1: expected a heartbeat within 6 s (parallel.timeout_s), got none after step "
    )
    assert "(stopped by a signal)" in one.last_line()
    for rank in (0, 1):
        (stacks,) = [part for part in one.text().split("nmoe: rank ")[1:] if part.startswith(f"{rank}: its stacks")]
        assert "in train_until" in stacks, stacks


@pytest.mark.long
def test_torchrun_starts_all_again_from_the_last_checkpoint(started: list[Started], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    config = str(tmp_path / "tiny.toml")
    started.append(Started(tmp_path, [*torchrun, "-m", "nmoe", "run", config, "--train.steps=60"]))
    started[0].until(8)
    os.kill(started[0].ranks()[1], signal.SIGKILL)
    assert started[0].wait() == 0, started[0].text()
    events = [json.loads(line) for line in (started[0].folder / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert resumed["attempt"] == 2 and resumed["step"] >= 5
    assert events[-1]["status"] == "finished" and events[-1]["step"] == 60
    told = [json.loads(line)["step"] for line in (started[0].folder / "metrics.rank1.jsonl").read_text().splitlines()]
    assert told == list(range(1, 61)), "each step once, on every rank"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_ranks_do_not_outlive_a_launcher_that_ends_while_they_start(
    started: list[Started], tmp_path: Path, number: signal.Signals
) -> None:
    one = run(started, tmp_path)
    end = time.monotonic() + PATIENCE_S
    while len(one.ranks()) < 2:
        assert one.process.poll() is None and time.monotonic() < end, one.text()
        time.sleep(0.005)
    os.kill(one.process.pid, number)
    assert one.wait(60) == (-number if number == signal.SIGKILL else 75), one.text()
    end = time.monotonic() + PATIENCE_S
    while one.ranks():
        assert time.monotonic() < end, "ranks train unwatched"
        time.sleep(0.05)
    assert not one.folder.exists(), one.text()


def test_a_rank_whose_launcher_is_gone_before_it_asked_for_the_signal_does_not_begin() -> None:
    """The launcher dies between the fork and the request: no signal will come, so the parent is looked at."""
    code = (
        "import os, signal, sys; from nmoe.effects.parallel import launch\n"
        "launch._tie_to(os.getppid() + (sys.argv[1] == 'gone')); os.write(1, b'begins')"
    )
    for parent, said, ended in (("here", b"begins", 0), ("gone", b"", launch.EXIT_ORPHAN)):
        done = subprocess.run([sys.executable, "-c", code, parent], cwd=ROOT, capture_output=True, check=False)
        assert (done.stdout, done.returncode) == (said, ended), done.stderr


@pytest.mark.long
def test_ranks_whose_launcher_was_killed_save_and_end(started: list[Started], tmp_path: Path) -> None:
    one = run(started, tmp_path)
    one.until(3)
    os.kill(one.process.pid, signal.SIGKILL)
    one.wait()
    end = time.monotonic() + PATIENCE_S
    while one.ranks():
        assert time.monotonic() < end
        time.sleep(0.1)
    last = json.loads((one.folder / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("end", 75)


def test_what_a_launcher_says_is_read_once_and_has_to_fit() -> None:
    told = from_environment({**environment(3, 8, 1234), "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (told.rank, told.world, told.local_rank, told.local_world) == (3, 8, 3, 8)
    assert (told.address, told.port, told.launched, told.restart) == ("127.0.0.1", 1234, True, 2)
    assert not told.hosts_store and from_environment(environment(0, 8, 1234)).hosts_store
    assert not from_environment({**environment(0, 8, 1), "TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store
    alone = from_environment({})
    assert (alone.rank, alone.world, alone.launched) == (0, 1, False)
    for environ, says in (
        ({"RANK": "x", "WORLD_SIZE": "y"}, r"RANK: .* got 'x'; .*\nWORLD_SIZE: .* got 'y'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected less than WORLD_SIZE = 2, got 2"),
        ({"WORLD_SIZE": "2"}, r"(?s)RANK: .*MASTER_ADDR: .*MASTER_PORT: "),
    ):
        with pytest.raises(InputError, match=says):
            from_environment(environ)
