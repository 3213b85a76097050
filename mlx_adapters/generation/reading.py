"""Prompts that wait, and that are read in pieces between the steps of those that are answered.

What is known of a prompt is not read again (see `prompt_caches.tree`), and what was read is kept, also when its client
leaves. A long prompt takes a while of each step; in half of it what is short may overtake it.
"""

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlx_adapters.generation.requests import Reading, Request, Token, scored
from mlx_adapters.prompt_caches.probing import comes_back
from mlx_adapters.prompt_caches.tree import PrefixTree
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.system.door import mx, nn

log = logging.getLogger("mlx_adapters.generation.reading")

PREFILL_TOKENS = 512
LEAST_TOKENS = 32  # of a piece, however slow the device is
STALL_SECONDS = 0.25  # for which others may wait for a piece
SCORED_TOKENS = 128  # of a prompt whose log-probabilities are told, in one piece: (tokens, vocabulary) is large
LOOKED_AT = 8  # of the prompts that wait, when a short one may overtake a long one


class Reader:
    """Reads the prompts of requests, in the order of their coming but for short ones. To be used from one thread.

    `known` keeps what was read in `cache_bytes` at most; `together`: what is added to it comes out of batches. The
    tokens of prompts that are scored are put into `told`.
    """

    def __init__(
        self,
        module: nn.Module,
        pool: AdapterPool,
        most: int,
        cache_bytes: int,
        together: bool,
        make: Callable[[], list[Any]],
    ) -> None:
        self.module, self.pool, self._most, self._make_cache = module, pool, most, make
        if cache_bytes > 0 and not comes_back(module, self._make_cache, together):
            cache_bytes = 0
        self.known = PrefixTree(self._make_cache, cache_bytes)
        self.waiting: deque[Request] = deque()
        self.told: list[Token] = []
        self._readings: list[Reading] = []  # one, or a long one and a short one that overtakes it
        self._pace = 0.0  # seconds that reading a token took lately

    @property
    def idle(self) -> bool:
        """Whether there is nothing to read."""
        return not (self.waiting or self._readings)

    def cancel(self, request: Request) -> bool:
        """Forget a request; False if it is not here."""
        self.told = [token for token in self.told if token.request is not request]
        if request in self.waiting:
            self.waiting.remove(request)
            return True
        for reading in self._readings[:]:
            if reading.request is request:
                self.remember(request, request.prompt[: reading.done], reading.cache)
                self._readings.remove(reading)
                return True
        return False

    def clear(self) -> list[Request]:
        """Forget all requests, and give them back; and what was kept: it may be what failed."""
        self.known.clear()
        lost = [*self.waiting, *(reading.request for reading in self._readings)]
        self.waiting.clear()
        self._readings, self.told = [], []
        return lost

    def remember(self, request: Request, tokens: Sequence[int], cache: Sequence[Any]) -> None:
        """Keep what a cache holds after these tokens of the request's; its owner may go on with it."""
        if not self.known.limit:
            return
        try:
            self.known.add(request.weights, tokens, cache)
        except Exception:  # no memory, say: answers go on, and find more of it
            log.exception("what was read cannot be kept")
            self.known.clear()

    def read(self, fits: Callable[[Request], bool], places: Callable[[], int], hurried: bool) -> Iterator[Reading]:
        """Read for a while; what was read to its end, as it is.

        `fits` says whether a request may be read now, `places` for how many there is room; `hurried`: others wait.
        """
        budget = self._while() if hurried else self._most
        aside = budget // 2
        while budget > 0 and not self.idle:
            if not fits(self._readings[0].request if self._readings else self.waiting[0]):
                return
            if not self._readings:
                self._readings.append(self._begin(self.waiting.popleft()))
            if len(self._readings) == 1 and self._readings[0].left > budget and places() > 1:
                short = self._short(fits, aside)
                if short is not None:
                    aside -= short.left + 1
                    self._readings.append(short)
            reading = self._readings[-1]
            budget -= self._read_piece(reading, budget) + 1
            if reading.left == 0:
                yield reading
                self._readings.remove(reading)  # then: `clear` gives back what could not join

    def _while(self) -> int:
        """How many tokens may be read while others wait: few sizes, since a GPU compiles its kernels for each."""
        most = STALL_SECONDS / self._pace if self._pace else self._most
        return min(self._most, max(LEAST_TOKENS, 1 << int(math.log2(max(most, 1)))))

    def _begin(self, request: Request) -> Reading:
        """Begin to read a prompt after what is known of it."""
        reading = Reading(request, self._make_cache())
        if not request.scores and self.known.limit:
            reading.cache, reading.done = self.known.find(request.weights, request.prompt[:-1])
            request.cached_tokens = reading.done
            if self.known.by_moments:  # then a message's end is a place to go on from
                ends = [i + 1 for i, token in enumerate(request.prompt[:-1]) if token in request.stop_tokens]
                reading.stops = ends[:1] + ends[-1:]
        return reading

    def _short(self, fits: Callable[[Request], bool], most: int) -> Reading | None:
        """One that waits and has fewer tokens to read."""
        for request in itertools.islice(self.waiting, LOOKED_AT):
            if fits(request) and (reading := self._begin(request)).left < most:
                self.waiting.remove(request)
                return reading
        return None

    def _read_piece(self, reading: Reading, most: int) -> int:
        """Read at most so many tokens; how many they were."""
        request = reading.request
        if request.scores and reading.done == 0:
            self.told.append(Token(request, request.prompt[0], of_prompt=True))
        piece, begun = reading.piece(min(most, SCORED_TOKENS) if request.scores else most), time.perf_counter()
        if not piece:
            return 0
        with self.pool.routed([request.adapter]):
            logits = self.module(mx.array([piece]), cache=reading.cache)
            mx.eval([layer.state for layer in reading.cache])
            if request.scores:
                self._score(request, logits[0], reading.done + 1)
        reading.done += len(piece)
        seconds = (time.perf_counter() - begun) / len(piece)
        self._pace = 0.7 * self._pace + 0.3 * seconds if self._pace else seconds
        if reading.left == 0 or reading.done in reading.stops:
            self.remember(request, request.prompt[: reading.done], reading.cache)
        return len(piece)

    def _score(self, request: Request, logits: mx.array, start: int) -> None:
        """Tell of the prompt's tokens from `start` on, by the logits (tokens, vocabulary) before each."""
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for i, token in enumerate(request.prompt[start : start + len(logprobs)]):
            told = scored(token, logprobs[i], request.top_logprobs or 0)
            self.told.append(Token(request, token, None, *told, of_prompt=True))
