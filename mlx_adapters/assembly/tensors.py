"""One fuse in progress: the base's tensors, the updates, the plan, and the tensors that come of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.assembly.left_out import hand_on, quantization_with
from mlx_adapters.assembly.plan import (
    LayerPlan,
    Precision,
    is_weight_leaf,
    packed_shapes,
    plan_layers,
    quantization_config,
)
from mlx_adapters.assembly.survival import Survival, SurvivalSum, require_finite, sample
from mlx_adapters.assembly.weights import BaseWeights, Updates, chunks
from mlx_adapters.assembly.writing import Unit, copy_companions, dtype_name, write_config, write_weights
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.events import OnEvent
from mlx_adapters.models.base import Base, quantization_in
from mlx_adapters.models.layers import check_fits, check_made_for
from mlx_adapters.models.loading import load_module
from mlx_adapters.rounding.packed import Packed, dequantize, to_nearest
from mlx_adapters.storage import tensor_names
from mlx_adapters.system.door import mx, nn

Rounded = Callable[[str, Precision], Packed | None]


def not_rounded(path: str, target: Precision) -> None:
    """The `Rounded` of an assembly whose layers are all rounded to nearest."""


@dataclass
class Assembly:
    """`dtype` None: every tensor keeps its type. `stored` gives the numbers that a file holds of unquantized float32
    rows, where its format rounds them itself."""

    base: Base
    opened: BaseWeights | None
    config: dict[str, Any]
    updates: Updates
    plans: list[LayerPlan]
    dtype: mx.Dtype | None
    survival: list[Survival] = field(default_factory=list)
    stored: Callable[[mx.array], mx.array] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> BaseWeights:
        """The base, lazily read; writing consumes it."""
        self.opened = self.opened or BaseWeights.of(load_module(self.base)[0])
        return self.opened

    def close(self) -> None:
        """Close the base's files until they are used again: each has one for each shard, and so has each variant."""
        self.opened = None
        self.__dict__.pop("_modules", None)

    @property
    def scale_dtype(self) -> mx.Dtype:
        """The type of scales and unquantized weights."""
        return self.dtype or self.source.dtype

    @property
    def default(self) -> Quantization | None:
        """The base's own precision, None if it is not quantized."""
        return quantization_in(self.config)

    def quantization(self, asked: Quantization | str) -> dict[str, Any] | None:
        """config.json's "quantization" for the plan."""
        return quantization_config(self.plans, asked if isinstance(asked, Quantization) else self.default)

    @cached_property
    def _layer_paths(self) -> set[str]:
        return {plan.path for plan in self.plans}

    def retarget(self, targets: dict[str, Precision]) -> None:
        """Change the precision of some layers."""
        self.plans = [
            replace(plan, target=targets[plan.path], copied=False) if plan.path in targets else plan
            for plan in self.plans
        ]

    @cached_property
    def parameters(self) -> int:
        """Numbers in the model, a packed weight counted as the numbers it stands for."""
        everything = tree_flatten(self.source.module.parameters())
        rest = sum(value.size for name, value in everything if not is_weight_leaf(name, self._layer_paths))
        return rest + sum(plan.parameters for plan in self.plans)

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

        def make() -> list[mx.array]:
            value = held.pop()
            made = [value.astype(dtype)]
            mx.eval(made)
            if dtype != value.dtype:  # what was Inf already is the base's own
                require_finite(name, mx.where(mx.isfinite(value), made[0], 0))
            if owner is not None and leaf in owner:
                owner[leaf] = mx.zeros((0,))
            return made

        return Unit([(name, dtype_name(dtype), tuple(value.shape))], make)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.source.module.named_modules())

    def _layer(self, plan: LayerPlan, rounded: Rounded) -> Unit:
        leaves = packed_shapes(plan, dtype_name(self.scale_dtype))
        layer = self.source.layers[plan.path]
        layout = [(tensor_names.join(plan.path, leaf), dtype, shape) for leaf, dtype, shape in leaves]

        def make() -> list[mx.array]:
            made = self._make_layer(plan, rounded(plan.path, plan.target))
            mx.eval(made)
            for leaf in (*tensor_names.QUANTIZED_LEAVES, "global_scale"):
                if leaf in layer:
                    layer[leaf] = mx.zeros((0,))
            return made

        return Unit(layout, make)

    def _make_layer(self, plan: LayerPlan, packed: Packed | None) -> list[mx.array]:
        """The layer's tensors, made a few rows at a time; rows are independent in every step."""
        total = SurvivalSum()
        pieces: list[list[mx.array]] = []
        for start, stop in chunks(plan.shape):
            base = self.source.rows(plan.path, start, stop)
            fused = self.source.update(plan.path, base, self.updates, start, stop)
            some = sample(stop - start)
            if plan.target is None:
                parts = [fused.astype(self.scale_dtype)]
                stored = parts[0][some].astype(mx.float32)
                stored = self.stored(stored) if self.stored and plan.changed else stored
            else:
                piece = packed[start:stop] if packed is not None else to_nearest(fused, plan.target, self.scale_dtype)
                parts, stored = list(piece.tensors.values()), dequantize(piece[some])
            base, wanted = base[some], fused[some]
            mx.eval(parts, *([base, wanted, stored] if plan.changed else []))
            require_finite(plan.path, fused.astype(self.scale_dtype), *parts)
            pieces.append(parts)
            if plan.changed:
                total.add(base, wanted, stored)
        if plan.changed:
            self.survival.append(total.result(plan.path))
        return [mx.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]

    def write(self, folder: Path, asked: Quantization | str, rounded: Rounded, on_event: OnEvent) -> int:
        """Write the model folder but for recipe and report; return the bytes of the tensors."""
        size = write_weights(folder, self.units(rounded), on_event)
        config = dict(self.base.config)
        if self.dtype is not None:
            config |= {key: dtype_name(self.dtype) for key in ("torch_dtype", "dtype") if key in config}
        others, notes = hand_on(self.base, folder)
        self.notes += notes
        write_config(folder, config, quantization_with(others, self.base.config, self.quantization(asked)))
        copy_companions(self.base, folder)
        return size


def open_assembly(
    base: Base,
    updates: Updates,
    asked: Quantization | str,
    dtype: str = "auto",
    any_base: bool = False,
) -> Assembly:
    """Load the base lazily, hold the adapters against it and plan every layer.

    Raises IncompatibleError when an adapter does not fit, ModelError when mlx-lm cannot load the base.
    """
    module, config = load_module(base)
    for adapter, _ in updates.adapters:
        check_fits(adapter, module, f"'{base.name}'")
        if not any_base:
            check_made_for(adapter, base.name, base.fingerprint)
    source = BaseWeights.of(module)
    missing = set(updates.replaced) - set(source.layers)
    require(not missing, f"The model has no layer {sorted(missing)}.")
    plans = plan_layers(source, updates.paths(), asked)
    return Assembly(base, source, config, updates, plans, None if dtype == "auto" else getattr(mx, dtype))
