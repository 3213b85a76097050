"""Run a model block by block, on any of mlx-lm's architectures, holding the weights of one block.

The model's own code computes embeddings, masks and head. To split it, its list of blocks is replaced for a
moment by stand-ins that note what they are called with and hand the hidden state on; each real block can then be
called by itself with the same arguments. A model that does not pass one hidden state from block to block is
run whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_adapters.assembly.weights import BaseWeights, Updates
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import dense_layer
from mlx_adapters.models.loading import load_module
from mlx_adapters.system.door import mx, nn


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden state."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _StandIn(nn.Module):
    """Takes a block's place: notes the call, and gives back `result` or the hidden state it was given."""

    def __init__(self, block: nn.Module, calls: list[tuple[Any, Call]], result: mx.array | None = None) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _calls=calls, _result=result)

    def __call__(self, hidden: Any, *arguments: Any, **keywords: Any) -> Any:
        self._calls.append((hidden, Call(arguments, keywords)))
        return hidden if self._result is None else self._result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


class Blocks:
    """A module as embedding, blocks and head. `paths[i]` is where block i lies; () if it cannot be split."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.paths: tuple[str, ...] = ()
        self._owner, self._key, self._blocks = module, "", []
        found = _block_list(module)
        if found is not None:
            prefix, self._owner, self._key = found
            self._blocks = list(self._owner[self._key])
            if self._splits():
                path = f"{prefix}.{self._key}" if prefix else self._key
                self.paths = tuple(f"{path}.{i}" for i in range(len(self._blocks)))

    def __len__(self) -> int:
        return len(self.paths)

    @contextmanager
    def _replaced(self, stand_ins: list[nn.Module]) -> Iterator[None]:
        self._owner[self._key] = stand_ins
        try:
            yield
        finally:
            self._owner[self._key] = self._blocks

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
        with self._replaced([_StandIn(block, calls) for block in self._blocks]):
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
        last = [_StandIn(self._blocks[-1], [], chosen)]
        with self._replaced([*(_StandIn(block, []) for block in self._blocks[:-1]), *last]):
            return self.module(mx.zeros((1, 1), mx.int32))[0]

    def block(self, index: int) -> nn.Module:
        """Block `index` itself."""
        return self._blocks[index]


def _block_list(module: nn.Module) -> tuple[str, nn.Module, str] | None:
    """(path of the owner, owner, attribute) of the longest list of modules, the model's blocks."""
    best, size = None, 1
    for path, owner in module.named_modules():
        for key, value in owner.items():
            modules = isinstance(value, list) and value and all(isinstance(v, nn.Module) for v in value)
            if modules and (len(value) > size or best is None):
                best, size = (path, owner, key), len(value)
    return best


class Variant:
    """One of the models that are compared or calibrated: base, adapter model or fused model.

    Weights are read lazily, and only for the block in use, as dense float32; `release` lets go of them. A
    variant goes through its blocks once, in any order.
    """

    def __init__(
        self,
        base: Base,
        updates: Updates | None = None,
        unlike: Callable[[str], bool] | None = None,
        stored: Callable[[str], mx.array | None] = lambda path: None,
        beside: "Variant | None" = None,
    ) -> None:
        """`unlike(path)`: whether that layer is unlike the base's (default: the updates change it).

        `stored(path)` gives a layer's dense weight, or None for the base's with the updates. `beside`: a new variant
        of the same base with which this one goes through the blocks; both read from one set of open files.
        """
        module, _ = load_module(base)
        if beside is not None:
            module.update(beside.source.module.parameters())
        self.source: BaseWeights = BaseWeights.of(module)
        self.updates = updates or Updates()
        self.blocks = Blocks(module)
        self._stored = stored
        self._dense: dict[str, nn.Module] = {}
        self._unlike = unlike or self.updates.paths().__contains__

    def layer_paths(self, index: int) -> list[str]:
        """Linear, expert and embedding layers in block `index`; for len(blocks): all outside the blocks."""
        if index < len(self.blocks):
            prefix = self.blocks.paths[index] + "."
            return [path for path in self.source.layers if path.startswith(prefix)]
        inside = tuple(path + "." for path in self.blocks.paths)
        return [path for path in self.source.layers if not (inside and path.startswith(inside))]

    def differs(self, index: int) -> bool:
        """Whether block `index` (len(blocks): embedding and head) is unlike the base's."""
        return any(self._unlike(path) for path in self.layer_paths(index))

    def prepare(self, index: int) -> None:
        """Make the weights of block `index` (len(blocks): of all the rest) dense float32."""
        dense = [(path, dense_layer(self.source.layers[path], self._weight(path))) for path in self.layer_paths(index)]
        self._dense |= dense
        self.source.module.update_modules(tree_unflatten(dense))
        part = self._part(index)
        part.update(tree_map(_to_float32, part.parameters()))
        mx.eval([layer.parameters() for _, layer in dense], part.parameters() if index < len(self.blocks) else [])

    def _part(self, index: int) -> nn.Module:
        if index < len(self.blocks):
            return self.blocks.block(index)
        return _Outside(self.source.module, self.blocks)

    def _weight(self, path: str) -> mx.array:
        stored = self._stored(path)
        return self.source.fused(path, self.updates) if stored is None else stored

    def weight(self, path: str) -> mx.array:
        """The dense float32 weight of a layer in a prepared block."""
        return self._dense[path].weight

    def change(self, path: str) -> mx.array | None:
        """What the updates add to a layer in a prepared block, dense float32; None if they do not touch it."""
        if path not in self.updates.paths() or path in self.updates.replaced:
            return None
        return self.weight(path) - self.source.fused(path, Updates())

    def release(self, index: int) -> None:
        """Drop the weights of block `index`; it cannot be used again."""
        for path in self.layer_paths(index):
            self._dense.pop(path, None)
        if index < len(self.blocks):
            block = self.blocks.block(index)
            block.update(tree_map(lambda _: mx.zeros((0,)), block.parameters()))
        mx.clear_cache()


class _Outside:
    """The parameters outside the blocks, behind the two methods of a module that `prepare` uses."""

    def __init__(self, module: nn.Module, blocks: Blocks) -> None:
        self._module = module
        self._inside = tuple(path + "." for path in blocks.paths)

    def parameters(self) -> dict:
        flat = tree_flatten(self._module.parameters())
        return dict((n, v) for n, v in flat if not (self._inside and n.startswith(self._inside)))

    def update(self, parameters: dict) -> None:
        self._module.load_weights(list(parameters.items()), strict=False)


def _to_float32(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
