"""What passes between the web side and the engine: jobs in, pieces of their answers or an error out."""

import asyncio
import logging
import time
from dataclasses import dataclass, field

from mlx_adapters.config.sampling import Sampling
from mlx_adapters.generation.requests import Constraint, Request, Token
from mlx_adapters.generation.text_stream import TextStream
from mlx_adapters.protocols.errors import ApiError

log = logging.getLogger("mlx_adapters.serve")


@dataclass(frozen=True)
class Piece:
    """Something new of an answer; `finish_reason` only with the last. `tokens` may begin with those of the prompt."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None
    completion_tokens: int


@dataclass(eq=False)
class Job:
    """One answer to be written. `events` gets pairs of the job and a Piece or, as its last one, an ApiError.

    Several jobs may share `events`: the answers of one request.
    """

    model: str
    prompt: list[int]
    sampling: Sampling
    top_logprobs: int | None = None
    continues: bool = False  # the prompt is a text to go on from: a leading space is kept
    constraint: Constraint | None = None
    scores: bool = False  # the prompt's tokens are told of, too
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
            self.loop.call_soon_threadsafe(self.events.put_nowait, (self, event))
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("an event came after the loop was closed")
