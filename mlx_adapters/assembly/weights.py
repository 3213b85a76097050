"""The base's weights, read when they are used, and what is added to them."""

import math
from collections import Counter
from dataclasses import dataclass, field

from mlx.utils import tree_flatten

from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import dense_weight, quantization_of
from mlx_adapters.models.layers import EMBEDDING, updated_weight, weight_layers
from mlx_adapters.rounding.packed import Packed, dequantize
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.machine import on_gpu

CHUNK, GPU_CHUNK = 1 << 22, 1 << 26  # weights handled at once: 16 and 256 MB in float32


@dataclass(frozen=True)
class Updates:
    """What is added to the base: the exact sum Σ weight · (W' - W) over adapters, W' as each would make it.

    `replaced` maps module paths to whole new weights (a full fine-tune of a few modules), used instead of the
    base's.
    """

    adapters: tuple[tuple[Adapter, float], ...] = ()
    replaced: dict[str, mx.array] = field(default_factory=dict)

    def paths(self) -> set[str]:
        """Paths of all layers that change."""
        return {key for adapter, _ in self.adapters for key in adapter.config.keys} | set(self.replaced)

    def apply(self, path: str, weight: mx.array, embedding: bool, start: int, stop: int) -> mx.array:
        """Rows (or experts) start…stop of the layer with the updates in it, float32."""
        weight = weight.astype(mx.float32)
        if path in self.replaced:
            weight = self.replaced[path][start:stop].astype(mx.float32)
        result = weight
        for adapter, share in self.adapters:
            if path not in adapter.config.keys:
                continue
            a, b, m = adapter.factors(path)
            if a.ndim == 3:
                a, b = a[start:stop], b[start:stop]
            elif embedding:
                a = a[start:stop]
            else:
                b = b[:, start:stop]
            m = None if m is None else m[start:stop]
            changed = updated_weight(weight, a, b, m, adapter.config.scale, embedding)
            whole = share == 1 and len(self.adapters) == 1
            result = changed if whole else result + share * (changed - weight)
        return result


@dataclass(frozen=True)
class BaseWeights:
    """The base with lazily loaded weights: nothing is read until it is used."""

    module: nn.Module
    layers: dict[str, nn.Module]  # see `weight_layers`
    dtype: mx.Dtype

    @classmethod
    def of(cls, module: nn.Module) -> "BaseWeights":
        """The weights of a model."""
        return cls(module, weight_layers(module), common_dtype(module))

    def packed(self, path: str) -> Packed | None:
        """The layer's quantized weight, if it is quantized without a tensor scale."""
        layer, quantization = self.layers[path], quantization_of(self.layers[path])
        if quantization is None or layer.get("global_scale") is not None:
            return None
        return Packed.of(layer, quantization)

    def rows(self, path: str, start: int, stop: int) -> mx.array:
        """Rows (or experts) of the base's weight in float32, dequantized exactly."""
        packed = self.packed(path)
        if packed is None:
            return dense_weight(self.layers[path], mx.float32)[start:stop]
        return dequantize(packed[start:stop])

    def fused_rows(self, path: str, updates: Updates, start: int, stop: int) -> mx.array:
        """The same rows with the updates in them."""
        return self.update(path, self.rows(path, start, stop), updates, start, stop)

    def update(self, path: str, rows: mx.array, updates: Updates, start: int, stop: int) -> mx.array:
        """The base's `rows` start…stop with the updates in them."""
        return updates.apply(path, rows, isinstance(self.layers[path], EMBEDDING), start, stop)

    def fused(self, path: str, updates: Updates) -> mx.array:
        """The whole fused weight in float32."""
        return self.fused_rows(path, updates, 0, self.layers[path].weight.shape[0])


def common_dtype(module: nn.Module) -> mx.Dtype:
    """The floating type that most of the model's numbers are stored in (for packed weights: their scales)."""
    counts: Counter = Counter()
    for _, value in tree_flatten(module.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            counts[value.dtype] += value.size
    return max(counts, key=lambda dtype: counts[dtype], default=mx.float32)


def chunks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of the first axis with at most CHUNK weights each; on a GPU, which waits at each, GPU_CHUNK."""
    step = max(1, (GPU_CHUNK if on_gpu() else CHUNK) // math.prod(shape[1:]))
    return [(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
