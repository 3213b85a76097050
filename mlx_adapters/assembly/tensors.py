"""One fuse in progress: the base's tensors, the updates, the plan, and the tensors that come of them."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mlx.utils import tree_flatten

from mlx_adapters.assembly.plan import (
    LayerPlan,
    is_weight_leaf,
    mix_of,
    packed_shapes,
    plan_layers,
    quantization_config,
)
from mlx_adapters.assembly.survival import (
    HELD,
    RowsTold,
    Survival,
    SurvivalSum,
    all_finite,
    ends_early,
    not_finite,
    require_representable,
    sample,
)
from mlx_adapters.assembly.weights import BaseWeights, Updates, chunks
from mlx_adapters.assembly.writing import Unit, Written, dtype_name
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import Precision, Quantization, default_group_size
from mlx_adapters.errors import FormatError
from mlx_adapters.events import OnEvent
from mlx_adapters.models.base import Base, quantization_in
from mlx_adapters.models.layers import check_fits, check_made_for
from mlx_adapters.models.loading import load_module
from mlx_adapters.rounding.packed import Packed, dequantize, to_nearest
from mlx_adapters.storage import tensor_names
from mlx_adapters.system.door import mx, nn

Rounded = Callable[[str, Quantization | None], Packed | None]
_Rows = tuple[list[mx.array], RowsTold]  # what the file holds of some rows, and what they tell


def not_rounded(path: str, target: Quantization | None) -> None:
    """The `Rounded` of an assembly whose layers are all rounded to nearest."""


@dataclass
class Assembly:
    """`dtype` None: every tensor keeps its type; `scales`: that of scales, if another. `stored` gives the numbers that
    the file holds of a layer's unquantized rows."""

    base: Base
    opened: BaseWeights | None
    config: dict[str, Any]
    updates: Updates
    precision: Precision
    plans: list[LayerPlan]
    dtype: mx.Dtype | None
    stored: Callable[[str, mx.array], mx.array]
    scales: mx.Dtype | None = None
    survival: list[Survival] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # layers that the numbers of their precision cannot hold
    parameters: int = field(init=False)  # numbers in the model, a packed weight counted as the numbers it stands for

    def __post_init__(self) -> None:
        everything = tree_flatten(self.source.module.parameters())
        rest = sum(value.size for name, value in everything if not is_weight_leaf(name, self._layer_paths))
        self.parameters = rest + sum(plan.parameters for plan in self.plans)  # now: writing consumes the base

    @property
    def source(self) -> BaseWeights:
        """The base, lazily read; writing consumes it."""
        self.opened = self.opened or BaseWeights.of(load_module(self.base, to_call=False)[0])
        return self.opened

    def close(self) -> None:
        """Close the base's files until they are used again: each has one for each shard, and so has each variant."""
        self.opened = None
        self.__dict__.pop("_modules", None)

    @property
    def weight_dtype(self) -> mx.Dtype:
        """The type of unquantized weights."""
        return self.dtype or self.source.dtype

    @property
    def scale_dtype(self) -> mx.Dtype:
        """The type of scales."""
        return self.scales or self.weight_dtype

    @property
    def quantization(self) -> dict[str, Any] | None:
        """config.json's "quantization" for the plan."""
        return quantization_config(self.plans, self.precision.quantization or quantization_in(self.config))

    @cached_property
    def _layer_paths(self) -> set[str]:
        return {plan.path for plan in self.plans}

    def retarget(self, targets: dict[str, Quantization | None]) -> None:
        """Change the precision of some layers."""
        self.plans = [
            replace(plan, target=targets[plan.path], copied=False) if plan.path in targets else plan
            for plan in self.plans
        ]

    def size_bytes(self) -> int:
        """Bytes of all tensors that the plan writes."""
        return sum(unit.size_bytes for unit in self.units(not_rounded))

    def units(self, rounded: Rounded) -> list[Unit]:
        """All tensors to be written, layer by layer, in the model's order."""
        made = {plan.path: plan for plan in self.plans if not plan.copied}
        paths, units = set(made), dict[str, Unit]()
        for name, value in tree_flatten(self.source.module.parameters()):
            path, _ = tensor_names.split(name)
            if not is_weight_leaf(name, paths):
                units[name] = self._copy(name, value)
            elif path not in units:
                units[path] = self._layer(made[path], rounded)
        return [units[name] for name in sorted(units, key=tensor_names.natural_order)]

    def _copy(self, name: str, value: mx.array) -> Unit:
        keep = getattr(self.source.module, "cast_predicate", lambda _: True)
        floating = mx.issubdtype(value.dtype, mx.floating)
        dtype = self.dtype if self.dtype is not None and floating and keep(name) else value.dtype
        path, leaf = tensor_names.split(name)
        owner, held = self._modules.get(path), [value]
        begun: list[tuple[mx.array, list[mx.array]]] = []

        def begin() -> None:
            value = held.pop()
            made = value.astype(dtype)
            wrong = [mx.isnan(made).any()] if floating else []
            if dtype != value.dtype:  # what was Inf already is the base's own
                wrong.append(~all_finite(mx.where(mx.isfinite(value), made, 0)))
            begun.append((made, wrong))
            mx.async_eval(*begun)

        def make() -> list[mx.array]:
            if not begun:
                begin()
            made, wrong = begun.pop()
            if wrong and wrong[0].item():
                raise FormatError(f"The base's '{name}' holds NaN.", "is the base whole?")
            if any(one.item() for one in wrong):
                raise not_finite(name, dtype)
            if owner is not None and leaf in owner:
                owner[leaf] = mx.zeros((0,))
            return [made]

        return Unit([(name, dtype_name(dtype), tuple(value.shape))], make, begin)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.source.module.named_modules())

    def _layer(self, plan: LayerPlan, rounded: Rounded) -> Unit:
        leaves = packed_shapes(plan, dtype_name(self.scale_dtype if plan.target else self.weight_dtype))
        layer = self.source.layers[plan.path]
        layout = [(tensor_names.join(plan.path, leaf), dtype, shape) for leaf, dtype, shape in leaves]
        begun: list[Iterator[_Rows]] = []

        def begin() -> None:
            begun.append(_one_ahead(self._rows(plan, rounded(plan.path, plan.target))))

        def make() -> list[mx.array]:
            if not begun:
                begin()
            made = self._make_layer(plan, begun.pop())
            mx.eval(made)
            for leaf in (*tensor_names.QUANTIZED_LEAVES, "global_scale"):
                if leaf in layer:
                    layer[leaf] = mx.zeros((0,))
            return made

        return Unit(layout, make, begin)

    def _rows(self, plan: LayerPlan, packed: Packed | None) -> Iterator[_Rows]:
        """The layer a few rows at a time, being computed; rows are independent in every step."""
        for start, stop in chunks(plan.shape):
            base = self.source.rows(plan.path, start, stop)
            fused = self.source.update(plan.path, base, self.updates, start, stop)
            some = sample(stop - start)
            if plan.target is None:
                parts = [fused.astype(self.weight_dtype)]
                stored = parts[0][some].astype(mx.float32)
                stored = self.stored(plan.path, stored) if plan.changed else stored
            else:
                piece = packed[start:stop] if packed is not None else to_nearest(fused, plan.target, self.scale_dtype)
                parts, stored = list(piece.tensors.values()), dequantize(piece[some])
            compared = [(base, fused, stored, some)] * plan.changed
            compared += [(mx.zeros_like(base), fused, stored, some)] * ends_early(plan.target)
            told = RowsTold(fused, parts, compared)
            mx.async_eval(parts, told.arrays)  # at once: each waits for a thread
            made = [(parts, told)]
            del base, fused, parts, stored, compared, told  # whoever takes them is the last to hold them
            yield made.pop()

    def _make_layer(self, plan: LayerPlan, rows: Iterator[_Rows]) -> list[mx.array]:
        """The layer's tensors."""
        total, whole = SurvivalSum(), SurvivalSum()
        pieces: list[list[mx.array]] = []
        for parts, told in rows:
            finite, least, most, sums = told.read()
            dtype = self.scale_dtype if plan.target else self.weight_dtype
            require_representable(plan.path, least, most, dtype)
            if plan.target is not None and not finite:
                raise not_finite(plan.path, dtype)
            pieces.append(parts)
            for each, some in zip([total] * plan.changed + [whole] * ends_early(plan.target), sums, strict=True):
                each.add_sums(some)
            del parts, told
        if plan.changed:
            self.survival.append(total.result(plan.path))
        if whole.result(plan.path).cosine < HELD:
            self.lost.append(plan.path)
        return [mx.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]


def _one_ahead(rows: Iterator[_Rows]) -> Iterator[_Rows]:
    """The same, of which the first is begun at once."""
    return itertools.chain([next(rows)], rows)


class Writer(Protocol):
    """One format, for one base and one precision. Making one raises ConfigError for what the format cannot hold.

    A writer says beforehand what it wants of the tensors, and takes them as they are planned then. `precision`: of the
    layers in the file.
    `loadable`: mlx-lm reads what is written, so that it can be checked.
    """

    precision: Precision
    loadable: bool

    def __init__(self, precision: Precision, dtype: mx.Dtype | None, base: Base) -> None: ...

    @property
    def rounds(self) -> bool:
        """Whether the format's own rounding makes some layers."""

    def dtype(self, source: BaseWeights) -> mx.Dtype | None:
        """The type of scales and of all that is not packed; None: each tensor keeps its own."""

    def scale_dtype(self) -> mx.Dtype | None:
        """The type of scales, where it is not that of the rest."""

    def settled(self, base: Base, source: BaseWeights, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The plan as the format can hold it. Raises ConfigError for a model that it cannot."""

    def stored(self, path: str, rows: mx.array) -> mx.array:
        """The numbers that the file holds of unquantized float32 `rows` of the changed layer at `path`."""

    def beside_bytes(self, assembly: Assembly) -> int:
        """Bytes on the disk that are not in the plan."""

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """Write the model into `folder`; `rounded` gives the layers that calibration has rounded."""


def open_assembly(
    base: Base, updates: Updates, writer: Writer, any_base: bool = False, recipe: str | None = None
) -> Assembly:
    """Load the base lazily, hold the adapters against it and plan every layer as the writer (or `recipe`, mlx-lm's name
    of one of mixed precision) wants it.

    Raises IncompatibleError when an adapter does not fit, ModelError when mlx-lm cannot load the base.
    """
    module, config = load_module(base, to_call=False)
    for adapter, _ in updates.adapters:
        check_fits(adapter, module, f"'{base.name}'")
        if not any_base:
            check_made_for(adapter, base.name, base.fingerprint)
    source = BaseWeights.of(module)
    missing = set(updates.replaced) - set(source.layers)
    require(not missing, f"The model has no layer {sorted(missing)}.")
    mix = None if recipe is None else mix_of(recipe, module, _group_size(base))
    plans = writer.settled(base, source, plan_layers(source, updates.paths(), writer.precision, mix))
    dtype, scales = writer.dtype(source), writer.scale_dtype()
    return Assembly(base, source, config, updates, writer.precision, plans, dtype, writer.stored, scales)


def _group_size(base: Base) -> int:
    """The base's own, if mode affine has it, else MLX's default."""
    own = base.quantization
    return own.group_size if own is not None and own.mode == "affine" else default_group_size("affine")
