"""What a model computes once more in the backward pass, instead of keeping it from the forward pass.

Gradient checkpointing (arXiv 1604.06174) at three sizes: a whole block, its feed-forward part, and what lies between a
part's matrix products, which costs little and is most of what a block would keep: a feed-forward part's activation, and
attention itself, with what is done to queries and keys before. No architecture is known by name: a feed-forward part is
what a block calls with the hidden state alone, and attention what attends once.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx.utils import tree_flatten, tree_map

from mlx_adapters.surgery import calls
from mlx_adapters.surgery.blocks import find_blocks
from mlx_adapters.system.door import gated_delta, mx, nn

Call = Callable[..., Any]
Again = Literal["nothing", "mlp", "blocks"]  # of a block what lies between its products; its feed-forward part; all


_ARRAY = object()  # stands for an array


def checkpoint(function: Call) -> Call:
    """`function`, of nested arguments, of which the backward pass is left the inputs.

    Unlike `mx.checkpoint`'s this begins to compute again when the gradient has come, and hands it on when all is done:
    the backward pass never holds more than one such call's arrays, whatever order MLX goes in.
    """

    def call(*args: Any) -> Any:
        form: list[Any] = []  # of what comes out, without its arrays: they would hold the graph, which holds `flat`

        def flat(*arrays: mx.array) -> list[mx.array]:
            made = function(*_filled(args, arrays, _carries_gradient))
            form[:] = [tree_map(lambda leaf: _ARRAY if _is_array(leaf) else leaf, made)]
            return _leaves(made, _is_array)

        run = mx.custom_function(flat)

        @run.vjp
        def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
            primals, cotangents = _listed(primals), _listed(cotangents)
            _, gradients = mx.vjp(flat, mx.depends(primals, cotangents), cotangents)
            return tuple(mx.depends(gradients, gradients))

        outputs = _listed(run(*_leaves(args, _carries_gradient)))
        return _filled(form, outputs, lambda leaf: leaf is _ARRAY)[0]

    return call


def _listed(arrays: Any) -> list[mx.array]:
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, mx.array)


def _carries_gradient(leaf: Any) -> bool:
    """Whole numbers carry none, and a GPU's kernels refuse to be asked for one: RoPE's by its offsets."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _may_hide_gradient(leaf: Any) -> bool:
    """A cache, through which layers share keys."""
    return not isinstance(leaf, mx.array | str | int | float | None)


def _leaves(tree: Any, wanted: Callable[[Any], bool]) -> list[mx.array]:
    leaves: list[mx.array] = []
    tree_map(lambda leaf: leaves.append(leaf) if wanted(leaf) else None, tree)
    return leaves


def _filled(tree: Any, arrays: Iterable[mx.array], wanted: Callable[[Any], bool]) -> Any:
    """The tree with other arrays for the leaves that are wanted."""
    left = iter(arrays)
    return tree_map(lambda leaf: next(left) if wanted(leaf) else leaf, tree)


@contextlib.contextmanager
def recompute(layer: nn.Module) -> Iterator[None]:
    """Within the block, `layer` keeps only its inputs for the backward pass. The backward pass has to happen within
    the block too, and leaves MLX's random key behind where dropout began in the layer, because it draws the same
    numbers again.

    Whatever carries a gradient is an input: the weights, and arrays anywhere in positional and keyword arguments
    (Gemma 4 hands keys and values from block to block by keyword).
    """

    def checkpointed(original: Call, *args: Any, **kwargs: Any) -> Any:
        key = calls.random_key()

        def inner(given: dict, args: tuple, kwargs: dict) -> Any:
            own = layer.trainable_parameters()
            layer.update(given)
            calls.set_random_key(key)
            try:
                return original(*args, **kwargs)
            finally:
                layer.update(own)

        return checkpoint(inner)(layer.trainable_parameters(), args, kwargs)

    with calls.call_as(layer, checkpointed):
        yield


@dataclass(frozen=True)
class Part:
    """The part of a block that turns each token's hidden state by itself, or that `attends` to others.

    `last`: the layers called last in their modules, that give the hidden state's width again; `first`: the others
    (gate, up, a router; q, k, v). Of these, `beside` lie in one module with one of `last`, and between them there is
    arithmetic on single numbers; none in attention.
    """

    module: nn.Module
    first: tuple[nn.Module, ...]
    last: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]
    attends: bool = False


@dataclass
class _Seen:
    """What one token's pass does in a part: how often it is called, whether as a feed-forward part or as attention is,
    and with which layers, by the width that they give."""

    module: nn.Module
    calls: int = 0
    alone: bool = True
    attends: bool = False
    width: int = 0
    widths: dict[int, int] = field(default_factory=dict)


def find_parts(module: nn.Module, layers: Iterable[nn.Module]) -> list[Part]:
    """Those of the model's blocks; of `layers` the matrices count. One token's pass is traced, and nothing computed."""
    known = {id(layer): layer for layer in layers if any(a.ndim > 1 for _, a in tree_flatten(layer.parameters()))}
    blocks = find_blocks(module)
    children = [child for block in blocks.owner[blocks.key] for child in block.children().values()] if blocks else []
    parts = [c for c in children if isinstance(c, nn.Module) and id(c) not in known]
    seen = [_Seen(part) for part in parts if any(id(each) in known for each in part.modules())]
    attended: list[None] = []

    def attend(original: Call, *args: Any, **kwargs: Any) -> mx.array:
        attended.append(None)
        return original(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(calls.function_call_as(mx.fast, "scaled_dot_product_attention", attend))
        for each in seen:
            stack.callback(calls.intercept(each.module, _noting(each, attended)))
            for layer in each.module.modules():
                if id(layer) in known:
                    stack.callback(calls.intercept(layer, _noting_width(each, id(layer))))
        try:
            module(mx.zeros((1, 1), mx.int32))
        except Exception:  # whoever computes with it will be told
            return []
    made = [_part(each, known) for each in seen if each.calls == 1 and (each.alone or each.attends)]
    return [part for part in made if part.last or not part.attends]


def _noting(seen: _Seen, attended: list[None]) -> Call:
    def note(original: Call, *args: Any, **kwargs: Any) -> Any:
        before = len(attended)
        out = original(*args, **kwargs)
        seen.calls += 1
        given = _leaves([args, kwargs], _carries_gradient)
        first = len(given) == 1 and bool(args) and args[0] is given[0]
        turned = first and _is_array(out) and given[0].shape == out.shape
        seen.alone = turned and len(args) + len(kwargs) == 1
        hidden = _leaves([args, kwargs], _may_hide_gradient)
        seen.attends = turned and not seen.alone and not hidden and len(attended) == before + 1
        seen.width = out.shape[-1] if turned else 0
        return out

    return note


def _noting_width(seen: _Seen, layer: int) -> Call:
    def note(original: Call, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        seen.widths[layer] = out.shape[-1]
        return out

    return note


def _part(seen: _Seen, known: Mapping[int, nn.Module]) -> Part:
    families = [{id(child) for child in each.children().values()} for each in seen.module.modules()]
    called = [[layer for layer in seen.widths if layer in family] for family in families]  # in order
    last = {layers[-1] for layers in called if layers and seen.widths[layers[-1]] == seen.width}
    beside = {layer for layers in called if layers and layers[-1] in last for layer in layers} - last
    kinds = (seen.widths.keys() - last, last, set() if seen.attends else beside)
    before, after, near = (tuple(known[layer] for layer in seen.widths if layer in kind) for kind in kinds)
    return Part(seen.module, before, after, near, seen.attends)


@contextlib.contextmanager
def recompute_between(part: Part, in_float32: bool = True) -> Iterator[None]:
    """Within the block, of `part` the backward pass is left its input and what its first layers gave; it computes again
    what comes after, up to the input of the last ones. No matrix product of the base is done twice for it.

    `in_float32`: in models of 16 bits what lies between is rounded once, where mlx-lm rounds each step.
    """

    def call(original: Call, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        given: list[mx.array] = []
        keys: list[mx.array] = []

        def note(layer: Call, *args: Any, **kwargs: Any) -> mx.array:
            given.append(layer(*args, **kwargs))
            return given[-1]

        def note_key(layer: Call, *args: Any, **kwargs: Any) -> mx.array:
            keys.append(calls.random_key())
            return layer(*args, **kwargs)

        with _each(part.first, note), _each(part.last, note_key):
            original(x, *args, **kwargs)  # traced; of this only what the first layers give is ever computed
        after = calls.random_key()

        def rest(weights: list[dict], given: list[mx.array], x: mx.array, args: tuple, kwargs: dict) -> mx.array:
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
                    return original(x, *args, **kwargs).astype(x.dtype)
            finally:
                for layer, mine in zip(part.last, own, strict=True):
                    layer.update(mine)

        weights = [layer.trainable_parameters() for layer in part.last]
        y = checkpoint(rest)(weights, given, x, args, kwargs)
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


CHUNK = 64  # tokens of a recurrence whose states the backward pass holds at a time


@contextlib.contextmanager
def recurrences_in_chunks() -> Iterator[None]:
    """Within the block, in this thread, a gated delta rule (Gated DeltaNet, arXiv 2412.06464) keeps one state for each
    chunk of tokens, not one for each token, and computes those of a chunk again: mlx-lm's code, on CHUNK tokens at a
    time."""

    def in_chunks(original: Call, q: mx.array, *args: Any) -> tuple[mx.array, mx.array]:
        k, v, g, beta, state, mask = (*args, None, None)[:6]
        if state is None:
            state = mx.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1]), mx.float32)  # (rows, heads, values, keys)
        outputs: list[mx.array] = []
        for start in range(0, q.shape[1], CHUNK):
            part = [None if x is None else x[:, start : start + CHUNK] for x in (q, k, v, g, beta, mask)]
            y, state = checkpoint(original)(*part[:5], state, part[5])
            outputs.append(y)
        return mx.concatenate(outputs, axis=1), state

    with calls.function_call_as(gated_delta, "gated_delta_ops", in_chunks):
        yield


@contextlib.contextmanager
def computed_again(
    blocks: Iterable[nn.Module], parts: Sequence[Part], again: Again, in_float32: bool = True
) -> Iterator[None]:
    """Within the block as little of a model is kept as `again` says; `in_float32`: see `recompute_between`."""
    feed_forwards = [part for part in parts if not part.attends]
    whole = {"nothing": [], "mlp": [part.module for part in feed_forwards], "blocks": list(blocks)}[again]
    with contextlib.ExitStack() as stack:
        stack.enter_context(recurrences_in_chunks())
        for part in feed_forwards if again == "blocks" else parts:
            stack.enter_context(recompute_between(part, in_float32))
        for module in whole:
            stack.enter_context(recompute(module))
        yield
