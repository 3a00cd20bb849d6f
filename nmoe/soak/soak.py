"""`nmoe soak`: a real training under hundreds of faults has to end bit for bit where it ends without any.

The trainings are small ones on this package's own sources. Each attempt is a process forked from this one, which has
imported everything and computed nothing, so that a restart takes a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from nmoe.config import sections as s
from nmoe.effects.checkpoint import reader, writer
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.manifest import DTYPES, Manifest
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.store import shard_writer
from nmoe.effects.record.names import CHECKPOINTS, WEIGHTS
from nmoe.effects.terminal import say, warn
from nmoe.effects.train import run
from nmoe.effects.train.outcome import EXIT_UNSAVED
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import share, whole
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.units import duration
from nmoe.pure.watch.metrics import is_timed
from nmoe.soak import faults as worlds
from nmoe.soak.forked import PATIENCE_S, forked, tail
from nmoe.soak.plan import KINDS, Fault, plan

VOCAB = 300
KEEP = 3
REPORT_S = 10.0


@attrs.frozen(kw_only=True)
class Outcome:
    """What a soak found."""

    struck: Mapping[str, int]  # faults, by kind
    attempts: int
    seconds: float
    digest: str  # of all tensors at the end
    problems: tuple[str, ...]  # nothing when the soak held


def main(hours: float, seed: int, steps: int, faults: int) -> int:
    """Soak for `hours`, or once when they are 0; every round with another seed.

    returns  exit code 0, or 1 when a round did not end where it should have
    Raises:  InputError for arguments out of range.
    """
    problems = [f"--hours: expected at least 0, got {hours}; 0 is one round"] if hours < 0 else []
    if not 1 <= faults <= steps - 3:
        problems.append(
            f"--faults: expected 1 to {steps - 3}, at most one a step, got {faults}; lower it or raise --steps"
        )
    if problems:
        raise InputError(*problems)
    began = time.monotonic()
    while True:
        with tempfile.TemporaryDirectory(prefix="nmoe-soak-") as work:
            outcome = soak(Path(work), steps=steps, faults=faults, seed=seed)
        kinds = "  ".join(f"{kind} {count}" for kind, count in outcome.struck.items())
        say(f"faults         {sum(outcome.struck.values())} of {len(outcome.struck)} kinds: {kinds}")
        say(f"seed {seed}  {outcome.attempts} attempts  {duration(outcome.seconds)}  digest {outcome.digest}")
        for problem in outcome.problems:
            warn(f"nmoe: seed {seed}: {problem}")
        if outcome.problems:
            return 1
        say("held           weights, state and metrics are those of the training without faults, bit for bit")
        seed += 1
        if time.monotonic() - began >= 3600 * hours:
            return 0


def soak(work: Path, *, steps: int, faults: int, seed: int, kinds: Sequence[str] = KINDS) -> Outcome:
    """One round: a training without faults, the same under a plan of faults, and the two compared.

    work     an empty folder
    """
    began = time.monotonic()
    planned = plan(steps=steps, faults=faults, seed=seed, kinds=kinds)
    corpus = work / "corpus"
    forked(lambda: write_corpus(corpus), work / "corpus.txt")
    calm = training(work, "calm", corpus, steps)
    of_data = [fault for fault in planned if fault.kind == "NaN batch"]
    # Without saves on the way: they must not change a bit either.
    calm = attrs.evolve(calm, checkpoint=attrs.evolve(calm.checkpoint, every=0))
    code = forked(
        lambda: _train(calm, of_data, work / "calm.journal"), work / "calm.txt", patience_s=PATIENCE_S + steps
    )
    if code != 0:
        raise RuntimeError(f"the training without faults ended with {code}:\n{tail(work / 'calm.txt')}")
    say(f"soak           without faults: {steps} steps in {duration(time.monotonic() - began)}")
    rough = training(work, "rough", corpus, steps)
    journal = worlds.Journal(path=work / "rough.journal")
    attempts, problems = weather(rough, planned, journal, work, random.Random(seed))
    if not problems:
        problems = differences(Path(calm.run.root) / "calm", Path(rough.run.root) / "rough")
    by_index = {fault.index: fault.kind for fault in planned}
    struck = Counter(by_index[index] for index in journal.struck())
    return Outcome(
        struck={kind: struck[kind] for kind in kinds if struck[kind]},
        attempts=attempts,
        seconds=time.monotonic() - began,
        digest=state_digest(newest(Path(rough.run.root) / "rough")) if not problems else "none",
        problems=tuple(problems),
    )


def weather(
    config: s.Config, planned: Sequence[Fault], journal: worlds.Journal, work: Path, chance: random.Random
) -> tuple[int, list[str]]:
    """Start the training again and again until it finishes.

    returns  attempts, and what was not as it should be
    """
    folder = Path(config.run.root) / str(config.run.name)
    by_index = {fault.index: fault for fault in planned}
    owed: list[Fault] = []
    attempts, reported_at, began = 0, time.monotonic(), time.monotonic()
    while True:
        before = len(journal.struck())
        output = work / f"attempt-{attempts % 8}.txt"
        attempts += 1
        code = forked(
            lambda: _train(config, planned, journal.path),
            output,
            stopped=lambda: _while_stopped(config, [by_index[index] for index in journal.struck()], work),
        )
        struck = [by_index[index] for index in journal.struck()[before:]]
        if code not in allowed(struck):
            kinds = ", ".join(fault.kind for fault in struck) or "no fault"
            return attempts, [f"attempt {attempts} ended with {code} after {kinds}:\n{tail(output)}"]
        if code == 0:
            return attempts, []
        owed += [fault for fault in struck if fault.kind in worlds.BETWEEN]
        owed = [fault for fault in owed if not between(fault, folder, work, chance)]
        if time.monotonic() - reported_at > REPORT_S:
            reported_at = time.monotonic()
            count = len(journal.struck())
            left = (reported_at - began) / max(count, 1) * (len(planned) - count)
            say(f"soak           {count}/{len(planned)} faults  {attempts} attempts  eta {duration(left)}")


def allowed(struck: Sequence[Fault]) -> set[int]:
    """How an attempt may end in which these faults struck: an exit code, or minus a signal."""
    codes = {0}
    for fault in struck:
        if fault.kind in ("kill", "kill in a save", *worlds.BETWEEN):
            codes.add(-signal.SIGKILL)
        elif fault.kind in ("terminate", "terminate twice", "user signal"):
            codes.add(75)
        elif fault.kind == "interrupt":
            codes.add(130)
        elif fault.kind == "loader error":
            codes.add(1)
        elif fault.kind in ("disk full", "short write", "failed fsync"):
            codes.add(EXIT_UNSAVED)
    return codes


def between(fault: Fault, folder: Path, work: Path, chance: random.Random) -> bool:
    """Do to the files of a run what a fault does while no process runs.

    returns  whether it could be done: what damages a checkpoint needs a whole one beside it
    Writes:  one file of the run folder, or a further checkpoint.
    """
    if fault.kind == "torn log":
        # A part of one more line: what was there before a commit was on the disk before it.
        path = folder / "metrics.rank0.jsonl"
        last = path.read_bytes().splitlines()[-1:] if path.exists() else []
        if last:
            with open(path, "ab") as file:
                file.write(last[0][: int(fault.draw * len(last[0]))])
        return bool(last)
    root = folder / CHECKPOINTS
    good = [entry for entry in reader.entries(Disk(), root) if not entry.problems]
    if fault.kind == "changed ranks":
        if not good:
            return False
        code = forked(lambda: reshard(root, 2 + int(fault.draw * 3)), work / "reshard.txt")
        if code != 0:
            raise RuntimeError(f"writing as other ranks ended with {code}:\n{tail(work / 'reshard.txt')}")
        return True
    whole_ones = [
        entry for entry in good if entry.manifest and not reader.verify(Disk(), root / entry.name, entry.manifest)
    ]
    if len(whole_ones) < 2:
        return False
    path = chance.choice(sorted((root / whole_ones[0].name).iterdir()))
    size = path.stat().st_size
    if fault.kind == "lost file":
        path.unlink()
    elif fault.kind == "cut file":
        os.truncate(path, int(fault.draw * size))
    else:
        bit = int(fault.draw * 8 * size)
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
    return True


def reshard(root: Path, world: int) -> int:
    """Save the newest checkpoint once more, as `world` ranks write it.

    returns  exit code 0
    """
    read: dict[str, torch.Tensor] = {}

    def targets(manifest: Manifest) -> list[Any]:
        read.clear()
        read.update(
            {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for name, entry in manifest.tensors.items()}
        )
        return [whole(name, entry) for name, entry in read.items()]

    manifest = reader.restore_(Disk(), root, targets, report=say)
    if manifest is None:
        raise RuntimeError(f"{root}: expected a checkpoint, got none")
    texts: list[str] = [""] * world
    barrier = threading.Barrier(world)
    failures: list[BaseException] = []

    def rank(index: int) -> None:
        def all_gather_text(text: str) -> list[str]:
            texts[index] = text
            barrier.wait()
            answers = list(texts)
            barrier.wait()
            return answers

        try:
            with writer.open_writer(
                Disk(),
                root,
                keep=Keep(last=KEEP),
                rank=index,
                world=world,
                all_gather_text=all_gather_text,
                parent=manifest,
            ) as saver:
                pieces = [share(whole(name, tensor), index, world) for name, tensor in read.items()]
                saver.save(pieces, step=manifest.step, meta=manifest.meta, score=manifest.score)
                saver.wait()
        except BaseException as error:
            failures.append(error)
            barrier.abort()
            raise

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1 if failures else 0


def differences(calm: Path, rough: Path) -> list[str]:
    """What is not the same at the end of two trainings."""
    problems: list[str] = []
    one, other = newest(calm), newest(rough)
    problems += [
        f"tensor {name}: expected the digest {entry.digest}, got {other.tensors[name].digest}"
        for name, entry in one.tensors.items()
        if other.tensors[name].digest != entry.digest
    ]
    if (one.step, one.meta) != (other.step, other.meta):
        problems.append(f"expected checkpoints with the same meta, got {one.meta} and {other.meta}")
    if (calm / WEIGHTS).read_bytes() != (rough / WEIGHTS).read_bytes():
        problems.append(f"expected the same {WEIGHTS}, got other bytes")
    lines, rough_lines = metrics(calm), metrics(rough)
    steps = [line["step"] for line in rough_lines if "loss" in line]
    if steps != list(range(1, one.step + 1)):
        doubled = sorted(step for step, count in Counter(steps).items() if count > 1)
        missing = sorted(set(range(1, one.step + 1)) - set(steps))
        problems.append(f"expected every step once in the metrics, got {doubled} more than once and {missing} never")
    elif lines != rough_lines:
        pairs = zip(lines, rough_lines, strict=False)
        one_line, other_line = next((a, b) for a, b in pairs if a != b)
        keys = [key for key in (one_line | other_line) if one_line.get(key) != other_line.get(key)]
        values = ", ".join(f"{key} {one_line.get(key)} and {other_line.get(key)}" for key in keys)
        problems.append(f"expected the same metrics, got at step {one_line['step']}: {values}")
    names = [path.name for path in (rough / CHECKPOINTS).iterdir() if not path.name.startswith("step-")]
    if sorted(names) != ["LEASE"]:
        problems.append(f"expected nothing beside the checkpoints, got {names}")
    return problems


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.rank0.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not is_timed(key)} for line in lines]


def newest(folder: Path) -> Manifest:
    """The newest checkpoint of a run."""
    entries = reader.entries(Disk(), folder / CHECKPOINTS)
    if not entries or entries[0].manifest is None:
        raise RuntimeError(f"{folder}: expected a whole newest checkpoint, got {entries[:1]}")
    return entries[0].manifest


def state_digest(manifest: Manifest) -> str:
    """One digest of all tensors of a checkpoint."""
    text = "".join(f"{name} {entry.digest}\n" for name, entry in sorted(manifest.tensors.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def training(work: Path, name: str, corpus: Path, steps: int) -> s.Config:
    """The training that is soaked: every part of a real one, small."""
    batch, length = 2, 16
    group = s.Group(lr=2e-3)
    return s.Config(
        model=s.Model(
            vocab_size=VOCAB + 4,
            hidden_size=32,
            num_layers=2,
            num_dense_layers=1,
            intermediate_size=48,
            max_positions=64,
            attention=s.Mla(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
            # written, so that the number of steps stays free to change
            moe=s.Moe(num_experts=8, top_k=2, num_shared_experts=1, intermediate_size=16, bias_update_rate=0.001),
        ),
        precision=s.Precision(compute="fp32"),
        data=s.Data(source=s.Shards(path=str(corpus))),
        optim=s.Optim(dense=group, expert=group, router=group),
        schedule=s.Schedule(
            warmup_tokens=8 * batch * length,
            hold_tokens=steps // 2 * batch * length,
            decay_tokens=steps // 2 * batch * length,
        ),
        train=s.Train(
            steps=steps, batch_size=batch, microbatch_size=1, sequence_length=length, max_nonfinite_steps=steps
        ),
        validation=s.Validation(every=25, tokens=128),
        run=s.Run(device="cpu", root=str(work / "runs"), name=name),
        log=s.Log(every=1),
        checkpoint=s.Checkpoint(every=2, keep_last=KEEP, keep_best=False, on_error="continue"),
    )


def write_corpus(folder: Path) -> int:
    """This package's own sources as shards, with a tokenizer trained on them.

    returns  exit code 0
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    tokenizer = tokenizers.train(texts, VOCAB, lambda line: None)
    encoding = tokenizers.encoding(tokenizer)
    documents = [np.asarray(encoding.encode_ordinary(text), dtype=np.int64) for text in texts]
    splits = {"train": documents[4:], "validation": documents[:2], "test": documents[2:4]}
    shard_writer.write(folder, tokenizer, splits, tokens_per_shard=20_000)
    return 0


def _train(config: s.Config, planned: Sequence[Fault], journal: Path) -> int:
    """One attempt, in a process of its own."""
    world = worlds.worse(planned, worlds.Journal(path=journal), config.train.batch_size)
    return run.main(config, {}, ("nmoe", "soak"), "soak", world=world)


def _while_stopped(config: s.Config, struck: Sequence[Fault], work: Path) -> None:
    """What happens while the trained process is stopped: time passes, or a second trainer wants its folder."""
    fault = next(fault for fault in reversed(struck) if fault.kind in worlds.STOPS)
    if fault.kind == "pause":
        time.sleep(fault.draw * worlds.DELAY_S)
        return
    code = forked(lambda: run.main(config, {}, ("nmoe", "soak"), "soak"), work / "second.txt")
    if code != 2:
        raise RuntimeError(f"expected exit code 2 of a second trainer, got {code}:\n{tail(work / 'second.txt')}")
