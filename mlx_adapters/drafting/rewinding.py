"""Taking tokens back out of a model's caches, exactly.

Most caches can drop their last tokens. Recurrent states and windows that have come round cannot: they are kept as they
were before, which costs nothing or a copy of the window, and the right ones of the tokens are read again.
"""

import copy
from collections.abc import Sequence
from typing import Any

from mlx_adapters.surgery.caches import Make, read_prompt, read_together, same_function
from mlx_adapters.system.door import mx, nn


def drops(layer: Any, ahead: int) -> bool:
    """Whether this cache can drop tokens once it has read `ahead` more. It is asked; its class is not."""
    parts, limit = getattr(layer, "caches", None), getattr(layer, "max_size", None)
    if parts is not None:
        return all(drops(part, ahead) for part in parts)
    return layer.is_trimmable() and (limit is None or layer.size() + ahead < limit)


def may_guess(cache: Sequence[Any], ahead: int, rows: int, batched: bool) -> bool:
    """Whether the rows of these caches may read `ahead` tokens, and each forget some of them.

    A window that has come round may not where it is `batched`: mlx-lm's mask for several tokens leaves one out there.
    """
    if all(drops(layer, ahead) for layer in cache):
        return True
    return rows == 1 and not (batched and any(_is_window(layer) for layer in cache))


def _is_window(layer: Any) -> bool:
    return getattr(layer, "max_size", None) is not None or any(map(_is_window, getattr(layer, "caches", ())))


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

    def back_rows(self, read: int, wrong: Sequence[int]) -> int:
        """Forget the last `wrong` (rows,) of the `read` tokens in each row; how many are to be read again.

        Rows of which other numbers are wrong need caches that can drop them.
        """
        least = min(wrong)
        again = self.back(read, least)
        more = [count - least for count in wrong]
        if any(more):
            for layer in self._cache:
                layer.prepare(lengths=[-count for count in more], right_padding=more)
                layer.finalize()
        return again


def rewinds(module: nn.Module, make: Make) -> bool:
    """Whether rows of a batch can each forget tokens of their own and go on as if alone. Tried on two of them.

    `make` gives empty caches.
    """
    prompts, ahead, after = ([5], [6, 7, 8]), [[9, 10, 11], [12, 13, 14]], mx.array([[15], [16]])
    try:
        together = read_together(module, prompts, make)
        mark = Mark(together, 3)
        module(mx.array(ahead), cache=together)
        if mark.back_rows(3, [2, 0]):
            return False
        both = module(after, cache=together)
        whole = ([*prompts[0], *ahead[0][:1]], [*prompts[1], *ahead[1]])
        alone = [module(after[i : i + 1], cache=read_prompt(module, text, make)) for i, text in enumerate(whole)]
        return same_function(both, mx.concatenate(alone))
    except Exception:  # mlx-lm's code raises what it likes
        return False
