"""A model as embedding, blocks and head, on any of mlx-lm's architectures.

The model's own code computes embeddings, masks and head. To split it, its blocks note for one pass what they are
called with, and nothing of them is computed; each can then be called by itself with the same arguments.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from mlx.utils import tree_map, tree_map_with_path

from mlx_adapters.surgery.calls import call_as, intercept
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.machine import on_cuda, on_gpu

WORTH_TOKENS = 8  # in one call: fewer are soon computed
AHEAD_TOKENS, AHEAD_BLOCKS = 1024, 4  # on CUDA: fewer tokens are computed before Python has built the rest
MOST_LOGITS = 1 << 26  # at once: 256 MB in float32, 441 tokens of a vocabulary of 151,936


class BlockList(NamedTuple):
    """Where a model keeps its blocks: in the list `owner[key]`; the owner lies at `path`."""

    path: str
    owner: nn.Module
    key: str


def find_blocks(module: nn.Module) -> BlockList | None:
    """The longest list of modules with one of `module.layers` in it (if none has, of all); None if there is none."""
    best, rank = None, (False, 0)
    own = {id(layer) for layer in getattr(module, "layers", None) or ()}
    for path, owner in module.named_modules():
        for key, value in owner.items():
            if isinstance(value, list) and value and all(isinstance(v, nn.Module) for v in value):
                score = (any(id(v) in own for v in value), len(value))
                if score > rank:
                    best, rank = BlockList(path, owner, key), score
    return best


def find_body(module: nn.Module) -> nn.Module | None:
    """The submodule that holds the blocks and whose output the head reads; None if there is no such split."""
    blocks = find_blocks(module)
    if blocks is None or not blocks.path:
        return None
    parts, modules = blocks.path.split("."), dict(module.named_modules())
    around = (modules[".".join(parts[:i])] for i in range(len(parts), 0, -1))
    return next((each for each in around if _is_called(module, each)), None)


def _is_called(module: nn.Module, body: nn.Module) -> bool:
    """Whether one token's pass calls the body, once. Nothing is computed. (PlaMo's blocks lie in one that is not.)"""
    calls: list[None] = []

    def note(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    with call_as(body, note):
        try:
            module(mx.zeros((1, 1), mx.int32))
        except Exception:  # whoever computes with it will be told
            return False
    return len(calls) == 1


@contextmanager
def noting_outputs(module: nn.Module) -> Iterator[list[Any]]:
    """Within the block what each block of the model gives is noted, in order, before it is evaluated."""
    outputs: list[Any] = []

    def note(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs.append(original(*args, **kwargs))
        return outputs[-1]

    blocks = find_blocks(module)
    with ExitStack() as stack:
        for block in [] if blocks is None else blocks.owner[blocks.key]:
            stack.callback(intercept(block, note))
        yield outputs


def evaluate_in_order(parts: list[Any], heed: Callable[[], None] = lambda: None) -> None:
    """Evaluate one part of a computation after the other, and let go of each: the same numbers, and Python hears a
    signal in between, where `heed` is called. Empties `parts`."""
    parts.reverse()
    while parts:
        mx.eval(parts.pop())
        heed()


def by_block(module: nn.Module) -> Callable[..., Any]:
    """The model, to be called as it is. On a CPU, where a text takes long, its blocks are evaluated in order; on CUDA
    some begin while Python still builds those after them."""
    if on_gpu():
        return partial(_ahead, module) if on_cuda() else module

    def call(tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
        if tokens.size < WORTH_TOKENS:
            return module(tokens, *args, **kwargs)
        with noting_outputs(module) as outputs:
            result = module(tokens, *args, **kwargs)
        evaluate_in_order(outputs)
        return result

    return call


def _ahead(module: nn.Module, tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
    if tokens.size < AHEAD_TOKENS:
        return module(tokens, *args, **kwargs)

    def begin(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        mx.async_eval(output)
        return output

    with ExitStack() as stack:
        for block in list(getattr(module, "layers", None) or ())[::AHEAD_BLOCKS]:
            stack.callback(intercept(block, begin))
        return module(tokens, *args, **kwargs)


def keep_blocks(module: nn.Module, first: int, count: int) -> None:
    """Cut the model down to `count` of its blocks, from the one numbered `first` on."""
    blocks = find_blocks(module)
    if blocks is not None:
        blocks.owner[blocks.key] = blocks.owner[blocks.key][first : first + count]


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the state: what stays as it is (masks, positions), and `given`, the arrays
    that hang on the tokens' embeddings."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    given: Sequence[mx.array]


@dataclass(frozen=True)
class Leaf:
    """Where an array lies in what a block gives: its number there."""

    number: int


Key = tuple[int, int]  # a block, and the number of an array that it gives; the hidden state has 0
Arrays = list[tuple[str, mx.array]]  # with their paths
Made = dict[int, tuple[Key, mx.array]]  # by `id`


class Blocks:
    """A module as embedding, blocks and head. `paths[i]` is where block i, `modules[i]`, lies; () if it cannot be
    split: a model whose blocks are not called in a row, each with the hidden state of the one before, is run whole.

    From block to block goes a state: the hidden state (rows, length, dim), then what later blocks take of what earlier
    ones gave (keys and values that layers share, say). What hangs on what, two passes of three tokens tell: in one all
    embeddings give NaN, in the other all blocks do. Large weights are not read there: a layer hands on NaN, or none.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.paths: tuple[str, ...] = ()
        blocks = find_blocks(module)
        self.modules: list[nn.Module] = list(blocks.owner[blocks.key]) if blocks is not None else []
        self._gives: list[Any] = [Leaf(0) for _ in self.modules]  # what each gives, with leaves for arrays
        self._uses: list[dict[str, Key]] = []  # what each takes of what others gave, by path
        self._given: list[list[str]] = []  # paths of what hangs on embeddings
        self._keys: list[list[Key]] = []  # the state before each block, and after the last
        if blocks is not None and (self._learn() or self._learn(ask=True)):
            path = f"{blocks.path}.{blocks.key}" if blocks.path else blocks.key
            self.paths = tuple(f"{path}.{i}" for i in range(len(self.modules)))

    def __len__(self) -> int:
        return len(self.paths)

    def _learn(self, ask: bool = False) -> bool:
        """Whether the model can be split, and how; `ask` its blocks what else they give (nothing is computed)."""
        try:
            calls, made, from_embeddings = self._probe(embedded=math.nan, gives=1.0, ask=ask)
            self._given = [[p for p, a in call if id(a) not in made and _has_nan(a)] for call in calls]
            calls, made, from_blocks = self._probe(embedded=1.0, gives=math.nan)
            self._uses = [{p: made[id(a)][0] for p, a in call if id(a) in made} for call in calls]
            hidden = [{p for p, key in uses.items() if key == (i, 0)} for i, uses in enumerate(self._uses[1:])]
            entrance = hidden[0] if hidden else {_first(calls[0])[0]}
            shapes = {a.shape for call in calls for path, a in call if path in entrance}
            lost = any(id(a) not in made and _has_nan(a) for call in calls for _, a in call)
            lost = lost or _has_nan(from_embeddings) or _has_nan(from_blocks)  # beside the last hidden state
            at_first = {id(a) for path, a in calls[0] if path in entrance}
        except Exception:  # the model expects more of a block
            return False
        self._uses[0] = dict.fromkeys(sorted(entrance), (-1, 0))
        self._given[0] = [path for path in self._given[0] if path not in entrance]
        count = len(self.modules)
        later = [{key for uses in self._uses[i:] for key in uses.values() if key[0] < i} for i in range(count + 1)]
        self._keys = [[(i - 1, 0), *sorted(keys - {(i - 1, 0)})] for i, keys in enumerate(later)]
        in_row = len(calls) == count and all(paths == entrance for paths in hidden) and len(at_first) == 1
        return in_row and not lost and len(shapes) == 1 and len(shapes.pop()) == 3

    def _probe(self, embedded: float, gives: float, ask: bool = False) -> tuple[list[Arrays], Made, mx.array]:
        """What a pass of three tokens calls each block with, what stands for what they give by `id`, and the logits.
        Embeddings give `embedded`, blocks `gives` (the last a hidden state of ones)."""
        calls: list[Arrays] = []
        made: Made = {}

        def embed(original: Callable[..., mx.array], *arguments: Any) -> mx.array:
            return _full(original(*arguments), embedded)

        def give(index: int, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            calls.append(_arrays((arguments, keywords)))
            given = original(*arguments, **keywords) if ask else None
            if ask:
                self._gives[index] = _leaves(given)
            like = [array for _, array in _arrays(given)]

            def stand(number: int) -> mx.array:
                is_read = index == len(self.modules) - 1 and number == 0
                array = _full(like[number] if ask else _first(calls[-1])[1], 1.0 if is_read else gives)
                made[id(array)] = (index, number), array
                return array

            return _filled(self._gives[index], stand)

        with ExitStack() as stack:
            for _, layer in self.module.named_modules():
                if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
                    stack.callback(intercept(layer, embed))
                    stack.callback(intercept(layer, _hand_on, "as_linear"))
                elif isinstance(layer, nn.Linear | nn.QuantizedLinear):
                    stack.callback(intercept(layer, _hand_on))
            logits = self._traced(mx.zeros((1, 3), mx.int32), give)
        return calls, made, logits

    def _traced(self, tokens: mx.array, give: Callable[..., Any]) -> mx.array:
        """The logits, where calling block i runs `give(i, original, hidden, …)`."""
        with ExitStack() as stack:
            for index, block in enumerate(self.modules):
                stack.callback(intercept(block, partial(give, index)))
            return self.module(tokens)

    def enter(self, tokens: mx.array) -> tuple[list[mx.array], list[Call]]:
        """(state before block 0, what each block is called with). The tokens (rows, length) of a model run whole."""
        if not self.paths:
            return [tokens], []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def give(index: int, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            calls.append((arguments, keywords))
            return _filled(self._gives[index], lambda _: _first(_arrays(calls[index]))[1])

        self._traced(tokens, give)
        entered = dict(_arrays(calls[0]))[next(iter(self._uses[0]))]
        return [entered], [self._call(i, call) for i, call in enumerate(calls)]

    def _call(self, index: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Call:
        arrays, moving = dict(_arrays(call)), {*self._uses[index], *self._given[index]}
        arguments, keywords = tree_map_with_path(lambda path, leaf: None if path in moving else leaf, call)
        return Call(arguments, keywords, [arrays[path] for path in self._given[index]])

    def step(self, index: int, state: Sequence[mx.array], call: Call) -> list[mx.array]:
        """The state after block `index`."""
        held = dict(zip(self._keys[index], state, strict=True))
        moving = {path: held[key] for path, key in self._uses[index].items()}
        moving |= zip(self._given[index], call.given, strict=True)
        arguments, keywords = tree_map_with_path(lambda p, leaf: moving.get(p, leaf), (call.arguments, call.keywords))
        given = _arrays(self.modules[index](*arguments, **keywords))
        held |= {(index, n): array for n, (_, array) in enumerate(given)}
        return [held[key] for key in self._keys[index + 1]]

    def finish(self, state: Sequence[mx.array], positions: mx.array) -> mx.array:
        """Logits (n, vocabulary) at flattened `positions` (n,), from the state after the last block."""
        if not self.paths:
            logits = self.module(state[0])
            return logits.reshape(-1, logits.shape[-1])[positions]
        chosen = state[0].reshape(-1, state[0].shape[-1])[positions][None]

        def give(index: int, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            hidden = chosen if index == len(self) - 1 else _first(_arrays((arguments, keywords)))[1]
            return _filled(self._gives[index], lambda _: hidden)

        return self._traced(mx.zeros((1, 1), mx.int32), give)[0]

    def pieces(self, state: Sequence[mx.array], positions: mx.array) -> list[mx.array]:
        """`positions` cut up so that no part has more than MOST_LOGITS logits; a model run whole is run once."""
        if not self.paths:
            return [positions]
        step = max(1, MOST_LOGITS // self.finish(state, positions[:1]).shape[-1])  # (nothing is computed)
        return [positions[a : a + step] for a in range(0, positions.shape[0], step)]


def _arrays(tree: Any) -> Arrays:
    """The arrays of a tree, each with its path. Raises TypeError for what blocks may keep things in (a cache)."""
    found: Arrays = []

    def visit(path: str, leaf: Any) -> None:
        if isinstance(leaf, mx.array):
            found.append((path, leaf))
        elif not isinstance(leaf, bool | int | float | str | None):
            raise TypeError(f"{path} is a {type(leaf).__name__}")

    tree_map_with_path(visit, tree)
    return found


def _first(arrays: Arrays) -> tuple[str, mx.array]:
    """The first that may be a hidden state, and its path."""
    return next((path, a) for path, a in arrays if a.ndim >= 3 and mx.issubdtype(a.dtype, mx.floating))


def _leaves(tree: Any) -> Any:
    """`tree` with a leaf for each array."""
    numbers = itertools.count()
    return tree_map(lambda each: Leaf(next(numbers)) if isinstance(each, mx.array) else each, tree)


def _filled(tree: Any, array: Callable[[int], mx.array]) -> Any:
    """`tree` with `array(number)` for each leaf."""
    return tree_map(lambda each: array(each.number) if isinstance(each, Leaf) else each, tree)


def _full(like: mx.array, value: float) -> mx.array:
    """An array that is all `value`; of whole numbers, zeros."""
    return mx.full(like.shape, value if mx.issubdtype(like.dtype, mx.floating) else 0, like.dtype)


def _hand_on(original: Callable[..., mx.array], x: mx.array) -> mx.array:
    """The mean of `x` (..., in) for each output of a linear layer, whose weight is not read."""
    return _full(original(x), 1.0) * x.astype(mx.float32).mean(axis=-1, keepdims=True)


def _has_nan(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating) and mx.isnan(array).any().item()
