"""A model as embedding, blocks and head, on any of mlx-lm's architectures.

The model's own code computes embeddings, masks and head. To split it, its blocks note for one pass what they are
called with and hand the hidden state on; each can then be called by itself with the same arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
    """What a block is called with beside the hidden state."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Blocks:
    """A module as embedding, blocks and head. `paths[i]` is where block i lies; () if it cannot be split: a model
    that does not pass one hidden state from block to block is run whole."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.paths: tuple[str, ...] = ()
        blocks = find_blocks(module)
        self._blocks: list[nn.Module] = list(blocks.owner[blocks.key]) if blocks is not None else []
        if blocks is not None and self._splits():
            path = f"{blocks.path}.{blocks.key}" if blocks.path else blocks.key
            self.paths = tuple(f"{path}.{i}" for i in range(len(self._blocks)))

    def __len__(self) -> int:
        return len(self.paths)

    def _splits(self) -> bool:
        """Whether each block is called once, in order, with the hidden state that the one before returned."""
        try:
            hidden, calls = self._trace(mx.zeros((1, 3), mx.int32))
        except Exception:
            return False  # the model expects more of a block than a hidden state
        alike = all(isinstance(h, mx.array) and h.shape == hidden.shape for h, _ in calls)
        return alike and len(calls) == len(self._blocks) and hidden.ndim == 3

    def _trace(self, tokens: mx.array) -> tuple[mx.array, list[tuple[Any, Call]]]:
        calls: list[tuple[Any, Call]] = []

        def note(original: Callable[..., Any], hidden: Any, *arguments: Any, **keywords: Any) -> Any:
            calls.append((hidden, Call(arguments, keywords)))
            return hidden

        with _each_called_as(self._blocks, note):
            self.module(tokens)
        return calls[0][0], calls

    def enter(self, tokens: mx.array) -> tuple[mx.array, list[Call]]:
        """(hidden state before block 0 (rows, length, dim), what each block is called with)."""
        if not self.paths:
            return tokens, []
        hidden, calls = self._trace(tokens)
        return hidden, [call for _, call in calls]

    def step(self, index: int, hidden: mx.array, call: Call) -> mx.array:
        """The hidden state after block `index`."""
        return self._blocks[index](hidden, *call.arguments, **call.keywords)

    def finish(self, hidden: mx.array, positions: mx.array) -> mx.array:
        """Logits (n, vocabulary) at flattened `positions` (n,), from the hidden state after the last block."""
        if not self.paths:
            logits = self.module(hidden)
            return logits.reshape(-1, logits.shape[-1])[positions]
        chosen = hidden.reshape(-1, hidden.shape[-1])[positions][None]

        def hand_on(original: Callable[..., Any], hidden: Any, *arguments: Any, **keywords: Any) -> Any:
            return hidden

        def choose(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> mx.array:
            return chosen

        with _each_called_as(self._blocks, hand_on), call_as(self._blocks[-1], choose):
            return self.module(mx.zeros((1, 1), mx.int32))[0]

    def pieces(self, hidden: mx.array, positions: mx.array) -> list[mx.array]:
        """`positions` cut up so that no part has more than MOST_LOGITS logits; a model run whole is run once."""
        if not self.paths:
            return [positions]
        step = max(
            1, MOST_LOGITS // self.finish(hidden, positions[:1]).shape[-1]
        )  # (its shape alone; nothing is computed)
        return [positions[a : a + step] for a in range(0, positions.shape[0], step)]

    def block(self, index: int) -> nn.Module:
        """Block `index` itself."""
        return self._blocks[index]


@contextmanager
def _each_called_as(blocks: list[nn.Module], function: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(intercept(block, function))
        yield
