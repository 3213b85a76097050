"""What HTTP asks for beside the answers: bodies that do not end, clients that leave, readers that stop reading."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_adapters.serving.jobs import ApiError

BODY_SECONDS = 30


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


class EventStream(Response):
    """Server-sent events; `on_end` is called however it ends, a reader that stops reading is let go."""

    def __init__(
        self,
        chunks: AsyncIterator[dict[str, Any] | ApiError],
        on_end: Callable[[], None],
        write_seconds: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", **headers}, "text/event-stream")
        del self.headers["content-length"]
        self.chunks, self.on_end, self.write_seconds = chunks, on_end, write_seconds

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
        """Send all events."""

        async def put(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self.write_seconds):  # wait_for can lose a cancellation in Python 3.11
                await send(message)

        await put({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.chunks:
            data = chunk.body if isinstance(chunk, ApiError) else chunk
            await put({"type": "http.response.body", "body": event(json.dumps(data)), "more_body": True})
        await put({"type": "http.response.body", "body": event("[DONE]"), "more_body": False})


def event(data: str) -> bytes:
    """One server-sent event."""
    return f"data: {data}\n\n".encode()
