"""A command run when there is an alert: detached, with a timeout, its failure told and nothing more."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["start"]


def start(command: str, alert: Mapping[str, Any], timeout_s: float, failed: Callable[[str], None]) -> threading.Thread:
    """Run a shell command with the alert as one line of JSON on its standard input; returns at once.

    failed   told when the command cannot start, takes too long, or exits with another code than 0
    returns  the thread that waits for it
    """

    def wait() -> None:
        try:
            done = subprocess.run(
                command,
                shell=True,
                input=json.dumps(alert) + "\n",
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                start_new_session=True,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            failed(f"log.alert_command: ends within {timeout_s:g} s, got none; it was killed")
        except OSError as error:
            failed(f"log.alert_command: can be started, got {error.strerror}")
        else:
            if done.returncode:
                failed(f"log.alert_command: exits with 0, got {done.returncode}: {done.stderr.strip()[-300:]}")

    thread = threading.Thread(target=wait, name="alert command", daemon=True)
    thread.start()
    return thread
