"""What becomes of each layer: which update it gets, and at what precision it is written.

The plan is made from shapes alone; no weight is read for it.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.config.mapping import from_mapping, to_mapping
from mlx_adapters.config.quantization import Precision, Quantization, default_group_size
from mlx_adapters.errors import ConfigError
from mlx_adapters.models.dense import quantization_of, takes_modes, weight_shape
from mlx_adapters.storage import tensor_names
from mlx_adapters.storage.tensor_names import BIASES, QUANTIZED_LEAVES, SCALES, WEIGHT
from mlx_adapters.system.door import mixed_quant_predicate_builder, nn


@dataclass(frozen=True)
class LayerPlan:
    """One linear, expert or embedding layer. `source` and `target` are None where it is not quantized.

    `copied`: the tensors go over as they are. `note` says why a layer is not as asked.
    """

    path: str
    shape: tuple[int, ...]
    source: Quantization | None
    target: Quantization | None
    changed: bool
    copied: bool
    note: str | None = None

    @property
    def rounded_to(self) -> Quantization | None:
        """The precision to which it is rounded anew, if it is."""
        return None if self.copied else self.target

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


Mix = Callable[[str, nn.Module], bool | dict[str, Any]]


def plan_layers(source: BaseWeights, keys: set[str], precision: Precision, mix: Mix | None = None) -> list[LayerPlan]:
    """Decide what becomes of every layer; those at the paths `keys` change. `mix` gives each its own precision."""
    unquantized_base = all(quantization_of(layer) is None for layer in source.layers.values())
    plans = []
    for path, layer in source.layers.items():
        origin, note = quantization_of(layer), None
        asked = _of_mix(mix(path, layer)) if mix is not None else precision.quantization
        if asked is not None:
            target, note = _asked(source, path, layer, asked, origin, unquantized_base)
        else:
            target = origin if precision.bits == "keep" else None
        changed = path in keys
        copied = not changed and target == origin
        plans.append(LayerPlan(path, weight_shape(layer), origin, target, changed, copied, note))
    return plans


def mix_of(recipe: str, module: nn.Module, group_size: int) -> Mix:
    """What `mlx_lm.convert --quant-predicate` gives each layer. Raises ConfigError for a name it does not have,
    and for a model whose layers its recipes do not know."""
    try:
        return mixed_quant_predicate_builder(recipe, module, group_size)
    except ValueError as error:
        hint = "'mlx_lm.convert --help' names its recipes, such as mixed_4_6; --bits takes any model."
        raise ConfigError(f"mlx-lm's recipe '{recipe}' does not fit: {error}.", hint) from None


def _of_mix(answer: bool | dict[str, Any]) -> Quantization | None:
    return from_mapping(Quantization, answer, "mlx-lm's recipe") if isinstance(answer, dict) else None


def _asked(
    source: BaseWeights,
    path: str,
    layer: nn.Module,
    asked: Quantization,
    origin: Quantization | None,
    unquantized_base: bool,
) -> tuple[Quantization | None, str | None]:
    """The precision of one layer when a quantization is asked for, as `mlx_lm.convert` would choose it."""
    if origin is None and not takes_modes(layer):
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
        return None, f"its {width} inputs cannot be cut into groups of {asked.group_size}"
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
