"""What passes between the web side and the engine: jobs in, pieces of their answers or an error out."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters.config.sampling import Sampling
from mlx_adapters.generation.batching import Request, Token
from mlx_adapters.generation.text_stream import TextStream

log = logging.getLogger("mlx_adapters.serve")


class ApiError(Exception):
    """A refusal with an HTTP status and the body that OpenAI's API gives."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Piece:
    """Something new of an answer; `finish_reason` only with the last."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None
    completion_tokens: int


@dataclass(eq=False)
class Job:
    """One answer to be written. `events` gets Pieces, or one ApiError."""

    model: str
    prompt: list[int]
    sampling: Sampling
    top_logprobs: int | None = None
    continues: bool = False  # the prompt is a text to go on from: a leading space is kept
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None
    request: Request | None = None
    text: TextStream = field(init=False, repr=False)  # set when the model begins with it
    made: int = 0
    held: list[Token] = field(default_factory=list)

    def send(self, event: Piece | ApiError) -> None:
        """Hand an event to the web side."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("an event came after the loop was closed")
