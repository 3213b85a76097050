"""Taking tokens back out of a model's caches, exactly.

Most caches can drop their last tokens. Recurrent states and windows that have come round cannot: they are kept as they
were before, which costs nothing or a copy of the window, and the right ones of the tokens are read again.
"""

import copy
from collections.abc import Sequence
from typing import Any


def drops(layer: Any, ahead: int) -> bool:
    """Whether this cache can drop tokens once it has read `ahead` more. It is asked; its class is not."""
    parts = getattr(layer, "caches", None)
    if parts is not None:
        return all(drops(part, ahead) for part in parts)
    limit = getattr(layer, "max_size", None)
    return layer.is_trimmable() and (limit is None or layer.size() + ahead < limit)


class Mark:
    """Where caches stand before they read `ahead` tokens, and the way back."""

    def __init__(self, cache: list[Any], ahead: int) -> None:
        self._cache = cache
        self._kept = {i: copy.deepcopy(layer) for i, layer in enumerate(cache) if not drops(layer, ahead)}

    def back(self, read: int, wrong: int) -> int:
        """Forget the last `wrong` of the `read` tokens; how many of the others are to be read again."""
        if wrong == 0:
            return 0
        for i, layer in enumerate(self._cache):
            if i in self._kept:
                self._cache[i] = self._kept[i]
            else:
                layer.trim(read if self._kept else wrong)
        return read - wrong if self._kept else 0


def drop_by_row(cache: Sequence[Any], wrong: Sequence[int]) -> None:
    """Forget the last `wrong` (rows,) tokens of each row of batched caches that can drop tokens."""
    least = min(wrong)
    more = [count - least for count in wrong]
    for layer in cache:
        if least:
            layer.trim(least)
        if any(more):
            layer.prepare(lengths=[-count for count in more], right_padding=more)
            layer.finalize()
