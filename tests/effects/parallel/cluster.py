"""Hosts of their own on one machine: network namespaces with host names, joined by a network that this process is.

A host's interface is a TUN device. `_switch` reads the packets of each and passes them to the host they are for: late,
at some rate, not all of them, and none while a host is cut off. TCP does not know that there is no cable.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import math
import os
import random
import select
import signal
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import pytest

from nmoe.soak.forked import call_and_exit
from tests.effects.parallel.rank_runs import PATIENCE_S

CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET = 0x04000000, 0x10000000, 0x40000000
TUNSETIFF, IFF_TUN_NO_PI = 0x400454CA, 0x1001
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8922, 0x8913, 0x8914
IFF_UP = 1

INTERFACE = "eth0"
FIRST = "10.77.0.1"
"""Address of the first host; the others follow."""

PORT = 29500
MTU = 60000
"""Bytes of a packet: few of them, so that a network in Python keeps up."""

CUT = "cut"
"""Name of the file that has the number of a host that no packet reaches or leaves."""

SENT = "sent"
"""Name of the file that gets how many bytes of packets went between hosts."""

EXIT_FORBIDDEN = 77
STOPPED = "stopped"


@attrs.frozen(kw_only=True)
class Network:
    """What joins every two hosts, in each direction."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    loss: float = 0.0  # share of packets


@attrs.frozen(kw_only=True)
class End:
    """How a rank ended."""

    code: int | None  # None: it was stopped, and ended with the others
    text: str


def on_hosts(
    hosts: int, per_host: int, folder: Path, call: Callable[[int], int], network: Network = Network()
) -> list[End]:
    """How `call(rank)` ended on each rank, each a fork of this process on one of the hosts.

    The test counts as not run where namespaces are forbidden.
    """
    folder.mkdir(parents=True, exist_ok=True)
    supervisor = os.fork()
    if supervisor == 0:
        call_and_exit(lambda: _supervise(hosts, per_host, folder, call, network), folder / "cluster.txt")
    _, status = os.waitpid(supervisor, 0)
    said = (folder / "cluster.txt").read_text()
    code = os.waitstatus_to_exitcode(status)
    if code == EXIT_FORBIDDEN:
        pytest.skip(f"hosts in namespaces: expected the right to make them, got {said.strip()}")
    assert code == 0, said
    codes = [None if text == STOPPED else int(text) for text in said.splitlines()[-1].split()]
    texts = [(folder / f"rank{rank}.txt").read_text(errors="replace") for rank in range(hosts * per_host)]
    return [End(code=code, text=text) for code, text in zip(codes, texts, strict=True)]


def _supervise(hosts: int, per_host: int, folder: Path, call: Callable[[int], int], network: Network) -> int:
    """Make the hosts, start their ranks, be their network, and print the exit code of each."""
    try:
        owners = {"uid_map": os.getuid(), "gid_map": os.getgid()}
        _unshare(CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        for name, outside in owners.items():
            Path(f"/proc/self/{name}").write_text(f"0 {outside} 1")
        taps: list[int] = []
        pids: list[int] = []
        for host in range(hosts):
            taps.append(_host(host))
            for local in range(per_host):
                pids.append(_started(host, local, hosts, per_host, folder, call))
    except OSError as error:
        print(error.strerror)
        return EXIT_FORBIDDEN
    codes: dict[int, str] = {}
    end = time.monotonic() + PATIENCE_S

    def over() -> bool:
        for pid in [pid for pid in pids if pid not in codes]:
            found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if found:
                codes[pid] = STOPPED if os.WIFSTOPPED(status) else str(os.waitstatus_to_exitcode(status))
        return len(codes) == len(pids) or time.monotonic() > end

    sent = _switch(taps, network, folder / CUT, over)
    (folder / SENT).write_text(str(sent))
    for pid in pids:
        if codes.get(pid, STOPPED) == STOPPED:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    print(*(codes.get(pid, STOPPED) for pid in pids))
    return 0


def _host(number: int) -> int:
    """Become a host of this number; its end of the network."""
    _unshare(CLONE_NEWNET | CLONE_NEWUTS)
    socket.sethostname(f"host{number}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), IFF_TUN_NO_PI))
    address = socket.inet_aton(FIRST)[:3] + bytes([1 + number])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, given in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, b"\xff\xff\xff\0")):
            fcntl.ioctl(control, request, struct.pack("16sHxx4s8x", INTERFACE.encode(), socket.AF_INET, given))
        fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", INTERFACE.encode(), MTU))
        for name in (INTERFACE, "lo"):
            flags = struct.unpack("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sh", name.encode(), 0)))[1]
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", name.encode(), flags | IFF_UP))
    return tap


def _started(host: int, local: int, hosts: int, per_host: int, folder: Path, call: Callable[[int], int]) -> int:
    """A rank of this host; its process."""
    rank = host * per_host + local
    pid = os.fork()
    if pid == 0:
        numbers = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": hosts * per_host, "LOCAL_WORLD_SIZE": per_host}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update(MASTER_ADDR=FIRST, MASTER_PORT=str(PORT), GLOO_SOCKET_IFNAME=INTERFACE)
        call_and_exit(lambda: call(rank), folder / f"rank{rank}.txt")
    return pid


def _switch(taps: Sequence[int], network: Network, cut: Path, over: Callable[[], bool]) -> int:
    """Pass packets on until it is over; their bytes."""
    chance, free, number, sent = random.Random(0), defaultdict[tuple[int, int], float](float), 0, 0
    waiting: list[tuple[float, int, int, bytes]] = []
    looked, away = 0.0, -1
    while True:
        now = time.monotonic()
        if now - looked > 0.02:
            if over():
                return sent
            looked, away = now, int(cut.read_text() or -1) if cut.exists() else -1
        patience = min(0.02, max(0.0, waiting[0][0] - now)) if waiting else 0.02
        for tap in select.select(taps, [], [], patience)[0]:
            packet = os.read(tap, 65536)
            source, target = taps.index(tap), packet[19] - 1
            is_known = packet[0] >> 4 == 4 and 0 <= target < len(taps)
            if not is_known or away in (source, target) or chance.random() < network.loss:
                continue
            begin = max(time.monotonic(), free[source, target])
            free[source, target] = begin + len(packet) / network.bytes_per_s
            number, sent = number + 1, sent + len(packet)
            heapq.heappush(waiting, (free[source, target] + network.delay_s, number, target, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            *_, target, packet = heapq.heappop(waiting)
            os.write(taps[target], packet)


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
