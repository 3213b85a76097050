"""What one answer in a batch is asked for, what comes of each step of it, and how far it is."""

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.config.sampling import Sampling
from mlx_adapters.drafting.drafts import Drafts
from mlx_adapters.errors import ModelError
from mlx_adapters.generation.sampling import Sampler
from mlx_adapters.runtime.attached import Attached
from mlx_adapters.surgery.caches import Text
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import compiled

_numbers = itertools.count()
NO_NUMBERS = "no numbers"


class Constraint(Protocol):
    """Which tokens one answer may go on with. It raises ModelError when it cannot go on itself."""

    ended: bool  # nothing more may come

    def mask(self) -> np.ndarray | None:
        """(words,) uint32, a bit for each token that may come next; None: every one may."""

    def accept(self, token: int) -> None:
        """Go on by a token."""


@dataclass(eq=False)
class Request:
    """A prompt and how to go on from it. `top_logprobs` None: no log-probabilities; n: also of the n likeliest.

    `adapter` None is the base. `stop_tokens` end the answer and are not part of it. `scores`: the prompt's tokens come
    out first, with their log-probabilities. `cached_tokens`: how many of them were not read, since they are known.
    `guessed_tokens` and `accepted_tokens`: of the answer, and how many were right.
    """

    prompt: Sequence[int]
    adapter: Attached | None = None
    max_tokens: int = 256
    sampler: Sampler = field(default_factory=lambda: Sampler(Sampling()))
    stop_tokens: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    scores: bool = False
    cached_tokens: int = field(default=0, init=False)
    guessed_tokens: int = field(default=0, init=False)
    accepted_tokens: int = field(default=0, init=False)
    number: int = field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "The prompt is empty.")
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}.")

    @property
    def weights(self) -> Hashable:
        """What stands for the weights that answer it; None: the base's own."""
        return None if self.adapter is None else self.adapter.weights


@dataclass(frozen=True)
class Token:
    """One token of an answer, or of a prompt that `scores`. The last one says why it is the last.

    At "stop" it is the stop token itself; at "complete" its constraint lets nothing follow; at "error" that failed; at
    "no numbers" the token means nothing.
    """

    request: Request
    id: int
    finish_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    of_prompt: bool = False

    @property
    def means_nothing(self) -> bool:
        """Whether the model computed NaN or Inf where it was to tell of it."""
        return self.finish_reason == NO_NUMBERS or (self.logprob is not None and math.isnan(self.logprob))


@dataclass(frozen=True)
class Chosen:
    """What the rows read next, and how it was chosen.

    `tokens` (rows,); `total` (rows,), log Σ exp of the logits that it was chosen by, which tells whether they were
    numbers; `logprobs` (rows, vocabulary) if a row wants them.
    """

    tokens: mx.array
    total: mx.array
    logprobs: mx.array | None = None

    def joined(self, tokens: mx.array) -> "Chosen":
        """With more rows, whose next input (rows,) was chosen by nobody."""
        logprobs = None if self.logprobs is None else mx.pad(self.logprobs, [(0, tokens.size), (0, 0)])
        joined = mx.concatenate([self.tokens.astype(mx.uint32), tokens])
        return Chosen(joined, mx.pad(self.total, (0, tokens.size)), logprobs)

    def kept(self, rows: Sequence[int]) -> "Chosen":
        """Of these rows only."""
        which = mx.array(rows)
        return Chosen(self.tokens[which], self.total[which], None if self.logprobs is None else self.logprobs[which])

    @property
    def rows(self) -> Iterator[tuple[int, float, mx.array | None]]:
        """(token, total, log-probabilities (vocabulary,)) of each row."""
        tokens, totals = self.tokens.tolist(), self.total.tolist()
        return zip(tokens, totals, self.logprobs if self.logprobs is not None else itertools.repeat(None), strict=False)


@dataclass(eq=False)
class Reading:
    """One prompt that is being read: `done` tokens of it are in `text`. It stops at each of `stops` on its way."""

    request: Request
    text: Text
    done: int = 0
    stops: Sequence[int] = ()

    @property
    def left(self) -> int:
        """How many tokens are to be read; the last one is not, it is the first step's input."""
        return len(self.request.prompt) - 1 - self.done

    def piece(self, most: int) -> list[int]:
        """The tokens to read next, `most` at most."""
        end = min([self.done + min(most, self.left), *(stop for stop in self.stops if stop > self.done)])
        return list(self.request.prompt[self.done : end])


@dataclass(frozen=True)
class Followed:
    """How far a row came in a step with guesses: what to tell, its next input, how many of those read were right."""

    tokens: list[Token]
    following: int
    total: float
    right: int


@dataclass(eq=False)
class Row:
    """One answer that is being written."""

    request: Request
    drafts: Drafts | None = None
    written: list[int] = field(default_factory=list)
    fresh: bool = True  # its next input is still the prompt's last token
    read: mx.array | None = None  # the tokens before its next input, (n,), where its logits are processed
    mask: np.ndarray | None = None
    failed: bool = False
    sound: bool = True  # the model computes numbers

    def __post_init__(self) -> None:
        if self.request.sampler.processors:
            self.read = mx.array(list(self.request.prompt[:-1]), dtype=mx.uint32)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token of the model's own logits."""
        return self.request.sampler.plain and self.mask is None

    def advance(self, token: int) -> None:
        """Bring the constraint up to date with the row's next input `token`, and find what may follow it."""
        constraint, self.mask = self.request.constraint, None
        if constraint is None or self.failed:
            return
        try:
            if not self.fresh:
                constraint.accept(token)
            self.mask = None if constraint.ended else constraint.mask()
        except ModelError:
            self.failed = True

    def guess(self, token: int) -> list[int]:
        """What may follow the row's next input `token`."""
        if self.drafts is None:
            return []
        request = self.request
        text = [*request.prompt, *self.written, *([] if self.fresh else [token])]
        room = request.max_tokens - 1 - (len(text) - len(request.prompt))
        return self.drafts.guess(text, room, request.sampler.foresee())

    def follow(self, read: Sequence[int], logits: mx.array, total: float, logprobs: mx.array | None) -> Followed:
        """Go on by the row's next input and those of the guesses after it that are right, `read` together.

        `logits` (read, vocabulary) come after each of them; `total` and `logprobs` (vocabulary,) are of the first.
        """
        told: list[Token] = []
        wants = self.request.top_logprobs is not None
        for right, token in enumerate(read, start=1):
            self.advance(token)
            if self.fresh:
                self.fresh = False
            else:
                told.append(self.told(token, total, logprobs))
            here = logits[right - 1 : right]
            chosen, sums = self.choose(mx.array([token]), here), mx.logsumexp(here, axis=-1, keepdims=True)
            mx.eval(chosen, sums)  # waited for once
            following, total, logprobs = int(chosen.item()), sums.item(), (here - sums)[0] if wants else None
            if right == len(read) or read[right] != following or (told and told[-1].finish_reason):
                break
        if self.drafts is not None and len(read) > 1:
            self.request.guessed_tokens += len(read) - 1
            self.request.accepted_tokens += right - 1
            self.drafts.note(len(read) - 1, right - 1)
        return Followed(told, following, total, right)

    def choose(self, token: mx.array, logits: mx.array) -> mx.array:
        """The token (1,) that follows `token` (1,), of its logits (1, vocabulary)."""
        if self.plain:
            return mx.argmax(logits, axis=-1)
        sampler = self.request.sampler
        if self.read is not None:
            self.read = mx.concatenate([self.read, token.astype(mx.uint32)])
            logits = sampler.process(self.read, logits)
        if self.mask is not None:
            logits = _allowed(mx.array(self.mask), logits)
        if not sampler.greedy:
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return sampler(logits).astype(mx.uint32)

    def told(self, token: int, total: float, logprobs: mx.array | None) -> Token:
        """The next token of the answer; `total` and `logprobs` (vocabulary,) are the model's own (see `Chosen`)."""
        request = self.request
        self.written.append(token)
        reason = "error" if self.failed else None
        if request.constraint is not None and request.constraint.ended:
            reason = "complete"
        if token in request.stop_tokens:
            reason = "stop"
        if not math.isfinite(total):
            self.sound, reason = False, NO_NUMBERS
        if reason is None and len(self.written) >= request.max_tokens:
            reason = "length"
        if request.top_logprobs is None or logprobs is None:
            return Token(request, token, reason)
        return Token(request, token, reason, *scored(token, logprobs, request.top_logprobs))


@compiled
def _allowed(mask: mx.array, logits: mx.array) -> mx.array:
    """The logits (1, vocabulary) of the tokens whose bits are set in the mask (words,) uint32; -inf for the others."""
    bits, vocabulary = (mask[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1, logits.shape[-1]  # (words, 32)
    may_come = bits.reshape(-1)[:vocabulary].astype(mx.bool_)
    return mx.where(mx.pad(may_come, (0, vocabulary - may_come.size)), logits, -mx.inf)


def scored(token: int, logprobs: mx.array, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of a token, and the likeliest tokens with theirs. `logprobs` (vocabulary,)."""
    logs = logprobs.astype(mx.float32)
    likeliest = mx.argsort(-logs)[:top].tolist() if top else []
    return logs[token].item(), tuple((i, logs[i].item()) for i in likeliest)
