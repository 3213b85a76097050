"""What may come next, by a second model or by what came before: guesses that cost little and bind nobody.

A guess is right when it is the token that the model itself chooses at its place, by its own logits, filters, grammar
and random numbers. So what is written is the same with guesses and without, greedy or sampled, to the token; where
two tokens are equally likely to within the rounding of floats, the wider step may decide between them otherwise.
(arXiv 2211.17192 and 2302.01318 accept by a coin, which keeps the distribution only; drawing both from the same
random numbers accepts about as many.)
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mlx_adapters.drafting.rewinding import Mark
from mlx_adapters.models.model import Model
from mlx_adapters.system.door import make_prompt_cache, mx

PREFILL_TOKENS = 512  # of a prompt, that are read in one step
PIECE_TOKENS, PIECE_SECONDS = 64, 0.1  # of a second model's reading, while others wait for their tokens
Choose = Callable[[mx.array], mx.array]  # log-probabilities (1, vocabulary) -> token (1,)


class Guesser(Protocol):
    """Guesses for one text."""

    def guess(self, tokens: Sequence[int], most: int, choose: Choose) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which only grow from call to call.

        `choose` chooses as the model's own tokens will be chosen.
        """


class Lookup:
    """Prompt lookup: what followed the last tokens when they were there before.

    Args:
        longest: the run of last tokens that is looked for first.
        shortest: and last.

    Example:
        >>> Lookup().guess([7, 8, 9, 1, 2, 7, 8], 2, mx.argmax)
        [9, 1]
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # run of tokens -> where its latest follower is
        self._noted = 0

    def guess(self, tokens: Sequence[int], most: int, choose: Choose) -> list[int]:
        """At most `most` tokens: those after the latest place where the longest run of last tokens was before."""
        for end in range(max(self._noted, 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._noted = max(self._noted, len(tokens))
        for size in self._sizes:
            at = self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if at is not None:
                return _continued(tokens, at, most)
        return []


def _continued(tokens: Sequence[int], at: int, most: int) -> list[int]:
    """The tokens from `at` on; where they end, those before are taken to repeat."""
    guess = list(tokens[at : at + most])
    period = len(tokens) - at
    while len(guess) < most:
        guess.append(guess[-period])
    return guess


class SmallModel:
    """Guesses of a second model, for one text. It chooses as the first one will, with the same random numbers.

    Args:
        model: with the same tokens.
        vocabulary: the width of the first model's logits.
    """

    def __init__(self, model: Model, vocabulary: int) -> None:
        self._model, self._vocabulary, self._known = model, vocabulary, model.vocabulary
        self._cache = make_prompt_cache(model.module)
        self._read: list[int] = []  # what is in the cache, before the last guesses
        self._guessed: list[int] = []  # of which all but the last are in the cache
        self._mark: Mark | None = None

    def guess(self, tokens: Sequence[int], most: int, choose: Choose) -> list[int]:
        """`most` tokens; none where the model's context ends, after a token that only the first model has (many are
        padded to different sizes), or while there is much to be read before it can guess."""
        context = self._model.base.context
        if any(token >= self._known for token in tokens[len(self._read) :]):
            return []
        if most < 1 or (context is not None and len(tokens) + most > context):
            return []
        self._go_back(tokens)
        deadline = time.monotonic() + PIECE_SECONDS
        while True:
            piece = list(tokens[len(self._read) : len(self._read) + PIECE_TOKENS])
            logits = self._model.module(mx.array([piece]), cache=self._cache)[:, -1]
            self._read += piece
            if len(self._read) == len(tokens):
                break
            mx.eval([layer.state for layer in self._cache])
            if time.monotonic() > deadline:
                return []
        self._mark = Mark(self._cache, most - 1)
        guessed: list[mx.array] = []
        while True:
            logits = of_width(logits, self._vocabulary)
            guessed.append(choose(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.uint32))
            if len(guessed) == most:
                break
            logits = self._model.module(guessed[-1][None], cache=self._cache)[:, -1]
        self._guessed = mx.concatenate(guessed).tolist()
        return list(self._guessed)

    def _go_back(self, tokens: Sequence[int]) -> None:
        """Forget the guesses that were wrong."""
        if self._mark is None:
            return
        in_cache = self._guessed[:-1]
        right = agreeing(in_cache, tokens[len(self._read) :])
        again = self._mark.back(len(in_cache), len(in_cache) - right)
        self._read += in_cache[: right - again]
        self._mark = None


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same in both, from the first on."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def of_width(logits: mx.array, vocabulary: int) -> mx.array:
    """Logits (rows, other vocabulary) as (rows, vocabulary): models pad their tokens' number differently."""
    short = vocabulary - logits.shape[-1]
    if short <= 0:
        return logits[..., :vocabulary]
    return mx.pad(logits, [(0, 0), (0, short)], constant_values=-mx.inf)
