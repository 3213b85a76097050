"""Fuse adapters into a base model: the update becomes part of the weights, in a folder that mlx-lm loads.

The new weight is computed from the base's exactly dequantized one in float32 and rounded once. At the base's
own precision every layer that no adapter touches keeps its bits; at any other precision each layer is
quantized from the best weights there are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters import files, tensor_names
from mlx_adapters.adapter import Adapter
from mlx_adapters.config import DTYPES, Quantization, require
from mlx_adapters.door import mx, nn
from mlx_adapters.errors import ConfigError
from mlx_adapters.events import Note, OnEvent, ignore
from mlx_adapters.fusion.plan import (
    LayerPlan,
    Source,
    Updates,
    chunks,
    is_weight_leaf,
    packed_shapes,
    plan_layers,
    quantization_config,
)
from mlx_adapters.fusion.rounding import Packed, dequantize, nearest
from mlx_adapters.fusion.stream import Unit, copy_companions, dtype_name, write_config, write_weights
from mlx_adapters.fusion.survival import Survival, SurvivalSum
from mlx_adapters.layers import check_fits, check_made_for
from mlx_adapters.model import Base, load_module, resolve_base
from mlx_adapters.registry import load_adapter

RECIPE_FILE, REPORT_FILE = "fuse_recipe.json", "fuse_report.json"


@dataclass(frozen=True)
class FuseResult:
    """A fused model. `bits_per_weight` counts all tensors; `notes` say where a layer is not as asked."""

    folder: Path
    quantization: dict[str, Any] | None
    size_bytes: int
    bits_per_weight: float
    survival: tuple[Survival, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def update_survival(self) -> float:
        """The mean over the changed layers of the cosine between the update wanted and the one stored."""
        return sum(s.cosine for s in self.survival) / max(len(self.survival), 1)

    def __repr__(self) -> str:
        return (
            f"FuseResult('{self.folder}', {self.bits_per_weight:.2f} bits per weight, "
            f"{self.size_bytes / 1e6:.0f} MB, update survival {self.update_survival:.4f})"
        )


Rounding = Callable[[str], Packed | None]


@dataclass
class Job:
    """One fuse in progress: what is read, what is added, what comes out."""

    base: Base
    source: Source
    config: dict[str, Any]
    updates: Updates
    plans: list[LayerPlan]
    dtype: mx.Dtype | None  # None: every tensor keeps its type
    survival: list[Survival] = field(default_factory=list)
    parameters: int = 0

    def __post_init__(self) -> None:
        """Count the model's numbers, a packed weight as the numbers it stands for."""
        paths = {plan.path for plan in self.plans}
        everything = tree_flatten(self.source.module.parameters())
        rest = sum(value.size for name, value in everything if not is_weight_leaf(name, paths))
        self.parameters = rest + sum(plan.parameters for plan in self.plans)

    @property
    def weight_dtype(self) -> str:
        return dtype_name(self.dtype or self.source.dtype)

    def units(self, rounded: Rounding) -> list[Unit]:
        """All tensors to be written, layer by layer, in the model's order."""
        paths = {plan.path: plan for plan in self.plans if not plan.copied}
        units: dict[str, Unit] = {}
        for name, value in tree_flatten(self.source.module.parameters()):
            path, _ = tensor_names.split(name)
            if not is_weight_leaf(name, set(paths)):
                units[name] = self._copy(name, value)
            elif path not in units:
                units[path] = self._layer(paths[path], rounded)
        return [units[name] for name in sorted(units, key=tensor_names.natural_order)]

    def _copy(self, name: str, value: mx.array) -> Unit:
        keep = getattr(self.source.module, "cast_predicate", lambda _: True)
        floating = mx.issubdtype(value.dtype, mx.floating)
        dtype = self.dtype if self.dtype is not None and floating and keep(name) else value.dtype
        drop = self._dropper(name)
        held = [value]

        def make() -> list[mx.array]:
            made = [held.pop().astype(dtype)]
            mx.eval(made)
            drop()
            return made

        return Unit([(name, dtype_name(dtype), tuple(value.shape))], make)

    def _dropper(self, name: str) -> Callable[[], None]:
        """Frees the lazily read tensor `name` once it was used."""
        path, leaf = tensor_names.split(name)
        try:
            owner = self._modules[path]
        except KeyError:
            return lambda: None

        def drop() -> None:
            if leaf in owner:
                owner[leaf] = mx.zeros((0,))

        return drop

    @property
    def _modules(self) -> dict[str, nn.Module]:
        if not hasattr(self, "_by_path"):
            self._by_path = dict(self.source.module.named_modules())
        return self._by_path

    def _layer(self, plan: LayerPlan, rounded: Rounding) -> Unit:
        leaves = packed_shapes(plan, self.weight_dtype)
        layer = self.source.layers[plan.path]
        layout = [(tensor_names.join(plan.path, leaf), dtype, shape) for leaf, dtype, shape in leaves]

        def make() -> list[mx.array]:
            made = self._make_layer(plan, rounded(plan.path))
            mx.eval(made)
            for leaf in (*tensor_names.QUANTIZED_LEAVES, "global_scale"):
                if leaf in layer:
                    layer[leaf] = mx.zeros((0,))
            return made

        return Unit(layout, make)

    def _make_layer(self, plan: LayerPlan, packed: Packed | None) -> list[mx.array]:
        """The layer's tensors, made a few rows at a time; rows are independent in every step."""
        dtype = self.dtype or self.source.dtype
        total = SurvivalSum()
        pieces: list[list[mx.array]] = []
        for start, stop in chunks(plan.shape):
            fused = self.source.fused_rows(plan.path, self.updates, start, stop)
            if plan.target is None:
                parts = [fused.astype(dtype)]
                stored = parts[0].astype(mx.float32)
            elif packed is not None:
                parts = [part[start:stop] for part in packed.tensors.values()]
                stored = dequantize(_rows_of(packed, start, stop)) if plan.changed else fused
            else:
                piece = nearest(fused, plan.target, dtype)
                parts, stored = list(piece.tensors.values()), dequantize(piece) if plan.changed else fused
            mx.eval(parts)
            pieces.append(parts)
            if plan.changed:
                total.add(self.source.rows(plan.path, start, stop), fused, stored)
        if plan.changed:
            self.survival.append(total.result(plan.path))
        return [mx.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]


def _rows_of(packed: Packed, start: int, stop: int) -> Packed:
    biases = None if packed.biases is None else packed.biases[start:stop]
    return Packed(packed.weight[start:stop], packed.scales[start:stop], biases, packed.quantization)


def gather_updates(
    adapters: Adapter | str | Path | Sequence[Adapter | str | Path],
    weights: Sequence[float] | None,
    replaced: dict[str, mx.array] | None = None,
) -> Updates:
    """Read the adapters and pair them with their weights (default 1 each). Raises ConfigError."""
    several = [adapters] if isinstance(adapters, Adapter | str | Path) else list(adapters)
    loaded = [load_adapter(adapter).check() for adapter in several]
    shares = [1.0] * len(loaded) if weights is None else [float(w) for w in weights]
    require(len(shares) == len(loaded), f"{len(loaded)} adapters, but {len(shares)} weights.")
    require(all(abs(share) < float("inf") for share in shares), "weights must be finite numbers.")
    require(bool(loaded) or bool(replaced), "Nothing to fuse: no adapter was given.")
    return Updates(tuple(zip(loaded, shares, strict=True)), replaced or {})


def choose_base(base: str | Path | Base | None, updates: Updates) -> Base:
    """The base that was named, else the one the adapters were made for. Raises ConfigError."""
    if base is None:
        names = dict.fromkeys(a.base_name for a, _ in updates.adapters if a.base_name)
        if len(names) != 1:
            why = "they name different ones: " + ", ".join(names) if names else "the adapter does not name it"
            raise ConfigError(f"Which base model? {why[0].upper()}{why[1:]}.", "give it with --base.")
        base = next(iter(names))
    return resolve_base(base)


def open_job(
    base: Base,
    updates: Updates,
    precision: Quantization | str,
    dtype: str,
    any_base: bool,
    per_layer: dict[str, Quantization | None] | None = None,
) -> Job:
    """Load the base lazily, hold the adapters against it and plan every layer."""
    module, config = load_module(base)
    for adapter, _ in updates.adapters:
        check_fits(adapter, module, f"'{base.name}'")
        if not any_base:
            check_made_for(adapter, base.name, base.fingerprint)
    source = Source.of(module)
    missing = set(updates.replaced) - set(source.layers)
    require(not missing, f"The model has no layer {sorted(missing)}.")
    plans = plan_layers(source, updates.keys(), precision, per_layer)
    return Job(base, source, config, updates, plans, None if dtype == "auto" else getattr(mx, dtype))


def write_model(job: Job, folder: Path, precision: Quantization | str, rounded: Rounding, on_event: OnEvent) -> int:
    """Write the whole model folder but for recipe and report; return the bytes of the tensors."""
    default = precision if isinstance(precision, Quantization) else _default_of(job.config)
    size = write_weights(folder, job.units(rounded), on_event)
    config = {k: v for k, v in job.base.config.items()}
    if job.dtype is not None:
        config |= {key: dtype_name(job.dtype) for key in ("torch_dtype", "dtype") if key in config}
    write_config(folder, config, quantization_config(job.plans, default))
    copy_companions(job.base, folder)
    return size


def _default_of(config: dict[str, Any]) -> Quantization | None:
    found = config.get("quantization")
    if not isinstance(found, dict) or "bits" not in found:
        return None
    return Quantization(found["bits"], found["group_size"], found.get("mode", "affine"))


def fuse(
    base: str | Path | Base | None,
    adapters: Adapter | str | Path | Sequence[Adapter | str | Path],
    out: str | Path,
    *,
    quantization: Quantization | str = "keep",
    dtype: str = "auto",
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
    any_base: bool = False,
    replaced: dict[str, mx.array] | None = None,
    on_event: OnEvent = ignore,
) -> FuseResult:
    """Write base + adapters as a whole model folder `out` and return what was made.

    base: a name, folder or Hub id; None takes the one the adapter was made for. adapters: one, or several
    whose updates are added with `weights`. quantization: "keep" the base's precision, "none", or a
    `Quantization`. dtype: of everything that is not packed ("auto": the base's).

    Raises ConfigError, NotFoundError, FormatError, IncompatibleError, ExistsError, ModelError or StorageError;
    then `out` is as it was before.
    """
    started = time.perf_counter()
    require(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
    files.refuse_existing(Path(out), overwrite)
    updates = gather_updates(adapters, weights, replaced)
    found = choose_base(base, updates)
    job = open_job(found, updates, quantization, dtype, any_base)
    notes = _notes(job.plans, on_event)
    with files.atomic_folder(Path(out), overwrite) as folder:
        size = write_model(job, folder, quantization, lambda _: None, on_event)
    config = quantization_config(job.plans, quantization if isinstance(quantization, Quantization) else None)
    return FuseResult(
        Path(out),
        config,
        size,
        8 * size / job.parameters,
        tuple(job.survival),
        time.perf_counter() - started,
        notes,
    )


def _notes(plans: list[LayerPlan], on_event: OnEvent) -> tuple[str, ...]:
    notes = tuple(f"{plan.path}: {plan.note}" for plan in plans if plan.note)
    if notes:
        on_event(Note(f"{len(notes)} layers stay unquantized; {notes[0]}.", "warning"))
    return notes
