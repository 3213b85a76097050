"""Rows packed into one line, each computed as if it were alone.

Attention is made block-diagonal. A recurrence begins anew at each row's first token: its decay, which multiplies the
state that came before, is zero there (Gated DeltaNet, arXiv 2412.06464; state spaces, arXiv 2405.21060). A causal
convolution sees zeros where it would see the row before. All of it costs what one row of that length costs.

    caches = segmented_caches(module, segments)      # in place of the model's own
    module(tokens, cache=caches)                     # within `interception(block, call)` of `begun_anew(module)`
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mlx_adapters.surgery import calls
from mlx_adapters.system.door import gated_delta, make_prompt_cache, mx, nn, ssm

Call = Callable[..., Any]
FORGET = 3e38  # times a state space's exponent, which is negative: e^-inf of the state stays


class Segments:
    """Stands in for a layer's cache and makes its attention block-diagonal: packed rows see only themselves.

    `segments`: (rows, length) int32, the number of the packed row that a token belongs to. Nothing came before; other
    layers may look at this one's keys and values. Rotary positions are relative, so a row may start anywhere.
    """

    offset = 0
    keys = values = None

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
        """Keys and values as they are."""
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Those that came last."""
        return self.keys, self.values


class States:
    """Stands in for the cache of a layer whose states go from token to token: there are none, and none is kept.

    `segments`: as for `Segments`; for whoever computes the layer.
    """

    lengths = left_padding = None

    def __init__(self, segments: mx.array, count: int) -> None:
        self.segments = segments
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> None:
        if index >= self._count:
            raise IndexError(index)

    def __setitem__(self, index: int, state: mx.array) -> None:
        """Nothing: a layer that is computed again begins as it began."""

    def make_mask(self, length: int) -> None:
        """None: padding comes last, where nothing sees it."""

    def advance(self, length: int) -> None:
        """Nothing: no position is counted."""


def segmented_caches(module: nn.Module, segments: mx.array) -> list[Any]:
    """What stands in for each of the model's caches."""
    return [_stand_in(cache, segments) for cache in make_prompt_cache(module)]


def _stand_in(cache: Any, segments: mx.array) -> Any:
    if hasattr(cache, "caches"):  # a layer's several
        return [_stand_in(each, segments) for each in cache.caches]
    if hasattr(cache, "update_and_fetch"):
        return Segments(segments)
    return States(segments, len(cache.cache))


def begun_anew(module: nn.Module) -> list[tuple[nn.Module, Call]]:
    """The blocks, and how each is called so that its recurrences and convolutions begin anew with each packed row."""
    return [(block, _anew([c for c in block.modules() if isinstance(c, nn.Conv1d)])) for block in module.layers]


def _anew(convolutions: list[nn.Module]) -> Call:
    def call(block: Call, *args: Any, **kwargs: Any) -> Any:
        given = _states_in([*args, *kwargs.values()])
        if given is None:
            return block(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_recurrences_begun_anew(given.segments))
            for each in convolutions:
                stack.enter_context(calls.call_as(each, _within_rows(each, given.segments)))
            return block(*args, **kwargs)

    return call


def _states_in(arguments: Any) -> States | None:
    for each in arguments:
        states = _states_in(each) if isinstance(each, list) else each
        if isinstance(states, States):
            return states
    return None


@contextlib.contextmanager
def _recurrences_begun_anew(segments: mx.array) -> Iterator[None]:
    """Within the block, in this thread, mlx-lm's recurrences forget their state at each row's first token."""
    first = mx.concatenate([mx.zeros_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], axis=1)

    def delta_rule(original: Call, q: mx.array, k: mx.array, v: mx.array, g: mx.array, *args: Any) -> Any:
        anew = first.reshape(*first.shape, *[1] * (g.ndim - 2)).astype(mx.bool_)  # g: (rows, length, heads[, keys])
        return original(q, k, v, mx.where(anew, mx.zeros_like(g), g), *args)

    def state_space(original: Call, *args: Any, mask: mx.array | None = None, **kwargs: Any) -> Any:
        factor = mx.where(first, FORGET, 1.0)  # of each token's exponent
        return original(*args, mask=factor if mask is None else mask * factor, **kwargs)

    with contextlib.ExitStack() as stack:
        for home, name, function in (
            (gated_delta, "gated_delta_ops", delta_rule),
            (gated_delta, "gated_delta_kernel", delta_rule),
            (ssm, "ssm_attn", state_space),
        ):
            stack.enter_context(calls.function_call_as(home, name, function))
        yield


def _within_rows(convolution: nn.Module, segments: mx.array) -> Call:
    """A depthwise causal convolution that sees zeros where the row before is."""
    weight, length = convolution.weight, segments.shape[1]  # weight: (channels, taps, 1)
    taps, thread = weight.shape[1], threading.get_ident()

    def call(original: Call, x: mx.array) -> mx.array:
        ours = threading.get_ident() == thread
        if not ours or weight.shape[2] != 1 or x.shape[1] != length + taps - 1:  # or not of this kind
            return original(x)
        rows = mx.pad(segments, [(0, 0), (taps - 1, 0)])
        y = mx.zeros((), mx.float32)
        for tap in range(taps):
            own = rows[:, tap : tap + length] == segments  # (rows, length)
            y = y + mx.where(own[..., None], x[:, tap : tap + length], 0) * weight[:, tap, 0].astype(mx.float32)
        y = y + convolution.bias if "bias" in convolution else y
        return y.astype(x.dtype)

    return call
