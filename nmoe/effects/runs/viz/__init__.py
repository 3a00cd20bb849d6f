"""`nmoe viz`: what runs are doing, in a browser. Of a run folder the notes alone are written."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from nmoe.effects.terminal import say
from nmoe.errors import InputError, pip_install

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(root: Path, data: Sequence[Path], home: Path, *, host: str, port: int, token: str | None) -> int:
    """Show the runs under `root` until interrupted.

    home     folder of caches, where the index is kept
    token    what a browser must show; None: none on loopback, a fresh one elsewhere
    returns  128 + the signal that ended it
    Raises:  InputError when the extra is not installed, `root` is no folder, or the port is taken.
    """
    try:
        import starlette  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import uvicorn  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise InputError(
            f"viz: expected the packages of its extra, got no {error.name}; install them with: {pip_install('viz')}"
        ) from error
    from nmoe.effects.runs.viz import data as inspector
    from nmoe.effects.runs.viz import index, listen, server

    if root.exists() and not root.is_dir():
        raise InputError(f"--runs: expected a folder of run folders, got the file {root}; name another")
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isalnum()):
        raise InputError("--token: expected at least 16 letters and digits, got another; leave it out and one is made")
    roots = inspector.data_roots(data)
    if token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(24)
    with index.open_index(root.resolve(), index.index_file(home, root)) as opened:
        settings = server.Settings(
            index=opened,
            data_roots=roots,
            hosts=tuple(dict.fromkeys(name if ":" not in name else f"[{name}]" for name in (*LOOPBACK, host))),
            token=token,
        )
        return listen.serve(settings, host, port, lambda text: say(f"viz            {text}"))
