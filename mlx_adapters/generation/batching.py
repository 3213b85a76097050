"""Continuous batching with another adapter for each row.

One decode step computes one token for every row, whatever its adapter (see `additions.PerRow`); requests join and
leave between steps. Prompts are read in pieces (see `reading`); then their keys and values join the batch's. What was
read and written is kept, and not read again (see `prompt_caches.tree`). While a step is computed the tokens of the one
before are handed out, so the device never waits.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Sampling
from mlx_adapters.drafting.batch import Batch
from mlx_adapters.drafting.drafts import Drafter
from mlx_adapters.drafting.rewinding import Mark, may_guess, rewinds
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.generation.decoding import TextStream, text_of
from mlx_adapters.generation.reading import MOST_TOKENS, Reader
from mlx_adapters.generation.requests import Chosen, Request, Row, Token
from mlx_adapters.models.model import Model, names_of, no_numbers
from mlx_adapters.prompt_caches.quantized import new_layers, reaching, require_quantizable
from mlx_adapters.runtime.attached import Attached
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.runtime.row_attention import attending
from mlx_adapters.surgery.caches import Text, batches
from mlx_adapters.surgery.cuda import generating
from mlx_adapters.system.door import make_prompt_cache, mx, nn

DRAFTED_ROWS = 4  # beyond, a device has enough to do with one token of each


class Batcher:
    """Requests come in with `submit`, tokens come out of `step`. To be used from one thread."""

    def __init__(
        self,
        module: nn.Module,
        pool: AdapterPool,
        max_batch: int = 16,
        prefill: int = MOST_TOKENS,
        cache_bytes: int = 0,
        make: Callable[[], list[Any]] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.module, self.pool = module, pool
        make = make or partial(make_prompt_cache, module)
        self.can_batch = max_batch > 1 and batches(module, make)
        self.reader = Reader(module, pool, prefill, cache_bytes, self.can_batch, make)
        self.max_batch = max_batch if self.can_batch else 1
        self._drafter = drafter
        self._drafted_rows = 0 if drafter is None else DRAFTED_ROWS if self.can_batch and rewinds(module, make) else 1
        self.rows: list[Row] = []
        self._batch = Batch(module)
        self._chosen: Chosen | None = None
        self._steps = 0
        self.before_waiting: Callable[[], None] = lambda: None  # called where the device gets its work
        self._mixed: tuple[list[Attached | None], bool] = ([], True)

    @property
    def can_mix(self) -> bool:
        """Whether rows with the attached adapters share a batch: every layer must tell whose entries it is given."""
        entries = [None, *self.pool.attached.values()]
        if self._mixed[0] != entries:
            self._mixed = entries, self._mix(entries)
        return self._mixed[1]

    def _mix(self, entries: list[Attached | None]) -> bool:
        try:
            with self.pool.routed(entries):
                self.module(mx.zeros((len(entries), 1), mx.int32))
        except IncompatibleError:
            return False
        return True

    def _fits(self, request: Request) -> bool:
        """Whether it may join the rows that are being decoded, and those that will be."""
        beside = [row.request for row in self.rows] + [reading.request for reading in self.reader.readings]
        alike = all(other.adapter is request.adapter for other in beside)
        return len(beside) < self.max_batch and (alike or self.can_mix)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.rows and self.reader.idle

    def submit(self, request: Request) -> None:
        """Queue a request. Its adapter will not be evicted before it ends."""
        if request.adapter is not None:
            request.adapter.users += 1
            self.pool.touch(request.adapter)
        self.reader.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it stands; its place is free at once."""
        if any(row.request is request for row in self.rows):
            self._keep([row.request is not request for row in self.rows])
        elif not self.reader.cancel(request):
            return
        self._release(request)

    def clear(self) -> list[Request]:
        """Forget everything, after a failure; gives the requests that were under way or waiting."""
        lost = [row.request for row in self.rows] + self.reader.clear()
        for request in lost:
            self._release(request)
        self.rows = []
        self._batch.clear()
        self._chosen = None
        return lost

    def step(self) -> list[Token]:
        """Read what fits of the waiting prompts, compute one step, give the tokens of the step before."""
        with generating():
            self._admit()
        tokens, self.reader.told = self.reader.told, []
        if self._chosen is None:
            return tokens
        read = self._guessed(self._chosen.tokens) if self._may_guess else []
        tokens += self._check(read, self._chosen) if read else self._advance(self._chosen)
        self._steps += 1
        if self._steps % 256 == 0:
            mx.clear_cache()
        return tokens

    @property
    def _may_guess(self) -> bool:
        """Whether all rows can read guesses and forget them again, each its own."""
        if self._drafter is None or len(self.rows) > self._drafted_rows:
            return False
        return may_guess(self._batch.layers, self._drafter.most + 1, len(self.rows), not self._batch.alone)

    def _guessed(self, inputs: mx.array) -> list[list[int]]:
        """The next input of each row, and what is guessed to follow it; none if nothing is guessed."""
        read = [[token, *row.guess(token)] for row, token in zip(self.rows, inputs.tolist(), strict=True)]
        return read if max(map(len, read)) > 1 else []

    def _check(self, read: list[list[int]], chosen: Chosen) -> list[Token]:
        """A step that reads the next input of each row and guesses, and goes on by those that are right."""
        self._batch.settle()
        width = max(map(len, read))
        inputs = mx.array([[*tokens, *[0] * (width - len(tokens))] for tokens in read])
        with self.pool.routed([row.request.adapter for row in self.rows]):
            mark = Mark(self._batch.layers, width)
            logits = self.module(inputs, cache=self._batch.layers)  # (rows, width, vocabulary)
            self.before_waiting()
            steps = [
                row.follow(tokens, here, total, logprobs)
                for row, tokens, here, (_, total, logprobs) in zip(self.rows, read, logits, chosen.rows, strict=True)
            ]
            again = mark.back_rows(width, [width - step.right for step in steps])
            if again:
                self.module(inputs[:, :again], cache=self._batch.layers)
        logprobs = None
        if any(row.request.top_logprobs is not None for row in self.rows):
            last = logits[mx.arange(len(steps)), mx.array([step.right - 1 for step in steps])]  # (rows, vocabulary)
            logprobs = last - mx.logsumexp(last, axis=-1, keepdims=True)
        following = mx.array([step.following for step in steps], dtype=mx.uint32)
        self._chosen = Chosen(following, mx.array([step.total for step in steps]), logprobs)
        self._end([not any(token.finish_reason for token in step.tokens) for step in steps])
        return [token for step in steps for token in step.tokens]

    def _advance(self, chosen: Chosen) -> list[Token]:
        """A step that reads the next input of each row; what was chosen in the one before is told while it computes."""
        tokens = []
        with self.pool.routed([row.request.adapter for row in self.rows]), attending(len(self.rows)):
            self._chosen = self._forward(chosen.tokens)
            self.before_waiting()
            mx.async_eval(*(part for part in vars(self._chosen).values() if part is not None))
        keep = []
        for row, (token, total, logprobs) in zip(self.rows, chosen.rows, strict=True):
            if row.fresh:
                row.fresh = False
                keep.append(True)
                continue
            tokens.append(row.told(token, total, logprobs))
            keep.append(tokens[-1].finish_reason is None)
        self._end(keep)
        return tokens

    def _end(self, keep: list[bool]) -> None:
        """Let the other rows go."""
        for row, stays in zip(self.rows, keep, strict=True):
            if not stays:
                self._release(row.request)
        self._keep(keep)

    def _forward(self, inputs: mx.array) -> Chosen:
        """What follows the tokens `inputs` (rows,)."""
        logits = self._batch(inputs, len(self.rows[0].written))
        if any(row.request.constraint is not None for row in self.rows):
            self.before_waiting()
            mx.async_eval(logits)  # computed while the masks are
            for row, token in zip(self.rows, inputs.tolist(), strict=True):
                row.advance(token)
        following = mx.argmax(logits, axis=-1)
        for i, row in enumerate(self.rows):
            if not row.plain:
                following[i : i + 1] = row.choose(inputs[i : i + 1], logits[i : i + 1])
        total = mx.logsumexp(logits, axis=-1)
        if all(row.request.top_logprobs is None for row in self.rows):
            return Chosen(following, total)
        return Chosen(following, total, logits - total[:, None])

    def _admit(self) -> None:
        """Read waiting prompts for a while; those that are read join the batch."""
        if not self.reader.idle:
            self.before_waiting()
        for readings in self.reader.read(self._fits, self.max_batch - len(self.rows), bool(self.rows)):
            self._join([reading.request for reading in readings], [reading.text for reading in readings])

    def _join(self, requests: Sequence[Request], texts: Sequence[Text]) -> None:
        last = mx.array([request.prompt[-1] for request in requests], dtype=mx.uint32)
        self._batch.join(texts)
        self._chosen = self._chosen.joined(last) if self._chosen else Chosen(last, mx.zeros(len(requests)))
        self.rows += [Row(request, self._drafter.begin() if self._drafter else None) for request in requests]

    def _keep(self, keep: list[bool]) -> None:
        if all(keep):
            return
        for i, (row, stays) in enumerate(zip(self.rows, keep, strict=True)):
            if not row.sound:
                self.reader.known.drop(row.request.weights)  # what was read may be why
            elif not stays and row.written and self.reader.known.limit:
                self.reader.remember(row.request, [*row.request.prompt, *row.written], self._batch.row(i))
        self.rows = [row for row, stays in zip(self.rows, keep, strict=True) if stays]
        kept = [i for i, stays in enumerate(keep) if stays]
        self._batch.keep(kept if self._chosen is not None else [])
        self._chosen = self._chosen.kept(kept) if kept and self._chosen is not None else None

    def _release(self, request: Request) -> None:
        if request.adapter is not None:
            request.adapter.users -= 1


def answer_all(
    module: nn.Module,
    pool: AdapterPool,
    requests: Sequence[Request],
    max_batch: int = 16,
    stopped: Callable[[Request, int], bool] = lambda *_: False,
    make: Callable[[], list[Any]] | None = None,
    drafter: Drafter | None = None,
    names: tuple[str, str | None] = ("The model", None),
) -> Iterator[tuple[Request, list[int]]]:
    """(request, its tokens without the stop token), as the requests finish.

    `stopped` is told each token and says whether its answer ends there. Raises ModelError where NaN or Inf is computed,
    by the `names` of the base and the adapter that is on it.
    """
    batcher = Batcher(module, pool, min(max_batch, len(requests)), make=make, drafter=drafter)
    answers: dict[int, list[int]] = {request.number: [] for request in requests}
    for request in requests:
        batcher.submit(request)
    with contextlib.ExitStack() as stack:
        stack.callback(batcher.clear)  # whatever ends it, no adapter is held
        while not batcher.idle:
            for token in batcher.step():
                if token.request.number not in answers:  # one of several of a step, after the end
                    continue
                if token.means_nothing:
                    adapter = token.request.adapter
                    raise no_numbers(module, names[0], adapter.name if adapter else names[1])
                ended = token.finish_reason is not None
                if token.finish_reason != "stop":
                    answers[token.request.number].append(token.id)
                    if not ended and stopped(token.request, token.id):
                        batcher.cancel(token.request)
                        ended = True
                if ended:
                    yield token.request, answers.pop(token.request.number)


def texts_of(
    model: Model,
    pool: AdapterPool,
    requests: Sequence[Request],
    max_batch: int,
    sampling: Sampling,
    kv: CacheQuantization | None = None,
    drafter: Drafter | None = None,
) -> list[str]:
    """The texts of `answer_all`, in the order of the requests; `kv`: in which caches."""
    module, tokenizer = model.module, model.tokenizer
    texts = {request.number: TextStream(tokenizer, sampling) for request in requests}

    def stopped(request: Request, token: int) -> bool:
        texts[request.number].add(token)
        return texts[request.number].stopped

    longest = max((len(request.prompt) + request.max_tokens for request in requests), default=0)
    make = partial(new_layers, module, reaching(kv, longest))
    answers = dict(answer_all(module, pool, requests, max_batch, stopped, make, drafter, (model.base.name, None)))
    return [text_of(tokenizer, answers[request], sampling) for request in requests]


def answer_plainly(
    model: Model, requests: Sequence[Request], max_batch: int = 16, kv: CacheQuantization | None = None
) -> Iterator[tuple[Request, list[int]]]:
    """`answer_all` by the model as it is. Raises IncompatibleError if it cannot keep keys and values as `kv` says;
    ModelError for NaN or Inf."""
    module = model.module
    if kv is not None and kv.kv_bits is not None:
        require_quantizable(module, kv, str(model.config.get("model_type")))
    make = partial(new_layers, module, kv)
    return answer_all(module, AdapterPool(module, group=False), requests, max_batch, make=make, names=names_of(model))
