"""A right program passes; everything else that a program may do neither passes nor gets through."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from nmoe.effects.evals import jail, sandbox
from nmoe.effects.evals.sandbox import Limits, grade
from nmoe.errors import InputError
from nmoe.pure.evals.problems import PROBLEMS, Problem

PROBLEM = next(problem for problem in PROBLEMS if problem.entry == "add")
RIGHT = PROBLEM.prompt + PROBLEM.solution
LIMITS = Limits(seconds=8.0)
KEY = 0x6E6D6F65
"""Of a segment of shared memory."""


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.entry)
def test_known_solutions_pass(problem: Problem) -> None:
    assert grade(problem, problem.prompt + problem.solution, Limits(seconds=30.0)) == "passed"


def asking(expression: str) -> str:
    """A program that is right if what it sees inside is as it should be: `expression` is true there."""
    return f"import os, sys\nif not ({expression}):\n    raise SystemExit\n{RIGHT}"


ATTACKS = {
    "wrong": ("def add(a, b):\n    return a - b\n", "wrong"),
    "not Python": ("def add(a, b:\n", "no result"),
    "nothing": ("", "wrong"),
    "early exit": (f"import sys\n{RIGHT}\nsys.exit(0)\n", "no result"),
    "early exit, at once": (f"import os\n{RIGHT}\nos._exit(0)\n", "no result"),
    "early exit in the call": ("def add(a, b):\n    raise SystemExit(0)\n", "no result"),
    "always equal": (
        "class A(int):\n    def __eq__(self, other): return True\ndef add(a, b):\n    return A(0)\n",
        "wrong",
    ),
    "other results than asked": ("import json\njson.dumps = lambda *x, **y: '[]'\n" + RIGHT, "no result"),
    "forged results": (
        "import json, sys\nasked = json.loads(sys.stdin.readline())\n"
        "print(asked['nonce'] + json.dumps([['value', 1]] * len(asked['calls'])), flush=True)\nraise SystemExit\n",
        "wrong",
    ),
    "right results before it is asked": (
        f"print({json.dumps([['value', result] for _, result in PROBLEM.calls])!r}, flush=True)\nraise SystemExit\n",
        "no result",
    ),
    "results of too few calls": (
        "import json, sys\nasked = json.loads(sys.stdin.readline())\n"
        "print(asked['nonce'] + '[[\"value\", 5]]', flush=True)\nraise SystemExit\n",
        "no result",
    ),
    "reads the harness": (
        "import sys\nframe = sys._getframe(1)\n"
        "def add(a, b):\n    return frame.f_globals['asked'].get('results', [[0]])[0][0]\n",
        "wrong",
    ),
    "endless loop": ("while True: pass\n", "time"),
    "sleeps": ("import time\ntime.sleep(1000)\n", "time"),
    "closes its output and stays": ("import os, time\nos.close(1)\ntime.sleep(1000)\n", "no result"),
    "endless output": ("while True: print('x' * 1000)\n", "output"),
    "memory, bit by bit": (f"x = []\nwhile True: x.append(bytearray(1 << 20))\n{RIGHT}", "no result"),
    "fork bomb": (f"import os\nwhile True: os.fork()\n{RIGHT}", "no result"),
    "mounts": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        f"if libc.mount(b'none', b'/usr', b'tmpfs', 0, None) == -1: raise SystemExit\n{RIGHT}",
        "no result",
    ),
    "a namespace of its own": (
        f"import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == -1: raise SystemExit\n{RIGHT}",
        "no result",
    ),
    "kills its parents": ("import os\nos.kill(-1, 9)\n", "no result"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_does_not_pass(name: str) -> None:
    program, expected = ATTACKS[name]
    assert grade(PROBLEM, program, LIMITS if expected != "time" else Limits(seconds=2.0)) == expected


REFUSED = {
    "memory": "bytearray(1 << 30)",
    "fork": "os.fork()",
    "thread": "threading.Thread(target=print).start()",
    "another program": "subprocess.run(['/usr/bin/env'])",
    "a file": "open('/x', 'w')",
    "a file of the library": "open(os.__file__, 'a')",
    "memory of a file without a name": "os.write(os.memfd_create('x'), b'x')",
    "a folder": "os.mkdir('/usr/x')",
    "a device": "os.mknod('/x')",
    "another user": "os.setuid(1)",
    "root again": "os.setuid(0)",
    "a chroot within": "os.chroot('/usr')",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "processes again": "resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_kernel_refuses_it(name: str) -> None:
    """The program goes on, and passes, only where the call is refused."""
    program = (
        f"import os, resource, subprocess, threading\ntry:\n    {REFUSED[name]}\n"
        f"except (OSError, MemoryError, RuntimeError, ValueError): pass\nelse: os._exit(0)\n{RIGHT}"
    )
    assert grade(PROBLEM, program, LIMITS) == "passed"


def test_nothing_outside_is_there(tmp_path: Path) -> None:
    """Files of this machine, its processes, its environment; and what is left open by who started it."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    os.environ["NMOE_SECRET"] = "x"
    try:
        for expression in (
            f"not os.path.exists({str(secret)!r})",
            "not os.path.exists('/proc') and not os.path.exists('/dev') and not os.path.exists('/etc')",
            "'NMOE_SECRET' not in os.environ",
            "os.getpid() == 1",
            "all(not _open(fd) for fd in range(3, 64))",
            "_prctl(39, 0) == 1 and not any(_prctl(23, capability) == 1 for capability in range(64))",
            "all(os.statvfs(path).f_flag & os.ST_RDONLY for path in ('/', '/usr', sys.base_prefix))",
        ):
            helper = (
                "import os\ndef _open(fd):\n    try: os.fstat(fd)\n    except OSError: return False\n    return True\n"
                "import ctypes\ndef _prctl(option, of): return ctypes.CDLL(None).prctl(option, of, 0, 0, 0)\n"
            )
            assert grade(PROBLEM, helper + asking(expression), LIMITS) == "passed", expression
    finally:
        del os.environ["NMOE_SECRET"]


@pytest.mark.parametrize(
    ("prefix", "more"), [("/usr", []), ("/usr/local", []), ("/opt/python", ["/opt/python"]), ("/usr2", ["/usr2"])]
)
def test_no_folder_is_mounted_twice(prefix: str, more: list[str]) -> None:
    assert jail.shown(prefix) == ["/usr", "/lib", "/lib64", *more]


def test_no_network() -> None:
    """A server on this machine is not reached, and no other address either."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()
        program = (
            "import socket\ndef reached(address):\n    try:\n        socket.create_connection(address, 1)\n"
            f"    except OSError: return False\n    return True\nif reached(('127.0.0.1', {port})): raise SystemExit\n"
            f"if reached(('10.0.0.1', 80)): raise SystemExit\n{RIGHT}"
        )
        assert grade(PROBLEM, program, LIMITS) == "passed"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_shared_memory_of_this_machine() -> None:
    """A segment of System V that everybody may read is not there inside."""
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(KEY, 4096, 0o1666)  # made if it is not there
    assert segment != -1, os.strerror(ctypes.get_errno())
    try:
        program = f"import ctypes\nif ctypes.CDLL(None).shmget({KEY}, 0, 0) != -1: raise SystemExit\n{RIGHT}"
        assert grade(PROBLEM, program, LIMITS) == "passed"
    finally:
        libc.shmctl(segment, 0, None)  # removed


def test_no_process_and_no_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    detached = (
        "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nos.close(0)\n"
        "while True:\n    time.sleep(0.1)\n    x = 'nmoe_detached'\n"
    )
    assert grade(PROBLEM, detached, Limits(seconds=1.0)) == "time"
    running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"scope[asked" in _content(path)]
    assert running == [] and list(tmp_path.iterdir()) == []


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_machine_without_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line; nothing is run without them."""
    text = Path(jail.__file__).read_text()
    broken = tmp_path / "jail.py"
    refusal = f"    raise OSError({errno.EPERM}, 'Operation not permitted', 'unshare')\n"
    broken.write_text(text.replace("    user, group = os.getuid(), os.getgid()\n", refusal, 1))
    monkeypatch.setattr(jail, "__file__", str(broken))
    with pytest.raises(InputError, match="sandbox: expected Linux namespaces, got Operation not permitted .unshare."):
        sandbox.check()


def test_a_sandbox_in_which_nothing_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> str:
        return "no result"

    monkeypatch.setattr(sandbox, "grade", wrong)
    with pytest.raises(InputError, match="sandbox: expected a right program to pass, got 'no result'"):
        sandbox.check()
