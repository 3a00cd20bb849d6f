"""`nmoe data prep`: a source TOML in, a folder of shards out.

    plan     which files, cut into tasks; a pure function of the source, so every process makes the same one
    stream   of a data set that is streamed: its records as files  -> .work/stream/
    survey   each task: clean, filter, hash                         -> .work/survey/task-00000/
    match    each bucket of hashes: what repeats an earlier document -> .work/match/bucket-00000/
    build    each task: tokenize what stays, write shards            -> .work/build/task-00000/
    fold     move the shards to their places, then the manifest; .work goes

Every task writes one folder, by one rename, from nothing but its inputs. So it may be done twice, by anyone, after any
crash: the bytes are the same. The manifest is the mark that the whole is done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import attrs

from nmoe.config.data_source import Source, Streamed, canonical
from nmoe.config.fields import flat
from nmoe.config.toml import dotted
from nmoe.effects import files
from nmoe.effects.data import tokenizer
from nmoe.effects.data.prepare import stream
from nmoe.effects.data.prepare.build import SPLITS, TRAIN, Built, build, built_folder, cut, cut_folder
from nmoe.effects.data.prepare.execute import Pool, run
from nmoe.effects.data.prepare.inputs import find
from nmoe.effects.data.prepare.match import Match, match
from nmoe.effects.data.prepare.survey import Work, reporting, survey, works_of
from nmoe.effects.data.store import blocks
from nmoe.effects.data.store.format import MANIFEST, Receipt, stem
from nmoe.effects.data.store.records import read_record, write_record
from nmoe.effects.data.store.shard_writer import commit
from nmoe.effects.terminal import Progress
from nmoe.errors import InputError
from nmoe.pure.data.prep import Item
from nmoe.pure.units import counted

FORMAT = 1
WORK = ".work"
PLAN = "plan.json"
REPORT = "report.json"
WAITING_EVERY_S = 30.0


@attrs.frozen(kw_only=True)
class Plan:
    """What a folder is being prepared from. Another plan in the same folder is refused."""

    format: int
    tokenizer: str
    source: str
    items: tuple[Item, ...]


@attrs.frozen(kw_only=True)
class Report:
    """What went in, what came out, and why each document that did not was dropped."""

    format: int
    tokenizer: str
    tokenizer_identity: str
    source: str
    inputs_sha256: str
    files: int
    bytes_read: int
    documents_in: int
    documents_with_replaced_bytes: int
    dropped: dict[str, int]
    documents_out: dict[str, int]
    tokens_out: dict[str, int]
    bytes_out: dict[str, int]


S = TypeVar("S", Work, Match)
R = TypeVar("R")


def prepare(
    source: Source,
    stored: tokenizer.Tokenizer,
    base: Path,
    out: Path,
    pool: Pool,
    say: Callable[[str], None],
    share: tuple[int, int] = (0, 1),
) -> Report | None:
    """Prepare a source, or what of it is missing.

    base     folder that the source's relative paths start from
    share    (i, n): do every n-th task from the i-th, and wait for the others before the next stage; worker 0 folds
    returns  the report; None from a worker other than 0, once its part is done

    Writes:  `out`, which must be absent, empty, or of the same plan.
    Raises:  InputError, one line a problem; tasks that are done stay so.
    """
    said, shared = source.input, share[1] > 1
    opened, items = None, ()
    if not isinstance(said, Streamed):
        items = find(said, base, out=out, skip_unreadable=source.clean.unreadable == "skip", say=say)
    elif shared:
        raise InputError("--worker: expected files that each worker can read, got a stream; use --workers")
    elif not (out / MANIFEST).exists():
        begun(out)
        opened = stream.open_set(said)
    with reporting(out), _locked(out, shared=shared):
        if opened is not None and isinstance(said, Streamed):
            items = stream.fetch(opened, said, source, stored, out / WORK, say)
        planned = Plan(format=FORMAT, tokenizer=stored.identity, source=canonical(source), items=items)
        finished = _claimed(out, stored, planned, shared=shared)
        if finished is not None:
            say(f"{out}: prepared already, nothing to do")
            return finished
        works = works_of(source, items, out / WORK)
        matches = tuple(
            Match(folder=out / WORK, index=index, tasks=len(works), near=source.deduplicate.near)
            for index in range(works[0].buckets)
        )
        sizes = [_bytes(work) for work in works]
        end, none = out / MANIFEST, [0] * len(matches)
        _stage("survey", survey, works, lambda work: work.done(), sizes, pool, share, end, say)
        _stage("match", match, matches, lambda bucket: bucket.done(), none, pool, share, end, say)
        # The others of a job array may still build when worker 0 folds, unless it has waited for all tasks.
        enough = None if source.max_tokens is None or shared else _enough(works, source.max_tokens)
        _stage("build", build, works, built_folder, sizes, pool, share, end, say, enough)
        if share[0] != 0:
            say(f"{out}: worker {share[0]} of {share[1]} is done; worker 0 finishes the folder")
            return None
        return _fold(out, stored, planned, works)


def begun(out: Path) -> Path | None:
    """The folder with the tokenizer that `out` is being or was prepared with; None when nothing is begun there.

    Raises:  InputError when it holds something else.
    """
    for mark, folder in ((out / MANIFEST, out), (out / WORK / PLAN, out / WORK)):
        if mark.exists() and (folder / tokenizer.FILE).exists():
            return folder
    if out.exists() and not (out / WORK / PLAN).exists() and (others := _others(out)):
        raise InputError(others)
    return None


def report_lines(report: Report) -> list[str]:
    """The report for a person."""
    kept = sum(report.documents_out.values())
    lines = [
        f"read       {counted(report.files, 'file')}, {report.bytes_read / 1e6:.1f} MB, "
        + counted(report.documents_in, "document"),
        *(f"dropped    {count} {reason}" for reason, count in sorted(report.dropped.items()) if count),
    ]
    if report.documents_with_replaced_bytes:
        lines.append(f"replaced   bytes that are not UTF-8 in {report.documents_with_replaced_bytes} documents")
    lines.append(f"kept       {counted(kept, 'document')}, {sum(report.tokens_out.values())} tokens")
    for split in SPLITS:
        tokens, size = report.tokens_out.get(split, 0), report.bytes_out.get(split, 0)
        ratio = f", {size / tokens:.2f} bytes a token" if tokens else ""
        lines.append(f"{split:<10} {counted(report.documents_out.get(split, 0), 'document')}, {tokens} tokens{ratio}")
    lines.append(f"tokenizer  {report.tokenizer} {report.tokenizer_identity[:12]}")
    return lines


def _bytes(work: Work) -> int:
    """Bytes of input that a task reads."""
    total = 0
    for part in work.ranges:
        item = work.items[part.file]
        total += sum(item.sizes[part.start : part.end]) if item.form == "parquet" else part.end - part.start
    return total


def _stage(
    name: str,
    function: Callable[[S], R],
    works: Sequence[S],
    done: Callable[[S], Path],
    sizes: Sequence[int],
    pool: Pool,
    share: tuple[int, int],
    end: Path,
    say: Callable[[str], None],
    enough: Callable[[], bool] | None = None,
) -> None:
    """Do this worker's part of what is missing, then wait until the others have done theirs.

    sizes    bytes of input of each work, for the estimate
    end      a file that is there when worker 0 has finished everything, after which what was done is gone
    enough   whether what is done makes the rest needless; None: it never does
    """
    missing = [work for work in works[share[0] :: share[1]] if not done(work).exists()]
    if end.exists():
        return
    total, done_bytes = sum(sizes[work.index] for work in missing), 0
    progress = Progress(say, total or len(missing))
    wanted = missing if enough is None else takewhile(lambda _: not enough(), missing)
    for number, (work, _) in enumerate(run(function, wanted, pool), 1):
        done_bytes += sizes[work.index]
        size = f", {done_bytes / 1e6:.1f} of {total / 1e6:.1f} MB" if total else ""
        progress.at(done_bytes if total else number, f"{name}: {number} of {counted(len(missing), 'task')}{size}")
    if enough is not None:
        return
    reported = time.monotonic()
    while (others := sum(not done(work).exists() for work in works)) and not end.exists():
        if time.monotonic() - reported >= WAITING_EVERY_S:
            reported = time.monotonic()
            say(f"{name}: waiting for {others} tasks of other workers")
        time.sleep(0.2)


def _enough(works: Sequence[Work], max_tokens: int) -> Callable[[], bool]:
    """Whether the first tasks, built one behind the other, hold `max_tokens` of the training split."""
    tokens = place = 0

    def enough() -> bool:
        nonlocal tokens, place
        while tokens < max_tokens and place < len(works) and built_folder(works[place]).exists():
            tokens += _train_tokens(build(works[place]))
            place += 1
        return tokens >= max_tokens

    return enough


def _train_tokens(built: Built) -> int:
    return sum(receipt.tokens for receipt in built.shards[TRAIN])


def _taken(works: Sequence[Work], max_tokens: int | None) -> Iterator[tuple[Path, Built]]:
    """Folder and record of the tasks that make up the first `max_tokens` of the training split; the last may be cut."""
    room = max_tokens
    for work in works:
        built, folder = build(work), built_folder(work)
        if room is not None and _train_tokens(built) > room:
            yield cut_folder(work), cut(work, room)
            return
        yield folder, built
        room = None if room is None else room - _train_tokens(built)
        if room == 0:
            return


def _fold(out: Path, stored: tokenizer.Tokenizer, planned: Plan, works: Sequence[Work]) -> Report:
    """Move every shard to its place in the order of the tasks, then write report and manifest.

    A shard that an interrupted fold has moved is in its place already.
    """
    limit = works[0].source.max_tokens
    surveys, taken = [survey(work) for work in works], list(_taken(works, limit))
    if limit is not None and not any(built.shards[TRAIN] for _, built in taken):
        raise InputError(f"max_tokens: expected at least one document of the training split, got {limit}; raise it")
    receipts: dict[str, list[Receipt]] = {split: [] for split in SPLITS}
    for split, placed in receipts.items():
        (out / split).mkdir(exist_ok=True)
        for folder, built in taken:
            for at, receipt in enumerate(built.shards[split]):
                for ending in (".npy", ".ends.npy", ".json", blocks.ENDING):
                    source = folder / split / f"{stem(at)}{ending}"
                    if source.exists():
                        os.replace(source, out / split / f"{stem(len(placed))}{ending}")
                placed.append(receipt)
        files.sync_folder(out / split)
    dropped: Counter[str] = Counter()
    for record in (*surveys, *(built for _, built in taken)):
        dropped.update(record.dropped)
    documents_in = sum(record.documents for record in surveys)
    if limit is not None:
        kept = sum(receipt.documents for placed in receipts.values() for receipt in placed)
        dropped["beyond max_tokens"] = documents_in - sum(dropped.values()) - kept
    report = Report(
        format=FORMAT,
        tokenizer=stored.name,
        tokenizer_identity=stored.identity,
        source=planned.source,
        inputs_sha256=_inputs(planned.items),
        files=len(planned.items),
        bytes_read=sum(sum(item.sizes) for item in planned.items),
        documents_in=documents_in,
        documents_with_replaced_bytes=sum(record.replaced for record in surveys),
        dropped=dict(sorted(dropped.items())),
        documents_out={split: sum(receipt.documents for receipt in placed) for split, placed in receipts.items()},
        tokens_out={split: sum(receipt.tokens for receipt in placed) for split, placed in receipts.items()},
        bytes_out={split: sum(receipt.bytes for receipt in placed) for split, placed in receipts.items()},
    )
    write_record(out / WORK / REPORT, report)
    commit(out / WORK, stored, receipts)
    # Made beside the plan and moved, so that a crash leaves nothing half written outside.
    for name in (tokenizer.FILE, REPORT, MANIFEST):
        os.replace(out / WORK / name, out / name)
        files.sync_folder(out)
    shutil.rmtree(out / WORK)
    return report


@contextmanager
def _locked(out: Path, *, shared: bool) -> Iterator[None]:
    """The folder, locked while the block runs.

    shared   whether other workers may have it at the same time

    Writes:  `out`, and the folder of its work.
    """
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with open(out / WORK / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{out}: expected no other process preparing it, got one; wait for its end") from error
        yield


def _claimed(out: Path, stored: tokenizer.Tokenizer, planned: Plan, *, shared: bool) -> Report | None:
    """Take a locked folder for this plan alone; the report where it is prepared already.

    Writes:  its plan and its tokenizer.
    """
    if (out / MANIFEST).exists():
        try:
            return _finished(out, planned)
        finally:
            shutil.rmtree(out / WORK)
    path = out / WORK / PLAN
    if path.exists():
        _same_plan(path, planned)
    elif others := _others(out):
        shutil.rmtree(out / WORK)
        raise InputError(others)
    else:
        write_record(path, planned)
    if not shared:
        for dead in (out / WORK).glob("**/.*.tmp"):
            shutil.rmtree(dead)
    if not (out / WORK / tokenizer.FILE).exists():
        tokenizer.save(stored, out / WORK)
    return None


def _others(out: Path) -> str:
    """What is wrong with a folder that nothing was begun in; empty for an empty one."""
    if not out.is_dir():
        return f"{out}: expected a folder, got a file; choose another"
    names = sorted(path.name for path in out.iterdir() if path.name != WORK)
    return f"{out}: expected an empty folder, got {', '.join(names[:3])} in it; choose another" if names else ""


def _finished(out: Path, planned: Plan) -> Report:
    """The report of a prepared folder, which must be of this plan."""
    report = read_record(out / REPORT, Report, version=FORMAT)
    before = (report.tokenizer_identity, report.inputs_sha256)
    now = (planned.tokenizer, _inputs(planned.items))
    problems = [
        f"{out}: expected a folder prepared with {what} {new}, got {old}; choose another folder"
        for what, old, new in zip(("tokenizer", "input files of sha256"), before, now, strict=True)
        # a stream that was read is not read again to be compared
        if old != new and (planned.items or what == "tokenizer")
    ]
    problems += _source_problems(out, report.source, planned.source)
    if problems:
        raise InputError(*problems)
    return report


def _same_plan(path: Path, planned: Plan) -> None:
    """Refuse to continue with another plan than the one that was begun with."""
    begun = read_record(path, Plan, version=FORMAT)
    where, problems = path.parent.parent, list[str]()
    if begun.tokenizer != planned.tokenizer:
        problems.append(
            f"{where}: expected tokenizer {begun.tokenizer}, which it was begun with, got {planned.tokenizer}; use "
            "that one or another folder"
        )
    problems += _source_problems(where, begun.source, planned.source)
    before, now = set(begun.items), set(planned.items)
    if changed := sorted({item.name for item in before ^ now}):
        problems.append(
            f"{where}: expected the input files it was begun with, got {len(changed)} others, {changed[0]} the first; "
            "restore them or choose another folder"
        )
    if problems:
        raise InputError(*problems)


def _source_problems(out: Path, before: str, now: str) -> list[str]:
    """A line for each key of the source that a folder is not prepared with."""
    old, new = (dict(flat(json.loads(text))) for text in (before, now))
    return [
        f"{out}: expected {dotted(key)} = {json.dumps(old.get(key))} of the source, which it was begun with, got "
        f"{json.dumps(new.get(key))}; choose another folder"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]


def _inputs(items: Sequence[Item]) -> str:
    """A hash of the names and sizes of the files, the same on every machine."""
    return hashlib.sha256(json.dumps([(item.name, item.sizes) for item in items]).encode("utf-8")).hexdigest()
