"""Choosing the next token, with random numbers of one's own: nothing another request draws changes them.

Logits go through processors, which see the tokens so far; log-probabilities through filters, which leave out unlikely
tokens; one of the rest is drawn. Filters are pure functions on (rows, vocabulary), in mlx-lm's order and meaning.
"""

import copy
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
CHOICE = ("temperature", "top_p", "min_p", "top_k", "xtc_probability", "seed")  # what a sampler of one's own replaces


class Sampler:
    """How one answer's tokens are chosen. Equal seeds give equal choices for equal inputs.

    Args:
        sampling: greedy at a temperature of 0 (or next to it), else drawn from what the filters leave.
        choose: does that instead.
        processors: change the logits first, one after the other; what `sampling` asks for comes before.
        tokenizer: knows the tokens that end an answer or a line, which some settings must not touch.
        read: the tokens of a cache that the prompt goes on from, which the processors see as its beginning.

    Raises ConfigError if `choose` and `sampling` both say how.
    """

    def __init__(
        self,
        sampling: Sampling,
        choose: Choose | None = None,
        processors: Sequence[LogitsProcessor] = (),
        tokenizer: Any = None,
        read: Sequence[int] = (),
    ) -> None:
        usual = Sampling()
        replaced = [name for name in CHOICE if getattr(sampling, name) != getattr(usual, name)]
        if choose is not None and replaced:
            raise ConfigError(f"A sampler of your own takes the place of {replaced[0]}.", "give one or the other.")
        self.sampling, self.choose = sampling, choose
        self.processors = (*processors_of(sampling, tokenizer), *processors)
        self._read = mx.array(list(read), dtype=mx.uint32) if read and self.processors else None
        self._spared = _spared(tokenizer) if sampling.xtc_probability > 0 else ()
        # Next to 0 the likeliest token wins anyhow, and log-probabilities divided by the temperature overflow.
        self.greedy = choose is None and sampling.temperature < 1e-5
        self._key = mx.random.key(int.from_bytes(os.urandom(7), "big") if sampling.seed is None else sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the model's own logits is taken: then no row needs care of its own."""
        return self.greedy and not self.processors

    def foresee(self) -> Choose:
        """Chooses as this is about to, from the same random numbers, and uses none of them up."""
        return copy.copy(self) if self.choose is None else lambda logprobs: mx.argmax(logprobs, axis=-1)

    def process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """The logits (1, vocabulary) as the processors leave them; `tokens` (n,) are the prompt's and the answer's."""
        if self._read is not None and self.processors:
            tokens = mx.concatenate([self._read, tokens.astype(mx.uint32)])  # (read + n,)
        for processor in self.processors:
            logits = processor(tokens, logits)
        return logits

    def step(self, tokens: Sequence[int], logits: mx.array) -> tuple[int, mx.array]:
        """The token that follows `tokens`, by logits (1, vocabulary), and the log-probabilities (vocabulary,)."""
        if self.processors:
            logits = self.process(mx.array(tokens, dtype=mx.uint32), logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return int(self(logprobs).item()), logprobs[0]

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Token (rows,) for each row of `logprobs` (rows, vocabulary); 0 where they are of no numbers."""
        if self.greedy:
            return mx.argmax(logprobs, axis=-1)  # of nothing but NaN the first; the one that is Inf was the likeliest
        chosen = self._drawn(logprobs) if self.choose is None else _checked(self.choose(logprobs), logprobs.shape)
        return mx.where(are_numbers(logprobs), chosen, 0)

    def _drawn(self, logprobs: mx.array) -> mx.array:
        self._key, key, coin = mx.random.split(self._key, 3) if self._spared else (*mx.random.split(self._key), None)
        logprobs = filtered(logprobs.astype(mx.float32), self.sampling, self._spared, coin)
        return mx.random.categorical(logprobs * (1 / self.sampling.temperature), key=key)


def are_numbers(logprobs: mx.array) -> mx.array:
    """(rows,) Whether the log-probabilities (rows, vocabulary) are of logits that are numbers, -Inf among them."""
    return mx.isfinite(mx.logsumexp(logprobs, axis=-1))


def processors_of(sampling: Sampling, tokenizer: Any = None) -> tuple[LogitsProcessor, ...]:
    """What these settings do to one answer's logits."""
    processors: list[LogitsProcessor] = []
    if sampling.logit_bias:
        processors.append(_Bias({int(token): float(bias) for token, bias in sampling.logit_bias.items()}))
    if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(_Penalties(sampling))
    if sampling.min_tokens:
        processors.append(_NotYet(sampling.min_tokens, stop_tokens(sampling, tokenizer)))
    return tuple(processors)


class _Bias:
    """Adds to some tokens' logits. MLX would write beyond them for a token that the model does not have."""

    def __init__(self, biases: dict[int, float]) -> None:
        self._tokens, self._biases, self._last = mx.array(list(biases)), mx.array(list(biases.values())), max(biases)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        end = logits.shape[-1] - 1
        require(self._last <= end, f"logit_bias names token {self._last}; this model's ids end at {end}.")
        most = mx.finfo(logits.dtype).max / 2  # so that what comes of it is a number
        return logits.at[:, self._tokens].add(mx.clip(self._biases, -most, most).astype(logits.dtype))


class _Penalties:
    """OpenAI's two penalties look at the answer, the older one at the prompt too; with a window all at its tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._prompt: int | None = None  # tokens of the prompt: those of the first call

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self._prompt = len(tokens) if self._prompt is None else self._prompt
        how: Sampling = self._sampling
        if how.penalty_window is not None:
            seen = answered = tokens[-how.penalty_window :]
        else:
            seen, answered = tokens, tokens[self._prompt :]
        if how.repetition_penalty != 1:
            logits = less_repeated(logits, counted(seen, logits.shape[-1]), how.repetition_penalty)
        if how.presence_penalty or how.frequency_penalty:
            counts = counted(answered, logits.shape[-1])
            lower = how.presence_penalty * (counts > 0) + how.frequency_penalty * counts
            logits = logits - lower.astype(logits.dtype)
        return logits


class _NotYet:
    """No token that ends the answer before it has `least` tokens; what the model does not have ends none."""

    def __init__(self, least: int, ends: frozenset[int]) -> None:
        self._least, self._ends = least, sorted(ends)
        self._prompt: int | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self._prompt = len(tokens) if self._prompt is None else self._prompt
        ends = [end for end in self._ends if end < logits.shape[-1]]
        if len(tokens) - self._prompt >= self._least or not ends:
            return logits
        return logits.at[:, mx.array(ends, mx.uint32)].add(-mx.inf)


def counted(tokens: mx.array, vocabulary: int) -> mx.array:
    """How often each token (vocabulary,) is among `tokens` (n,), float32."""
    counts = mx.zeros(vocabulary, mx.float32)
    return counts.at[tokens].add(1.0) if tokens.size else counts


def less_repeated(logits: mx.array, counts: mx.array, penalty: float) -> mx.array:
    """Logits (1, vocabulary), those of tokens that were there made less likely (arXiv 1909.05858)."""
    lower = mx.where(logits < 0, logits * penalty, logits / penalty)
    return mx.where(counts > 0, lower, logits)


def stop_tokens(sampling: Sampling, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer and are not part of it. Raises ConfigError for one that the model does not have."""
    own = frozenset() if sampling.ignore_eos or tokenizer is None else frozenset(map(int, tokenizer.eos_token_ids))
    return own | {_token_id(token, tokenizer) for token in sampling.extra_eos}


def _token_id(token: str, tokenizer: Any) -> int:
    if token.isdecimal():
        return int(token)
    known = tokenizer.get_vocab()
    require(token in known, f"extra_eos '{token}' is no token of this model.", "give its text exactly, or its id.")
    return int(known[token])


def _spared(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that XTC leaves alone, as in mlx-lm: those that end an answer, and a new line."""
    if tokenizer is None:
        return (-1,)
    return (*map(int, tokenizer.eos_token_ids), *map(int, tokenizer.encode("\n", add_special_tokens=False)))


def filtered(
    logprobs: mx.array, sampling: Sampling, spared: Sequence[int] = (), coin: mx.array | None = None
) -> mx.array:
    """Log-probabilities (rows, vocabulary) float32 with -inf for the tokens that the settings leave out.

    Args:
        logprobs: of all tokens.
        sampling: says which are left out.
        spared: tokens that XTC leaves alone.
        coin: a random key, which says whether XTC is at work this time.
    """
    if sampling.top_p < 1:
        logprobs = of_mass(logprobs, sampling.top_p)
    if sampling.min_p > 0:
        logprobs = as_likely(logprobs, sampling.min_p)
    if sampling.xtc_probability > 0 and coin is not None:
        at_work = mx.random.uniform(key=coin) < sampling.xtc_probability
        logprobs = mx.where(at_work, less_likely(logprobs, sampling.xtc_threshold, spared), logprobs)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        logprobs = likeliest(logprobs, sampling.top_k)
    return logprobs


def less_likely(logprobs: mx.array, threshold: float, spared: Sequence[int]) -> mx.array:
    """Without the tokens above `threshold`, but for the least likely of them ("exclude top choices")."""
    probabilities = mx.softmax(logprobs, axis=-1)
    above = mx.where(probabilities > threshold, probabilities, mx.inf)
    out = probabilities > above.min(axis=-1, keepdims=True)  # (rows, vocabulary)
    for token in spared:
        out = out & (mx.arange(logprobs.shape[-1]) != token)
    return mx.where(out, -mx.inf, logprobs)


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
