"""A walk from one adapter to another, with the loss at each step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_adapters.config.mapping import require
from mlx_adapters.events import OnEvent, log_warnings
from mlx_adapters.merging.recipes import interpolate
from mlx_adapters.models.adapter import Adapter, AdapterLike
from mlx_adapters.sources import lookup, registry
from mlx_adapters.storage import replacing


@dataclass(frozen=True)
class Point:
    """(1 - t) · first + t · second, and its loss in nats per judged token where data was given."""

    t: float
    adapter: Adapter
    loss: float | None = None


def sweep(
    first: AdapterLike,
    second: AdapterLike,
    *,
    steps: int = 5,
    data: str | Path | None = None,
    base: str | None = None,
    any_base: bool = False,
    on_event: OnEvent = log_warnings,
) -> list[Point]:
    """The interpolated adapters, with losses on `data` if given."""
    points = [Point(t, adapter) for t, adapter in interpolate(first, second, steps=steps, any_base=any_base)]
    if data is None:
        return points
    from mlx_adapters.evaluation.tokens import losses_on  # imports mlx-lm

    losses = losses_on(data, [point.adapter for point in points], base, any_base, on_event)
    return [replace(point, loss=loss) for point, loss in zip(points, losses, strict=True)]


def keep(
    points: Sequence[Point],
    name: str,
    *,
    best: bool = False,
    overwrite: bool = False,
    reads: Sequence[AdapterLike] = (),
) -> dict[float, str]:
    """Register every point as `name`-t, or the one of the lowest loss as `name`; t -> name. `reads`, the two ends, are
    not replaced: ExistsError."""
    if best:
        known = [point for point in points if point.loss is not None]
        require(bool(known), "Without losses there is no best point.", "give data.")
        chosen = {min(known, key=lambda point: point.loss or 0.0).t: name}
    else:
        chosen = {point.t: f"{name}-{point.t:.4g}" for point in points}
    ends = [lookup.load_adapter(end) for end in reads]
    for new in chosen.values():
        replacing.refuse_reading_inside(registry.adapter_folder(new), ends)
    for point in points:
        if point.t in chosen:
            registry.register(point.adapter, chosen[point.t], overwrite=overwrite)
    return chosen
