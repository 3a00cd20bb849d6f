"""Loads: the newest valid checkpoint, verified while it is read, into any number of ranks.

A damaged checkpoint is named and passed over for an older valid one. When there is a checkpoint but no valid one,
nothing starts from zero: that is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint.fs import Fs, read_into
from nmoe.effects.checkpoint.manifest import DTYPES, FileEntry, Manifest, NewerFormatError, name_fields, stored
from nmoe.effects.checkpoint.writer import TEMPORARY, TRASH
from nmoe.effects.parallel.ranks import AllGatherText, single_rank
from nmoe.errors import InputError
from nmoe.pure.checkpoint.digest import digest, to_text
from nmoe.pure.checkpoint.pieces import Copy, Piece, copies, gaps

READERS = 4
"""Threads that read and hash, each with a chunk of its own."""


@attrs.frozen(kw_only=True)
class Entry:
    """A folder that looks like a checkpoint, as far as its manifest and the sizes of its files tell."""

    name: str
    manifest: Manifest | None  # None: damaged
    problems: tuple[str, ...]
    newer: bool  # whole, but of a newer format


def entries(fs: Fs, root: Path) -> tuple[Entry, ...]:
    """Everything in a folder that is a checkpoint or looks like one, newest first; what was never committed is not.

    The newest is that of the latest attempt, whatever its step: after a return to an earlier step, the run continues
    from there.

    returns  none when `root` is absent
    Raises:  InputError when the folder cannot be read.
    """
    ranked: list[tuple[tuple[float, int], Entry]] = []
    for name in _names(fs, root):
        if fields := name_fields(name):
            ranked.append((fields[1:], entry(fs, root / name)))
        elif renamed := _renamed(fs, root / name):
            # It may be the newest, so it is looked at first and reported.
            ranked.append(((math.inf, 0), renamed))
    return tuple(one for _, one in sorted(ranked, key=lambda pair: (pair[0], pair[1].name), reverse=True))


def has_any(fs: Fs, root: Path) -> bool:
    """Whether a folder has anything that `entries` would list, without reading all of it.

    Raises:  InputError when the folder cannot be read.
    """
    return any(name_fields(name) or _renamed(fs, root / name) for name in _names(fs, root))


def verify(
    fs: Fs, folder: Path, manifest: Manifest, progress: Callable[[int], None] = lambda done: None
) -> tuple[str, ...]:
    """What is wrong with a checkpoint; nothing when every byte of it is as it was written.

    progress  called with the bytes read so far
    """
    problems = list(_wrong_files(fs, folder, manifest))
    if problems:
        return tuple(problems)
    sums = dict.fromkeys(manifest.tensors, 0)
    done = 0
    for file in manifest.files:

        def add(chunk: Tensor, begin: int, file: FileEntry = file) -> list[tuple[str, int]]:
            return _chunk_digests(manifest, file, chunk, begin)

        for problem, digests in _scan(fs, folder, file, range(len(file.chunks)), add, pinned=False):
            problems += [problem] if problem else []
            for name, value in digests or ():
                sums[name] += value
        done += file.bytes
        progress(done)
    problems += [
        f"{folder}: expected digest {tensor.digest} of tensor '{name}', got {to_text(sums[name])}; {manifests.DAMAGED}"
        for name, tensor in manifest.tensors.items()
        if to_text(sums[name]) != tensor.digest and not problems
    ]
    return tuple(problems)


def restore_(
    fs: Fs,
    root: Path,
    targets: Callable[[Manifest], Sequence[Piece]],
    *,
    report: Callable[[str], None],
    rank: int = 0,
    all_gather_text: AllGatherText = single_rank,
) -> Manifest | None:
    """Load the newest valid checkpoint of a folder, the same one on every rank.

    targets  what to load into, given the manifest; an InputError it raises, such as that of another model, goes
             through. The same tensors on every rank
    report   called on rank 0 with each problem of a checkpoint that is passed over
    returns  its manifest; None when there is no checkpoint at all
    Writes:  the targets, which hold anything when this raises.
    Raises:  InputError when there are checkpoints but no valid one, one is of a newer format, or of two runs.
    """
    candidates: tuple[Entry, ...] = ()
    passed: list[str] = []
    place = -1
    while True:
        choice: dict[str, Any] = {}
        if rank == 0:
            try:
                candidates = candidates or entries(fs, root)
                place += 1
                while place < len(candidates) and candidates[place].problems and not candidates[place].newer:
                    passed += candidates[place].problems
                    _report(report, candidates[place].problems)
                    place += 1
                choice = _choice(root, candidates, place, passed)
            except InputError as error:
                choice = {"error": error.problems}
        choice = json.loads(all_gather_text(json.dumps(choice))[0])
        if "error" in choice:
            raise InputError(*choice["error"])
        if "name" not in choice:
            return None
        folder = root / choice["name"]
        manifest, problems = _agreed(fs, folder, choice["sha256"], all_gather_text)
        if manifest is not None:
            problems = _load_(fs, folder, manifest, targets(manifest), rank, all_gather_text, partial=False)
        if manifest is not None and not problems:
            return manifest
        passed += problems
        if rank == 0:
            _report(report, problems)


def load_(
    fs: Fs,
    folder: Path,
    manifest: Manifest,
    targets: Sequence[Piece],
    *,
    rank: int = 0,
    all_gather_text: AllGatherText = single_rank,
    partial: bool = False,
) -> None:
    """Load one checkpoint, verified.

    targets  of this rank, each tensor in any pieces; without `partial`, every tensor of the checkpoint
    Writes:  the targets, which hold anything when this raises.
    Raises:  InputError when the checkpoint is damaged or the targets are not those it holds.
    """
    if problems := _load_(fs, folder, manifest, targets, rank, all_gather_text, partial=partial):
        raise InputError(*problems)


def _load_(
    fs: Fs,
    folder: Path,
    manifest: Manifest,
    targets: Sequence[Piece],
    rank: int,
    all_gather_text: AllGatherText,
    *,
    partial: bool,
) -> list[str]:
    """What is damaged, found on any rank.

    Raises:  InputError when the targets are not what the checkpoint holds.
    """
    if wrong := _unfit(folder, manifest, targets, partial):
        raise InputError(*wrong)
    problems = list(_wrong_files(fs, folder, manifest))
    jobs: dict[str, list[tuple[Piece, Copy]]] = {file.name: [] for file in manifest.files}
    places = stored(manifest)
    for piece in targets:
        for copy in copies(piece.begin, piece.end(), piece.tensor.element_size(), places[piece.name]):
            jobs[copy.file].append((piece, copy))
    pinned = any(piece.tensor.device.type == "cuda" for piece in targets)
    for file in manifest.files if not problems else ():
        job = sorted(jobs[file.name], key=lambda pair: pair[1].offset)
        spans = [(copy.offset, copy.offset + copy.size) for _, copy in job]
        if rank == 0 and not partial:
            # What is in no tensor, the header, is looked at by one.
            spans.append((0, min((piece.offset for piece in file.pieces), default=file.bytes)))
        chunks = sorted(
            {
                index
                for begin, end in spans
                for index in range(begin // file.chunk_bytes, -(-end // file.chunk_bytes))
                if begin < end
            }
        )
        by_chunk: dict[int, list[tuple[Piece, Copy]]] = {index: [] for index in chunks}
        for piece, copy in job:
            for index in range(copy.offset // file.chunk_bytes, -(-(copy.offset + copy.size) // file.chunk_bytes)):
                by_chunk[index].append((piece, copy))

        def deliver(
            chunk: Tensor, begin: int, by_chunk: dict = by_chunk, file: FileEntry = file
        ) -> list[tuple[str, int]]:
            for piece, copy in by_chunk[begin // file.chunk_bytes]:
                _deliver_(piece.tensor, copy, chunk, begin)
            return []

        problems += [problem for problem, _ in _scan(fs, folder, file, chunks, deliver, pinned=pinned) if problem]
    summed = _held(manifest, targets) if partial else targets
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda piece: int(digest(piece.tensor.detach(), piece.begin)), summed)
        sums = [[piece.name, piece.begin, piece.end(), value] for piece, value in zip(summed, digests, strict=True)]
    answers = [json.loads(answer) for answer in all_gather_text(json.dumps({"problems": problems, "sums": sums}))]
    damage = [problem for answer in answers for problem in answer["problems"]]
    return damage or _wrong_tensors(folder, manifest, [entry for answer in answers for entry in answer["sums"]])


def _scan(
    fs: Fs,
    folder: Path,
    file: FileEntry,
    chunks: Sequence[int],
    use: Callable[[Tensor, int], list[tuple[str, int]]],
    *,
    pinned: bool,
) -> list[tuple[str, list[tuple[str, int]] | None]]:
    """Read chunks of a file and `use` each, with its place in the file, when its digest is right.

    returns  for each chunk: a problem, or "" and what `use` returned
    """
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(min(READERS, len(chunks))):
        buffers.put(torch.empty(min(file.chunk_bytes, file.bytes), dtype=torch.uint8, pin_memory=pinned))
    try:
        handle = fs.open(folder / file.name)
    except OSError as error:
        return [
            (
                f"{folder / file.name}: expected to read it, got {error.strerror or error}; {manifests.remedy(error)}",
                None,
            )
        ]

    def one(index: int) -> tuple[str, list[tuple[str, int]] | None]:
        begin = index * file.chunk_bytes
        size = min(file.chunk_bytes, file.bytes - begin)
        where = f"{folder / file.name}: bytes {begin} to {begin + size}"
        buffer = buffers.get()
        try:
            view = buffer.numpy().data[:size]
            got = read_into(fs, handle, view, begin)
            if got == size and hashlib.sha256(view).hexdigest() == file.chunks[index]:
                return "", use(buffer[:size], begin)
            reason = f"{got} bytes" if got < size else "others"
            return f"{where}: expected what was written, got {reason}; {manifests.DAMAGED}", None
        except OSError as error:
            return f"{where}: expected to read them, got {error.strerror or error}; {manifests.remedy(error)}", None
        finally:
            buffers.put(buffer)

    try:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(one, chunks))
    finally:
        fs.close(handle)


def _deliver_(tensor: Tensor, copy: Copy, chunk: Tensor, begin: int) -> None:
    """Put the part of `copy` that lies in a chunk, which starts at byte `begin` of its file, into the tensor."""
    low, high = max(copy.offset, begin), min(copy.offset + copy.size, begin + len(chunk))
    to = copy.to + low - copy.offset
    tensor.detach().view(-1).view(torch.uint8)[to : to + high - low].copy_(chunk[low - begin : high - begin])


def _chunk_digests(manifest: Manifest, file: FileEntry, chunk: Tensor, begin: int) -> list[tuple[str, int]]:
    """What a chunk adds to the digest of each tensor. A digest counts bytes, so a cut inside an element is fine."""
    digests: list[tuple[str, int]] = []
    for piece in file.pieces:
        itemsize = DTYPES[manifest.tensors[piece.name].dtype].itemsize
        end = piece.offset + (piece.end - piece.begin) * itemsize
        low, high = max(piece.offset, begin), min(end, begin + len(chunk))
        if low < high:
            start = piece.begin * itemsize + low - piece.offset
            digests.append((piece.name, int(digest(chunk[low - begin : high - begin], start))))
    return digests


def _held(manifest: Manifest, targets: Sequence[Piece]) -> list[Piece]:
    """Those of tensors of which the targets have every element: the others are known by their chunks alone."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for piece in targets:
        spans.setdefault(piece.name, []).append((piece.begin, piece.end()))
    whole = {name for name, held in spans.items() if not gaps(math.prod(manifest.tensors[name].shape), held)}
    return [piece for piece in targets if piece.name in whole]


def _wrong_tensors(folder: Path, manifest: Manifest, sums: Sequence[Any]) -> list[str]:
    """Tensors whose digest is not the manifest's, from the digests of all ranks' pieces.

    Ranks may have the same piece. A tensor of which no rank has some element is known by its chunks alone.
    """
    parts: dict[str, dict[tuple[int, int], set[int]]] = {}
    for name, begin, end, value in sums:
        parts.setdefault(name, {}).setdefault((begin, end), set()).add(value)
    problems: list[str] = []
    for name, pieces in parts.items():
        tensor = manifest.tensors[name]
        size = math.prod(tensor.shape)
        whole = pieces.get((0, size))
        spans = {(0, size): whole} if whole else pieces
        digests = {to_text(sum(max(values) for values in spans.values()))}
        if any(len(values) > 1 for values in pieces.values()):
            digests.add("different ones on different ranks")
        if not gaps(size, spans) and digests != {tensor.digest}:
            problems.append(
                f"{folder}: expected digest {tensor.digest} of tensor '{name}', got {', '.join(sorted(digests))}; "
                f"{manifests.DAMAGED}"
            )
    return problems


def _unfit(folder: Path, manifest: Manifest, targets: Sequence[Piece], partial: bool) -> list[str]:
    """Where the targets are not what the checkpoint holds."""
    problems: list[str] = []
    for piece in targets:
        tensor = manifest.tensors.get(piece.name)
        wanted = (piece.tensor.dtype, piece.shape)
        if tensor is None:
            problems.append(f"{folder}: expected '{piece.name}', got nothing by that name")
        elif wanted != (DTYPES[tensor.dtype], tensor.shape):
            problems.append(
                f"{folder}: expected '{piece.name}' as {_kind(*wanted)}, got "
                f"{_kind(DTYPES[tensor.dtype], tensor.shape)}"
            )
        elif piece.begin < 0 or piece.end() > math.prod(piece.shape):
            size = math.prod(piece.shape)
            problems.append(f"{folder}: expected {size} elements of '{piece.name}', got up to {piece.end()}")
    if not partial:
        names = {piece.name for piece in targets}
        problems += [f"{folder}: expected nothing else, got '{name}'" for name in manifest.tensors if name not in names]
    return [f"{problem}; use the config it was saved with" for problem in problems]


def _kind(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def entry(fs: Fs, folder: Path) -> Entry:
    """A checkpoint as its manifest and the sizes of its files tell."""
    try:
        manifest = manifests.read(fs, folder)
    except InputError as error:
        newer = isinstance(error, NewerFormatError)
        return Entry(name=folder.name, manifest=None, problems=error.problems, newer=newer)
    problems = _wrong_files(fs, folder, manifest)
    return Entry(name=folder.name, manifest=manifest, problems=problems, newer=False)


def _wrong_files(fs: Fs, folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Files that are not there or have another size."""
    problems: list[str] = []
    for file in manifest.files:
        try:
            handle = fs.open(folder / file.name)
            try:
                size = fs.size(handle)
            finally:
                fs.close(handle)
        except OSError as error:
            problems.append(
                f"{folder / file.name}: expected to read it, got {error.strerror or error}; {manifests.remedy(error)}"
            )
            continue
        if size != file.bytes:
            problems.append(f"{folder / file.name}: expected {file.bytes} bytes, got {size}; {manifests.DAMAGED}")
    return tuple(problems)


def _names(fs: Fs, root: Path) -> list[str]:
    """What is in a folder of checkpoints, without what was never committed; nothing when `root` is absent.

    Raises:  InputError when the folder cannot be read.
    """
    try:
        names = [] if fs.kind(root) == "absent" else fs.names(root)
    except OSError as error:
        raise InputError(
            f"{root}: expected a folder of checkpoints, got {error.strerror or error}; fix its permissions, its "
            "link or its disk"
        ) from error
    return [name for name in names if not name.startswith((TEMPORARY, TRASH))]


def _renamed(fs: Fs, folder: Path) -> Entry | None:
    """A checkpoint whose folder has another name, or a folder that may be one; None: what lies there is none.

    A link, such as `latest`, leads to a checkpoint that is looked at under its own name.
    """
    try:
        if fs.kind(folder) != "folder" or manifests.FILE not in fs.names(folder):
            return None
    except FileNotFoundError:  # deleted since its name was read
        return None
    except OSError as error:
        problem = f"{folder}: expected a folder to look into, got {error.strerror or error}; {manifests.remedy(error)}"
        return Entry(name=folder.name, manifest=None, problems=(problem,), newer=False)
    return entry(fs, folder)


def _choice(root: Path, candidates: Sequence[Entry], place: int, passed: Sequence[str]) -> dict[str, Any]:
    """What rank 0 broadcasts: a name and the digest of its manifest, an error, or nothing."""
    newer = [problem for entry in candidates if entry.newer for problem in entry.problems]
    if newer:
        return {"error": newer}
    lineages: Mapping[str, str] = {entry.manifest.lineage: entry.name for entry in candidates if entry.manifest}
    if len(lineages) > 1:
        return {
            "error": [
                f"{root}: expected the checkpoints of one run, got those of {len(lineages)}: "
                f"{', '.join(sorted(lineages.values()))}; move the others away"
            ]
        }
    if place < len(candidates):
        manifest = candidates[place].manifest
        return {"name": candidates[place].name, "sha256": manifests.sha256(manifest)} if manifest else {}
    if candidates:
        return {
            "error": [
                *passed,
                f"{root}: expected a valid checkpoint, got {len(candidates)} damaged ones; restore one from a copy, or "
                "move all away to start anew",
            ]
        }
    return {}


def _agreed(fs: Fs, folder: Path, sha256: str, all_gather_text: AllGatherText) -> tuple[Manifest | None, list[str]]:
    """The manifest that rank 0 chose, when every rank reads the same one; else what is wrong."""
    manifest: Manifest | None = None
    problems: list[str] = []
    try:
        manifest = manifests.read(fs, folder)
        if manifests.sha256(manifest) != sha256:
            problems = [
                f"{folder}: expected the same manifest on every rank, got another; mount the same folder everywhere"
            ]
    except InputError as error:
        problems = list(error.problems)
    answers = [json.loads(answer) for answer in all_gather_text(json.dumps(problems))]
    problems = [problem for answer in answers for problem in answer]
    return (None if problems else manifest), problems


def _report(report: Callable[[str], None], problems: Sequence[str]) -> None:
    for problem in problems:
        report(problem)
