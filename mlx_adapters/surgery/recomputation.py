"""What a model computes once more in the backward pass, instead of keeping it from the forward pass.

Gradient checkpointing (arXiv 1604.06174) at three sizes: a whole block, its feed-forward part, and the little that lies
between the feed-forward part's matrix products, which costs next to nothing and is most of what a block would keep. No
architecture is known by name: a feed-forward part is what a block calls with the hidden state alone.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx.utils import tree_map

from mlx_adapters.surgery import calls
from mlx_adapters.surgery.blocks import find_blocks
from mlx_adapters.system.door import mx, nn

Call = Callable[..., Any]


@contextlib.contextmanager
def recompute(layer: nn.Module) -> Iterator[None]:
    """Within the block, `layer` keeps only its inputs for the backward pass. The backward pass has to happen within
    the block too, and leaves MLX's random key behind where dropout began in the layer, because it draws the same
    numbers again.

    Whatever carries a gradient is an input: the weights, and arrays anywhere in positional and keyword arguments
    (Gemma 4 hands keys and values from block to block by keyword). Whole numbers carry none, and a GPU's kernels refuse
    to be asked for one: RoPE's by its offsets.
    """

    def checkpointed(original: Call, *args: Any, **kwargs: Any) -> Any:
        key = calls.random_key()

        def inner(given: dict, args: tuple, kwargs: dict) -> Any:
            own = layer.trainable_parameters()
            layer.update(given)
            calls.set_random_key(key)
            args, kwargs = tree_map(_without_gradient_of_whole_numbers, (args, kwargs))
            try:
                return original(*args, **kwargs)
            finally:
                layer.update(own)

        return mx.checkpoint(inner)(layer.trainable_parameters(), args, kwargs)

    with calls.call_as(layer, checkpointed):
        yield


def _without_gradient_of_whole_numbers(leaf: Any) -> Any:
    whole = isinstance(leaf, mx.array) and not mx.issubdtype(leaf.dtype, mx.floating)
    return mx.stop_gradient(leaf) if whole else leaf


@dataclass(frozen=True)
class FeedForward:
    """The part of a block that turns each token's hidden state by itself.

    `last`: its layers that give the hidden state's width again; `first`: the others (gate, up, a router). Of these,
    `beside` lie in one module with one of `last`: between them there is arithmetic on single numbers.
    """

    module: nn.Module
    first: tuple[nn.Module, ...]
    last: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]


@dataclass
class _Seen:
    """What one token's pass does in a part: how often it is called, whether as a feed-forward part is, and with which
    layers, by the width that they give."""

    module: nn.Module
    calls: int = 0
    alone: bool = True
    width: int = 0
    widths: dict[int, int] = field(default_factory=dict)


def find_feed_forwards(module: nn.Module, layers: Iterable[nn.Module]) -> list[FeedForward]:
    """Those of the model's blocks; `layers` are its matrices. One token's pass is traced, and nothing computed."""
    known = {id(layer): layer for layer in layers}
    blocks = find_blocks(module)
    children = [child for block in blocks.owner[blocks.key] for child in block.children().values()] if blocks else []
    parts = [c for c in children if isinstance(c, nn.Module) and id(c) not in known]
    seen = [_Seen(part) for part in parts if any(id(each) in known for each in part.modules())]
    with contextlib.ExitStack() as stack:
        for each in seen:
            stack.callback(calls.intercept(each.module, _noting(each)))
            for layer in each.module.modules():
                if id(layer) in known:
                    stack.callback(calls.intercept(layer, _noting_width(each, id(layer))))
        try:
            module(mx.zeros((1, 1), mx.int32))
        except Exception:  # whoever computes with it will be told
            return []
    return [_feed_forward(each, known) for each in seen if each.calls == 1 and each.alone]


def _noting(seen: _Seen) -> Call:
    def note(original: Call, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        seen.calls += 1
        given = [*args, *kwargs.values()]
        arrays = len(given) == 1 and all(isinstance(each, mx.array) for each in (*given, out))
        seen.alone = arrays and given[0].shape == out.shape
        seen.width = out.shape[-1] if seen.alone else 0
        return out

    return note


def _noting_width(seen: _Seen, layer: int) -> Call:
    def note(original: Call, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        seen.widths[layer] = out.shape[-1]
        return out

    return note


def _feed_forward(seen: _Seen, known: Mapping[int, nn.Module]) -> FeedForward:
    last = {layer for layer, width in seen.widths.items() if width == seen.width}
    families = [{id(child) for child in each.children().values()} for each in seen.module.modules()]
    beside = {layer for family in families if family & last for layer in family & seen.widths.keys()} - last
    first = seen.widths.keys() - last
    return FeedForward(
        seen.module, *(tuple(known[layer] for layer in seen.widths if layer in kind) for kind in (first, last, beside))
    )


@contextlib.contextmanager
def recompute_between(part: FeedForward, in_float32: bool = True) -> Iterator[None]:
    """Within the block, of `part` the backward pass is left its input and what its first layers gave; it computes again
    what comes after, up to the input of the last ones. No matrix product of the base is done twice for it.

    `in_float32`: in models of 16 bits what lies between is rounded once, where mlx-lm rounds each step.
    """

    def call(original: Call, x: mx.array) -> mx.array:
        given: list[mx.array] = []
        keys: list[mx.array] = []

        def note(layer: Call, *args: Any, **kwargs: Any) -> mx.array:
            given.append(layer(*args, **kwargs))
            return given[-1]

        def note_key(layer: Call, *args: Any, **kwargs: Any) -> mx.array:
            keys.append(calls.random_key())
            return layer(*args, **kwargs)

        with _each(part.first, note), _each(part.last, note_key):
            original(x)  # traced; of this only what the first layers give is ever computed
        after = calls.random_key()

        def rest(weights: list[dict], given: list[mx.array], x: mx.array) -> mx.array:
            own, keys_left = [layer.trainable_parameters() for layer in part.last], iter(keys)

            def compute(layer: Call, d: mx.array, *args: Any, **kwargs: Any) -> mx.array:
                calls.set_random_key(next(keys_left))
                return layer(d.astype(x.dtype), *args, **kwargs)

            for layer, mine in zip(part.last, weights, strict=True):
                layer.update(mine)
            try:
                with contextlib.ExitStack() as stack:
                    outputs = iter(given)
                    for layer in part.first:
                        wide = in_float32 and any(layer is each for each in part.beside)
                        stack.callback(calls.intercept(layer, _giving(outputs, mx.float32 if wide else None)))
                    stack.enter_context(_each(part.last, compute))
                    return original(x).astype(x.dtype)
            finally:
                for layer, mine in zip(part.last, own, strict=True):
                    layer.update(mine)

        weights = [layer.trainable_parameters() for layer in part.last]
        y = mx.checkpoint(rest)(weights, given, x)
        calls.set_random_key(after)
        return y

    with calls.call_as(part.module, call):
        yield


def _giving(outputs: Iterator[mx.array], dtype: mx.Dtype | None) -> Call:
    def give(layer: Call, *args: Any, **kwargs: Any) -> mx.array:
        output = next(outputs)
        return output if dtype is None else output.astype(dtype)

    return give


@contextlib.contextmanager
def _each(layers: Sequence[nn.Module], function: Call) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(calls.intercept(layer, function))
        yield
