"""Whole blocks (an MLP) as one compiled program while one token of one row is decoded.

`mx.compile` records a function once and then replays it without Python, with neighbouring elementwise
operations in one kernel; the additions of the updates vanish into the activation. Worth it on a GPU, where
decoding small batches is bound by the number of operations, and only for blocks that are a function of one
array: attention, which has a cache, is none.
"""

from collections.abc import Callable, Sequence

from mlx_adapters.door import mx, nn


def at_path(module: nn.Module, path: str) -> nn.Module:
    """The module at a path."""
    for part in path.split(".") if path else ():
        module = module[int(part)] if isinstance(module, list) else getattr(module, part)
    return module


class Block:
    """A module whose calls go to `program` while there is one and one token of one row is computed."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.program: Callable[[mx.array], mx.array] | None = None
        block, kind = self, self.kind

        class Compiled(kind):  # type: ignore[misc, valid-type]
            def __call__(self, x: mx.array) -> mx.array:
                if block.program is None or x.shape[:-1] != (1, 1):
                    return super().__call__(x)
                return block.program(x)

        Compiled.__name__, Compiled.__qualname__ = kind.__name__, kind.__qualname__
        module.__class__ = Compiled

    def compile(self) -> Callable[[mx.array], mx.array]:
        """The block as it is now, its weights and updates included, as a program."""
        return mx.compile(lambda x: self.kind.__call__(self.module, x))

    def restore(self) -> None:
        """Give the module its own class back."""
        self.module.__class__ = self.kind


def find_blocks(module: nn.Module, groups: Sequence[tuple[str, ...]]) -> list[str]:
    """Paths of the parents of `groups` that are functions of one array, found by watching one forward pass."""
    seen: dict[str, bool] = {}
    watched = []
    for path in dict.fromkeys(group[0].rpartition(".")[0] for group in groups):
        block = at_path(module, path)
        watched.append((block, type(block)))
        _watch(block, path, seen)
    try:
        module(mx.zeros((1, 1), dtype=mx.uint32))
    except (TypeError, ValueError, AttributeError):
        return []
    finally:
        for block, kind in watched:
            block.__class__ = kind
    return [path for path, pure in seen.items() if pure]


def _watch(block: nn.Module, path: str, seen: dict[str, bool]) -> None:
    kind = type(block)

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: object, **keywords: object) -> object:
            out = super().__call__(*args, **keywords)
            pure = len(args) == 1 and not keywords and isinstance(args[0], mx.array) and isinstance(out, mx.array)
            seen[path] = seen.get(path, True) and pure
            return out

    block.__class__ = Watched
