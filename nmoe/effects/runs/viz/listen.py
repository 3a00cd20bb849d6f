"""From a port to the application of `nmoe viz`: connections with a time limit, signals, the orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nmoe.effects.parallel.launch import handling
from nmoe.effects.runs.viz.server import Settings, Watch, application
from nmoe.errors import InputError

REQUEST_S = 5.0
"""Seconds a client has for the head of a request, from the start of the connection or the answer before."""

MAX_CONNECTIONS = 256
"""A browser opens six to a host."""


class Connection(H11Protocol):
    """One connection of a client: closed when there are too many, or when no whole request comes in time.

    uvicorn itself waits for ever for the end of a request's head.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection. Writes: the connections of the server."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._expect_request()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _expect_request(self) -> None:
        """Close the connection in `REQUEST_S` seconds unless a request is whole by then."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not answering and self._late is None:
            self._late = self.loop.call_later(REQUEST_S, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn's server, whose signals are those of `serve`, and whose streams end with it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve`, which holds them until no thread reads the index any more."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then the connections."""
        application: Any = self.config.app
        watch: Watch = application.state.watch
        async with watch.changed:
            watch.ended = True
            watch.changed.notify_all()
        # What is still asked for is cancelled after a second, which is no error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def serve(settings: Settings, host: str, port: int, say: Callable[[str], None]) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; another one meanwhile changes nothing.

    returns  128 + the signal
    Raises:  InputError when the port cannot be listened to.
    """
    signals: list[int] = []
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, else asyncio leaves Nagle's algorithm on and each answer waits 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen()
        except OSError as error:
            raise InputError(
                f"--port: expected a free port of {host}, got {port} ({error.strerror}); choose another, or 0 for any"
            ) from error
        config = uvicorn.Config(
            application(settings),
            http=Connection,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
            lifespan="on",
        )
        server = Server(config)

        def end(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            server.should_exit = True

        # Until the event loop is closed, which waits for the threads that read the index.
        with handling(end, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            bound = listening.getsockname()[1]
            name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
            say(f"http://{name}:{bound}/" + (f"?token={settings.token}" if settings.token else ""))
            server.run(sockets=[listening])
    return 128 + signals[0] if signals else 0
