"""Calibrated rounding of a whole model, block by block, each result put on the disk at once."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mlx_adapters.assembly.plan import LayerPlan
from mlx_adapters.assembly.spool import Spool
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.assembly.writing import dtype_name
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector
from mlx_adapters.calibration.moments import EXPERTS_SHARE, ExpertMoments, Moments, doubted, mix
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import TokenBatch
from mlx_adapters.errors import FormatError
from mlx_adapters.events import Note, OnEvent, Progress
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.rounding.engines import NUMPY, Engine, MlxEngine
from mlx_adapters.rounding.feedback import DAMPING, OUTPUT_DAMPING, SWEEPS
from mlx_adapters.rounding.packed import Packed
from mlx_adapters.rounding.workers import Done, Task, Way, Workers, stacked, worker_count
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.system.door import mx
from mlx_adapters.system.limits import out_of_memory
from mlx_adapters.system.machine import on_gpu

EXPERT_BYTES = 1 << 30  # of the experts that are rounded together, and of their moments
TOGETHER_BYTES = 4 << 30  # of the layers that are
PUTTING = 2  # rounded layers that may wait for the disk
FEW_SWEEPS = 1  # to a precision that is only to choose from


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
    thorough: bool | None = None,
) -> list[str]:
    """Round every layer of `plans` that is to be quantized anew, to its target and to the precisions `also`.

    `thorough`: whether rows cancel each other's errors; None: at the target, but not at the others.

    What `spool` holds already stays. On a CPU workers round the layers whose moments are there while those of the next
    ones are collected. Returns the paths of layers of which calibration tells nothing: they are not rounded.
    """
    wanted = {plan.path: plan.rounded_to for plan in plans if plan.rounded_to is not None}
    every = {path: dict.fromkeys([target, *also]) for path, target in wanted.items()}
    left = {path: [q for q in targets if (path, q) not in spool.losses] for path, targets in every.items()}
    targets = {path: some for path, some in left.items() if some}
    if not targets:
        return []
    forward, backward = BlockwiseModel(base, updates), BlockwiseModel(base, updates)
    shapes = {path: weight_shape(backward.source.layers[path]) for path in targets}
    total = sum(map(len, every.values()))
    under_way: deque[tuple[str, list[Future[list[Done]]]]] = deque()
    engine: Engine = MlxEngine() if on_gpu() else NUMPY

    count = 0 if on_gpu() else worker_count(shapes.values())
    with Workers(count, engine=engine) as workers, ThreadPoolExecutor(1) as beside:
        putting: deque[Future[None]] = deque()
        rounded = itertools.count(len(spool.losses) + 1)

        def collect(most: int) -> None:
            """Take finished layers off the queue, waiting until at most so many are left."""
            while under_way and (len(under_way) > most or all(part.done() for part in under_way[0][1])):
                path, parts = under_way.popleft()
                for dones in zip(*(part.result() for part in parts), strict=True):
                    done = _joined(dones, len(shapes[path]))
                    mx.eval(done.packed.tensors)  # (the other thread cannot)
                    putting.append(beside.submit(spool.put, path, done))
                    on_event(Progress("calibrate: round", next(rounded), total, "layer"))
                while putting and (len(putting) > PUTTING or putting[0].done()):
                    putting.popleft().result()

        trying = beside.submit(_try_kernels, engine, set(itertools.chain(*targets.values())), dtype)
        for _, moments in Collector(forward, backward, set(targets), batches, spool.folder).run(on_event, seed):
            trying.result()
            while moments:
                # The largest moments are soon gone; workers keep what takes longest for while the next are collected.
                path = (min if workers.count else max)(moments, key=lambda each: shapes[each][-1])
                paths = [path] if engine is NUMPY else _alike(path, moments, backward, wanted, targets)
                layers = [_Layer(each, backward, moments.pop(each), dtype_name(dtype)) for each in paths]
                ways = _ways(wanted[path], thorough, targets[path])
                if len(layers) == 1:
                    under_way.append((path, layers[0].submit(workers, ways, engine)))
                else:
                    under_way += _together(layers, ways, engine)
                del layers  # and with them the block's weights
                collect(most=2 * workers.count)
        collect(most=0)
        for put in putting:
            put.result()
    if isinstance(engine, MlxEngine) and engine.note:
        on_event(Note(f"{engine.note[0].upper()}{engine.note[1:]}.", "warning"))
    known = {path for path, _ in spool.losses}
    return [path for path in wanted if path not in known]


def _try_kernels(engine: Engine, quantizations: Iterable[Quantization], dtype: mx.Dtype) -> None:
    if isinstance(engine, MlxEngine):
        engine.try_kernels(quantizations, dtype)


def _alike(
    path: str,
    moments: dict[str, Moments | ExpertMoments],
    model: BlockwiseModel,
    wanted: dict[str, Quantization],
    targets: dict[str, list[Quantization]],
) -> list[str]:
    """`path` and the other layers of its block that can be rounded with it in one batch, as many as memory allows: a
    GPU is soon done with one."""

    def kind(other: str) -> tuple[Any, ...]:
        seen, start = moments[other], model.source.packed(other)
        outputs = seen.outputs is not None if isinstance(seen, Moments) else other
        changed = model.change(other, 0, 1) is not None
        return model.weight(other).shape, outputs, changed, start and start.quantization, wanted[other], targets[other]

    out, width = model.weight(path).shape[-2:]
    most = TOGETHER_BYTES // (4 * (8 * width * width + 12 * width * out + 4 * out * out))
    return [other for other in moments if kind(other) == kind(path)][: max(1, most)]


def _ways(main: Quantization, thorough: bool | None, targets: Iterable[Quantization]) -> tuple[Way, ...]:
    """How to round to `main`, and to the other `targets`, to choose from.

    Unless all is to be `thorough`, these get few sweeps, row by row: three of them take less than `main` alone, with
    errors 5 % above what all sweeps leave, and a quarter above what rows leave that cancel each other's errors.
    """
    return tuple(
        Way(q, q == main if thorough is None else thorough, SWEEPS if q == main else FEW_SWEEPS) for q in targets
    )


def _together(
    layers: Sequence["_Layer"], ways: tuple[Way, ...], engine: Engine
) -> Iterator[tuple[str, list[Future[list[Done]]]]]:
    """Round layers that are alike; one by one where the GPU's memory is too small for all."""
    together = stacked([task for layer in layers for task in layer.tasks(0, 1, ways, engine)])
    mx.eval(together.arrays, together.hessian, together.outputs)  # and their parts are gone
    done: Sequence[list[Done]] | None = None
    try:
        done = together.run_each(engine)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    if done is None:  # after the block: the error holds what took the memory
        mx.clear_cache()
        done = [together[i].run(engine) for i in range(len(layers))]
    for layer, each in zip(layers, done, strict=True):
        future: Future[list[Done]] = Future()
        future.set_result(each)
        yield layer.path, [future]


class _Layer:
    """One layer to be rounded in a prepared block, with what calibration saw of it.

    Errors are about tr(G E H Eᵀ) with the unscaled moments of what the predictions feel: proportional to the KL that
    the layer alone would cost.
    """

    def __init__(self, path: str, model: BlockwiseModel, seen: Moments | ExpertMoments, dtype: str) -> None:
        self.path, self.model, self.seen, self.dtype = path, model, seen, dtype
        self.weight, self.start = model.weight(path), model.source.packed(path)

    def submit(self, workers: Workers, ways: tuple[Way, ...], engine: Engine) -> list[Future[list[Done]]]:
        """Start the rounding, of fewer experts at a time where the GPU's memory is too small for more."""
        begun: list[Future[list[Done]]] = []
        pieces = self._pieces()
        while pieces:
            a, b = pieces.pop(0)
            try:
                begun += [workers.submit(task) for task in self.tasks(a, b, ways, engine)]
            except RuntimeError as error:
                if not out_of_memory(error) or b - a < 2:
                    raise
                mx.clear_cache()
                middle = (a + b) // 2
                pieces[:0] = [(a, middle), (middle, b)]
        return begun

    def _pieces(self) -> list[tuple[int, int]]:
        """Ranges of experts that are rounded together, and of which moments are in memory at once."""
        if isinstance(self.seen, Moments):
            return [(0, 1)]
        experts, out, width = self.weight.shape
        each = 4 * (8 * width * width + 12 * width * out)
        step = max(1, EXPERT_BYTES // each)
        return [(a, min(a + step, experts)) for a in range(0, experts, step)]

    def tasks(self, a: int, b: int, ways: tuple[Way, ...], engine: Engine) -> Iterator[Task]:
        """The rounding of the matrix, or of the experts a…b, row by row, by their own moments."""
        if isinstance(self.seen, ExpertMoments):
            ways = tuple(way._replace(together=False) for way in ways)
            yield from self._experts(a, b, ways, engine)
            return
        moments, weight = self.seen, self.weight
        _refuse_not_finite(moments)
        tokens = max(int(moments.tokens), 1)
        hessian = _for(engine, doubted(mix(moments.plain, moments.fisher), tokens))
        outputs = _for(engine, moments.outputs)
        # Few tokens know little of how outputs are felt together.
        damping = OUTPUT_DAMPING + weight.shape[0] / tokens
        felt = _mean_diagonal(moments.fisher) if moments.felt is None else moments.felt
        unit = weight.size * felt.item()
        if engine is not NUMPY:
            mx.eval(hessian)
        moments.plain = moments.fisher = moments.outputs = None  # they are large
        doubt, update = DAMPING + weight.shape[1] / tokens, self.model.change(self.path, 0, None)
        yield Task(weight, hessian, ways, self.dtype, self.start, unit, outputs, damping, update, doubt)

    def _experts(self, a: int, b: int, ways: tuple[Way, ...], engine: Engine) -> Iterator[Task]:
        assert isinstance(self.seen, ExpertMoments)
        moments = self.seen.of(a, b)
        _refuse_not_finite(moments)
        assert moments.plain is not None and moments.fisher is not None
        hessian = mix(moments.plain, moments.fisher, EXPERTS_SHARE)
        units = self.weight[0].size * _mean_diagonal(moments.fisher)  # (experts,)
        doubts = DAMPING + self.weight.shape[-1] / mx.maximum(mx.array(moments.tokens), 1)
        update, start = self.model.change(self.path, a, b), None if self.start is None else self.start[a:b]
        weight = self.weight[a:b]
        mx.eval(hessian, units, doubts)
        moments.plain = moments.fisher = None  # they are large
        if engine is not NUMPY:
            yield Task(weight, hessian, ways, self.dtype, start, units, update=update, doubt=doubts)
            return
        for e in range(b - a):
            mine, first = (None if part is None else part[e] for part in (update, start))
            h, unit, doubt = as_numpy(hessian[e]), units[e].item(), doubts[e].item()
            yield Task(weight[e], h, ways, self.dtype, first, unit, update=mine, doubt=doubt)


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
    assert moments.plain is not None and moments.fisher is not None
    plain, fisher = mx.isfinite(mx.stack([moments.plain.sum(), moments.fisher.sum()])).tolist()
    if plain and not fisher:
        raise FormatError(
            "The adapter model's gradient is NaN or Inf on the calibration text.",
            "--method nearest needs none; is the adapter's update far too large?",
        )
    if not plain:
        raise FormatError(
            "The adapter model computes NaN or Inf on the calibration text.",
            "is the base whole, and the adapter's update not far too large?",
        )
