"""What HTTP asks for beside the answers: who may ask from where, bodies that do not end, readers that stop reading.

A page of another origin can reach a server on this machine: by a simple POST, or by a name of its own that comes to
mean 127.0.0.1. So the host and the origin of each request are looked at, and its body must be told to be JSON.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_adapters.protocols.errors import ApiError
from mlx_adapters.serving.jobs import log
from mlx_adapters.serving.settings import ServeSettings, is_loopback
from mlx_adapters.storage import files

BODY_SECONDS = 30
ALIVE_SECONDS = 10.0  # of silence, before a reader is told that the answer is still coming
CLOSING_SECONDS = 5.0  # for the access log's last lines
METHODS = "GET, POST, DELETE, OPTIONS"
READABLE = "X-Adapter, X-Ignored-Fields, Retry-After"  # by pages of other origins, to which headers are hidden else


class Keys:
    """The keys that may ask, as digests, which are compared in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    def who(self, headers: Headers) -> str | None:
        """Who asks: the beginning of the key's digest, "anyone" where none is needed; None without a good one."""
        if not self._keys:
            return "anyone"
        header = headers.get("authorization", "")
        given = header[7:].strip() if header[:7].lower() == "bearer " else header or headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode()).digest()
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return digest.hex()[:8] if any(matches) else None


class Limits:
    """How much each key may ask: requests in a minute, and requests at once. Used by the event loop alone."""

    def __init__(self, settings: ServeSettings) -> None:
        self._rate, self._most = settings.key_rate, settings.key_requests
        self._left: dict[str, tuple[float, float]] = {}
        self._open: dict[str, int] = {}

    @contextlib.contextmanager
    def one(self, who: str) -> Iterator[None]:
        """One request of `who`. Raises ApiError 429."""
        if self._rate is not None:
            now = time.monotonic()
            left, at = self._left.get(who, (float(self._rate), now))
            left = min(left + (now - at) * self._rate / 60, float(self._rate))
            if left < 1:
                wait = (1 - left) * 60 / self._rate
                message = f"This key may ask {self._rate} times a minute; try again in {wait:.0f} s."
                raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded")
            self._left[who] = left - 1, now
        if self._most is not None and self._open.get(who, 0) >= self._most:
            message = f"This key may have {self._most} requests at once."
            raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded")
        self._open[who] = self._open.get(who, 0) + 1
        try:
            yield
        finally:
            self._open[who] -= 1


class AccessLog:
    """A line for each request, written by a thread of its own: a slow disk keeps no answer waiting."""

    def __init__(self, path: Path | None, as_json: bool) -> None:
        self._path, self._as_json = path, as_json
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = None
        if path is not None:
            self._thread = threading.Thread(target=self._write, args=(path,), name="access log", daemon=True)
            self._thread.start()

    def note(self, record: dict[str, Any]) -> None:
        """Write a request down."""
        if self._path is not None:
            text = " ".join(f"{key}={_plain(value)}" for key, value in record.items() if value is not None)
            self._lines.put(json.dumps(record) if self._as_json else text)

    def close(self) -> None:
        """Wait until all is written, but for no slow disk."""
        self._lines.put(None)
        if self._thread is not None:
            self._thread.join(CLOSING_SECONDS)

    def _write(self, path: Path) -> None:
        while (line := self._lines.get()) is not None:
            try:
                files.append_line(path, line)
            except OSError as error:
                log.warning("the access log cannot be written: %s", error)


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)


TOLD_WITH = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # the header that goes with a status


class Guard:
    """An application behind the checks of host, origin and body, with CORS, limits of time and the access log."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings, self.keys = app, settings, Keys(settings.api_keys)
        self.log = AccessLog(settings.access_log, settings.access_log_json)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, begun, status = Headers(scope=scope), time.monotonic(), 0
        # `held` is let go when the answer is written, which for a stream is later than its handler's return.
        scope["who"], scope["told"], scope["held"] = self.keys.who(headers), {}, contextlib.ExitStack()
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if origin is not None and self._may_read(origin, headers):
                    told = {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": READABLE}
                    MutableHeaders(scope=message).update({**told, "Vary": "Origin"})
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                response: Response = error_response(refusal, scope["path"])
                if refusal.code == "ambiguous_length":
                    response.headers["Connection"] = "close"
                await response(scope, receive, answer)
            elif scope["method"] == "OPTIONS":
                await self._preflight(headers)(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        finally:
            scope["held"].close()
            client = scope.get("client") or ("",)
            self.log.note(
                {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "client": client[0],
                    "key": scope["who"],
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    **scope["told"],
                    "ms": round((time.monotonic() - begun) * 1000),
                }
            )

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why a request is not even looked at."""
        if "transfer-encoding" in headers and "content-length" in headers:
            return ApiError(400, "Content-Length and Transfer-Encoding contradict each other.", code="ambiguous_length")
        if len(headers.getlist("host")) != 1 or not self._is_ours(headers["host"]):
            why = f"This server is not called '{headers.get('host', '')[:100]}'; start it with --allow-host to say so."
            return ApiError(403, why, code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and not self._may_read(origin, headers):
            why = f"Pages of '{origin[:100]}' may not ask this server; start it with --cors-origin to allow them."
            return ApiError(403, why, code="unknown_origin")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return ApiError(415, "Send JSON, with the header 'Content-Type: application/json'.")
        if (coding := headers.get("content-encoding", "").strip().lower()) not in ("", "identity"):
            return ApiError(415, f"Send the body as it is, without 'Content-Encoding: {coding[:40]}'.")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a request's Host may be meant for this server; what is not on loopback may have any name."""
        name = _host_name(host)
        allowed = self.settings.allowed_hosts
        if "*" in allowed or name in allowed or name == self.settings.host.lower():
            return True
        return is_loopback(name) if is_loopback(self.settings.host) else not allowed

    def _may_read(self, origin: str, headers: Headers) -> bool:
        allowed = self.settings.cors_origins
        same = urlsplit(origin).netloc.lower() == headers.get("host", "").lower() if "://" in origin else False
        return same or origin in allowed or "*" in allowed

    def _preflight(self, headers: Headers) -> Response:
        asked = headers.get("access-control-request-headers", "authorization, content-type")
        told = {"Allow": METHODS, "Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": "600"}
        if asked.isascii() and asked.isprintable():
            told["Access-Control-Allow-Headers"] = asked[:500]
        if headers.get("access-control-request-private-network") == "true":
            told["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=204, headers=told)


def _host_name(host: str) -> str:
    """A Host header without its port: a name, or an address without brackets."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    return name.partition(":")[0]


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises ApiError 413 beyond `limit` bytes, 408 when it does not come."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body.extend(part)
                if len(body) > limit:
                    raise ApiError(413, f"The body is larger than {limit} bytes.")
    except TimeoutError:
        raise ApiError(408, "The body did not come in time.") from None
    return bytes(body)


def error_response(error: ApiError, path: str = "", headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A refusal in OpenAI's form; on Ollama's paths in theirs, a text, with what else OpenAI's tells beside it."""
    headers = {**(headers or {}), **TOLD_WITH.get(error.status, {})}
    told = error.body["error"]
    body = {**told, "error": told.pop("message")} if path.startswith("/api/") else error.body
    return JSONResponse(body, error.status, headers)


async def left(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Framing(Protocol):
    """How the chunks of a stream are written."""

    media_type: str
    alive: bytes  # what may be sent while there is nothing to tell
    last: bytes

    def frame(self, chunk: dict[str, Any]) -> bytes:
        """One chunk."""


class EventStream(Response):
    """Chunks as they come, those that are there together in one piece; `on_end` is called however it ends."""

    def __init__(
        self,
        chunks: AsyncIterator[list[dict[str, Any] | ApiError]],
        on_end: Callable[[], None],
        headers: dict[str, str],
        framing: Framing,
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", **headers}, framing.media_type)
        del self.headers["content-length"]
        self.chunks, self.on_end, self.framing = chunks, on_end, framing
        self._sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end or the client's leaving; a connection whose reader takes nothing ends by itself."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        others = [asyncio.ensure_future(left(receive)), asyncio.ensure_future(self._keep_alive(send))]
        try:
            await asyncio.wait([writing, *others], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                with contextlib.suppress(OSError):
                    writing.result()
        finally:
            self.on_end()
            for task in (writing, *others):
                task.cancel()
            await asyncio.wait([writing, *others])

    async def _write(self, send: Send) -> None:
        async for chunks in self.chunks:
            framed = (self.framing.frame(chunk.body if isinstance(chunk, ApiError) else chunk) for chunk in chunks)
            await self._send(send, b"".join(framed))
        await self._send(send, self.framing.last, more=False)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(max(self._sent + ALIVE_SECONDS - time.monotonic(), 0))
            if time.monotonic() - self._sent >= ALIVE_SECONDS:
                await self._send(send, self.framing.alive)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        self._sent = time.monotonic()
        if data or not more:
            await send({"type": "http.response.body", "body": data, "more_body": more})
