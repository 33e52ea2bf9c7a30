"""The web application of `tokentm serve`: what may be asked, by whom, and how much of it at a time.

Every answer is computed by one thread, and made from what is in memory: no request names a file of the server. An
upload is the bytes of a photo, a recording or a text, as the body of the request; nothing of it is kept after the
answer.
"""

import asyncio
import ipaddress
import json
import logging
import mimetypes
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokentm_jax.cli.figure import colour_tables
from tokentm_jax.cli.heatmaps import Asked, Column, Job
from tokentm_jax.data.examples import Example
from tokentm_jax.data.labels import number
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.pictures import as_base64
from tokentm_jax.methods.table import METHODS
from tokentm_jax.methods.titles import RECOMMENDED, title_of
from tokentm_jax.models.loading import Model

PAGE = Path(__file__).parent / "page"
WAITING = 64  # requests that wait for their turn; one more is told to come back
COME_BACK = "2"  # seconds until then
HELD = 256 * 2**20  # bytes of all uploads that are held at a time
UPLOAD_TIME = 60.0  # seconds in which an upload must have arrived
PATIENCE = 10.0  # seconds that a connection may do nothing
CONNECTIONS = 512
OCTETS = "application/octet-stream"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Busy(Exception):
    """There is no room for one more request, or its turn did not come in time."""


class Turns:
    """One thread that computes, and a queue of bounded length before it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._waiting = seconds, 0
        self._turn, self._thread = asyncio.Lock(), ThreadPoolExecutor(1, "explain")

    async def run(self, function: Callable[[], Any]) -> Any:
        """The function's result. Raises Busy for a full queue, or after `seconds` in it, and TimeoutError where the
        function itself takes longer.

        Who goes away while waiting leaves the queue. What is being computed cannot be stopped: after its time it is
        no longer waited for, and the next turn begins when it has ended.
        """
        if self._waiting >= WAITING:
            raise Busy
        self._waiting += 1
        try:
            async with asyncio.timeout(self.seconds):
                await self._turn.acquire()
        except TimeoutError:
            raise Busy from None
        finally:
            self._waiting -= 1
        computed = asyncio.get_running_loop().run_in_executor(self._thread, function)
        computed.add_done_callback(self._end)
        return await asyncio.wait_for(asyncio.shield(computed), self.seconds)

    def _end(self, computed: asyncio.Future[Any]) -> None:
        self._turn.release()
        if not computed.cancelled():
            computed.exception()  # it may be that nobody waits for it any more


class Uploads:
    """Uploads as they arrive: each of at most `largest` bytes, in `UPLOAD_TIME`, and all of at most `HELD`."""

    def __init__(self, largest: int, kind: str) -> None:
        self.largest, self._kind, self._held = largest, kind, 0

    @asynccontextmanager
    async def content(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as held within the context. Raises HTTPException, and `Busy`."""
        taken, parts = 0, []
        self._check(int(request.headers.get("content-length", 0)))
        try:
            try:
                async with asyncio.timeout(UPLOAD_TIME):
                    async for part in request.stream():
                        taken += len(part)
                        self._held += len(part)
                        self._check(taken)
                        if self._held > HELD:
                            raise Busy
                        parts.append(part)
            except TimeoutError:
                raise HTTPException(408, f"the {self._kind} did not arrive within {UPLOAD_TIME:g} s") from None
            content = b"".join(parts)
            parts.clear()
            yield content
        finally:
            self._held -= taken

    def _check(self, size: int) -> None:
        if size > self.largest:
            raise HTTPException(413, f"the {self._kind} is larger than {self.largest / 2**20:g} MiB")


def explained(vit: Model, content: bytes, method: str, target: int | None) -> dict[str, Any]:
    """What the page shows of the bytes of one photo, recording or text, for a class or (None) the predicted one.

    Raises InputError for bytes that the model does not take, and where its numbers are not finite.
    """
    reader, name = vit.preprocessing, f"the {vit.preprocessing.kind}"
    given = reader.decoded(content)
    inputs, panel = reader.sample(Example(name, given)), reader.panel(given, name)
    del given
    job = Job(vit, [Column(method, Asked(target))])
    (outputs,), ((_, (heatmap,)),) = job.maps(reader.stacked([inputs]))
    if not (np.isfinite(outputs).all() and np.isfinite(heatmap).all()):
        raise InputError(f"the model gives no finite numbers for {name}")
    found = job.described(outputs)
    return {
        "method": method,
        "top5": found["top5"],
        "target": found["target"],
        **panel.answer(job.shown(heatmap)),
        "map": {"shape": list(heatmap.shape), "data": as_base64(heatmap.astype("<f4").tobytes())},
    }


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Lets through what comes from the page itself, and puts the security headers on every answer.

    The Host must be one of the server's own, or a page of another site whose name leads here could read the answers;
    and if the browser names the page that asks, it must be one of ours. With `numbers`, any address in numbers is one
    of the server's own: no other site can lead one of these here.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], numbers: bool) -> None:
        self.app, self._names, self._numbers = app, names, numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                ours = ((name.encode(), value.encode()) for name, value in HEADERS.items())
                message["headers"] = [*message["headers"], *(pair for pair in ours if pair[0] not in given)]
            await send(message)

        if refusal := self._refuse(scope, headers):
            await _json({"error": refusal}, 403, {"connection": "close"})(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def _refuse(self, scope: Scope, headers: Mapping[str, str]) -> str:
        host = headers.get("host", "").lower()  # "localhost:8000", or "[::1]:8000"
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].removesuffix(".")
        if [name for name, _ in scope["headers"]].count(b"host") != 1 or not self._is_own(name):
            return "this server has another name; --allow-host adds one"
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            return "pages of other sites may ask nothing here"
        elsewhere = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if elsewhere and headers.get("sec-fetch-mode") != "navigate":  # a link to the page is allowed
            return "pages of other sites may ask nothing here"
        return ""

    def _is_own(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            return bool(ipaddress.ip_address(name)) and self._numbers
        except ValueError:
            return False


def connection(longest: float) -> type[H11Protocol]:
    """Connections that do not wait for ever: neither for a request, nor `longest` seconds for its end."""

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen: Any = None
            self._since = self.loop.time()
            self._watch()

        def _watch(self) -> None:
            now = self.loop.time()
            if self.cycle is not self._seen:
                self._seen, self._since = self.cycle, now
            waited = now - self._since
            if waited > longest or (waited > PATIENCE and self._seen is None):
                self.transport.abort()
            elif waited > PATIENCE and self._seen.response_complete:
                self.transport.close()
            self._timer = self.loop.call_later(PATIENCE / 4, self._watch)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

    return Connection


def application(
    vit: Model,
    methods: Sequence[str],
    *,
    host: str = "127.0.0.1",
    names: Iterable[str] = (),
    largest: int = 20 * 2**20,
    seconds: float = 60,
    ready: Iterable[str] = (),
    compiling: float = 0,
    answer: Callable[..., dict[str, Any]] = explained,
) -> ASGIApp:
    """The application for a server that listens at `host`, also known by `names`; `seconds` limit the wait for a turn,
    and the computing; methods that are `ready` are compiled, which took `compiling` seconds."""
    own = {"localhost", "127.0.0.1", "::1", host, socket.gethostname(), *names}
    files = {path.relative_to(PAGE).as_posix(): path.read_bytes() for path in PAGE.rglob("*") if path.is_file()}
    suffixes = vit.preprocessing.suffixes
    compiled, turns, uploads = set(ready), Turns(seconds), Uploads(largest, vit.preprocessing.kind)
    constant = {
        **_described(vit, methods),
        "examples": sorted(name for name in files if name.startswith("examples/") and Path(name).suffix in suffixes),
        "largest": largest,
        "compiling": compiling,
    }

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            raise HTTPException(404, "there is no such page")
        kind = mimetypes.guess_type(name)[0] or OCTETS
        return Response(files[name], headers={"cache-control": "no-cache"}, media_type=kind)

    async def settings(_: Request) -> Response:
        return _json({**constant, "ready": [name for name in methods if name in compiled]})

    async def explain(request: Request) -> Response:
        method, name = request.query_params.get("method", methods[0]), request.query_params.get("class")
        if method not in methods:
            raise InputError(f"the method {method!r:.80} is not served here")
        index = None if name is None else number(name)  # the page sends a number, whatever classes are called
        target = None if name is None else vit.class_index(name if index is None else index)
        if request.headers.get("content-type") != OCTETS:
            raise HTTPException(415, f"send the {vit.preprocessing.kind}'s bytes as the body, of the type {OCTETS}")

        def work() -> bytes:
            found = answer(vit, content, method, target)
            compiled.add(method)
            return json.dumps(found).encode()

        async with uploads.content(request) as content:
            try:
                return Response(await _unless_gone(request, turns.run(work)), media_type="application/json")
            except TimeoutError:
                raise HTTPException(504, f"{method} takes longer than {seconds:g} s here") from None

    routes = [
        Route("/", file),
        Route("/settings", settings),
        Route("/explain", explain, methods=["POST"]),
        Route("/{name:path}", file),
    ]
    app = Starlette(routes=routes, exception_handlers=FAULTS)
    return Guard(app, frozenset(name.lower() for name in own), numbers=not is_local(host))


async def _unless_gone(request: Request, work: Awaitable[bytes]) -> bytes:
    """The result of the work, which is given up when the client goes away."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, media_type="application/json")


def _fault(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Any:
    async def respond(_: Request, error: Exception) -> Response:
        return _json({"error": sentence or str(error)}, status, headers)

    return respond


async def _refused(_: Request, error: Any) -> Response:
    return _json({"error": error.detail}, error.status_code, error.headers)


FAULTS: dict[Any, Any] = {
    InputError: _fault(400, ""),
    HTTPException: _refused,
    Busy: _fault(503, "too many requests are waiting here: try again in a moment", {"retry-after": COME_BACK}),
    ClientDisconnect: _fault(400, "nobody waits for an answer"),
    Exception: _fault(500, "something went wrong here; the server's terminal shows what"),
}


def _described(vit: Model, methods: Sequence[str]) -> dict[str, Any]:
    """What the page has to know of the model, the methods and the colours."""

    best = RECOMMENDED[vit.preprocessing.kind]

    def entry(name: str) -> dict[str, Any]:
        title, fields = title_of(name), ("paper", "year", "passes", "class_specific")
        words = {"name": name, "title": title.name, "sentence": title.sentence, "recommended": name == best}
        return words | {field: getattr(METHODS[name], field) for field in fields}

    return {
        "model": vit.name,
        "kind": vit.preprocessing.kind,
        "accept": sorted(vit.preprocessing.suffixes),
        "size": vit.preprocessing.size,
        "classes": [vit.class_name(i) for i in range(vit.module.num_classes)],
        "methods": [entry(name) for name in methods],
        "colours": colour_tables(),
    }


def server(app: ASGIApp, seconds: float) -> uvicorn.Server:
    """What runs the application, whose time limit is `seconds`."""
    # Only lines about errors of ours: clients may send what they like, and go when they like.
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.exc_info is not None)
    config = uvicorn.Config(
        app,
        http=connection(UPLOAD_TIME + 2 * seconds + 30),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)
