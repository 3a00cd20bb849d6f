"""Saves: staged at once, written in the background, committed by one rename.

What a crash leaves behind is the last committed checkpoint, whole, and perhaps a folder whose name says that it never
became one. In this order: files and their fsync, manifest and fsync, fsync of the folder, rename, fsync of the
folder above. Only then is the save announced, and only then is an older one deleted.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import cattrs
import torch
from torch import Tensor

from nmoe.effects.checkpoint import lease as leases
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint.fs import Fs, remove_tree, write_all
from nmoe.effects.checkpoint.lease import Lease
from nmoe.effects.checkpoint.manifest import DTYPES, FORMAT, FileEntry, Manifest, Parent, TensorEntry, name_fields
from nmoe.effects.checkpoint.shard import Staged, free_host, host_memory, num_bytes, plan_shard, stage, write
from nmoe.effects.parallel.ranks import AllGatherText, single_rank
from nmoe.errors import InputError
from nmoe.pure.checkpoint.digest import to_text
from nmoe.pure.checkpoint.pieces import Piece
from nmoe.pure.checkpoint.retention import Keep, Kept, superfluous

CHUNK_BYTES = 1 << 24
"""What one digest covers: a damaged file is known to 16 MiB, and several threads share the hashing."""

TEMPORARY, TRASH = ".tmp-", ".trash-"
"""First letters of folders that are being written, and that are being deleted."""


class SaveError(InputError):
    """A save failed: nothing was committed."""


@attrs.frozen(kw_only=True)
class Saved:
    """A committed checkpoint."""

    name: str
    step: int
    sha256: str  # of its manifest
    bytes: int  # over all ranks
    seconds: float  # from the copy to the commit
    removed: tuple[str, ...]  # older checkpoints deleted after it
    undeleted: tuple[str, ...] = ()  # what kept others from being deleted; the next save tries again


@attrs.frozen(kw_only=True)
class Place:
    """Where a writer writes, and as whom."""

    fs: Fs
    root: Path
    rank: int
    world: int
    all_gather_text: AllGatherText
    keep: Keep
    chunk_bytes: int
    lease: Lease | None  # rank 0 has it
    attempt: int
    lineage: str
    pinned: bool


class Writer:
    """Takes one save at a time. Made by `open_writer`."""

    def __init__(self, place: Place, pool: ThreadPoolExecutor, parent: Parent | None) -> None:
        self.attempt = place.attempt
        self._place = place
        self._pool = pool
        self._parent = parent
        self._serial = 0
        self._buffer: Tensor | None = None
        self._streams: tuple[Any, Any] | None = None
        self._staged: Staged | None = None
        self._flight: Future[Saved] | None = None

    def save(
        self, pieces: Sequence[Piece], *, step: int, meta: Mapping[str, Any], score: float | None = None
    ) -> Saved | None:
        """Copy the pieces and start writing them; the save before this one is awaited first.

        pieces   of this rank; together with those of the others they are each tensor exactly once
        meta     whatever else a resume needs, as JSON has it
        score    lower is better; what `Keep.best` goes by
        returns  the save before this one, when nobody has asked for it
        Raises:  SaveError when the save before this one failed; this one is then not started, call again.
        """
        before = self.wait()
        shard = plan_shard(pieces)
        began = time.monotonic()
        self._staged = stage(shard, self.reserve(pieces), self._streams)
        self._serial += 1
        manifest = Manifest(
            format=FORMAT,
            step=step,
            attempt=self.attempt,
            serial=self._serial,
            lineage=self._place.lineage,
            parent=self._parent,
            score=None if score is None else float(score),
            meta=json.loads(json.dumps(meta, allow_nan=False)),
            tensors={},
            files=(),
        )
        self._flight = self._pool.submit(commit, self._place, self._staged, manifest, began)
        return before

    def reserve(self, pieces: Sequence[Piece]) -> Tensor:
        """The host memory that a save of these pieces is copied to: before the first one, so that it need not wait.

        Raises:  InputError when there is not as much.
        """
        size = num_bytes(pieces)
        gpus = {piece.tensor.device for piece in pieces if piece.tensor.device.type == "cuda"}
        if self._buffer is not None and self._buffer.numel() != size:
            self.release()
        if self._buffer is None:
            self._buffer = host_memory(size, pinned=self._place.pinned and bool(gpus))
        if gpus and self._streams is None:
            device = next(iter(gpus))
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._buffer

    def release(self) -> None:
        """Give back what `reserve` took. No save is in flight."""
        if self._buffer is not None:
            free_host(self._buffer)
            self._buffer = None

    def staged(self) -> None:
        """Nothing that is computed from now on changes what is saved. The host does not wait, the GPU does."""
        if self._staged is not None and self._staged.ready is not None:
            torch.cuda.current_stream().wait_event(self._staged.ready)

    def wait(self) -> Saved | None:
        """The save in flight, when it is committed; None when there is none.

        Raises:  SaveError when it failed.
        """
        if self._flight is None:
            return None
        futures.wait([self._flight])  # may be interrupted, and is then in flight still
        flight, self._flight, self._staged = self._flight, None, None
        saved = flight.result()
        self._parent = Parent(name=saved.name, sha256=saved.sha256)
        return saved

    def poll(self) -> Saved | None:
        """The save in flight when it has ended, else None; returned once.

        Raises:  SaveError when it failed.
        """
        return self.wait() if self._flight is not None and self._flight.done() else None


@contextmanager
def open_writer(
    fs: Fs,
    root: Path,
    *,
    keep: Keep,
    parent: Manifest | None = None,
    rank: int = 0,
    world: int = 1,
    all_gather_text: AllGatherText = single_rank,
    chunk_bytes: int = CHUNK_BYTES,
    pinned: bool = True,
) -> Iterator[Writer]:
    """The one writer of a folder of checkpoints; when the block ends, the save in flight is awaited.

    parent           what the run resumes from, as `restore_` returned it; None: from nothing, in a folder without
                     checkpoints
    all_gather_text  called in the background, so it needs a process group of its own
    pinned           whether a GPU copies to pinned memory; without it a save holds the host until the copy is made
    Writes:  `root`, made when absent, and the lease in it.
    Raises:  InputError when another trainer writes there, or `parent` is None and there are checkpoints.
             SaveError, at the end, when the save in flight failed.
    """
    place = Place(
        fs=fs,
        root=root,
        rank=rank,
        world=world,
        all_gather_text=all_gather_text,
        keep=keep,
        chunk_bytes=chunk_bytes,
        lease=None,
        attempt=0,
        lineage=parent.lineage if parent else uuid.uuid4().hex,
        pinned=pinned,
    )
    leading = _leading(place, fresh=parent is None)
    with leading as place, ExitStack() as last, ThreadPoolExecutor(1, "checkpoint") as pool:
        writer = Writer(place, pool, Parent(name=parent.name(), sha256=manifests.sha256(parent)) if parent else None)
        last.callback(writer.release)
        try:
            yield writer
        except BaseException as error:
            try:
                writer.wait()
            except SaveError as failed:
                error.add_note(str(failed))
            raise
        writer.wait()


def prune(fs: Fs, root: Path, keep: Keep) -> tuple[str, ...]:
    """Delete the checkpoints that nothing keeps, and what unfinished saves and deletions left.

    returns  names of the deleted checkpoints
    Raises:  InputError when a trainer writes there, or something cannot be deleted.
    """
    try:
        with leases.hold(fs, root, _attempts(fs, root)):
            return retire(fs, root, keep)
    except OSError as error:
        raise InputError(
            f"{error.filename or root}: expected to delete it, got {error.strerror or error}; fix its permissions or "
            "its disk, then prune again"
        ) from error


def commit(place: Place, staged: Staged, manifest: Manifest, began: float) -> Saved:
    """Write a staged shard and, on rank 0, make all shards a checkpoint.

    Writes:  a new folder in the root, and removes superfluous ones.
    Raises:  SaveError on every rank when one failed.
    """
    fs, root, name = place.fs, place.root, manifest.name()
    temporary = root / f"{TEMPORARY}{name}"
    where = f"{root}: the save of step {manifest.step}"

    def make() -> None:
        if place.rank == 0:
            fs.make_folder(temporary)

    def put() -> Any:
        entry, sums = write(fs, temporary / f"rank-{place.rank:03d}.safetensors", staged, place.chunk_bytes)
        entries = {
            piece.name: (str(piece.tensor.dtype), list(piece.shape), value)
            for piece, value in zip(staged.shard.pieces, sums, strict=True)
        }
        return {"file": cattrs.unstructure(entry), "tensors": entries}

    def publish() -> Any:
        if place.lease is None:
            return None
        whole = attrs.evolve(manifest, **_merge(answers))
        data = manifests.to_bytes(whole)
        manifests.parse(data, temporary)  # a checkpoint that no reader takes is none
        handle = fs.create(temporary / manifests.FILE, len(data))
        try:
            write_all(fs, handle, data, 0)
            fs.sync(handle)
        finally:
            fs.close(handle)
        fs.sync_folder(temporary)
        leases.check(fs, place.lease)
        fs.rename(temporary, root / name)
        fs.sync_folder(root)
        return {"bytes": whole.num_bytes(), "sha256": manifests.sha256(whole), "seconds": time.monotonic() - began}

    def clean() -> Any:
        return retire(fs, root, place.keep) if place.rank == 0 else None

    try:
        _on_all_ranks(place, make, where)
        answers = _on_all_ranks(place, put, where)
        committed = _on_all_ranks(place, publish, where)[0]
    except SaveError as error:
        if place.rank == 0 and (left := _discard(fs, temporary)):
            raise SaveError(*error.problems, left) from error
        raise
    saved = Saved(name=name, step=manifest.step, removed=(), **committed)
    try:
        removed = _on_all_ranks(place, clean, f"{root}: deleting what step {manifest.step} replaces")[0]
    except SaveError as error:
        return attrs.evolve(saved, undeleted=error.problems)
    return attrs.evolve(saved, removed=tuple(removed))


def retire(fs: Fs, root: Path, keep: Keep) -> tuple[str, ...]:
    """Delete what nothing keeps, after a commit: first by name, durably, then the files.

    A folder whose manifest is damaged is not counted and not touched.

    returns  names of the deleted checkpoints
    Writes:  removes folders of `root`.
    """
    names = fs.names(root)
    for name in names:
        if name.startswith((TEMPORARY, TRASH)):
            remove_tree(fs, root / name)
    committed: list[tuple[int, int, Kept]] = []
    for name in names:
        if name_fields(name) is None:
            continue
        try:
            manifest = manifests.read(fs, root / name)
        except InputError:
            continue
        committed.append((manifest.attempt, manifest.serial, Kept(name=name, step=manifest.step, score=manifest.score)))
    newest_first = [kept for _, _, kept in sorted(committed, key=lambda entry: entry[:2], reverse=True)]
    removed = superfluous(newest_first, keep)
    for name in removed:
        fs.rename(root / name, root / f"{TRASH}{name}")
        fs.sync_folder(root)
        remove_tree(fs, root / f"{TRASH}{name}")
    return removed


@contextmanager
def _leading(place: Place, *, fresh: bool) -> Iterator[Place]:
    """The place with lease and attempt: rank 0 takes them, the others hear of it."""
    with ExitStack() as stack:
        held: list[Lease] = []

        def take() -> int | None:
            if place.rank != 0:
                return None
            if place.root.name not in place.fs.names(place.root.parent):
                place.fs.make_folder(place.root)
                place.fs.sync_folder(place.root.parent)
            present = [name for name in place.fs.names(place.root) if name_fields(name)]
            if fresh and present:
                raise InputError(
                    f"{place.root}: expected no checkpoints of a new run, got {present[-1]}; continue from it "
                    "or choose another run.name"
                )
            held.append(stack.enter_context(leases.hold(place.fs, place.root, _attempts(place.fs, place.root))))
            return held[0].attempt

        attempt = _on_all_ranks(place, take, f"{place.root}: taking the folder")[0]
        yield attrs.evolve(place, lease=held[0] if held else None, attempt=attempt)


def _on_all_ranks(place: Place, act: Callable[[], Any], where: str) -> list[Any]:
    """What `act` returned on every rank, by rank, when it went well on all of them.

    Raises:  SaveError on every rank, with the problems of each.
    """
    cause: Exception | None = None
    try:
        mine: dict[str, Any] = {"value": act()}
    except InputError as error:
        cause, mine = error, {"problems": list(error.problems)}
    except OSError as error:
        reason = f"{where}: expected it to end well, got {error.strerror or error} on rank {place.rank}; fix the disk"
        cause, mine = error, {"problems": [reason]}
    except BaseException as error:
        problem = f"{where}: expected it to end well, got {error!r} on rank {place.rank}; report it"
        place.all_gather_text(json.dumps({"problems": [problem]}))
        raise
    answers = [json.loads(answer) for answer in place.all_gather_text(json.dumps(mine))]
    problems = [problem for answer in answers for problem in answer.get("problems", ())]
    if problems:
        raise SaveError(*problems) from cause
    return [answer["value"] for answer in answers]


def _merge(answers: Sequence[Any]) -> dict[str, Any]:
    """Tensors and files of all ranks' answers.

    Raises:  InputError when ranks disagree about a tensor.
    """
    names = {str(dtype): name for name, dtype in DTYPES.items()}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    sums: dict[str, int] = {}
    for rank, answer in enumerate(answers):
        for name, (dtype, shape, value) in answer["tensors"].items():
            kind = (names[dtype], tuple(shape))
            if kinds.setdefault(name, kind) != kind:
                raise InputError(
                    f"checkpoint: expected '{name}' as {kinds[name]} on every rank, got {kind} on rank "
                    f"{rank}; report it"
                )
            sums[name] = sums.get(name, 0) + value
    return {
        "tensors": {
            name: TensorEntry(dtype=dtype, shape=shape, digest=to_text(sums[name]))
            for name, (dtype, shape) in kinds.items()
        },
        "files": tuple(cattrs.structure(answer["file"], FileEntry) for answer in answers),
    }


def _discard(fs: Fs, temporary: Path) -> str:
    """Delete a failed save; what kept that from happening, or nothing."""
    try:
        if temporary.name in fs.names(temporary.parent):
            remove_tree(fs, temporary)
    except OSError as error:
        return (
            f"{temporary}: expected to delete it, got {error.strerror or error}; the next save that succeeds deletes it"
        )
    return ""


def _attempts(fs: Fs, root: Path) -> list[int]:
    """The attempts that left something in the folder, finished or not."""
    parts = [name_fields(name.removeprefix(TEMPORARY).removeprefix(TRASH)) for name in fs.names(root)]
    return [fields[1] for fields in parts if fields is not None]
