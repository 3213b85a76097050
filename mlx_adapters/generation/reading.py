"""Prompts that wait, and that are read in pieces between the steps of those that are answered.

What is known of a prompt is not read again (see `prompt_caches.tree`), and what was read is kept, also when its client
leaves. Prompts of about one length are read in one pass, each into its own cache: a pass over many rows costs less than
one for each. While others are answered, a prompt waits a moment for company: a pass holds them all up, and those that
begin together end together. A long prompt takes a while of each step; in half of it what is short may overtake it.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlx_adapters.generation.requests import Reading, Request, Token, scored
from mlx_adapters.prompt_caches.layers import holds
from mlx_adapters.prompt_caches.probing import comes_back
from mlx_adapters.prompt_caches.tree import PrefixTree
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.surgery.caches import Text, read_rows, reads_rows
from mlx_adapters.surgery.cuda import hand_over
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.machine import on_gpu

log = logging.getLogger("mlx_adapters.generation.reading")

LEAST_TOKENS = 32  # of a piece, however slow the device is
STALL_SECONDS = 0.25  # for which others may wait for a piece
MOMENT = 0.1  # seconds of reading that the next step is prepared meanwhile, not waited for
SCORED_TOKENS = 128  # of a prompt whose log-probabilities are told, in one piece: (tokens, vocabulary) is large
TOGETHER = 16 if on_gpu() else 8  # prompts in one pass
WORTH_KEEPING = 256 if on_gpu() else 1  # tokens that were read, before their answer is there and kept with them
PATIENCE = 2  # steps of others that a prompt waits for company
MOST_TOKENS = 2048 if on_gpu() else 512  # in one step


class Reader:
    """Reads the prompts of requests, in the order of their coming but for short ones. To be used from one thread.

    `known` keeps what was read in `cache_bytes` at most; `together`: caches can be merged, and what is added to it
    comes out of batches. `readings` are under way, in the order of their coming. The tokens of prompts that are scored
    are put into `told`.
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
        self._rows = TOGETHER if together and reads_rows(module, make) else 1
        self.waiting: deque[Request] = deque()
        self.told: list[Token] = []
        self.readings: list[Reading] = []
        self._pace = 0.0  # seconds that reading a token took lately
        self._waited = 0  # steps for which what waits could have been read

    @property
    def idle(self) -> bool:
        """Whether there is nothing to read."""
        return not (self.waiting or self.readings)

    def cancel(self, request: Request) -> bool:
        """Forget a request; False if it is not here."""
        self.told = [token for token in self.told if token.request is not request]
        if request in self.waiting:
            self.waiting.remove(request)
            return True
        for reading in self.readings[:]:
            if reading.request is request:
                self.remember(request, request.prompt[: reading.done], reading.text.own)
                self.readings.remove(reading)
                return True
        return False

    def clear(self) -> list[Request]:
        """Forget all requests, and give them back; and what was kept: it may be what failed."""
        self.known.clear()
        lost = [*self.waiting, *(reading.request for reading in self.readings)]
        self.waiting.clear()
        self.readings, self.told = [], []
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

    def read(self, fits: Callable[[Request], bool], free: int, hurried: bool) -> Iterator[list[Reading]]:
        """Read for a while; what was read to its end, as it is.

        `fits` says whether a request may join those that are answered and those under way, beside whom so many places
        are `free`; `hurried`: others wait.
        """
        if hurried and self._awaits_company(fits, free):
            return
        budget = self._while() if hurried else self._most
        aside = budget // 2
        while budget > 0 and self._take(fits):
            if all(reading.left for reading in self.readings):
                spent = self._pass(*self._group(budget, aside))
                budget, aside = budget - spent, aside - spent
            if ready := [reading for reading in self.readings if not reading.left]:
                yield ready
                self.readings = [reading for reading in self.readings if reading.left]  # then: `clear` gives back all

    def _awaits_company(self, fits: Callable[[Request], bool], free: int) -> bool:
        """Whether what waits is left to wait in this step: for more to come, or for more places."""
        alone = not self.readings and 0 < min(len(self.waiting), free) < self._rows and fits(self.waiting[0])
        self._waited = (self._waited + 1) % (PATIENCE + 1) if alone else 0
        return self._waited > 0

    def _while(self) -> int:
        """How many tokens may be read while others wait: few sizes, since a GPU compiles its kernels for each."""
        most = int(STALL_SECONDS / self._pace) if self._pace else self._most
        return min(self._most, max(most // LEAST_TOKENS, 1) * LEAST_TOKENS)

    def _take(self, fits: Callable[[Request], bool]) -> bool:
        """Begin what may be read now, in the order of its coming; whether anything is under way."""
        for request in list(itertools.islice(self.waiting, TOGETHER)):
            if len(self.readings) == TOGETHER or not fits(request):
                break
            if not any(self._soon_known(request, other) for other in self.readings):
                self.waiting.remove(request)
                self.readings.append(self._begin(request))
                if request.scores:
                    self.told.append(Token(request, request.prompt[0], of_prompt=True))
        return bool(self.readings)

    def _begin(self, request: Request) -> Reading:
        """Begin to read a prompt after what is known of it."""
        reading = Reading(request, Text(self._make_cache()))
        if not request.scores and self.known.limit:
            cache, reading.done = self.known.find(request.weights, request.prompt[:-1])
            reading.text = Text(cache)
            hand_over([layer.state for layer in cache] if reading.done else [])
            request.cached_tokens = reading.done
            if self.known.by_moments:  # then a message's end is a place to go on from
                ends = [i + 1 for i, token in enumerate(request.prompt[:-1]) if token in request.stop_tokens]
                reading.stops = ends[:1] + ends[-1:]
        return reading

    def _soon_known(self, request: Request, reading: Reading) -> bool:
        """Whether most of what is to be read of a prompt will be known once another is read."""
        prompt, other = request.prompt, reading.request
        if request.scores or not self.known.limit or request.weights != other.weights:
            return False
        known = self.known.known(request.weights, prompt[:-1])
        most = known + (len(prompt) - 1 - known) // 2 + 1
        ends = [*reading.stops, len(other.prompt) - 1] if self.known.by_moments else [most]
        return any(most <= end < len(prompt) and list(prompt[:end]) == list(other.prompt[:end]) for end in ends)

    def _group(self, budget: int, aside: int) -> tuple[list[Reading], int]:
        """What is read in the next pass, and how much of each at most: the oldest, or short ones that overtake it."""
        first, most = self.readings[0], budget
        if first.left > budget:
            first = next((reading for reading in self.readings if reading.left < aside), first)
            most = budget if first is self.readings[0] else aside
        if first.request.scores:
            return [first], min(most, SCORED_TOKENS)
        group, width = [first], len(first.piece(most))
        for reading in self.readings:
            wider = max(width, len(reading.piece(most)))
            if reading is first or reading.request.scores or len(group) == self._rows:
                continue
            if (len(group) + 1) * wider <= most and _are_alike([*group, reading], wider):
                group, width = [*group, reading], wider
        return group, width

    def _pass(self, group: Sequence[Reading], most: int) -> int:
        """Read at most so many tokens of each; how many it took the time of."""
        first, begun = group[0], time.perf_counter()
        pieces = [reading.piece(most) for reading in group]
        with self.pool.routed([reading.request.adapter for reading in group]):
            if first.request.scores:
                logits = self.module(mx.array(pieces), cache=first.text.own)
                self._score(first.request, logits[0], first.done + 1)
            else:
                texts = read_rows(self.module, [reading.text for reading in group], pieces)
                for reading, text in zip(group, texts, strict=True):
                    reading.text = text
            held = {id(layer): layer for reading in group for layer in reading.text.layers}
            states = [layer.state for layer in held.values()]
            tokens = len(group) * max(map(len, pieces))
            waits = not 0 < self._pace * tokens < MOMENT
            mx.eval(states) if waits else mx.async_eval(states)
        for reading, piece in zip(group, pieces, strict=True):
            reading.done += len(piece)
            if reading.done in reading.stops or (reading.left == 0 and self._is_kept_now(reading)):
                self.remember(reading.request, reading.request.prompt[: reading.done], reading.text.own)
        if waits:
            self._note(tokens, time.perf_counter() - begun)
        return tokens

    def _is_kept_now(self, reading: Reading) -> bool:
        """Whether a prompt is kept before its answer is there: if it was long, or somebody waits, or it can only be
        gone on from at its end (which the first one tells)."""
        long = reading.done - reading.request.cached_tokens >= WORTH_KEEPING
        wanted = long or bool(self.waiting) or self.known.by_moments or not len(self.known)
        return self.known.limit > 0 and wanted

    def _note(self, tokens: int, seconds: float) -> None:
        """Learn how fast the device reads, of passes that it works for; a slow one may have compiled kernels."""
        pace = seconds / tokens
        if tokens >= LEAST_TOKENS:
            self._pace = 0.7 * self._pace + 0.3 * pace if 0 < self._pace < pace else pace

    def _score(self, request: Request, logits: mx.array, start: int) -> None:
        """Tell of the prompt's tokens from `start` on, by the logits (tokens, vocabulary) before each."""
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for i, token in enumerate(request.prompt[start : start + len(logprobs)]):
            told = scored(token, logprobs[i], request.top_logprobs or 0)
            self.told.append(Token(request, token, None, *told, of_prompt=True))


def _are_alike(group: Sequence[Reading], width: int) -> bool:
    """Whether one pass over `width` tokens of each is worth its padding, and a window has room for it."""
    pieces = [len(reading.piece(width)) for reading in group]
    ahead = max(reading.done for reading in group) + width
    texts = [reading.done + piece for reading, piece in zip(group, pieces, strict=True)]
    padded = any(len(group) * max(lengths) > 2 * sum(lengths) for lengths in (pieces, texts))
    return not padded and all(holds(layer, ahead) for reading in group for layer in reading.text.layers)
