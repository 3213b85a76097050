"""Choosing the next token, with random numbers of one's own: nothing another request draws changes them."""

import os

from mlx_adapters.config.sampling import Sampling
from mlx_adapters.system.door import mx


class Sampler:
    """Greedy at a temperature of 0 (or next to it); else from the likeliest tokens of mass `top_p`, at `temperature`.

    As in mlx-lm the mass is counted at temperature 1. Equal seeds give equal choices for equal inputs.
    """

    def __init__(self, sampling: Sampling) -> None:
        # Next to 0 the likeliest token wins anyhow, and log-probabilities divided by the temperature overflow.
        self.temperature, self.top_p = sampling.temperature if sampling.temperature >= 1e-5 else 0.0, sampling.top_p
        seed = int.from_bytes(os.urandom(7), "big") if sampling.seed is None else sampling.seed
        self._key = mx.random.key(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Token (rows,) for each row of `logprobs` (rows, vocabulary)."""
        if self.temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        logprobs = logprobs.astype(mx.float32)
        self._key, key = mx.random.split(self._key)
        if self.top_p == 1:
            return mx.random.categorical(logprobs * (1 / self.temperature), key=key)
        order = mx.argsort(-logprobs, axis=-1)
        ranked = mx.take_along_axis(logprobs, order, axis=-1)
        mass = mx.exp(ranked)
        before = mx.cumsum(mass, axis=-1) - mass
        ranked = mx.where(before < self.top_p, ranked, -mx.inf)
        choice = mx.random.categorical(ranked * (1 / self.temperature), key=key)
        return mx.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
