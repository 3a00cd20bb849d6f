"""A command run when there is an alert: detached, with a timeout, its failure reported and nothing more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any


def start(command: str, alert: Mapping[str, Any], timeout_s: float, failed: Callable[[str], None]) -> threading.Thread:
    """Run a shell command with the alert as one line of JSON on its standard input; returns at once.

    failed   called when the command cannot start, takes too long, or exits with another code than 0
    returns  the thread that waits for it
    """
    thread = threading.Thread(
        target=_wait, args=(command, json.dumps(alert) + "\n", timeout_s, failed), name="alert command", daemon=True
    )
    thread.start()
    return thread


def _wait(command: str, text: str, timeout_s: float, failed: Callable[[str], None]) -> None:
    # files rather than pipes: what the command leaves running can hold neither of them against this thread
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as stderr:
        given.write(text.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                command, shell=True, stdin=given, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        except OSError as error:
            failed(f"log.alert_command: expected a command that can be started, got {error.strerror}")
            return
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            failed(f"log.alert_command: expected an end within {timeout_s:g} s, got none; it was killed")
            return
        if code:
            stderr.seek(0)
            failed(
                f"log.alert_command: expected exit code 0, got {code}: "
                f"{stderr.read(300).decode(errors='replace').strip()}"
            )
