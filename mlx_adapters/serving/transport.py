"""What HTTP asks for beside the answers: bodies that do not end, clients that leave, readers that stop reading."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_adapters.protocols.errors import ApiError

BODY_SECONDS = 30
ALIVE_SECONDS = 10.0  # of silence, before a reader is told that the answer is still coming


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


def error_response(error: ApiError) -> JSONResponse:
    """OpenAI's form of a refusal."""
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    return JSONResponse(error.body, error.status, headers)


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
    """Chunks as they come; `on_end` is called however it ends, a reader that stops reading is let go."""

    def __init__(
        self,
        chunks: AsyncIterator[dict[str, Any] | ApiError],
        on_end: Callable[[], None],
        write_seconds: float,
        headers: dict[str, str],
        framing: Framing,
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", **headers}, framing.media_type)
        del self.headers["content-length"]
        self.chunks, self.on_end, self.write_seconds, self.framing = chunks, on_end, write_seconds, framing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, the client's leaving or its silence."""
        writing = asyncio.ensure_future(self.write(send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait([writing, leaving], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                with contextlib.suppress(TimeoutError, OSError):
                    writing.result()
        finally:
            self.on_end()
            writing.cancel()
            leaving.cancel()
            await asyncio.wait([writing, leaving])

    async def write(self, send: Send) -> None:
        """Send all chunks."""

        async def put(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self.write_seconds):  # wait_for can lose a cancellation in Python 3.11
                await send(message)

        async def body(data: bytes, more: bool = True) -> None:
            await put({"type": "http.response.body", "body": data, "more_body": more})

        await put({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        chunks = aiter(self.chunks)
        coming = asyncio.ensure_future(anext(chunks, None))
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=ALIVE_SECONDS)
                if not done:
                    if self.framing.alive:
                        await body(self.framing.alive)
                    continue
                chunk = coming.result()
                if chunk is None:
                    break
                await body(self.framing.frame(chunk.body if isinstance(chunk, ApiError) else chunk))
                coming = asyncio.ensure_future(anext(chunks, None))
            await body(self.framing.last, more=False)
        finally:
            coming.cancel()
