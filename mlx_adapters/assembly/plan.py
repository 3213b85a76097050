"""What becomes of each layer: which update it gets, and at what precision it is written.

The plan is made from shapes alone; no weight is read for it.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.config.training import Quantization, default_group_size, to_mapping
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.layers import (
    EMBEDDING,
    dense_weight,
    quantization_of,
    updated_weight,
    weight_layers,
    weight_shape,
)
from mlx_adapters.rounding.packed import Packed, dequantize
from mlx_adapters.storage import tensor_names
from mlx_adapters.storage.tensor_names import BIASES, QUANTIZED_LEAVES, SCALES, WEIGHT
from mlx_adapters.system.door import mx, nn

CHUNK = 1 << 22  # weights handled at once: 16 MB in float32
Precision = Quantization | None


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
class LayerPlan:
    """One linear, expert or embedding layer. `source` and `target` are None where it is not quantized.

    `copied`: the tensors go over as they are. `note` says why a layer is not as asked.
    """

    path: str
    shape: tuple[int, ...]
    source: Precision
    target: Precision
    changed: bool
    copied: bool
    note: str | None = None

    @property
    def rounded_to(self) -> Precision:
        """The precision to which it is rounded anew, if it is."""
        return None if self.copied else self.target

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Source:
    """The base with lazily loaded weights: nothing is read until it is used."""

    module: nn.Module
    layers: dict[str, nn.Module]  # see `weight_layers`
    dtype: mx.Dtype

    @classmethod
    def of(cls, module: nn.Module) -> "Source":
        """The source that a model is."""
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
    """Ranges of the first axis with at most CHUNK weights each."""
    step = max(1, CHUNK // math.prod(shape[1:]))
    return [(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def plan_layers(source: Source, keys: set[str], precision: Quantization | str) -> list[LayerPlan]:
    """Decide every layer's precision. `precision` is a Quantization, "none" or "keep"."""
    unquantized_base = all(quantization_of(layer) is None for layer in source.layers.values())
    plans = []
    for path, layer in source.layers.items():
        origin, note = quantization_of(layer), None
        if isinstance(precision, Quantization):
            target, note = _asked(source, path, layer, precision, origin, unquantized_base)
        else:
            target = origin if precision == "keep" else None
        changed = path in keys
        copied = not changed and target == origin
        plans.append(LayerPlan(path, weight_shape(layer), origin, target, changed, copied, note))
    return plans


def _asked(
    source: Source, path: str, layer: nn.Module, asked: Quantization, origin: Precision, unquantized_base: bool
) -> tuple[Precision, str | None]:
    """The precision of one layer when a quantization is asked for, as `mlx_lm.convert` would choose it."""
    if not hasattr(layer, "to_quantized") and origin is None:
        return None, None
    if origin is None and not unquantized_base:
        return None, None  # the base's maker left it unquantized on purpose
    predicate = getattr(source.module, "quant_predicate", None)
    answer: Any = predicate(path, layer) if predicate is not None else True
    if answer is False:
        return None, None
    if isinstance(answer, dict):
        mode = answer.get("mode", "affine")
        asked = Quantization(answer["bits"], answer.get("group_size") or default_group_size(mode), mode)
    if weight_shape(layer)[-1] % asked.group_size:
        width = weight_shape(layer)[-1]
        return None, f"not quantized: its {width} inputs cannot be cut into groups of {asked.group_size}"
    return asked, None


def quantization_config(plans: list[LayerPlan], default: Quantization | None) -> dict[str, Any] | None:
    """config.json's "quantization": the commonest precision, and an entry for each layer that differs."""
    counts = Counter(plan.target for plan in plans if plan.target is not None)
    if not counts:
        return None
    if default is None or default not in counts:
        default = counts.most_common(1)[0][0]
    entries: dict[str, Any] = to_mapping(default)
    for plan in plans:
        if plan.target is not None and plan.target != default:
            entries[plan.path] = to_mapping(plan.target)
    return entries


def packed_shapes(plan: LayerPlan, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(leaf, dtype, shape) of the tensors that hold the layer's weight."""
    if plan.target is None:
        return [(WEIGHT, dtype, plan.shape)]
    q = plan.target
    *rows, width = plan.shape
    groups = (*rows, width // q.group_size)
    packed = [(WEIGHT, "uint32", (*rows, width * q.bits // 32))]
    if q.mode == "affine":
        return [*packed, (SCALES, dtype, groups), (BIASES, dtype, groups)]
    return [*packed, (SCALES, "uint8", groups)]


def is_weight_leaf(name: str, paths: set[str]) -> bool:
    """Whether a parameter belongs to the (quantized) weight of one of the layers at `paths`."""
    path, leaf = tensor_names.split(name)
    return path in paths and leaf in (*QUANTIZED_LEAVES, "global_scale")
