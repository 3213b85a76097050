"""Choosing the next token, with random numbers of one's own: nothing another request draws changes them.

Logits go through processors, which see the tokens so far; log-probabilities through filters, which leave out unlikely
tokens; one of the rest is drawn. Filters are pure functions on (rows, vocabulary), in mlx-lm's order and meaning.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from mlx_adapters.config.mapping import require
from mlx_adapters.config.sampling import Sampling
from mlx_adapters.errors import ConfigError
from mlx_adapters.system.door import mx

Choose = Callable[[mx.array], mx.array]  # log-probabilities (1, vocabulary) -> token (1,), as mlx-lm's samplers
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # tokens (n,), logits (1, vocabulary) -> logits
CHOICE = ("temperature", "top_p", "min_p", "top_k", "seed")  # what a sampler of one's own replaces


class Sampler:
    """How one answer's tokens are chosen. Equal seeds give equal choices for equal inputs.

    Args:
        sampling: greedy at a temperature of 0 (or next to it), else drawn from what the filters leave.
        choose: does that instead.
        processors: change the logits first, one after the other; what `sampling` asks for comes before.

    Raises ConfigError if `choose` and `sampling` both say how.
    """

    def __init__(
        self, sampling: Sampling, choose: Choose | None = None, processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        replaced = [name for name in CHOICE if getattr(sampling, name) != getattr(Sampling(), name)]
        if choose is not None and replaced:
            raise ConfigError(f"A sampler of your own takes the place of {replaced[0]}.", "give one or the other.")
        self.sampling, self.choose, self.processors = sampling, choose, (*processors_of(sampling), *processors)
        # Next to 0 the likeliest token wins anyhow, and log-probabilities divided by the temperature overflow.
        self.greedy = choose is None and sampling.temperature < 1e-5
        self._key = mx.random.key(int.from_bytes(os.urandom(7), "big") if sampling.seed is None else sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the model's own logits is taken: then no row needs care of its own."""
        return self.greedy and not self.processors

    def process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """The logits (1, vocabulary) as the processors leave them; `tokens` (n,) are the prompt's and the answer's."""
        for processor in self.processors:
            logits = processor(tokens, logits)
        return logits

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Token (rows,) for each row of `logprobs` (rows, vocabulary)."""
        if self.choose is not None:
            return _checked(self.choose(logprobs), logprobs.shape)
        if self.greedy:
            return mx.argmax(logprobs, axis=-1)
        logprobs = filtered(logprobs.astype(mx.float32), self.sampling)
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(logprobs * (1 / self.sampling.temperature), key=key)


def processors_of(sampling: Sampling) -> tuple[LogitsProcessor, ...]:
    """What these settings do to the logits."""
    return ()


def stop_tokens(sampling: Sampling, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer and are not part of it."""
    return frozenset(tokenizer.eos_token_ids)


def filtered(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Log-probabilities (rows, vocabulary) float32 with -inf for the tokens that the settings leave out."""
    if sampling.top_p < 1:
        logprobs = of_mass(logprobs, sampling.top_p)
    if sampling.min_p > 0:
        logprobs = as_likely(logprobs, sampling.min_p)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        logprobs = likeliest(logprobs, sampling.top_k)
    return logprobs


def of_mass(logprobs: mx.array, top_p: float) -> mx.array:
    """The likeliest tokens whose probabilities first sum to `top_p` (nucleus sampling, arXiv 1904.09751)."""
    order = mx.argsort(-logprobs, axis=-1)
    ranked = mx.take_along_axis(logprobs, order, axis=-1)  # (rows, vocabulary), falling
    mass = mx.exp(ranked)
    before = mx.cumsum(mass, axis=-1) - mass
    return mx.put_along_axis(logprobs, order, mx.where(before < top_p, ranked, -mx.inf), axis=-1)


def as_likely(logprobs: mx.array, min_p: float) -> mx.array:
    """Tokens at least `min_p` times as likely as the likeliest (arXiv 2407.01082)."""
    least = mx.max(logprobs, axis=-1, keepdims=True) + math.log(min_p)  # (rows, 1)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def likeliest(logprobs: mx.array, top_k: int) -> mx.array:
    """The `top_k` likeliest tokens (arXiv 1805.04833); `top_k` below the vocabulary's size."""
    others = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]  # (rows, vocabulary - top_k)
    return mx.put_along_axis(logprobs, others, mx.array(-mx.inf, logprobs.dtype), axis=-1)


def _checked(chosen: mx.array, shape: tuple[int, ...]) -> mx.array:
    """What a sampler of the user's gave, held against the vocabulary: another id would read foreign memory."""
    rows, vocabulary = shape
    good = isinstance(chosen, mx.array) and chosen.size == rows and mx.issubdtype(chosen.dtype, mx.integer)
    what = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, mx.array) else type(chosen).__name__
    require(good, f"The sampler must give one token id, an array of shape ({rows},), not {what}.")
    low, high = chosen.min().item(), chosen.max().item()
    require(low >= 0 and high < vocabulary, f"The sampler gave token {low if low < 0 else high} of {vocabulary}.")
    return chosen.reshape(rows).astype(mx.uint32)
