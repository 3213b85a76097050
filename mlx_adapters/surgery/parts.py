"""Parts of a model that are functions of hidden states alone, found by watching one forward pass: its MLPs, mostly."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from mlx_adapters.surgery.caches import trace
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.system.door import mx, nn


def find_parts(module: nn.Module, layers: Iterable[str]) -> list[str]:
    """Paths of the outermost modules around at least two of these layers that take hidden states, once, and give such.

    Masks, caches and whatever else comes and goes beside the hidden states keep a module out. The pass is only
    traced, not computed, and no architecture is known by name.
    """
    holds: dict[str, int] = {}
    for path in layers:
        while path := path.rpartition(".")[0]:
            holds[path] = holds.get(path, 0) + 1
    modules = dict(module.named_modules())
    candidates = {path: modules[path] for path, count in holds.items() if count > 1 and path in modules}
    calls: dict[str, list[bool]] = {path: [] for path in candidates}

    def noting(path: str) -> Callable[..., Any]:
        def note(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            y = original(*args, **kwargs)
            calls[path].append(not kwargs and len(args) == 1 and _hidden(args[0]) and _hidden(y))
            return y

        return note

    with ExitStack() as stack:
        for path, candidate in candidates.items():
            stack.callback(intercept(candidate, noting(path)))
        trace(module)
    pure = {path for path, seen in calls.items() if seen == [True]}
    return [path for path in candidates if path in pure and not any(path.startswith(f"{outer}.") for outer in pure)]


def _hidden(value: Any) -> bool:
    return isinstance(value, mx.array) and value.ndim == 3 and mx.issubdtype(value.dtype, mx.floating)
