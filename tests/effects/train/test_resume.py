"""A run that goes on is the run it would have been: bit for bit, from any step, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from nmoe.config.sections import Config
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader, weights
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.writer import open_writer
from nmoe.effects.device.process import Runtime
from nmoe.effects.record.names import ATTEMPTS, WEIGHTS
from nmoe.effects.train import build, resume, run
from nmoe.effects.train.outcome import EXIT_UNSAVED
from nmoe.errors import InputError
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core import tree
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.soak import soak
from tests.effects.train import trainings
from tests.effects.train.tiny import tiny
from tests.effects.train.trainings import changed, content, events, folder, train

STEPS = 16


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished training with a checkpoint of every step."""
    config = trainings.config(tmp_path_factory.mktemp("whole"), "whole", sources, STEPS)
    code, told = train(config)
    assert code == 0, told
    return config


def other(config: Config, work: Path, name: str) -> Config:
    """The same training in another folder."""
    return attrs.evolve(config, run=attrs.evolve(config.run, root=str(work / "runs"), name=name))


def checkpoint(config: Config, step: int) -> Path:
    """The folder of a checkpoint."""
    return next((folder(config) / "checkpoints").glob(f"step-{step:08d}.*"))


def same_end(config: Config, whole: Config, after: int = 0) -> None:
    """The end is that of the whole training, and the lines of metrics after a step are."""
    one, two = soak.newest(folder(config)), soak.newest(folder(whole))
    assert {name: each.digest for name, each in one.tensors.items()} == {
        name: each.digest for name, each in two.tensors.items()
    }
    assert one.meta["cursor"] == two.meta["cursor"] and one.meta["validations"] == two.meta["validations"]
    assert (folder(config) / WEIGHTS).read_bytes() == (folder(whole) / WEIGHTS).read_bytes()
    lines = [line for line in soak.metrics(folder(whole)) if line["step"] > after]
    assert soak.metrics(folder(config)) == lines


@pytest.mark.parametrize("step", [9])
def test_from_any_step_the_end_is_the_same(whole: Config, tmp_path: Path, step: int) -> None:
    again = changed(other(whole, tmp_path, "again"), resume=str(checkpoint(whole, step)))
    code, told = train(again)
    assert code == 0, told
    same_end(again, whole, after=step)
    (resumed,) = events(again, "resume")
    assert resumed["step"] == step and resumed["from"] == str(checkpoint(whole, step))


def test_saves_change_no_bit(whole: Config, tmp_path: Path) -> None:
    for name, every, asynchronous in (("without", 0, True), ("waiting", 3, False)):
        config = other(whole, tmp_path, name)
        settings = attrs.evolve(config.checkpoint, every=every, asynchronous=asynchronous)
        config = attrs.evolve(config, checkpoint=settings)
        assert train(config)[0] == 0
        same_end(config, whole)
        saved = [each["step"] for each in events(config, "checkpoint")]
        assert saved == ([STEPS] if every == 0 else [3, 6, 9, 12, 15, 16])
        assert all(each["bytes"] > 500_000 and each["seconds"] > 0 for each in events(config, "checkpoint"))


class At:
    """Calls something at the head of the step after `step` steps, once."""

    def __init__(self, step: int, call: Any, batch_size: int = 2) -> None:
        self.step, self.call, self.batch_size = step, call, batch_size

    def __call__(self, inner: Any) -> Any:
        def read(cursor: int) -> Any:
            if cursor == self.step * self.batch_size:
                self.call()
            return inner(cursor)

        return read


def send(*numbers: signal.Signals) -> Any:
    def call() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return call


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        pytest.param((signal.SIGTERM,), 75, marks=pytest.mark.long),
        ((signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1), 75),
        pytest.param((signal.SIGINT,), 130, marks=pytest.mark.long),
        pytest.param((signal.SIGINT, signal.SIGINT), 130, marks=pytest.mark.long),
        pytest.param((signal.SIGKILL,), -9, marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_goes_on_in_its_folder(
    whole: Config, tmp_path: Path, numbers: tuple[signal.Signals, ...], code: int
) -> None:
    config = attrs.evolve(other(whole, tmp_path, "stopped"), checkpoint=attrs.evolve(whole.checkpoint, every=5))
    found, told = train(config, world=run.World(read=At(12, send(*numbers))))
    assert found == code, told
    noted = code == 75 or numbers == (signal.SIGINT,)
    saved = [each["step"] for each in events(config, "checkpoint")]
    if noted:
        assert saved == [5, 10, 13], "a noted signal saves the step in progress"
        end = events(config, "end")[-1]
        assert (end["status"], end["exit_code"], end["signal"]) == ("interrupted", code, numbers[0].name)
    code, told = train(config)
    assert code == 0, told
    same_end(config, whole)
    assert [each["attempt"] for each in events(config, "start")] == [1, 2]
    assert events(config, "resume")[0]["step"] in ((13,) if noted else (5, 10))
    attempts = [
        json.loads(line)["attempt"] for line in (folder(config) / "metrics.rank0.jsonl").read_text().split("\n")[:-1]
    ]
    assert attempts == sorted(attempts) and set(attempts) == {1, 2}
    assert (folder(config) / ATTEMPTS / "1" / "config.toml").is_file()


def test_a_finished_run_may_have_more_steps(whole: Config, tmp_path: Path) -> None:
    config = changed(other(whole, tmp_path, "longer"), steps=STEPS - 4)
    assert train(config)[0] == 0
    assert train(changed(config, steps=STEPS))[0] == 0
    lines = [line for line in soak.metrics(folder(config)) if "loss" in line]
    assert lines == [line for line in soak.metrics(folder(whole)) if "loss" in line]
    before = content(folder(config))
    code, told = train(config)
    assert code == 2 and f"train.steps: expected at least the {STEPS} steps taken, got {STEPS - 4}; " in told
    assert content(folder(config)) == before
    assert train(changed(config, steps=STEPS))[0] == 0, "nothing is left to do"
    assert [line for line in soak.metrics(folder(config)) if "loss" in line] == lines


def test_what_resume_says_is_what_happens(whole: Config, tmp_path: Path) -> None:
    config = changed(other(whole, tmp_path, "a"), steps=4)
    assert train(config)[0] == 0
    before = content(folder(config))
    for value, says in (
        ("never", 'a new run folder with train.resume = "never", got '),
        (str(tmp_path / "nowhere"), "train.resume: expected a run folder or a checkpoint, got "),
    ):
        code, told = train(changed(config, resume=value))
        assert code == 2 and says in told
    assert content(folder(config)) == before

    back = changed(config, resume=str(checkpoint(config, 2)), steps=6)
    assert train(back)[0] == 0, "a path into its own folder takes it back"
    assert [line["step"] for line in soak.metrics(folder(config)) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [each["step"] for each in events(config, "resume")] == [2]

    branch = changed(other(whole, tmp_path, "b"), resume=str(folder(config)), steps=8)
    late = attrs.evolve(branch, checkpoint=attrs.evolve(branch.checkpoint, every=0))
    assert train(late, world=run.World(read=At(7, send(signal.SIGKILL))))[0] == -9, "with nothing saved of its own"
    assert train(branch)[0] == 0
    assert [line["step"] for line in soak.metrics(folder(branch)) if "loss" in line] == [7, 8]
    assert train(changed(branch, steps=9))[0] == 0, "a branch goes on from what is its own"
    assert [each["step"] for each in events(branch, "resume")] == [6, 6, 8]

    (tmp_path / "runs" / "notes").mkdir()
    code, told = train(other(whole, tmp_path, "notes"))
    assert code == 2 and "which exists and holds no config.toml; " in told
    assert list((tmp_path / "runs" / "notes").iterdir()) == []


def test_without_a_checkpoint_it_starts_anew_in_its_folder(whole: Config, tmp_path: Path) -> None:
    config = attrs.evolve(other(whole, tmp_path, "early"), checkpoint=attrs.evolve(whole.checkpoint, every=0))
    assert train(config, world=run.World(read=At(3, send(signal.SIGKILL))))[0] == -9
    assert [line["step"] for line in soak.metrics(folder(config))] == [1, 2, 3]
    assert train(config)[0] == 0
    same_end(config, whole)


def test_another_run_is_refused_key_by_key(whole: Config, tmp_path: Path, sources: Path) -> None:
    config = changed(other(whole, tmp_path, "identity"), steps=3)
    assert train(config)[0] == 0
    before = content(folder(config))
    wide = attrs.evolve(config.model, moe=attrs.evolve(config.model.moe, top_k=3))
    code, told = train(attrs.evolve(config, model=wide, run=attrs.evolve(config.run, seed=5)))
    assert code == 2
    assert "nmoe: model.moe.top_k: expected 2 as in " in told and "got 3; set it back" in told
    assert "nmoe: run.seed: expected 0 as in " in told
    assert content(folder(config)) == before, "a refused run leaves everything as it was"

    longer = changed(config, steps=4)
    code, told = train(attrs.evolve(longer, model=wide), accept=("model.moe.top_k",))
    assert code == 0 and events(config, "resume")[-1]["accepted"] == {"model.moe.top_k": [2, 3]}, told
    assert train(changed(attrs.evolve(longer, model=wide), steps=5), accept=("model.moe.top_k",))[0] == 0

    # accepted or not, tensors of another shape do not fit
    deep = attrs.evolve(config.model, hidden_size=64)
    code, told = train(attrs.evolve(longer, model=deep), accept=("model.hidden_size", "model.moe.top_k"))
    assert code == 2 and "model.hidden_size: expected 32 as in " in told
    assert told.endswith("got 64; set it back, or train under another run.name")


def test_other_data_or_another_tokenizer_is_refused(whole: Config, tmp_path: Path, sources: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(sources, moved)
    config = changed(other(whole, tmp_path, "data"), steps=3)
    config = attrs.evolve(
        config, data=attrs.evolve(config.data, source=attrs.evolve(config.data.source, path=str(moved)))
    )
    assert train(config)[0] == 0
    shutil.rmtree(moved)
    shutil.copytree(sources, tmp_path / "again")
    elsewhere = attrs.evolve(config.data, source=attrs.evolve(config.data.source, path=str(tmp_path / "again")))
    config = changed(attrs.evolve(config, data=elsewhere), steps=4)
    assert train(config)[0] == 0, "the same data at another place"
    manifest = tmp_path / "again" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", "{ ", 1))
    code, told = train(changed(config, steps=5))
    assert code == 2 and "data.identity: " in told and "--accept data.identity" in told
    code, told = train(changed(config, steps=5), accept=("data.identity",))
    assert code == 0, told


def damage(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_passed_over(whole: Config, tmp_path: Path) -> None:
    config = changed(other(whole, tmp_path, "damaged"), steps=8)
    assert train(config)[0] == 0
    damage(checkpoint(config, 8))
    (checkpoint(config, 7) / "manifest.json").unlink()
    code, told = train(changed(config, steps=STEPS))
    assert code == 0, told
    assert soak.newest(folder(config)).tensors == soak.newest(folder(whole)).tensors
    assert events(config, "resume")[0]["step"] == 6
    problems = [each["problem"] for each in events(config, "checkpoint_damaged")]
    assert len(problems) == 2 and "step-00000008" in problems[0] and "step-00000007" in problems[1]
    for path in (folder(config) / "checkpoints").rglob("*.safetensors"):
        os.truncate(path, path.stat().st_size - 1)
    before = content(folder(config))
    code, told = train(changed(config, steps=STEPS + 1))
    assert code == 2 and "expected a valid checkpoint, got " in told, "never silently from zero"
    assert content(folder(config)) == before


@attrs.frozen(kw_only=True)
class Full(Disk):
    """A disk that is full, or cannot be written, after so many files."""

    files: int
    number: int = errno.ENOSPC
    made: list[Path] = attrs.Factory(list)

    def create(self, path: Path, size: int) -> int:
        self.made.append(path)
        if self.files < len(self.made) <= self.files + 2:
            raise OSError(self.number, os.strerror(self.number), str(path))
        return super().create(path, size)


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.long)])
def test_a_disk_that_cannot_be_written(whole: Config, tmp_path: Path, number: int) -> None:
    """Two files a save: the second and third save fail."""
    stop = attrs.evolve(other(whole, tmp_path, "stop"), checkpoint=attrs.evolve(whole.checkpoint, every=4))
    code, told = train(stop, world=run.World(fs=Full(files=2, number=number)))
    assert code == EXIT_UNSAVED, told
    assert f"nmoe: {folder(stop)}/checkpoints: the save of step 8" in told and os.strerror(number) in told
    steps = [line["step"] for line in soak.metrics(folder(stop)) if "loss" in line]
    assert steps[-1] == 12, "it trains on to the next save point"
    assert events(stop, "end")[-1]["exit_code"] == EXIT_UNSAVED
    code, told = train(stop)
    assert code == 0, told
    same_end(stop, whole)

    settings = attrs.evolve(stop.checkpoint, on_error="continue")
    on = attrs.evolve(other(whole, tmp_path, "continue"), checkpoint=settings)
    code, told = train(on, world=run.World(fs=Full(files=2, number=number)))
    assert code == 0, told
    same_end(on, whole)
    assert [each["step"] for each in events(on, "checkpoint_failed")] == [8, 12]
    assert [each["step"] for each in events(on, "checkpoint")] == [4, 16]


def test_a_state_that_is_never_saved_is_no_success(whole: Config, tmp_path: Path) -> None:
    settings = attrs.evolve(whole.checkpoint, every=0, on_error="continue")
    config = attrs.evolve(changed(other(whole, tmp_path, "last"), steps=3), checkpoint=settings)
    code, told = train(config, world=run.World(fs=Full(files=0)))
    assert code == EXIT_UNSAVED and "No space left" in told


@attrs.frozen(kw_only=True)
class Slow(Disk):
    """A disk that takes its time, from the second file on."""

    made: list[Path] = attrs.Factory(list)

    def create(self, path: Path, size: int) -> int:
        self.made.append(path)
        if len(self.made) > 2:
            time.sleep(600)
        return super().create(path, size)


def test_the_grace_time_is_kept_and_the_last_commit_stays(whole: Config, tmp_path: Path) -> None:
    settings = attrs.evolve(whole.checkpoint, every=4, grace_s=1.0)
    config = attrs.evolve(other(whole, tmp_path, "grace"), checkpoint=settings)
    code, told = train(config, world=run.World(fs=Slow(), read=At(6, send(signal.SIGTERM))))
    assert code == 75, told
    assert "grace time was over" in events(config, "end")[-1]["error"]
    code, told = train(config)
    assert code == 0, told
    assert events(config, "resume")[0]["step"] == 4
    same_end(config, whole)


def test_a_validation_that_is_cut_short_is_made_up_for(whole: Config, tmp_path: Path) -> None:
    config = attrs.evolve(whole, validation=attrs.evolve(whole.validation, every=4))
    config, other_end = other(config, tmp_path, "cut"), other(config, tmp_path, "end")
    assert train(other_end)[0] == 0

    def worse(env: Any) -> Any:
        def loss(*arguments: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                os.kill(os.getpid(), signal.SIGTERM)
            return env.ops.linear_cross_entropy(*arguments, **named)

        return attrs.evolve(env, ops=attrs.evolve(env.ops, linear_cross_entropy=loss))

    assert train(config, world=run.World(env=worse))[0] == 75
    assert [line["step"] for line in soak.metrics(folder(config))] == [1, 2, 3, 4], "no validation of a part"
    (folder(config) / "tokenizer.json").unlink()
    code, told = train(config)
    assert code == 0, told
    same_end(config, other_end)
    assert (folder(config) / "tokenizer.json").is_file()


def test_too_many_nonfinite_steps_leave_no_checkpoint_that_cannot_go_on(whole: Config, tmp_path: Path) -> None:
    config = changed(other(whole, tmp_path, "burst"), max_nonfinite_steps=3)
    config = attrs.evolve(config, log=attrs.evolve(config.log, every=100))
    world = run.World(env=lambda env: _nan_from(env, 10))
    code, told = train(config, world=world)
    assert code == 5, told
    assert events(config, "checkpoint")[-1]["step"] == 12, "two in a row may still recover"
    code, told = train(config)
    assert code == 0, told


def _nan_from(env: Any, step: int) -> Any:
    """The loss of every step after `step` steps is NaN."""
    calls = [0]

    def loss(*arguments: Any, **named: Any) -> Any:
        found = env.ops.linear_cross_entropy(*arguments, **named)
        if not torch.is_grad_enabled():
            return found
        calls[0] += 1
        return tuple(each * (float("nan") if calls[0] > 2 * step else 1.0) for each in found)  # two microbatches

    return attrs.evolve(env, ops=attrs.evolve(env.ops, linear_cross_entropy=loss))


def test_a_second_trainer_is_refused(whole: Config, tmp_path: Path) -> None:
    config = other(whole, tmp_path, "one")

    def second() -> None:
        code, told = train(attrs.evolve(config, run=attrs.evolve(config.run)))
        (tmp_path / "second").write_text(f"{code} {told}")

    assert train(config, world=run.World(read=At(6, second)))[0] == 0
    told = (tmp_path / "second").read_text()
    assert told.startswith("2 ") and "one trainer at a time" in told
    same_end(config, whole)


def test_a_warm_start_has_the_weights_and_nothing_else(whole: Config, tmp_path: Path, sources: Path) -> None:
    blueprint = make_blueprint(whole)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    exact = weights.of_path(Disk(), checkpoint(whole, STEPS), blueprint)
    for path in (folder(whole), checkpoint(whole, STEPS), folder(whole) / WEIGHTS):
        start = weights.of_path(Disk(), path, blueprint)
        state, _ = build.fresh(whole, blueprint, rt)
        resume.put_(state, blueprint, start)
        for (name, ours), (_, theirs) in zip(tree.leaves(state.params), tree.leaves(exact.params), strict=True):
            assert torch.equal(ours.detach(), theirs), name
        assert torch.equal(state.router_bias, exact.router_bias) and exact.router_bias.abs().sum() > 0
        assert not any(moment.any() for arena in state.arenas for moment in arena.moments)
    config = changed(other(whole, tmp_path, "warm"), warm_start=str(folder(whole)), steps=2)
    assert train(config)[0] == 0
    cold = changed(other(whole, tmp_path, "cold"), steps=2)
    assert train(cold)[0] == 0
    first = soak.metrics(folder(config))[0]
    assert first["step"] == 1 and first["loss"] < soak.metrics(folder(cold))[0]["loss"] - 0.5
    code, told = train(changed(other(whole, tmp_path, "x"), warm_start=str(tmp_path)))
    assert code == 2 and "train.warm_start: expected a run, a checkpoint or weights.safetensors, got " in told
    assert not (tmp_path / "runs" / "x").exists()


def test_a_bf16_state_comes_back_with_its_low_halves(tmp_path: Path, sources: Path) -> None:
    config = tiny(compute="bf16", vocab_size=304)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    blueprint = make_blueprint(config)
    state, _ = build.fresh(config, blueprint, rt)
    blank, _ = build.blank(config, blueprint, rt)
    names = {piece.name: piece for piece in resume.pieces(state, blueprint)}
    assert {"router_bias", "spikes", "updates", "skipped", "skipped_in_row"} < set(names)
    assert names["param/blocks.1.ffn.up/remainder"].tensor.dtype is torch.int16
    assert "param/blocks.1.ffn.router/remainder" not in names, "routers are stored in fp32"
    saved = sum(piece.tensor.nbytes for piece in names.values())
    assert saved == run.plan(config, blueprint, mfu=1.0).checkpoint + state.router_bias.nbytes + 4 * 8
    del blank


def test_a_warm_start_in_bf16_has_the_low_halves(tmp_path: Path) -> None:
    """The fp32 masters of the new run are those of the old one, to the last bit."""
    config = tiny(compute="bf16", vocab_size=304)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    blueprint = make_blueprint(config)
    old, _ = build.fresh(config, blueprint, rt)
    with open_writer(Disk(), tmp_path / "checkpoints", keep=Keep()) as saving:
        saving.save(resume.pieces(old, blueprint), step=1, meta={})
    new, _ = build.blank(config, blueprint, rt)
    resume.put_(new, blueprint, weights.of_path(Disk(), tmp_path, blueprint))
    before, after = ({each.name: each.tensor for each in resume.pieces(one, blueprint)} for one in (old, new))
    assert before["param/embed/remainder"].any(), "there is something to lose"
    kept = [name for name in before if name.endswith(("/value", "/remainder"))]
    assert [name for name in kept if not torch.equal(before[name], after[name])] == []
    wide = attrs.evolve(config, model=attrs.evolve(config.model, hidden_size=64))
    with pytest.raises(InputError, match=r"expected .param/embed/value. as BF16 \[304, 64\], got BF16 \[304, 32\]"):
        weights.of_path(Disk(), tmp_path, make_blueprint(wide))


def test_the_same_state_by_any_number_of_ranks(whole: Config, tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1: every save, load and reshard leaves the digest of each tensor as it was."""
    config = changed(other(whole, tmp_path, "ranks"), steps=4)
    assert train(config)[0] == 0
    root = folder(config) / "checkpoints"
    before = soak.newest(folder(config))
    for world in (2, 4, 1):
        assert soak.reshard(root, world) == 0
        after = soak.newest(folder(config))
        assert len(after.files) == world and after.tensors == before.tensors and after.meta == before.meta
        assert reader.verify(Disk(), root / after.name(), manifests.read(Disk(), root / after.name())) == ()
    config = changed(config, steps=STEPS)
    assert train(config)[0] == 0
    lines = [line for line in soak.metrics(folder(whole)) if "loss" in line]
    assert [line for line in soak.metrics(folder(config)) if "loss" in line] == lines


def test_one_of_each_fault(tmp_path: Path) -> None:
    before = threading.active_count()
    outcome = soak.soak(tmp_path, steps=30, faults=19, seed=11)
    assert outcome.problems == ()
    assert sum(outcome.struck.values()) == 19 and set(outcome.struck.values()) == {1}
    assert outcome.attempts > 5 and threading.active_count() == before
