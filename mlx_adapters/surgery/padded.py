"""Keys and values of a batch's rows, each row padded before its first token, as in mlx-lm's `BatchKVCache`.

mlx-lm's keeps the padding on the device, in arrays of each layer's own: each step adds to all of them, and when a row
leaves, every layer waits until the device has told it its own. Here layers share one `Padding`, whose numbers need not
be asked for; where no row is padded, attention gets no mask; and arrays grow by many places, so that those who come and
go find memory of a size that was used before.
"""

import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_adapters.system.door import BatchKVCache, KVCache, attention, mx

STEP = 256  # places
Part = tuple[Any, ...]  # keys, values (None of what has no tokens), rows, filled places


class Padding:
    """How many places before its first token each row leaves free. Never changed: layers share it."""

    def __init__(self, left: tuple[int, ...]) -> None:
        self.left, self.array = left, mx.array(left)
        self._offsets: tuple[int, mx.array] = (0, mx.array([-free for free in left]))

    def offsets(self, end: int) -> mx.array:
        """(rows,) how many tokens of each row stand before place `end`."""
        known = self._offsets  # at once: another thread may put its own there
        if known[0] != end:
            known = self._offsets = end, mx.array([end - free for free in self.left])
        return known[1]


@lru_cache(64)
def padding(left: tuple[int, ...]) -> Padding:
    """One for all layers."""
    return Padding(left)


@lru_cache(64)
def _moved(behind: tuple[int, ...], places: int) -> mx.array:
    """(rows, 1, places, 1) which place each one is taken from where rows move to the right by `behind`."""
    whole = np.arange(places, dtype=np.int32) - np.array(behind, np.int32)[:, None]
    return mx.array(whole[:, None, :, None] % places)  # nothing to compute


_latest = threading.local()  # weakly, what was given out last: keys, their layer, and the mask of one token


def fetched(keys: mx.array, mask: Any) -> "PaddedCache | None":
    """The layer that gave out these keys just now, for tokens that see all of their row by this mask; None if none."""
    given, layer = getattr(_latest, "keys", (_gone, _gone))
    whole = mask is None or getattr(_latest, "mask", _gone)() is mask
    return layer() if given() is keys and whole else None


def _gone() -> None:
    """What a reference gives that refers to nothing."""


class PaddedCache(BatchKVCache):
    """One layer's keys and values (rows, heads, places, width); the places from `_idx` on are free.

    `left`: the padding of each row. `held` (rows,): how many tokens each held before the last that came.
    """

    held: mx.array

    def __init__(self, left: Sequence[int]) -> None:
        self.keys: Any = None
        self.values: Any = None
        self._idx = 0
        self._padding = padding(tuple(left))
        self._behind: tuple[int, ...] = ()

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> "PaddedCache":
        """The rows of these caches, one of each."""
        lengths = [cache.offset for cache in caches]
        made = cls([max(lengths) - length for length in lengths])
        made._lay([(cache.keys, cache.values, 1, cache.offset) for cache in caches])
        return made

    def _lay(self, parts: Sequence[Part], room: int = 0, like: tuple[mx.array, ...] = ()) -> None:
        """Hold these parts below each other, so that their ends meet; `room`: for more tokens, `like` these."""
        self._idx = end = max(filled for *_, filled in parts)
        places, rows = (end + room) // STEP * STEP + STEP, sum(rows for _, _, rows, _ in parts)
        for which, name in enumerate(("keys", "values")):
            known = [part[which] for part in parts if part[which] is not None] or like[which : which + 1]
            if known:
                whole = mx.zeros((rows, known[0].shape[1], places, known[0].shape[3]), known[0].dtype)
                setattr(self, name, _laid(whole, [(part[which], *part[2:]) for part in parts], end))

    @property
    def left_padding(self) -> mx.array:
        """(rows,) the padding of each row."""
        return self._padding.array

    @property
    def offset(self) -> mx.array:
        """(rows,) how many tokens each row holds."""
        return self._padding.offsets(self._idx)

    @property
    def state(self) -> tuple[Any, Any]:
        """What may be left to compute."""
        return self.keys, self.values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take the next tokens' (rows, heads, tokens, width); gives those of all tokens so far."""
        rows, _, tokens, _ = keys.shape
        start, end = self._idx, self._idx + tokens
        if self.keys is None or end > self.keys.shape[2]:
            self._lay([(self.keys, self.values, rows, start)], tokens, (keys, values))
        self.keys[..., start:end, :], self.values[..., start:end, :] = keys, values
        self._idx, self.held = end, self._padding.offsets(start)
        given = self.keys_and_values()
        _latest.keys = weakref.ref(given[0]), weakref.ref(self)
        return given

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What each of the next N tokens sees, as mlx-lm's models take it: "causal", None for everything."""
        if any(self._padding.left) or window_size is not None or (return_array and N > 1):
            sees = {"offset": self._idx, "window_size": window_size, "left_padding": self.left_padding}
            mask = attention.create_causal_mask(N, **sees)
            if window_size is None and N == 1:
                _latest.mask = weakref.ref(mask)
            return mask
        return "causal" if N > 1 else None

    def trim(self, n: int) -> int:
        """Forget the last tokens of all rows; how many."""
        n = min(self._idx, n)
        self._idx -= n
        return n

    def prepare(self, *, right_padding: Sequence[int], **_: Any) -> None:
        """Tell how many of each row's next tokens, or of its last ones, are none; `finalize` lets them go."""
        self._behind = tuple(right_padding)

    def finalize(self) -> None:
        """Move each row to the right, over what is none behind it."""
        if any(self._behind):
            where = _moved(self._behind, self.keys.shape[2])
            self.keys, self.values = (mx.take_along_axis(x, where, axis=2) for x in (self.keys, self.values))
            self._pad(free + more for free, more in zip(self._padding.left, self._behind, strict=True))
        self._behind = ()

    def filter(self, batch_indices: mx.array) -> None:
        """Keep these rows, and no more padding than they need."""
        left = [self._padding.left[row] for row in batch_indices.tolist()]
        least = min(left)
        if self.keys is not None:
            self.keys, self.values = self.keys[batch_indices], self.values[batch_indices]
            if least:
                keys, values = (array[:, :, least : self._idx] for array in (self.keys, self.values))
                self._lay([(keys, values, len(left), self._idx - least)])
        self._pad(free - least for free in left)

    def extend(self, other: "PaddedCache") -> None:
        """Take another's rows below one's own."""
        both = (self, other)
        end = max(part._idx for part in both)
        left = [free + end - part._idx for part in both for free in part._padding.left]
        self._lay([(part.keys, part.values, len(part._padding.left), part._idx) for part in both])
        self._pad(left)

    def extract(self, row: int) -> KVCache:
        """A row by itself. Its arrays are parts of these, which stay in memory as long."""
        made, free = KVCache(), self._padding.left[row]
        if self.keys is not None:
            made.keys, made.values = (array[row : row + 1, :, free : self._idx] for array in (self.keys, self.values))
            made.offset = self._idx - free
        return made

    def _pad(self, left: Iterable[int]) -> None:
        self._padding = padding(tuple(left))


def give_room(layer: KVCache) -> None:
    """Let a text's arrays have free places behind it, a multiple of `STEP` in all."""
    whole = PaddedCache.merge([layer])
    layer.keys, layer.values = whole.keys, whole.values


def _laid(whole: mx.array, parts: Sequence[tuple[mx.array | None, int, int]], end: int) -> mx.array:
    """(array, rows, filled) below each other in `whole`."""
    row = 0
    for array, rows, filled in parts:
        if array is not None and filled:
            whole[row : row + rows, :, end - filled : end] = array[:, :, :filled]
        row += rows
    return whole
