"""Whether what a tree gives back is what it was given: tried on a few tokens, since nobody says so of a model."""

from collections.abc import Callable
from typing import Any

from mlx_adapters.prompt_caches.tree import PrefixTree
from mlx_adapters.surgery.caches import merged, same_function
from mlx_adapters.system.door import mx, nn

READ, NEXT = [5, 6, 7, 8, 9, 10], 11


def comes_back(module: nn.Module, make: Callable[[], list[Any]], together: bool) -> bool:
    """Whether the model goes on from a prompt in a tree, and from its beginning, as from what it has read itself.

    `together`: what goes into the tree is taken out of a batch. `make` gives an empty cache.
    """
    try:
        tree = PrefixTree(make, 1 << 62)
        tree.add(None, READ, _read(module, make, together))
        expected = module(mx.array([[*READ, NEXT]]), cache=make())
        for length in (len(READ), len(READ) // 2):
            cache, known = tree.find(None, READ[:length])
            logits = module(mx.array([[*READ, NEXT][known:]]), cache=cache)
            if not same_function(logits[:, -1], expected[:, -1]):
                return False
        return True
    except Exception:  # mlx-lm's code raises what it likes
        return False


def _read(module: nn.Module, make: Callable[[], list[Any]], together: bool) -> list[Any]:
    cache, other = make(), make()
    module(mx.array([READ]), cache=cache)
    if not together:
        return cache
    module(mx.array([READ[1:3]]), cache=other)
    rows = merged([cache])
    for mine, new in zip(rows, merged([other]), strict=True):
        mine.extend(new)
    return [layer.extract(0) for layer in rows]
