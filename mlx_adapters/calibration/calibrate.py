"""Calibrated rounding of a whole model, block by block, each result put on the disk at once."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mlx_adapters.assembly.plan import LayerPlan
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.assembly.writing import dtype_name
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector
from mlx_adapters.calibration.moments import ExpertMoments, Moments, mix
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import TokenBatch
from mlx_adapters.errors import FormatError
from mlx_adapters.events import Note, OnEvent, Progress
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.rounding.engines import NUMPY, Engine, MlxEngine
from mlx_adapters.rounding.feedback import DAMPING, OUTPUT_DAMPING
from mlx_adapters.rounding.packed import Packed
from mlx_adapters.rounding.workers import Done, Task, Workers, worker_count
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu

EXPERT_BYTES = 1 << 31  # of the experts that are rounded together, and of their moments


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

    On a CPU workers round the layers whose moments are there while those of the next ones are collected. Returns the
    paths of layers of which calibration tells nothing: they are not rounded.
    """
    wanted = {plan.path: plan.rounded_to for plan in plans if plan.rounded_to is not None}
    if not wanted:
        return []
    forward, backward = BlockwiseModel(base, updates), BlockwiseModel(base, updates)
    targets = {path: list(dict.fromkeys([target, *also])) for path, target in wanted.items()}
    shapes = {path: weight_shape(backward.source.layers[path]) for path in wanted}
    total = sum(map(len, targets.values()))
    under_way: deque[tuple[str, list[Future[Done]]]] = deque()
    engine: Engine = MlxEngine() if on_gpu() else NUMPY

    def collect(most: int) -> None:
        """Take finished layers off the queue, waiting until at most so many are left."""
        while under_way and (len(under_way) > most or all(part.done() for part in under_way[0][1])):
            path, parts = under_way.popleft()
            spool.put(path, _joined([part.result() for part in parts], len(shapes[path])))
            on_event(Progress("calibrate: round", len(spool.losses), total, "layer"))

    with Workers(0 if on_gpu() else worker_count(shapes.values()), engine=engine) as workers:
        for _, moments in Collector(forward, backward, set(wanted), batches, spool.folder).run(on_event, seed):
            while moments:
                path = next(iter(moments))
                layer = _Layer(path, backward, moments.pop(path), dtype_name(dtype))
                parts: dict[Quantization, list[Future[Done]]] = {target: [] for target in targets[path]}
                for a, b in layer.pieces(engine):
                    for task in layer.tasks(a, b, wanted[path] if thorough else None, targets[path], engine):
                        parts[task.quantization].append(workers.submit(task))
                under_way += [(path, futures) for futures in parts.values()]
                collect(most=2 * workers.count)
        collect(most=0)
    if isinstance(engine, MlxEngine) and engine.note:
        on_event(Note(f"{engine.note[0].upper()}{engine.note[1:]}.", "warning"))
    known = {path for path, _ in spool.losses}
    return [path for path in wanted if path not in known]


class _Layer:
    """One layer to be rounded in a prepared block, with what calibration saw of it.

    Errors are about tr(G E H Eᵀ) with the unscaled moments of what the predictions feel: proportional to the KL that
    the layer alone would cost.
    """

    def __init__(self, path: str, model: BlockwiseModel, seen: Moments | ExpertMoments, dtype: str) -> None:
        self.path, self.model, self.seen, self.dtype = path, model, seen, dtype
        self.weight, self.start = model.weight(path), model.source.packed(path)

    def pieces(self, engine: Engine) -> list[tuple[int, int]]:
        """Ranges of experts that are rounded together, and of which moments are in memory at once."""
        if isinstance(self.seen, Moments):
            return [(0, 1)]
        experts, out, width = self.weight.shape
        each = 4 * (8 * width * width + 12 * width * out)
        step = max(1, EXPERT_BYTES // each)
        return [(a, min(a + step, experts)) for a in range(0, experts, step)]

    def tasks(
        self, a: int, b: int, together: Quantization | None, targets: Sequence[Quantization], engine: Engine
    ) -> Iterator[Task]:
        """The rounding to `targets` of the matrix, or of the experts a…b by their own moments.

        To `together` (see `calibrated`) the rows of a matrix are rounded so; experts and all else row by row.
        """
        if isinstance(self.seen, ExpertMoments):
            yield from self._experts(a, b, targets, engine)
            return
        moments, weight = self.seen, self.weight
        _refuse_not_finite(moments)
        assert moments.plain is not None and moments.fisher is not None
        hessian, outputs = _for(engine, mix(moments.plain, moments.fisher)), _for(engine, moments.outputs)
        # Few tokens know little of how outputs are felt together.
        damping = OUTPUT_DAMPING + weight.shape[0] / max(moments.output_tokens, 1)
        unit = weight.size * _mean_diagonal(moments.fisher).item()
        doubt, update = DAMPING + weight.shape[1] / max(int(moments.tokens), 1), self.model.change(self.path, 0, None)
        for target in targets:
            yield Task(
                weight,
                hessian,
                target,
                self.dtype,
                self.start,
                unit,
                outputs,
                target == together,
                damping,
                update,
                doubt,
            )

    def _experts(self, a: int, b: int, targets: Sequence[Quantization], engine: Engine) -> Iterator[Task]:
        assert isinstance(self.seen, ExpertMoments)
        moments = self.seen.of(a, b)
        _refuse_not_finite(moments)
        assert moments.plain is not None and moments.fisher is not None
        hessian = mix(moments.plain, moments.fisher)
        units = self.weight[0].size * _mean_diagonal(moments.fisher)  # (experts,)
        doubts = DAMPING + self.weight.shape[-1] / mx.maximum(mx.array(moments.tokens), 1)
        update, start = self.model.change(self.path, a, b), None if self.start is None else self.start[a:b]
        weight = self.weight[a:b]
        for target in targets:
            if engine is not NUMPY:
                yield Task(weight, hessian, target, self.dtype, start, units, update=update, doubt=doubts)
                continue
            for e in range(b - a):
                mine, first = (None if part is None else part[e] for part in (update, start))
                h, unit, doubt = as_numpy(hessian[e]), units[e].item(), doubts[e].item()
                yield Task(weight[e], h, target, self.dtype, first, unit, update=mine, doubt=doubt)


def _for(engine: Engine, matrix: mx.array | None) -> Any:
    return as_numpy(matrix) if engine is NUMPY and matrix is not None else matrix


def _joined(parts: Sequence[Done], ndim: int) -> Done:
    """The layer (`ndim` axes) that this matrix is, or these experts, with the sum of their errors."""
    first = parts[0].packed
    if len(parts) == 1 and first.weight.ndim == ndim:
        return parts[0]
    join = mx.stack if first.weight.ndim < ndim else mx.concatenate
    joined = {name: join([part.packed.tensors[name] for part in parts]) for name in first.tensors}
    loss, nearest = sum(part.loss for part in parts), all(part.nearest for part in parts)
    return Done(Packed.of(joined, first.quantization), loss, nearest)


def _mean_diagonal(fisher: mx.array) -> mx.array:
    return mx.diagonal(fisher, axis1=-2, axis2=-1).mean(axis=-1)


def _refuse_not_finite(moments: Moments) -> None:
    sums = [matrix.sum() for matrix in (moments.plain, moments.fisher) if matrix is not None]
    if not mx.isfinite(mx.stack(sums)).all():
        raise FormatError("The adapter model computes NaN or Inf on the calibration text.", "is the base whole?")
