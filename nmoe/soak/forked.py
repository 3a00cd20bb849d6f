"""A call in a forked process: a fresh one in milliseconds, when everything is imported and nothing was computed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from nmoe.effects.terminal import warn
from nmoe.errors import InputError

PATIENCE_S = 120.0
"""A call that takes longer hangs, unless it says how long it may take."""


def forked(
    call: Callable[[], int],
    output: Path,
    *,
    stopped: Callable[[], None] = lambda: None,
    patience_s: float = PATIENCE_S,
) -> int:
    """Run `call` in a forked process, whose output goes to a file.

    stopped     called each time the process is stopped; it continues afterwards
    patience_s  most seconds it may take
    returns     its exit code, or minus the signal that ended it
    Raises:  RuntimeError when it takes too long.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        call_and_exit(call, output)
    deadline = time.monotonic() + patience_s
    while True:
        pid, status = os.waitpid(child, os.WUNTRACED | os.WNOHANG)
        if pid == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise RuntimeError(f"expected an attempt to end within {patience_s:.0f} s, got none:\n{tail(output)}")
            time.sleep(0.005)
        elif os.WIFSTOPPED(status):
            try:
                stopped()
            finally:
                os.kill(child, signal.SIGCONT)
        else:
            return os.waitstatus_to_exitcode(status)


def call_and_exit(call: Callable[[], int], output: Path) -> NoReturn:
    """What the forked process does: it ends here, whatever happens."""
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        code = call()
    except InputError as error:
        warn("\n".join(f"nmoe: {problem}" for problem in error.problems))
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leave:
        code = int(leave.code or 0)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def tail(output: Path) -> str:
    """The last lines a process wrote."""
    return "\n".join(output.read_text(errors="replace").splitlines()[-12:])
