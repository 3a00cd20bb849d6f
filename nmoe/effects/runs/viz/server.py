"""The server of `nmoe viz`: answers as JSON to GET, one stream that says which runs grew, and one POST for notes.

It listens to this host alone by default, answers only to the names it was started under, and reads nothing
but the runs it has scanned and the data folders it was given. Of a run folder it writes the notes alone, and those
only for its own page: see `Guard`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import attrs
import duckdb
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from nmoe.effects.record.reading import json_object
from nmoe.effects.runs.viz import api, curves, data, experts, export, folder, machine, mixture, views
from nmoe.effects.runs.viz.contract import contract, to_json
from nmoe.effects.runs.viz.index import Index, Poll, poll
from nmoe.errors import InputError

COOKIE = "nmoe_viz"
NOTES = "/api/notes"
MAX_BODY = 64 << 10
BODY_S = 5.0
POLL_S = 1.0
KEEP_ALIVE_S = 15.0
MAX_RUNS = 500
MAX_TEXT = 4000
STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@attrs.frozen(kw_only=True)
class Settings:
    """What a server shows and to whom."""

    index: Index
    data_roots: tuple[Path, ...]
    hosts: tuple[str, ...]  # names it answers to
    token: str | None  # None: whoever reaches it


@attrs.define
class Watch:
    """What the pages are sent. One task polls while a page listens; everything else waits for `changed`."""

    listeners: int = 0
    polled: float = -math.inf  # monotonic seconds
    left_bytes: int = 0
    rate: float = 0.0  # bytes a second
    number: int = 0
    last: dict[str, Any] = attrs.field(factory=dict)
    ended: bool = False  # the server ends, and its streams with it
    changed: asyncio.Condition = attrs.field(factory=asyncio.Condition)
    polling: asyncio.Lock = attrs.field(factory=asyncio.Lock)


def application(settings: Settings) -> Starlette:
    """The application: pages, answers, the stream."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.watch = Watch()
        task = asyncio.create_task(_poll_while_watched(settings, app.state.watch))
        yield
        task.cancel()

    answers: Mapping[str, Callable[[Ask], Any]] = {
        "runs": lambda ask: views.runs(settings.index, ask.texts("column")),
        "series": lambda ask: curves.series(settings.index, ask.runs(), ask.text("tag"), ask.axis()),
        "events": lambda ask: views.events(settings.index, ask.runs(), ask.axis(), alerts=ask.texts("alerts") == ["1"]),
        "configs": lambda ask: views.configs(settings.index, ask.runs(), differing=ask.texts("differs") == ["1"]),
        "evaluations": lambda ask: views.evaluations(settings.index, ask.runs()),
        "samples": lambda ask: views.samples(settings.index, ask.runs()),
        "experts": lambda ask: experts.experts(settings.index, ask.text("run")),
        "layers": lambda ask: experts.layers(settings.index, ask.text("run"), ask.text("tag"), ask.axis()),
        "load": lambda ask: experts.load(settings.index, ask.text("run"), ask.whole("step")),
        "load_history": lambda ask: experts.load_history(
            settings.index, ask.text("run"), ask.whole("layer", required=True) or 0
        ),
        "timing": lambda ask: machine.timing(settings.index, ask.text("run")),
        "gpus": lambda ask: machine.gpus(settings.index, ask.text("run")),
        "mixture": lambda ask: mixture.mixture(settings.index, ask.text("run")),
        "checkpoints": lambda ask: folder.checkpoints(settings.index, ask.text("run")),
        "console": lambda ask: folder.console(settings.index, ask.text("run")),
        "folders": lambda ask: data.folders(settings.data_roots),
        "document": lambda ask: data.document(
            settings.data_roots,
            ask.whole("folder", required=True) or 0,
            ask.text("split"),
            ask.whole("number", required=True) or 0,
        ),
    }
    routes = [Route(f"/api/{name}", _answer(answer, settings), methods=["GET"]) for name, answer in answers.items()]
    routes += [
        Route(NOTES, _notes(settings), methods=["POST"]),
        Route("/api/contract", _contract, methods=["GET"]),
        Route("/api/export", _export(settings), methods=["GET"]),
        Route("/api/stream", _stream, methods=["GET"]),
        Route("/", _page, methods=["GET"]),
        Route("/favicon.ico", _icon, methods=["GET"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, settings=settings)],
        exception_handlers={HTTPException: _http_problem},
    )


class Guard:
    """Refuses what is not for this server, and says in every answer what a page may do."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        refused = self._refused(Request(scope))
        await (refused or self.app)(scope, receive, send_guarded)

    def _refused(self, request: Request) -> Response | None:
        """Why a request gets no answer; None when it gets one."""
        if _host_name(request.headers.get("host", "")) not in self.settings.hosts:
            names = ", ".join(self.settings.hosts)
            return _problem(
                421, f"host: expected one of {names}, got another; open the address that `nmoe viz` printed"
            )
        if request.method == "POST" and request.url.path == NOTES:
            if problem := _foreign(request):
                return _problem(403, problem)
        elif request.method not in ("GET", "HEAD"):
            return _problem(405, f"method: expected GET, got {request.method[:20]}; only notes can be changed")
        token = self.settings.token
        if token is None or _same(request.cookies.get(COOKIE, ""), token):
            return None
        if request.url.path == "/" and _same(request.query_params.get("token", ""), token):
            kept = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
            answer = RedirectResponse("/" + (f"?{_encoded(kept)}" if kept else ""), status_code=303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        return _problem(401, "token: the one that `nmoe viz` printed, got none or another; open the address it printed")


def _foreign(request: Request) -> str | None:
    """Why a POST may come from a page of another site; None when it cannot.

    A browser asks the server before another site's page may send JSON, and never gets leave here; it also names the
    page that sends.
    """
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return "content-type: expected application/json, got another; send JSON"
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
    if site != "same-origin" or (origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower()):
        return "origin: expected the page of this server, got another; open the address that `nmoe viz` printed"
    return None


def _host_name(header: str) -> str:
    """The host of a Host header, without the port."""
    name, _, port = header.rpartition(":")
    return (name if name and port.isdecimal() else header).lower()


def _same(given: str, token: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _encoded(pairs: Sequence[tuple[str, str]]) -> str:
    from urllib.parse import urlencode

    return urlencode(pairs)


@attrs.frozen(kw_only=True)
class Ask:
    """The parameters of a request, read strictly."""

    given: Mapping[str, list[str]]

    def texts(self, name: str) -> list[str]:
        """Every value of a parameter."""
        values = list(dict.fromkeys(self.given.get(name, [])))
        if len(values) > MAX_RUNS or any(len(value) > MAX_TEXT for value in values):
            raise InputError(
                f"{name}: expected at most {MAX_RUNS} values of {MAX_TEXT} characters, got more; ask for fewer"
            )
        return values

    def runs(self) -> list[str]:
        """The runs asked for, at least one."""
        names = self.texts("run")
        if not names:
            raise InputError("run: expected the name of a run, got none; add run=NAME")
        return names

    def text(self, name: str) -> str:
        """A parameter that must be there once."""
        values = self.texts(name)
        if len(values) != 1:
            raise InputError(f"{name}: expected one value, got {len(values)}; add {name}=VALUE")
        return values[0]

    def whole(self, name: str, *, required: bool = False) -> int | None:
        """A whole number from 0."""
        if not required and not self.texts(name):
            return None
        value = self.text(name)
        if not (value.isascii() and value.isdecimal() and len(value) < 16):
            raise InputError(f"{name}: expected a whole number from 0, got {value[:40]!r}; write digits")
        return int(value)

    def real(self, name: str, low: float) -> float | None:
        """A finite number from `low`."""
        if not self.texts(name):
            return None
        value = self.text(name)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and low <= number <= 1e300):
            raise InputError(f"{name}: expected a number from {low:g}, got {value[:40]!r}; write another")
        return number

    def axis(self) -> curves.Axis:
        """What a chart asks for."""
        x = self.texts("x") or ["step"]
        if len(x) != 1 or x[0] not in curves.AXES:
            raise InputError(f"x: expected one of {', '.join(curves.AXES)}, got {x[0][:40]!r}; choose one of them")
        points = self.whole("points")
        return curves.Axis(
            x=x[0],
            smooth=self.real("smooth", 0.0) or 0.0,
            points=800 if points is None else min(max(points, 10), 4000),
            log_x=self.texts("log_x") == ["1"],
            bands=self.texts("bands") != ["0"],
            low=self.real("low", 0.0),
            high=self.real("high", 0.0),
        )


def _ask(request: Request) -> Ask:
    """The parameters of a request.

    Raises:  InputError when they are no UTF-8, or too many.
    """
    try:
        given = parse_qs(
            request.scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=2 * MAX_RUNS,
        )
    except ValueError as error:
        raise InputError(
            f"query: expected parameters in UTF-8, at most {2 * MAX_RUNS}, got {error}; ask for fewer"
        ) from error
    return Ask(given=given)


def _answer(answer: Callable[[Ask], Any], settings: Settings) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint: parameters in, JSON out, computed in a thread."""

    async def endpoint(request: Request) -> Response:
        await _freshen(settings, request.app.state.watch)
        try:
            ask = _ask(request)
            content = await asyncio.to_thread(lambda: to_json(answer(ask)))
        except InputError as error:
            return _problem(400, *error.problems)
        return Response(content, media_type="application/json", headers={"cache-control": "no-store"})

    return endpoint


async def _contract(request: Request) -> Response:
    return Response(to_json(contract()), media_type="application/json", headers={"cache-control": "no-store"})


def _export(settings: Settings) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            ask = _ask(request)
            runs, kind = ask.runs(), ask.text("format")
            content = await asyncio.to_thread(export.export, settings.index, runs, kind)
        except InputError as error:
            return _problem(400, *error.problems)
        headers = {"content-disposition": f'attachment; filename="metrics.{kind}"', "cache-control": "no-store"}
        return Response(content, media_type=export.MEDIA_TYPES[kind], headers=headers)

    return endpoint


def _notes(settings: Settings) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint that changes what people wrote about a run: `{"run": NAME, "note": ..., "tags": ..., ...}`."""

    async def endpoint(request: Request) -> Response:
        try:
            async with asyncio.timeout(BODY_S):
                fields = json_object(await _body(request))
            name = fields.pop("run", None)
            if not isinstance(name, str):
                raise InputError("run: expected the name of a run, got none; add it to the body")
            content = await asyncio.to_thread(lambda: to_json(views.write_notes(settings.index, name, fields)))
        except ClientDisconnect:
            return Response(status_code=400)
        except TimeoutError:
            return _problem(408, f"body: expected it within {BODY_S:g} s, got a part; send it at once")
        except InputError as error:
            return _problem(400, *error.problems)
        except ValueError as error:
            return _problem(400, f"body: expected a JSON object, got another ({error}); send one")
        return Response(content, media_type="application/json", headers={"cache-control": "no-store"})

    return endpoint


async def _body(request: Request) -> bytes:
    """The body of a request. Raises: InputError when it has more than `MAX_BODY` bytes."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY:
            raise InputError(f"body: expected at most {MAX_BODY} bytes, got more; write less")
    return content


async def _freshen(settings: Settings, watch: Watch) -> None:
    """Look at the run folders when nobody has for a second."""
    if time.monotonic() - watch.polled > POLL_S:
        await _poll_once(settings, watch)


async def _poll_once(settings: Settings, watch: Watch) -> None:
    """Look at the run folders once, and tell who listens what was found, or why nothing was."""
    async with watch.polling:
        if time.monotonic() - watch.polled < POLL_S / 2 and not watch.left_bytes:
            return
        began = time.monotonic()
        try:
            read = await asyncio.to_thread(poll, settings.index)
        except (OSError, duckdb.Error) as error:
            read = Poll(grown=(), gone=(), problems=(f"reading the runs failed: {error}",), read_bytes=0, left_bytes=0)
        watch.polled, watch.left_bytes = time.monotonic(), read.left_bytes
        if read.read_bytes:
            watch.rate = read.read_bytes / (watch.polled - began)
        message = {
            "grown": list(read.grown),
            "gone": list(read.gone),
            "problems": list(read.problems),
            "left_bytes": read.left_bytes,
            "left_s": read.left_bytes / watch.rate if watch.rate else None,
        }
        async with watch.changed:
            if read.grown or read.gone or message["problems"] != watch.last.get("problems"):
                watch.number += 1
            watch.last = message
            watch.changed.notify_all()


async def _poll_while_watched(settings: Settings, watch: Watch) -> None:
    """Poll once a second while a page listens, at once while there is more to read."""
    while True:
        if watch.listeners:
            await _poll_once(settings, watch)
        await asyncio.sleep(0.01 if watch.listeners and watch.left_bytes else POLL_S)


async def _stream(request: Request) -> Response:
    """Server-sent events: one each time runs grew, were removed, or could not be read."""
    watch: Watch = request.app.state.watch

    async def lines() -> AsyncIterator[bytes]:
        watch.listeners += 1
        try:
            sent = watch.number
            yield b"retry: 2000\n\n" + _sse(watch.last)
            while not watch.ended:
                async with watch.changed:
                    # not asyncio.wait_for: it waits in a task of its own, which under load found the lock released
                    try:
                        async with asyncio.timeout(KEEP_ALIVE_S):
                            await watch.changed.wait_for(_is_news(watch, sent))
                    except TimeoutError:
                        text = b": still here\n\n"
                    else:
                        sent, text = watch.number, _sse(watch.last)
                yield text
        finally:
            watch.listeners -= 1

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _is_news(watch: Watch, sent: int) -> Callable[[], bool]:
    return lambda: watch.ended or watch.number != sent


def _sse(message: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(message)}\n\n".encode() if message else b""


async def _page(request: Request) -> Response:
    return Response((STATIC / "index.html").read_bytes(), media_type="text/html", headers={"cache-control": "no-cache"})


async def _icon(request: Request) -> Response:
    return Response((STATIC / "icon.svg").read_bytes(), media_type="image/svg+xml")


def _problem(code: int, *problems: str) -> Response:
    return Response(to_json(api.Problems(problems=list(problems))), code, media_type="application/json")


async def _http_problem(request: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    return _problem(code, f"address: expected one of this server's, got another ({code}); open /")
