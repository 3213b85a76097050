"""What one layer's cache holds, taken out and put back: by tokens, where it holds all of them, else as a whole.

mlx-lm's caches are told apart by asking them. A layer that can be trimmed and shows as many tokens as it was given
holds keys and values of each, and any part from the first token on is what it held then. Others have dropped tokens
that are out of their window, or keep a state that no token can be taken out of again; a copy stands for one moment.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from mlx.utils import tree_flatten, tree_map

from mlx_adapters.system.door import mx

Tokens = Any  # (keys, values) of tokens on the last axis but one; of quantized ones each is (codes, scales, biases)


def leaves(cache: Sequence[Any]) -> list[Any]:
    """The caches of a model's layers, those apart that are in one layer's list."""
    return [leaf for layer in cache for leaf in (leaves(layer.caches) if hasattr(layer, "caches") else [layer])]


def arrays(tree: Any) -> list[mx.array]:
    """The arrays of a tree."""
    return [value for _, value in tree_flatten(tree) if isinstance(value, mx.array)]


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(array.nbytes for array in arrays(tree))


def held(layer: Any) -> Tokens | None:
    """Keys and values of all tokens that the layer was given; None of one that does not have them all, or none yet."""
    if not hasattr(layer, "keys_and_values") or layer.empty() or not layer.is_trimmable():
        return None
    tokens = layer.keys_and_values()
    return tokens if all(array.shape[-2] == layer.offset for array in arrays(tokens)) else None


def holds(layer: Any, length: int) -> bool:
    """Whether nothing of `length` tokens would be out of the layer's window, if it has one."""
    parts, window = getattr(layer, "caches", None), getattr(layer, "max_size", None)
    return all(holds(part, length) for part in parts) if parts is not None else window is None or length < window


def cut(tokens: Tokens, start: int, end: int | None = None) -> Tokens:
    """Some of the tokens, in arrays of their own: what they were cut from can be freed."""
    return tree_map(lambda array: mx.contiguous(array[..., start:end, :]), tokens)


def fill(layer: Any, parts: Sequence[Tokens], length: int) -> None:
    """Let an empty layer hold these parts, one after another, up to `length` tokens. The parts are never changed."""
    whole = parts[0] if len(parts) == 1 else tree_map(lambda *each: mx.concatenate(each, axis=-2), *parts)
    layer.keys, layer.values = tree_map(lambda array: array[..., :length, :], whole)
    layer.offset = length
    if hasattr(layer, "_idx"):
        layer._idx = length


def moment(layer: Any) -> Any:
    """A copy of the layer as it is now, in arrays of its own."""
    kept = copy.copy(layer)
    for name, value in vars(layer).items():
        if arrays(value):
            setattr(kept, name, tree_map(_own, value))
        elif isinstance(value, list):
            setattr(kept, name, list(value))
    return kept


def _own(value: Any) -> Any:
    return mx.contiguous(value) if isinstance(value, mx.array) else value


def bring_back(layer: Any, kept: Any) -> None:
    """Let a layer be as `kept`, a copy of `moment`, which is not changed later."""
    vars(layer).update(vars(moment(kept)))


def shortened(cache: Sequence[Any], length: int, make: Callable[[], list[Any]]) -> list[Any] | None:
    """A cache of the first `length` tokens of what this one holds; None if it does not hold all tokens apart."""
    parts, short = [held(layer) for layer in leaves(cache)], make()
    if any(part is None or not _alike(part, layer) for part, layer in zip(parts, leaves(short), strict=True)):
        return None
    for layer, part in zip(leaves(short), parts, strict=True):
        fill(layer, [part], length)
    return short


def _alike(tokens: Tokens, layer: Any) -> bool:
    """Whether the layer keeps such keys and values: in few bits, or not."""
    return isinstance(tokens[0], mx.array) != hasattr(layer, "bits")


def count_of(cache: Sequence[Any]) -> int | None:
    """How many tokens a cache was given, by the first layer that counts them; None if none does."""
    offsets = (getattr(layer, "offset", None) for layer in leaves(cache))
    return next((offset for offset in offsets if isinstance(offset, int)), None)
