"""What an adapter is, and how two of them differ.

Norms and cosines are those of the updates scale · B·A, from the factors: ⟨ΔX, ΔY⟩ = sₓsᵧ tr((AₓᵀAᵧ)(BᵧBₓᵀ)).
Of a DoRA adapter that is the low-rank part, and a note says so: what its magnitudes do, only its base tells.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.data.datasets import Data
from mlx_adapters.display.tables import Table, flat
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.adapter import Adapter, AdapterLike, place_of, weights_file
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.low_rank import LowRankUpdate, inner, update_of, update_shape
from mlx_adapters.models.metadata import FULL, curve_of, losses_of, read_version
from mlx_adapters.sources import lookup, registry
from mlx_adapters.sources.registry import Entry
from mlx_adapters.storage import paths, tensor_files
from mlx_adapters.storage.tensor_names import natural_order
from mlx_adapters.units import listed


@dataclass(frozen=True)
class Layer:
    """An adapted module: `shape` is (in, out), with the experts first where there are any; ‖ΔW‖ Frobenius."""

    key: str
    shape: tuple[int, ...]
    norm: float


@dataclass(frozen=True)
class SavedIteration:
    """A saved iteration with the losses measured there."""

    iteration: int
    train_loss: float | None
    validation_loss: float | None
    size_bytes: int
    in_use: bool


@dataclass(frozen=True, repr=False)
class Details(Table):
    """Everything `show` shows."""

    name: str
    folder: Path | None
    type: str
    rank: int
    scale: float
    parameters: int
    base: str | None
    layers: tuple[Layer, ...]
    checkpoints: tuple[SavedIteration, ...]
    files: dict[str, int]
    metadata: dict[str, Any] = field(repr=False)
    strength_note: str | None = None

    def records(self) -> list[dict[str, Any]]:
        """One for each layer."""
        return [flat(layer) for layer in self.layers]

    @property
    def reference(self) -> str:
        """How the adapter is spelled."""
        return self.name if self.folder is None else str(self.folder)


def describe(reference: AdapterLike) -> Details:
    """Read an adapter and what lies around it: layers, checkpoints, files, metadata.

    Args:
        reference: what `load_adapter` takes.

    Raises NotFoundError, FormatError or HubError.

    Example:
        >>> details = ma.describe("sql")
        >>> details.type, len(details.checkpoints)
        ('lora', 4)
    """
    if isinstance(reference, Adapter):
        place = reference.folder if place_of(reference) else None
        return _describe(reference, None if place is None else registry.read_entry(place))
    folder, iteration = lookup.locate(reference)

    def read() -> Details:
        entry = registry.read_entry(folder)
        if entry.type == FULL:
            return _describe_full(entry, weights_file(folder, iteration))
        return _describe(lookup.load_adapter(reference), entry)

    return read_version(folder, read)


def _describe_full(entry: Entry, weights: Path) -> Details:
    size = sum(array.size for array in tensor_files.read_safetensors(weights).values())
    saved, there = _checkpoints(entry), _files(entry.folder)
    return Details(entry.name, entry.folder, FULL, 0, 1.0, size, entry.base, (), saved, there, entry.metadata)


def _describe(adapter: Adapter, entry: Entry | None) -> Details:
    config = adapter.config
    layers = tuple(Layer(key, update_shape(a, b), update_of(adapter, key).norm()) for key, a, b, _ in adapter.layers())
    return Details(
        adapter.name,
        entry.folder if entry else None,
        config.type,
        config.rank,
        config.scale,
        adapter.parameters,
        adapter.base_name,
        layers,
        _checkpoints(entry) if entry else (),
        _files(entry.folder) if entry else {},
        adapter.metadata,
        adapter.strength_note,
    )


def _checkpoints(entry: Entry) -> tuple[SavedIteration, ...]:
    train, validation = map(dict, losses_of(entry.metadata))
    sizes = {i: _size(registry.checkpoint_path(entry, i)) for i in entry.iterations}
    return tuple(
        SavedIteration(i, train.get(i), validation.get(i), size, i == entry.iteration)
        for i, size in sizes.items()
        if size is not None
    )


def _files(folder: Path) -> dict[str, int]:
    there = [path for path in paths.visible(folder, "**/*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): _size(path) for path in there}
    return {name: size for name, size in sizes.items() if size is not None}


def _size(path: Path) -> int | None:
    """Bytes of a file, or None: it was pruned just now."""
    try:
        return path.stat().st_size
    except OSError:
        return None


@dataclass(frozen=True)
class LayerComparison:
    """‖ΔA‖ and ‖ΔB‖ of one module and the cosine between them; None where only one adapts it."""

    key: str
    norm_a: float | None
    norm_b: float | None
    cosine: float | None


@dataclass(frozen=True, repr=False)
class Comparison(Table):
    """Two adapters side by side. `settings` holds what differs, as (name, value of a, value of b)."""

    a: str
    b: str
    settings: tuple[tuple[str, Any, Any], ...]
    layers: tuple[LayerComparison, ...]
    norm_a: float
    norm_b: float
    cosine: float | None
    losses: tuple[float, float] | None = None

    def records(self) -> list[dict[str, Any]]:
        """One for each layer."""
        return [flat(layer) for layer in self.layers]


def compare(
    a: AdapterLike,
    b: AdapterLike,
    *,
    data: Data | None = None,
    base: BaseLike | None = None,
    on_event: OnEvent = log_warnings,
) -> Comparison:
    """Settings, data and losses that differ, and norm and cosine of the updates, layer by layer and over all.

    Args:
        a: an adapter.
        b: another of the same base.
        data: also take the loss of each on these rows.
        base: for that; None: the adapters' own.
        on_event: called with progress and notes.

    Raises NotFoundError, FormatError, IncompatibleError or HubError.

    Example:
        >>> both = ma.compare("sql@200", "sql@400")
        >>> both.norm_a > 0 and both.settings == ()
        True
    """
    first, second = lookup.load_adapter(a), lookup.load_adapter(b)
    if named := [repr(one.name) for one in (first, second) if one.config.type == "dora"]:
        of = listed(list(dict.fromkeys(named)))
        on_event(
            Note(f"Norms and cosines are of the low-rank part of {of}; DoRA's magnitudes are left aside.", "warning")
        )
    keys = sorted({*first.config.keys, *second.config.keys}, key=natural_order)
    rows, total = [], [0.0, 0.0, 0.0]
    for key in keys:
        x, y = (update_of(one, key) if key in one.config.keys else None for one in (first, second))
        product = _inner_if_same_shape(x, y)
        xx, yy = (inner(u, u) if u is not None else 0.0 for u in (x, y))
        norms = [None if u is None else math.sqrt(uu) for u, uu in ((x, xx), (y, yy))]
        rows.append(LayerComparison(key, norms[0], norms[1], _cosine(product, xx, yy)))
        total = [t + part for t, part in zip(total, (xx, yy, product or 0.0), strict=True)]
    cosine = _cosine(total[2], total[0], total[1])
    losses = None
    if data is not None:
        from mlx_adapters.evaluation.tokens import losses_on  # imports mlx-lm

        losses = losses_on(data, [first, second], base, on_event=on_event)
    return Comparison(
        first.name,
        second.name,
        tuple(_differences(first, second)),
        tuple(rows),
        math.sqrt(total[0]),
        math.sqrt(total[1]),
        cosine,
        (losses[0], losses[1]) if losses else None,
    )


def _inner_if_same_shape(x: LowRankUpdate | None, y: LowRankUpdate | None) -> float | None:
    if x is None or y is None or x.a.shape[:-1] != y.a.shape[:-1] or x.b.shape[-1] != y.b.shape[-1]:
        return None
    return inner(x, y)


def _cosine(product: float | None, xx: float, yy: float) -> float | None:
    return product / math.sqrt(xx * yy) if product is not None and xx > 0 and yy > 0 else None


def _differences(a: Adapter, b: Adapter) -> Iterator[tuple[str, Any, Any]]:
    x, y = _settings(a), _settings(b)
    for name in dict.fromkeys((*x, *y)):
        if x.get(name) != y.get(name):
            yield name, x.get(name), y.get(name)


def _settings(adapter: Adapter) -> dict[str, Any]:
    """Settings, base, data and losses as one flat mapping with dotted names; no curves, dates or checksums."""
    config = {key: value for key, value in to_mapping(adapter.config).items() if key != "keys"}
    skipped = {
        "name",
        "sha256",
        "train_losses",
        "validation_losses",
        "train_figures",
        "validation_figures",
        "checkpoints",
        "versions",
        "command",
        *config,
    }
    rest = {key: value for key, value in adapter.metadata.items() if key not in skipped}
    return dict(_flat(config | {"layers": len(adapter.config.keys)} | rest))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def figures_of(metadata: Mapping[str, Any], name: str) -> dict[str, list[tuple[int, float]]]:
    """A figure that is watched of preferences, such as "margin", by iteration; of training and validation, if known."""
    curves = {}
    for kind in ("train", "validation"):
        points = metadata.get(f"{kind}_figures")
        pairs = [p for p in points if isinstance(p, list | tuple) and len(p) == 2] if isinstance(points, list) else []
        if curve := curve_of([(i, figures.get(name)) for i, figures in pairs if isinstance(figures, Mapping)]):
            curves["training" if kind == "train" else kind] = curve
    return curves


def objective_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an adapter's record says of its objective, or {}."""
    training = metadata.get("training")
    objective = training.get("objective") if isinstance(training, Mapping) else None
    return objective if isinstance(objective, Mapping) else {}


def loss_unit(metadata: Mapping[str, Any]) -> str:
    """What a recorded loss counts in: nats, or the objective's own."""
    name = objective_of(metadata).get("name", "sft")
    return "nats per token" if name == "sft" else f"of {name}"
