"""Linear layers that are given the same input: found by watching one forward pass, laid together in memory."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from mlx_adapters.storage.tensor_names import BIAS, QUANTIZED_LEAVES
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.system.door import mx, nn

Arrays = dict[str, mx.array]  # of layers, by their names in a layer


def find_groups(module: nn.Module, layers: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    """Paths of the linear layers that get the same input object.

    The pass is only traced, not computed, and no architecture is known by name. A group's layers lie in one
    block, are called once each and are of one kind (type, quantization, bias, dtype).
    """
    linear = {path: layer for path, layer in layers.items() if type(layer) in (nn.Linear, nn.QuantizedLinear)}
    calls: list[tuple[str, mx.array]] = []

    def noting(path: str) -> Callable[..., mx.array]:
        def note(original: Callable[..., mx.array], x: mx.array) -> mx.array:
            calls.append((path, x))
            return original(x)

        return note

    with ExitStack() as stack:
        for path, layer in linear.items():
            stack.callback(intercept(layer, noting(path)))
        try:
            module(mx.zeros((1, 1), dtype=mx.uint32))
        except (TypeError, ValueError, AttributeError):
            calls = []
    count: dict[str, int] = {}
    for path, _ in calls:
        count[path] = count.get(path, 0) + 1
    groups: dict[tuple, list[str]] = {}
    for path, x in calls:
        if count[path] == 1 and linear[path].weight.shape[0] % 8 == 0:
            groups.setdefault((path.rpartition(".")[0], id(x), _kind(linear[path])), []).append(path)
    return [tuple(paths) for paths in groups.values() if len(paths) > 1]


def _kind(layer: nn.Module) -> tuple:
    dtypes = tuple(layer[name].dtype if layer.get(name) is not None else None for name in (*QUANTIZED_LEAVES, BIAS))
    return (type(layer), *(getattr(layer, n, None) for n in ("bits", "group_size", "mode")), dtypes)


def lay_together(layers: Sequence[nn.Module]) -> Arrays:
    """The arrays of linear layers of one kind, one below the other, (Σ out, ...) each; the layers' own become views of
    them, equal to the bit. Of layers that were not evaluated before, no second copy is left in memory once they are."""
    wholes: Arrays = {}
    for name in (name for name in (*QUANTIZED_LEAVES, BIAS) if layers[0].get(name) is not None):
        whole, start = mx.concatenate([layer[name] for layer in layers]), 0
        for layer in layers:
            extent = layer[name].shape[0]
            layer[name] = whole[start : start + extent]
            start += extent
        wholes[name] = whole
    return wholes


UNDER_WAY = 4  # groups: a GPU waits for none of them, and few are in memory twice


def lay_groups_together(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[tuple[str, ...], Arrays]:
    """`lay_together` for all groups of a model, by their paths, evaluated; of a model whose weights are still to be
    read, so that they are read into place."""
    laid: dict[tuple[str, ...], Arrays] = {}
    begun: deque[list[Any]] = deque()
    for paths in find_groups(module, dict(layers)):
        group = [layers[path] for path in paths]
        laid[paths] = lay_together(group)
        begun.append([laid[paths], [layer.parameters() for layer in group]])
        mx.async_eval(begun[-1])
        if len(begun) > UNDER_WAY:
            mx.eval(begun.popleft())
    mx.eval(list(begun))
    return laid
