"""`nmoe bench data`: preparation against the bare tokenizer on the same text, and what it holds in memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nmoe.config.data_source import Deduplicate, Jsonl, Source
from nmoe.effects.data import stdlib
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.prepare.build import build
from nmoe.effects.data.prepare.execute import open_pool, run
from nmoe.effects.data.prepare.inputs import find
from nmoe.effects.data.prepare.survey import survey, works_of
from nmoe.errors import InputError

ROUNDS = 3
SAMPLE_EVERY_S = 0.1


def preparation(megabytes: int, workers: int, home: Path, say: Callable[[str], None]) -> int:
    """Time tokenizing in preparation against `tiktoken.encode_ordinary_batch`, and watch the memory of a whole one.

    The text is Python's standard library, repeated to `megabytes`. Each round times both, one after the other, so that
    what else the machine does meets both; the middle ratio counts.

    workers  processes of preparation, threads of tiktoken

    Writes:  a temporary folder, which goes.
    Cost:    about 2 * ROUNDS * `megabytes` / (3.4 MB/s * `workers`), and 20 MB on disk for each 10 MB of text.
    """
    if megabytes < 1 or workers < 1:
        raise InputError(f"--megabytes, --workers: expected at least 1, got {megabytes} and {workers}; raise them")
    tokenizer = tokenizers.load(stdlib.prepare(home, 4096, say))
    # One process can be told apart from its neighbours by processor time, several only by the clock.
    at, what = (1, "processor time") if workers == 1 else (0, "time")
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        folder = Path(name)
        size = _write_input(folder, megabytes * 1_000_000)
        tokenizers.save(tokenizer, folder)
        ratios: list[float] = []
        for number in range(ROUNDS):
            alone, ours = _bare(folder, tokenizer, workers), _built(folder, number, workers)
            ratios.append(alone[at] / ours[at])
            say(
                f"tokenize   round {number + 1}: preparation {size / ours[at] / 1e6:.2f} MB/s, tiktoken alone "
                f"{size / alone[at] / 1e6:.2f} MB/s of {what}: {ratios[-1]:.1%}, {size / 1e6:.0f} MB, {workers} workers"
            )
        say(f"tokenize   {statistics.median(ratios):.1%} of tiktoken alone, the middle of {ROUNDS} rounds")
        took, peak, largest = _watched(folder, workers)
        say(
            f"prepare    {size / took / 1e6:.2f} MB/s in all, {peak / 1e6:.0f} MB resident at most, all processes "
            f"together, {largest / 1e6:.0f} MB the largest"
        )
    return 0


def _source() -> Source:
    """What is prepared: no document is dropped, so that both sides tokenize the same text."""
    return Source(
        tokenizer="tokenizer.json",
        task_bytes=8 << 20,
        input=Jsonl(paths=("input.jsonl",)),
        deduplicate=Deduplicate(exact=False),
    )


def _write_input(folder: Path, wanted: int) -> int:
    """Write the standard library again and again, as JSON lines; bytes of text."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib.paths(root)]
    size = 0
    with open(folder / "input.jsonl", "w", encoding="utf-8") as file:
        while size < wanted:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode("utf-8"))
                if size >= wanted:
                    break
    (folder / "source.toml").write_text(
        'tokenizer = "./tokenizer.json"\n[input]\nkind = "jsonl"\npaths = ["input.jsonl"]\n', encoding="utf-8"
    )
    return size


def _bare(folder: Path, tokenizer: tokenizers.Tokenizer, threads: int) -> tuple[float, float]:
    """Seconds, of the clock and of the processor, that tiktoken takes for batches of texts ready in memory."""
    encoding = tokenizers.encoding(tokenizer)
    took = np.zeros(2)
    batch: list[str] = []
    with open(folder / "input.jsonl", encoding="utf-8") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == 512:
                began = _now()
                encoding.encode_ordinary_batch(batch, num_threads=threads)
                took += _now() - began
                batch = []
    began = _now()
    encoding.encode_ordinary_batch(batch, num_threads=threads)
    clock, processor = (took + _now() - began).tolist()
    return clock, processor


def _now() -> np.ndarray:
    """Seconds of the clock, and of this process's processor time."""
    return np.array([time.monotonic(), time.process_time()])


def _built(folder: Path, number: int, workers: int) -> tuple[float, float]:
    """Seconds, of the clock and of this process's processor, that the tokenizing pass of preparation takes.

    The pass reads, cleans, tokenizes, hashes, writes and makes durable.

    The processes have been started, as they are for all but the first seconds of a real preparation.
    """
    source = _source()
    items = find(source.input, folder, skip_unreadable=False, say=lambda line: None)
    out = folder / f"out{number}"
    (out / ".work").mkdir(parents=True)
    (out / ".work" / tokenizers.FILE).write_bytes((folder / tokenizers.FILE).read_bytes())
    works = works_of(source, items, out / ".work")
    with open_pool(workers=workers, dask=None) as pool:
        for _ in run(survey, works, pool):
            continue
        began = _now()
        for _ in run(build, works, pool):
            continue
        clock, processor = (_now() - began).tolist()
        return clock, processor


def _watched(folder: Path, workers: int) -> tuple[float, int, int]:
    """Seconds of a whole preparation in processes of its own, their memory at its highest, and the largest one's."""
    command = [sys.executable, "-m", "nmoe", "data", "prep", str(folder / "source.toml"), str(folder / "whole")]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)
    peak = largest = 0
    while process.poll() is None:
        sizes = [_resident(pid) for pid in _tree(process.pid)]
        peak, largest = max(peak, sum(sizes)), max(largest, *sizes)
        time.sleep(SAMPLE_EVERY_S)
    if process.returncode:
        raise InputError(
            f"{folder}: expected a preparation that ends well, got exit code {process.returncode}; see above"
        )
    return time.monotonic() - began, peak, largest


def _tree(pid: int) -> list[int]:
    """A process and everything it started, as Linux tells."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids += [descendant for child in task.read_text().split() for descendant in _tree(int(child))]
        except OSError:
            continue  # it ended meanwhile
    return pids


def _resident(pid: int) -> int:
    """Bytes of memory a process has, 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
