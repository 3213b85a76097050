"""Calibrated rounding of a whole model, block by block, each result put on the disk at once."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from mlx_adapters.assembly.plan import LayerPlan
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.assembly.writing import dtype_name
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector
from mlx_adapters.calibration.moments import Moments, mix
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import TokenBatch
from mlx_adapters.errors import FormatError
from mlx_adapters.events import OnEvent, Progress
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.rounding.feedback import DAMPING, OUTPUT_DAMPING
from mlx_adapters.rounding.packed import Packed
from mlx_adapters.rounding.workers import Done, Task, Workers, worker_count
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.system.door import mx


class Spool:
    """Rounded layers on the disk, by path and precision, until the shards are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: dict[tuple[str, Quantization], float] = {}
        self.nearest: set[tuple[str, Quantization]] = set()  # where that was better than calibration
        self._files: dict[tuple[str, Quantization], Path] = {}

    def put(self, path: str, done: Done) -> None:
        """Keep one rounded layer."""
        key = (path, done.packed.quantization)
        self.losses[key] = done.loss
        if done.nearest:
            self.nearest.add(key)
        self._files[key] = self.folder / f"{len(self._files):06d}.safetensors"
        tensor_files.write_safetensors(self._files[key], done.packed.tensors)

    def get(self, path: str, quantization: Quantization | None) -> Packed | None:
        """The layer rounded to that precision, or None."""
        file = self._files.get((path, quantization)) if quantization is not None else None
        if file is None or quantization is None:
            return None
        return Packed.of(tensor_files.read_safetensors(file), quantization)

    def remove(self) -> None:
        """Delete and forget everything."""
        self._files = {}
        if self.folder.is_dir():
            files.remove(self.folder)


def round_layers(
    base: Base,
    updates: Updates,
    plans: Sequence[LayerPlan],
    batches: Sequence[TokenBatch],
    dtype: mx.Dtype,
    spool: Spool,
    on_event: OnEvent,
    also: Iterable[Quantization] = (),
    seed: int = 0,
    thorough: bool = True,
) -> list[str]:
    """Round every layer of `plans` that is to be quantized anew, to its target and to the precisions `also`.

    Workers round the layers whose moments are there while those of the next ones are collected. Returns the paths of
    layers of which calibration tells nothing: they are not rounded.
    """
    wanted = {plan.path: plan.rounded_to for plan in plans if plan.rounded_to is not None}
    if not wanted:
        return []
    forward, backward = BlockwiseModel(base, updates), BlockwiseModel(base, updates)
    targets = {path: list(dict.fromkeys([target, *also])) for path, target in wanted.items()}
    shapes = {path: weight_shape(backward.source.layers[path]) for path in wanted}
    total = sum(map(len, targets.values()))
    under_way: deque[tuple[str, list[Future[Done]]]] = deque()

    def collect(most: int) -> None:
        """Take finished layers off the queue, waiting until at most so many are left."""
        while under_way and (len(under_way) > most or all(part.done() for part in under_way[0][1])):
            path, parts = under_way.popleft()
            spool.put(path, _stacked([part.result() for part in parts], len(shapes[path])))
            on_event(Progress("calibrate: round", len(spool.losses), total, "layer"))

    with Workers(worker_count(shapes.values())) as workers:
        for _, moments in Collector(forward, backward, set(wanted), batches, spool.folder).run(on_event, seed):
            for path, layer_moments in moments.items():
                _refuse_not_finite(layer_moments)
                start = backward.source.packed(path)
                update = backward.change(path)
                for target in targets[path]:
                    together = thorough and target == wanted[path]
                    tasks = tasks_for(backward.weight(path), layer_moments, target, dtype, start, together, update)
                    under_way.append((path, [workers.submit(task) for task in tasks]))
                    collect(most=2 * workers.count)
        collect(most=0)
    known = {path for path, _ in spool.losses}
    return [path for path in wanted if path not in known]


def tasks_for(
    weight: mx.array,
    moments: Moments,
    target: Quantization,
    dtype: mx.Dtype,
    start: Packed | None,
    together: bool,
    update: mx.array | None,
) -> Iterator[Task]:
    """The rounding of one layer: one task for a matrix, one for each expert by its own moments.

    Their errors are about tr(G E H Eᵀ) with the unscaled moments of what the predictions feel: proportional to the
    KL that the layer alone would cost. `together`: see `calibrated`.
    """
    name = dtype_name(dtype)
    plain, fisher = as_numpy(moments.plain), as_numpy(moments.fisher)
    if weight.ndim == 2:
        outputs = None if moments.outputs is None else as_numpy(moments.outputs)
        # Few tokens know little of how outputs are felt together.
        damping = OUTPUT_DAMPING + weight.shape[0] / max(moments.output_tokens, 1)
        unit = weight.size * _mean_diagonal(fisher)
        doubt = DAMPING + weight.shape[1] / max(int(moments.tokens), 1)
        yield Task(weight, mix(plain, fisher), target, name, start, unit, outputs, together, damping, update, doubt)
        return
    seen = np.asarray(moments.tokens)
    for e in range(weight.shape[0]):
        unit = weight[e].size * _mean_diagonal(fisher[e])
        mine, first = (None if part is None else part[e] for part in (update, start))
        doubt = DAMPING + weight.shape[2] / max(int(seen[e]), 1)
        yield Task(weight[e], mix(plain[e], fisher[e]), target, name, first, unit, update=mine, doubt=doubt)


def _stacked(parts: Sequence[Done], ndim: int) -> Done:
    """The layer (`ndim` axes) that these matrices are, with the sum of their errors."""
    if ndim == 2:
        return parts[0]
    first = parts[0].packed
    stacked = {name: mx.stack([part.packed.tensors[name] for part in parts]) for name in first.tensors}
    loss, nearest = sum(part.loss for part in parts), all(part.nearest for part in parts)
    return Done(Packed.of(stacked, first.quantization), loss, nearest)


def _mean_diagonal(fisher: np.ndarray) -> float:
    return float(np.trace(fisher)) / len(fisher)


def _refuse_not_finite(moments: Moments) -> None:
    sums = [matrix.sum() for matrix in (moments.plain, moments.fisher) if matrix is not None]
    if not mx.isfinite(mx.stack(sums)).all():
        raise FormatError("The adapter model computes NaN or Inf on the calibration text.", "is the base whole?")
