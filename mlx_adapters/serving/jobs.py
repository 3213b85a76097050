"""What passes between the web side and the engine: jobs and commands in, pieces of answers or an error out, and what
becomes of them; the log."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect

from mlx_adapters.answers.reading import Answer, Part, ToolCall
from mlx_adapters.config.sampling import Sampling
from mlx_adapters.generation.decoding import TextStream
from mlx_adapters.generation.requests import Constraint, Request, Token
from mlx_adapters.generation.sampling import Sampler, stop_tokens
from mlx_adapters.protocols.chat import Writer, usage
from mlx_adapters.protocols.errors import ApiError
from mlx_adapters.protocols.options import Asked
from mlx_adapters.runtime.attached import Attached
from mlx_adapters.serving.metrics import Metrics
from mlx_adapters.system.door import TokenizerWrapper

log = logging.getLogger("mlx_adapters.serve")
COMPANY_SECONDS, MOST_COMPANY_SECONDS = 0.008, 0.03  # for which the next of several is awaited, and all of them
RETURN_SECONDS = 0.1  # after which those who had an answer are not thought to ask again together


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

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens were known and not read."""
        return 0 if self.request is None else self.request.cached_tokens

    @property
    def guessed(self) -> tuple[int, int]:
        """How many tokens were guessed, and how many of them were right."""
        return (0, 0) if self.request is None else (self.request.guessed_tokens, self.request.accepted_tokens)

    def begin(self, attached: Attached | None, tokenizer: TokenizerWrapper) -> Request:
        """What the batch is asked for, with the adapter in memory (None: the base)."""
        how = self.sampling
        self.text = TextStream(tokenizer, how, self.continues)
        self.request = Request(
            self.prompt,
            attached,
            how.max_tokens,
            Sampler(how, tokenizer=tokenizer),
            stop_tokens(how, tokenizer),
            self.top_logprobs,
            self.constraint,
            self.scores,
        )
        return self.request

    def take(self, token: Token) -> Piece | ApiError | None:
        """Go on by a token; what there is to tell then."""
        if token.means_nothing:
            return ApiError(500, f"'{self.model}' computes NaN or Inf.", kind="server_error")
        if token.of_prompt:
            self.held.append(token)
            return None
        self.made += 1
        reason, text = token.finish_reason, ""
        if reason == "error":
            return ApiError(400, "The schema or grammar became too large to go on with.", code="invalid_schema")
        if reason != "stop":
            text = self.text.add(token.id)
            self.held.append(token)
        if reason is not None:
            text += self.text.finish()
        if self.text.stopped or reason == "complete":
            reason = "stop"
        if not text and reason is None:
            return None
        held, self.held = tuple(self.held), []
        return Piece(text, held, reason, self.made)

    def begun(self, metrics: Metrics) -> None:
        """Count its first token, which comes now."""
        self.first = time.monotonic()
        metrics.observe("time_to_first_token_seconds", self.first - self.arrived, model=self.model)
        metrics.add("cached_tokens_total", self.cached_tokens, model=self.model)

    def count(self, metrics: Metrics, outcome: str) -> None:
        """Count it and its tokens, at its end."""
        metrics.add("requests_total", model=self.model, outcome=outcome)
        metrics.add("completion_tokens_total", self.made, model=self.model)
        for name, tokens in zip(("guessed", "accepted"), self.guessed, strict=True):
            metrics.add(f"{name}_tokens_total", tokens, model=self.model)
        if self.first is not None and self.made > 1:
            spent = (time.monotonic() - self.first) / (self.made - 1)
            metrics.observe("time_per_output_token_seconds", spent, model=self.model)

    def send(self, event: Piece | ApiError) -> None:
        """Hand an event to the web side."""
        send_all([(self, event)])


def send_all(told: Iterable[tuple[Job, Piece | ApiError]]) -> None:
    """Hand events to the web side. Each loop is woken once: who wakes a thread of Python's may have to wait for it."""
    of_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Piece | ApiError]]] = {}
    for job, event in told:
        of_loop.setdefault(job.loop, []).append((job, event))
    for loop, pairs in of_loop.items():
        try:
            loop.call_soon_threadsafe(_put, pairs)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("events came after the loop was closed")


def _put(pairs: Sequence[tuple[Job, Piece | ApiError]]) -> None:
    for pair in pairs:
        pair[0].events.put_nowait(pair)


class Commands:
    """What a thread is told to do between its steps. Any thread may tell it, any loop await what comes of it."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue()
        self.asked: set[Future[Any]] = set()
        self._company = 0, 0.0  # how many answers ended together, the last there were, and when

    def __len__(self) -> int:
        return self._queue.qsize()

    def put(self, work: Callable[[], None]) -> None:
        """Have it done."""
        self._queue.put(work)

    async def ask(self, work: Callable[[], Any], alive: Callable[[], bool]) -> Any:
        """Have `work` done and give its result. Raises ApiError 503 if the thread is not `alive`."""
        answer: Future[Any] = Future()

        def command() -> None:
            if not answer.set_running_or_notify_cancel():  # nobody waits for it any more
                return
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)

        self.asked.add(answer)  # before the look at the thread, which tells all when it fails
        try:
            if not alive():
                raise ApiError(503, "The server is stopping.", kind="server_error")
            self._queue.put(command)
            return await asyncio.wrap_future(answer)
        finally:
            self.asked.discard(answer)

    def fail(self, error: ApiError) -> None:
        """Tell all who wait for a result."""
        for answer in list(self.asked):
            with contextlib.suppress(InvalidStateError):  # it was given, or nobody waits for it
                answer.set_exception(error)

    def carry_out(self, wait: bool, before: Callable[[], None]) -> None:
        """Do what there is to do; `wait`: for something, a while. `before` is called before anything is done."""
        with contextlib.suppress(queue.Empty):
            command = self._queue.get(timeout=0.5 if wait else None, block=wait)
            before()
            command()
            while True:
                self._queue.get_nowait()()

    def ended(self, answers: int) -> None:
        """Note that so many answers ended together, and no other is being written."""
        self._company = answers, time.monotonic()

    def await_company(self, asking: Collection[Job]) -> None:
        """Let some who ask wait a moment for others: those whose answers ended together are likely to ask again
        together, and one pass over their prompts takes less than two."""
        (company, ended), self._company = self._company, (0, 0.0)
        now = time.monotonic()
        end = now + MOST_COMPANY_SECONDS if now - ended < RETURN_SECONDS else now
        with contextlib.suppress(queue.Empty):
            while len(asking) < company and (left := end - time.monotonic()) > 0:
                self._queue.get(timeout=min(left, COMPANY_SECONDS))()


class OncePerSecond(logging.Filter):
    """Lets one line of a kind through in a second, with how many were left out since."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        kind, now = (record.name, str(record.msg)[:60]), time.monotonic()
        with self._lock:
            at, left_out = self._last.get(kind, (-1.0, 0))
            if now - at < 1:
                self._last[kind] = at, left_out + 1
                return False
            if len(self._last) > 1000:
                self._last.clear()
            self._last[kind] = now, 0
        if left_out:
            record.msg = f"{record.msg} (and {left_out} times since)"
        return True


@dataclass(frozen=True)
class Reply:
    """The answers to one request while they are written, in the words of `writer`. `told`: for the access log."""

    asked: Asked
    prompts: Sequence[list[int]]
    jobs: list[Job]
    answers: list[Answer]
    writer: Writer
    told: dict[str, Any]

    async def whole(self, left: Coroutine[Any, Any, None]) -> dict[str, Any]:
        """Wait for the answers. Raises ApiError, or ClientDisconnect when `left` ends: the client has gone away."""
        gone = asyncio.ensure_future(left)
        try:
            while self._unfinished:
                event = asyncio.ensure_future(self.jobs[0].events.get())
                await asyncio.wait([event, gone], return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise ClientDisconnect
                index, parts = self._take(*event.result())
                self.writer.note(index, parts, self.answers[index])
            return self.writer.whole(self.answers, self._usage)
        finally:
            gone.cancel()

    async def chunks(self) -> AsyncIterator[list[dict[str, Any] | ApiError]]:
        """The chunks of a stream, those together that are there together."""
        ready: list[dict[str, Any] | ApiError] = list(self.writer.begin(len(self.answers)))
        events = self.jobs[0].events
        while self._unfinished:
            if ready and events.empty():
                yield ready
                ready = []
            try:
                index, parts = self._take(*await events.get())
            except ApiError as error:
                yield [*ready, error]
                return
            ready += self.writer.piece(index, parts, self.answers[index])
        yield [*ready, *self.writer.end(self.answers, self._usage)]

    @property
    def _unfinished(self) -> bool:
        return any(answer.finish_reason is None for answer in self.answers)

    def _take(self, job: Job, event: Piece | ApiError) -> tuple[int, list[Part | ToolCall]]:
        """Put a piece into its answer: which one that is, and its new parts."""
        if isinstance(event, ApiError):
            raise event
        self.writer.note_first(job.first)
        text, tokens, made, reason = event.text, event.tokens, event.completion_tokens, event.finish_reason
        if self.asked.max_tokens == 0:  # the prompt's log-probabilities alone were asked for
            text, tokens, made = "", tuple(token for token in tokens if token.of_prompt), 0
            reason = reason and "length"
        index = self.jobs.index(job)
        answer = self.answers[index]
        self.told["completion_tokens"] += answer.count(made)
        return index, answer.add(text, reason, tokens)

    @property
    def _usage(self) -> dict[str, Any]:
        """The record of all answers; each prompt counts once, however many answers it got."""
        firsts = self.jobs[:: len(self.jobs) // len(self.prompts)]
        return usage(
            sum(map(len, self.prompts)),
            sum(answer.completion_tokens for answer in self.answers),
            sum(job.cached_tokens for job in firsts),
            sum(answer.reasoning_tokens for answer in self.answers),
            *(sum(counts) for counts in zip(*(job.guessed for job in self.jobs), strict=True)),
        )
