"""Changing how one module of a model is called while a block of code runs, and nothing else.

mlx-lm's models are plain modules that call each other. To take the hidden states before the output head, to
compute them again in the backward pass, or to round a weight on the way, we give single instances another
`__call__` for the duration of a trace. No class is touched, so other models in the process are unchanged.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mlx_adapters.system.door import mx, nn


@contextlib.contextmanager
def call_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling `module` runs `function(original_call, *args, **kwargs)`."""
    kind = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(partial(kind.__call__, self), *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    try:
        yield
    finally:
        module.__class__ = kind


def random_key() -> mx.array:
    """The key that MLX draws its next random numbers from, as an array of its own."""
    return mx.random.state[0] + 0  # (mx.array would share it: a step then holds a tenth more memory)


def set_random_key(key: mx.array) -> None:
    """Let MLX draw its next random numbers from `key`."""
    mx.random.state[0][...] = key


def recompute(layer: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block, `layer` keeps only its inputs for the backward pass (gradient checkpointing,
    arXiv 1604.06174). The backward pass has to happen within the block too, and leaves MLX's random key behind
    where dropout began in the layer, because it draws the same numbers again.

    Whatever carries a gradient is an input: the weights, and arrays anywhere in positional and keyword arguments
    (Gemma 4 hands keys and values from block to block by keyword).
    """

    def checkpointed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = random_key()

        def inner(given: dict, args: tuple, kwargs: dict) -> Any:
            own = layer.trainable_parameters()
            layer.update(given)
            set_random_key(key)
            try:
                return original(*args, **kwargs)
            finally:
                layer.update(own)

        return mx.checkpoint(inner)(layer.trainable_parameters(), args, kwargs)

    return call_as(layer, checkpointed)


def find_body(module: nn.Module) -> nn.Module | None:
    """The submodule that holds the blocks and whose output the head reads; None if there is no such split."""
    last = module.layers[-1]
    for _, child in module.named_modules():
        lists = [value for value in child.values() if isinstance(value, list) and value]
        if any(blocks[-1] is last for blocks in lists):
            return None if child is module else child
    return None


def hidden_states(module: nn.Module, body: nn.Module, tokens: mx.array, cache: Any = None) -> mx.array:
    """(rows, length, hidden) that the body gives to the head. The head's own work is never evaluated."""
    seen: list[mx.array] = []

    def record(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with call_as(body, record):
        module(tokens, cache=cache)
    return seen[-1]


def head_logits(module: nn.Module, body: nn.Module, hidden: mx.array) -> mx.array:
    """(n, vocabulary) logits of (n, hidden) states, through whatever the model does after its body."""
    with call_as(body, lambda original, *args, **kwargs: hidden[None]):
        return module(mx.zeros((1, hidden.shape[0]), mx.int32))[0]


class Segments:
    """Stands in for a layer's cache and makes its attention block-diagonal: packed rows see only themselves.

    `segments`: (rows, length) int32, the number of the packed row that a token belongs to. Nothing is cached;
    rotary positions are relative, so a row may start anywhere.
    """

    offset = 0

    def __init__(self, segments: mx.array) -> None:
        same = segments[:, :, None] == segments[:, None, :]
        places = mx.arange(segments.shape[1])
        self._distance = places[:, None] - places[None, :]
        self._mask = same & (self._distance >= 0)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(rows, 1, length, length) bool, True where a token may look."""
        near = self._mask if window_size is None else self._mask & (self._distance < window_size)
        return near[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values as they are: nothing came before."""
        return keys, values
