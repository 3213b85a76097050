"""Trying a model on this device: what steps on a few of its blocks take, and whether its ways to compute agree."""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import Batch, make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import compute_dtype, is_quantized, weight_shape
from mlx_adapters.models.layers import add_adapter_layers, expected_shapes, named_layers
from mlx_adapters.models.loading import lay_experts_out, load_module, set_precision
from mlx_adapters.models.metadata import FULL, AdapterConfig
from mlx_adapters.models.quantized_check import miscomputed, replace_miscomputed
from mlx_adapters.optimization import log_probabilities
from mlx_adapters.optimization.distributed import World
from mlx_adapters.optimization.feed import Draw
from mlx_adapters.optimization.log_probabilities import EQUAL, Arrays, device_batch, plan_loss
from mlx_adapters.optimization.optimizers import Optimizer
from mlx_adapters.optimization.step import Again, MemoryPlan, OutOfMemoryError, TrainStep
from mlx_adapters.optimization.through_rounding import Rounding
from mlx_adapters.storage.tensor_names import block_index
from mlx_adapters.surgery.blocks import keep_blocks
from mlx_adapters.surgery.caches import same_function
from mlx_adapters.surgery.calls import call_as
from mlx_adapters.surgery.segments import begun_anew, segmented_caches
from mlx_adapters.system.door import make_prompt_cache, mx, nn
from mlx_adapters.system.limits import as_little_memory_as_will_do
from mlx_adapters.system.machine import on_gpu, usable_memory_bytes

AHEAD = 0.25  # of what a step needs: with it a GPU works ahead; without it waits, and takes up to twice as long
PROBED_TOKENS, MOST_TOKENS = 16, 64  # of what a model says; of a row that it is tried on


@dataclass(frozen=True)
class Rehearsal(World):
    """Several processes as far as this one's memory goes: a sum takes as much, and is what this one gave."""

    size: int = 2

    def sum(self, array: mx.array) -> mx.array:
        """A copy, evaluated beside what it is of."""
        total = array + 0
        mx.eval(total)
        return total


@dataclass(frozen=True)
class Prober:
    """A run whose steps are measured. `probe`: a few of its tokens; `vocabulary`: the number of logits; `processes`:
    how many sum their gradients."""

    base: Base
    adapter: AdapterConfig
    training: TrainConfig
    probe: Batch
    vocabulary: int
    rounding: Rounding | None = None
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    processes: int = 1

    def step_bytes(self, draw: Draw, blocks: int) -> tuple[float, float]:
        """(bytes that one step needs above what lies in memory all the time, for `blocks` adapted blocks; how many more
        a GPU takes that waits where AHEAD says).

        The first step holds less than those after it, and a GPU frees what it has done with at its own time, so there
        the least of three later ones counts; a CPU's first step tells enough. What there is no room for takes all that
        there is, or more.
        """
        steps = (1, 3) if on_gpu() else (0, 1)
        seen: list[tuple[int, float, int]] = []

        def need(count: int) -> int:
            seen.append(self._measure(draw, count, *steps))
            return seen[-1][0]

        try:
            with _leaving_nothing(), as_little_memory_as_will_do():
                return _through(self._counts(blocks), need, blocks), seen[-1][2]
        except OutOfMemoryError:
            return usable_memory_bytes(), 0

    def seconds(self, draw: Draw, blocks: int, warm_up: int = 3, timed: int = 3) -> float:
        """Median time of a step after `warm_up` steps, for `blocks` adapted blocks."""
        with _leaving_nothing():
            return _through(self._counts(blocks), lambda n: self._measure(draw, n, warm_up, timed)[1], blocks)

    def _counts(self, blocks: int) -> list[int]:
        for few, more in ((4, 8), (6, 12)):
            if blocks <= more:
                return [blocks]
            if self._runs_with(few):
                return [few, more]
        return [blocks]

    def _runs_with(self, blocks: int) -> bool:
        """Whether the model computes with so few blocks (some index into their list)."""
        try:
            mx.eval(self._cut_module(blocks)(mx.zeros((1, 2), mx.int32)))
        except (IndexError, ValueError, TypeError):
            return False
        return True

    def _cut_module(self, blocks: int) -> nn.Module:
        module, _ = load_module(self.base)
        keep_blocks(module, first_block(self.adapter, len(module.layers)), blocks)
        return module

    def _train_step(self, blocks: int) -> TrainStep:
        module = self._cut_module(blocks)
        first = first_block(self.adapter, 1 << 30)
        there = {}  # key in the cut module -> key in the whole one
        for key in self.adapter.keys:
            index = block_index(key)
            if index is None:
                there[key] = key
            elif first <= index < first + blocks:
                there[key.replace(f".{index}.", f".{index - first}.", 1)] = key
        keys, rounding = tuple(there), self.rounding
        if rounding is not None:  # of the adapted layers only: the others are rounded before the first step
            rounding = replace(rounding, targets={key: rounding.targets[there[key]] for key in keys})
        set_precision(module, self.training.dtype)
        if on_gpu():  # as it is loaded for training
            lay_experts_out(module)
            replace_miscomputed(module, compute_dtype(module), gradients=True, say=False)
        module.freeze()
        config = AdapterConfig(self.adapter.rank, self.adapter.scale, keys, self.adapter.type, self.adapter.dropout)
        add_adapter_layers(module, config)
        mx.eval(module.parameters())
        layers = dict(module.named_modules())
        plan = plan_loss(module, self.training, self.vocabulary, self.probe)
        return TrainStep(
            module,
            {key: layers[key] for key in keys},
            self.training,
            plan,
            Rehearsal() if self.processes > 1 else World(),
            rounding,
            self.memory,
        )

    def _measure(self, draw: Draw, blocks: int, warm_up: int, timed: int) -> tuple[int, float, int]:
        """(the least bytes at the peak above what lay there before, median seconds) of the steps after the warm-up, and
        how many bytes more steps take on a GPU that may be ahead."""
        train_step = self._train_step(blocks)
        mx.eval(train_step.weights, train_step.optimizer.arrays())
        gc.collect()
        mx.synchronize()  # a GPU's is given back a moment after the result is there
        mx.clear_cache()
        before, seconds, peaks = mx.get_active_memory(), [], []

        def steps(count: int) -> None:
            for _ in range(count):
                mx.reset_peak_memory()
                start = time.perf_counter()
                train_step.take(draw, 1e-12, rounding=self.training.fuse_aware is not None)
                seconds.append(time.perf_counter() - start)
                peaks.append(mx.get_peak_memory() - before)

        steps(warm_up + timed)
        needed, median = min(peaks[warm_up:]), statistics.median(seconds[warm_up:])
        if on_gpu():
            train_step.memory = replace(self.memory, near=int((1 + AHEAD) * (before + needed)))
            steps(2)
        return needed, median, max(min(peaks[-2:]) - needed, 0) if on_gpu() else 0


@contextlib.contextmanager
def _leaving_nothing() -> Iterator[None]:
    """Afterwards no model that was tried lies in memory: each is in a circle with the calls that it is computed by."""
    try:
        yield
    finally:
        gc.collect()
        mx.clear_cache()


def _through(counts: list[int], measure: Callable[[int], float], wanted: int) -> float:
    """The straight line through the measurements at `counts` blocks, at `wanted` blocks."""
    values = [measure(count) for count in counts]
    if len(values) == 1:
        return values[0]
    slope = max((values[1] - values[0]) / (counts[1] - counts[0]), 0)
    return values[1] + slope * (wanted - counts[1])


def first_block(adapter: AdapterConfig, blocks: int) -> int:
    """The first block that the backward pass reaches: 0 if an embedding is adapted."""
    indexes = [block_index(key) for key in adapter.keys]
    before = any(index is None and "lm_head" not in key for index, key in zip(indexes, adapter.keys, strict=True))
    return 0 if before else min((i for i in indexes if i is not None), default=blocks)


def weight_bytes(module: nn.Module, dtype: str, adapter: AdapterConfig | None = None) -> int:
    """Bytes of the frozen weights once they are loaded for training in `dtype`: of all modules but those whose own
    weights the `adapter` trains."""
    trained = adapter.keys if adapter is not None and adapter.type == FULL else ()
    item = {"auto": None if on_gpu() else 4, "float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    if on_gpu():
        set_precision(module, dtype)  # lazily
        dense = miscomputed(module, compute_dtype(module), gradients=True)
    else:
        dense = {path: layer for path, layer in named_layers(module) if is_quantized(layer)}
    frozen = [layer for path, layer in dense.items() if path not in trained]
    total = sum((item or compute_dtype(module).size) * math.prod(weight_shape(layer)) for layer in frozen)
    for name, array in tree_flatten(module.parameters()):
        path, _, leaf = name.rpartition(".")
        if path in trained or (path in dense and leaf in ("weight", "scales", "biases")):
            continue
        floating = mx.issubdtype(array.dtype, mx.floating)
        total += array.size * item if item and floating else array.nbytes
    return total


def adapter_bytes(module: nn.Module, adapter: AdapterConfig, training: TrainConfig) -> tuple[int, int]:
    """(bytes of the trained float32 weights, bytes of the optimizer's state)."""
    layers = dict(module.named_modules())
    shapes = {
        f"{key}.{leaf}": shape for key in adapter.keys for leaf, shape in expected_shapes(layers[key], adapter).items()
    }
    weights = {name: mx.zeros(shape) for name, shape in shapes.items()}  # lazy: never evaluated
    state = Optimizer(training, weights).arrays()
    return sum(w.nbytes for w in weights.values()), sum(a.nbytes for a in state.values())


def short_rows(rows: Sequence[Row]) -> list[Row]:
    """The two shortest rows, and no more of them than a model is tried on: with their last token trained."""
    return [_beginning(row) for row in sorted(rows, key=lambda row: row.length)[:2]]


def _beginning(row: Row) -> Row:
    tokens = row.tokens[:MOST_TOKENS]
    if len(tokens) == len(row.tokens):
        return row if row.rejected is None else replace(row, rejected=_beginning(row.rejected))
    trained, answer = (
        row.trained[: len(tokens)].copy(),
        None if row.answer is None else row.answer[: len(tokens)].copy(),
    )
    trained[-1] = True
    if answer is not None:
        answer[-1] = True
    rejected = None if row.rejected is None else _beginning(row.rejected)
    return replace(row, tokens=tokens, trained=trained, answer=answer, rejected=rejected)


def probe_of(rows: Sequence[Row]) -> Batch:
    """A small batch to try a model on."""
    return make_batch([[row] for row in short_rows(rows)])


def computes_as_generated(module: nn.Module, probe: Batch) -> bool:
    """Whether the logits of whole texts are those that come one after another, from a cache."""
    module.eval()
    tokens, cache = mx.array(probe.tokens[:1, :PROBED_TOKENS]), make_prompt_cache(module)
    try:
        parts = [module(tokens[:, :-1], cache=cache), module(tokens[:, -1:], cache=cache)]
    except Exception:  # whoever generates with it will be told
        return True
    return same_function(module(tokens), mx.concatenate(parts, axis=1))


def packing_is_exact(module: nn.Module, separate: Batch, packed: Batch) -> bool:
    """Whether rows that share a sequence get the losses that they get alone."""

    def total(given: Batch, caches: list[Any] | None = None) -> float:
        batch = Arrays(**device_batch(given))
        return (log_probabilities.plain(module, batch, caches) * batch.weights).sum().item()

    module.eval()
    alone = total(separate)
    try:
        with contextlib.ExitStack() as stack:
            for block, call in begun_anew(module):
                stack.enter_context(call_as(block, call))
            together = total(packed, segmented_caches(module, mx.array(packed.segments)[:, :-1]))
    except (ValueError, TypeError, IndexError, AttributeError):
        return False
    return abs(alone - together) <= EQUAL * abs(alone)


def settle_recomputing(train_step: TrainStep, probe: Batch) -> bool:
    """Whether what is computed again gives the gradient that kept arrays give. Parts of which that does not hold,
    attention first, are left as they are. What cannot be differentiated at all shows here."""
    kept = train_step.gradient_of(probe, None)

    def exact(again: Again) -> bool:
        gradients = train_step.gradient_of(probe, again, in_float32=False)
        return all(_near(gradients[name], gradient) for name, gradient in kept.items())

    for parts in (train_step.parts, [part for part in train_step.parts if not part.attends], []):
        train_step.parts = parts
        if not parts or exact("mlp" if train_step.memory.again == "mlp" else "nothing"):
            break
    return train_step.memory.again != "blocks" or exact("blocks")


def _near(value: mx.array, expected: mx.array) -> bool:
    """Equal but for sums in another order, as a GPU makes some."""
    return bool((mx.linalg.norm(value - expected) <= 100 * EQUAL * mx.linalg.norm(expected)).item())
