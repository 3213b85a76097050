"""A model that goes through its blocks one by one, holding the dense weights of one block."""

from collections.abc import Callable, Mapping

from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_adapters.assembly.spool import Spool
from mlx_adapters.assembly.tensors import Assembly
from mlx_adapters.assembly.weights import BaseWeights, Updates
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import dense_layer
from mlx_adapters.models.loading import load_module
from mlx_adapters.rounding.packed import dequantize
from mlx_adapters.surgery.blocks import Blocks
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.limits import trim_cache


class BlockwiseModel:
    """One of the models that are compared or calibrated: base, adapter model or fused model.

    Weights are read lazily, and only for the block in use, as dense float32; `release` lets go of them, and of what
    the file holds of them. It goes through its blocks once, in any order.
    """

    def __init__(
        self,
        base: Base,
        updates: Updates | None = None,
        unlike: Callable[[str], bool] | None = None,
        stored: Callable[[str], mx.array | None] = lambda path: None,
        beside: "BlockwiseModel | None" = None,
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
        """Make the weights of block `index` dense float32; len(blocks): of all the rest, each where it is first used.
        To prepare those again lets go of what was computed."""
        dense = [(path, dense_layer(self.source.layers[path], self._weight(path))) for path in self.layer_paths(index)]
        self._dense |= dense
        self.source.module.update_modules(tree_unflatten(dense))
        part = self._part(index)
        part.update(tree_map(_to_float32, part.parameters()))
        if index < len(self.blocks):
            for _, layer in dense:
                mx.eval(layer.parameters())  # one by one: a GPU would hold what leads to all of them
            mx.eval(part.parameters())

    def _part(self, index: int) -> nn.Module:
        if index < len(self.blocks):
            return self.blocks.modules[index]
        return _Outside(self.source.module, self.blocks)

    def _weight(self, path: str) -> mx.array:
        stored = self._stored(path)
        return self.source.fused(path, self.updates) if stored is None else stored

    def weight(self, path: str) -> mx.array:
        """The dense float32 weight of a layer in a prepared block."""
        return self._dense[path].weight

    def change(self, path: str, start: int, stop: int | None) -> mx.array | None:
        """What the updates add to rows (or experts) start…stop of a layer in a prepared block, dense float32; None if
        they do not touch it."""
        if path not in self.updates.paths() or path in self.updates.replaced:
            return None
        weight = self.weight(path)
        return weight[start:stop] - self.source.rows(path, start, len(weight) if stop is None else stop)

    def release(self, index: int) -> None:
        """Drop the weights of block `index` (len(blocks): all the rest), packed ones too; it cannot be used again."""
        paths = self.layer_paths(index)
        for path in paths:
            self._dense.pop(path, None)
        for part in (self._part(index), *(self.source.layers[path] for path in paths)):
            part.update(tree_map(lambda _: mx.zeros((0,)), part.parameters()))
        trim_cache()


def with_rounded(
    assembly: Assembly, spool: Spool, targets: Mapping[str, Quantization | None], beside: BlockwiseModel
) -> BlockwiseModel:
    """The adapter model, with what `spool` holds of it at these precisions."""

    def stored(path: str) -> mx.array | None:
        packed = spool.get(path, targets.get(path))
        return None if packed is None else dequantize(packed)

    touched = set(targets) | assembly.updates.paths()
    return BlockwiseModel(assembly.base, assembly.updates, touched.__contains__, stored, beside)


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
