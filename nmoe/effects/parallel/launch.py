"""Launcher: start the ranks of a run on this machine, watch their heartbeats; read the environment of a started rank.

A launcher, ours or torchrun, passes a rank everything in its environment, which is read here and nowhere else. Ours
imports no torch: it starts processes, forwards signals, and ends all when one dies or no heartbeat comes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType

import attrs

from nmoe.effects import files, terminal
from nmoe.errors import InputError

STACKS = signal.SIGUSR2
"""What makes a rank write the stacks of its threads to stderr."""

MULTICAST_OFF = MappingProxyType(
    {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1", "NCCL_NVLS_ENABLE": "0"}
)
"""NVLink multicast can hang a whole machine, so it is off before any library looks."""

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables with settings of torch's allocator, which are the config's own: `[memory]`."""

HEARTBEATS = "NMOE_HEARTBEATS"
"""Name of the variable with the descriptor, open in every rank, of the memory for heartbeats to our launcher."""

HEARTBEAT = struct.Struct("<qd")  # steps taken; monotonic seconds, which all processes of a machine share

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal a process gets when its parent dies."""

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals after which a run saves and ends with exit code 75. Between its fork and its first handler a rank holds them
back: their default would end it with 128 + the number instead."""

POLL_S = 0.1
ORDERLY_S = 10.0
"""Seconds between the first orderly end of a rank and that of the last."""

STACKS_S = 2.0
"""Seconds all ranks have for writing their stacks, one after the other."""

ORDERLY = (0, 2, 5, 6, 75, 130)
"""Exit codes of a rank that ended as it should: the others do too (docs/architecture.md)."""

EXIT_HUNG = 1
EXIT_ORPHAN = 75
"""Of a rank whose launcher died while it forked: the same command resumes."""


@attrs.frozen(kw_only=True)
class Launch:
    """This process as its environment describes it; read once."""

    rank: int
    world: int
    home: Path  # caches: prepared corpora and tokenizers
    local_rank: int
    local_world: int  # ranks on this host
    address: str  # where rank 0 or the launcher listens
    port: int
    launched: bool  # whether a launcher started it
    hosts_store: bool  # whether this rank opens the rendezvous
    restart: int  # of all ranks together, by a launcher
    heartbeats: int | None  # descriptor; None: our launcher does not watch this process
    multicast: Mapping[str, str]  # the switches of MULTICAST_OFF
    allocator: Mapping[str, str]  # the variables of ALLOCATOR


def from_environment(environ: Mapping[str, str]) -> Launch:
    """Read what torchrun and `start` set: `RANK`, `WORLD_SIZE` and the like; and `NMOE_HOME`, the folder of caches.

    Raises:  InputError for each that is no number, or does not fit the others.
    """
    world_names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    names = (*world_names, "TORCHELASTIC_RESTART_COUNT", HEARTBEATS)
    texts = {name: environ[name] for name in names if name in environ}
    if problems := [
        f"{name}: expected a number from a launcher, got {text!r}; unset it or start with a launcher"
        for name, text in texts.items()
        if not text.isdecimal()
    ]:
        raise InputError(*problems)
    numbers = {name: int(text) for name, text in texts.items()}
    rank, world = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if rank >= world:
        raise InputError(
            f"RANK: expected less than WORLD_SIZE = {world}, got {rank}; unset both or start with a launcher"
        )
    if world > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]):
        raise InputError(
            *(f"{name}: expected a value with WORLD_SIZE = {world}, got nothing; use torchrun" for name in missing)
        )
    return Launch(
        rank=rank,
        world=world,
        home=files.home(environ),
        local_rank=numbers.get("LOCAL_RANK", rank),
        local_world=numbers.get("LOCAL_WORLD_SIZE", world),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=numbers.get("MASTER_PORT", 0),
        launched="WORLD_SIZE" in environ,
        hosts_store=rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        restart=numbers.get("TORCHELASTIC_RESTART_COUNT", 0),
        heartbeats=numbers.get(HEARTBEATS),
        multicast={name: environ[name] for name in MULTICAST_OFF if name in environ},
        allocator={name: environ[name] for name in ALLOCATOR if name in environ},
    )


class RankHeartbeat:
    """Heartbeat of one rank: its step and the time, in a few bytes of a file that our launcher maps too.

    Without a file, as under torchrun, the rank itself writes its stacks to stderr when no heartbeat comes for too long.
    """

    def __init__(self, memory: mmap.mmap | None, rank: int, alarm_s: float | None) -> None:
        """alarm_s: None: nobody waits for this rank."""
        self.step = 0
        self._memory, self._at, self._alarm_s = memory, rank * HEARTBEAT.size, alarm_s

    def beat(self, step: int | None = None) -> None:
        """Beat now. Writes: steps taken, and the time, to the shared memory."""
        self.step = self.step if step is None else step
        self._write(time.monotonic())
        if self._memory is None and self._alarm_s is not None:
            faulthandler.dump_traceback_later(self._alarm_s)

    def rest(self) -> None:
        """No step follows, and what does may take its time. Writes: as `beat`."""
        self._write(math.inf)
        faulthandler.cancel_dump_traceback_later()

    def _write(self, when: float) -> None:
        if self._memory is not None:
            self._memory[self._at : self._at + HEARTBEAT.size] = HEARTBEAT.pack(self.step, when)


@contextmanager
def open_rank_heartbeat(launch: Launch, timeout_s: float) -> Iterator[RankHeartbeat]:
    """The heartbeat of this process, until the block ends.

    Meanwhile a rank among others writes its stacks to stderr when it gets `STACKS`.
    """
    if launch.world == 1:
        yield RankHeartbeat(None, 0, None)
        return
    faulthandler.register(STACKS, all_threads=True)
    try:
        if launch.heartbeats is None:
            yield RankHeartbeat(None, launch.rank, timeout_s)
            return
        with mmap.mmap(launch.heartbeats, 0) as memory:
            yield RankHeartbeat(memory, launch.rank, timeout_s)
    finally:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS)


@attrs.frozen(kw_only=True)
class Rank:
    """A process that was started."""

    number: int
    process: subprocess.Popen[bytes]

    def code(self) -> int | None:
        """Its exit code, minus the signal that ended it, or None while it runs."""
        return self.process.poll()

    def is_orderly(self) -> bool:
        """Whether it ended as a run ends."""
        return self.code() in ORDERLY

    def is_stopped(self) -> bool:
        """Whether a signal keeps it from running."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.code() is None:
            self.process.send_signal(number)


def start(ranks: int, arguments: Sequence[str], environ: Mapping[str, str], *, timeout_s: float, grace_s: float) -> int:
    """Run `nmoe` with these arguments as so many processes, and wait for all of them.

    SIGINT, SIGTERM and SIGUSR1 are forwarded to all, SIGHUP as SIGTERM. When one rank dies, the others are ended. When
    no heartbeat comes for `timeout_s` after the first step, each writes its stacks, and all are ended. When this
    process dies, each rank gets SIGTERM, from its fork on.

    grace_s  seconds that ranks give themselves to end after SIGTERM or SIGUSR1
    returns  the exit code on which the ranks agree, or that of the first that died; 128 + the signal if one ended it
    """
    asked: list[tuple[int, float]] = []
    started: list[Rank] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append((signal.SIGTERM if number == signal.SIGHUP else number, time.monotonic()))

    # An open file without a name: nothing stays behind, however this process ends.
    with tempfile.TemporaryFile() as file, handling(note, signal.SIGINT, *STOPPING):
        file.truncate(ranks * HEARTBEAT.size)
        shared = {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
            **environ,
            **MULTICAST_OFF,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            HEARTBEATS: str(file.fileno()),
        }
        launcher = os.getpid()
        try:
            for number in range(ranks):
                process = subprocess.Popen(
                    [sys.executable, "-m", "nmoe", *arguments],
                    env={**shared, "RANK": str(number), "LOCAL_RANK": str(number)},
                    pass_fds=(file.fileno(),),
                    start_new_session=True,  # so that Ctrl-C reaches a rank once: through us
                    preexec_fn=lambda: _tie_to(launcher),  # safe: this process has one thread
                )
                started.append(Rank(number=number, process=process))
            with mmap.mmap(file.fileno(), 0) as memory:
                return _watch(started, memory, asked, timeout_s=timeout_s, grace_s=grace_s)
        finally:
            for rank in started:
                rank.send(signal.SIGKILL)
                rank.process.wait()


def _tie_to(launcher: int) -> None:
    """Have this process, a fork of the launcher, get SIGTERM when the launcher dies, also before its first import.

    Writes: the signal of the parent's death and the mask of signals, which both outlast exec; ends an orphan.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != launcher:  # it died before the request: no signal comes
        os._exit(EXIT_ORPHAN)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """One handler for these signals, what was there before put back at the end; SIGHUP stays ignored under nohup.

    Writes:  the process's handlers; signals that the launcher had held back arrive now.
    """
    before: dict[signal.Signals, Callable[..., object] | int | None] = {}
    try:
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _watch(
    ranks: Sequence[Rank], memory: mmap.mmap, asked: Sequence[tuple[int, float]], *, timeout_s: float, grace_s: float
) -> int:
    """Wait until all have ended, or have to; report why, and return the exit code."""
    passed_on = 0
    first: Rank | None = None
    since = math.inf
    while True:
        for number, _ in asked[passed_on:]:
            for rank in ranks:
                rank.send(number)
            passed_on += 1
        now = time.monotonic()
        ended = [rank for rank in ranks if rank.code() is not None]
        if ended and first is None:
            # Of several that ended between two looks, one that did not do so by itself explains the others.
            first, since = min(ended, key=lambda rank: (rank.is_orderly(), (rank.code() or 0) > 0)), now
        if first is not None and (not first.is_orderly() or len(ended) == len(ranks) or now - since > ORDERLY_S):
            return _ended(ranks, first)
        if any(number != signal.SIGINT and now - when > grace_s + ORDERLY_S for number, when in asked):
            return _hung(ranks, memory, f"expected an end within {grace_s:g} s after a signal (checkpoint.grace_s)")
        beats = [_last_heartbeat(memory, rank)[1] for rank in ranks]
        if first is None and min(beats) > 0 and now - max(beats) > timeout_s:
            return _hung(ranks, memory, f"expected a heartbeat within {timeout_s:g} s (parallel.timeout_s)")
        time.sleep(POLL_S)


def _ended(ranks: Sequence[Rank], first: Rank) -> int:
    """End those that still run, say what became of the first, unless all agree, and return the exit code."""
    running = [rank for rank in ranks if rank.code() is None]
    _kill(running)
    code = first.code() or 0
    if running or any(rank.code() != code for rank in ranks):
        others = f"; ended the others ({_numbers(running)})" if running else ""
        name = f" ({signal.Signals(-code).name})" if code < 0 else ""
        _report(
            f"rank {first.number}: expected the end of all ranks together, got exit code {code}{name}{others}; "
            "see what it wrote above"
        )
    return code if code > 0 else 128 - code if code < 0 else int(bool(running))


def _hung(ranks: Sequence[Rank], memory: mmap.mmap, what: str) -> int:
    """Have each rank write its stacks, end all, and name the one that the others wait for."""
    running = [rank for rank in ranks if rank.code() is None]
    stopped = [rank for rank in running if rank.is_stopped()]
    for rank in running:
        _report(f"rank {rank.number}: its stacks, after step {_last_heartbeat(memory, rank)[0]}")
        rank.send(STACKS)
        rank.send(signal.SIGCONT)
        time.sleep(STACKS_S / len(running))
    _kill(running)
    # A rank that waits for another one beats when the wait begins, so the oldest heartbeat is the culprit's.
    culprits = stopped or [min(running, key=lambda rank: _last_heartbeat(memory, rank)[1])]
    step = _last_heartbeat(memory, culprits[0])[0]
    why = "stopped by a signal" if stopped else "the longest without a heartbeat"
    _report(f"rank {_numbers(culprits)}: {what}, got none after step {step} ({why}); ended all ranks, stacks are above")
    return EXIT_HUNG


def _kill(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        rank.send(signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


def _last_heartbeat(memory: mmap.mmap, rank: Rank) -> tuple[int, float]:
    """Steps and time of a rank's last beat; 0 before the first."""
    return HEARTBEAT.unpack_from(memory, rank.number * HEARTBEAT.size)


def _free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _numbers(ranks: Sequence[Rank]) -> str:
    return ", ".join(str(rank.number) for rank in ranks)


def _report(text: str) -> None:
    terminal.warn(f"nmoe: {text}")
