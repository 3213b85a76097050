"""How much memory and time a training run will take, told beforehand.

What lies in memory all the time (weights, adapter, optimizer) is counted from shapes. What a step needs on top
is measured on this device with a few of the model's blocks, at the shape of the largest batch, and extended to
all: each block that the backward pass reaches keeps its activations, the blocks before keep nothing. So a
model that does not fit can be judged too. On a GPU MLX works some 300 operations ahead as long as there is room; a run
lets it do so in a quarter of what a step needs, if there is as much, and no further.

`settle_memory` chooses, before a run begins, the cheapest way that fits: keep all, compute the MLPs again in the
backward pass, or whole blocks, and, if that is not enough, take batches in parts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mlx_adapters.config.mapping import from_mapping
from mlx_adapters.config.settings import of_kind
from mlx_adapters.config.training import LoraConfig, TrainConfig, settled
from mlx_adapters.data.batches import Batch
from mlx_adapters.data.datasets import Data, read_data
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.display.tables import Table
from mlx_adapters.errors import refusals
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.layers import named_layers
from mlx_adapters.models.loading import load_module, load_tokenizer_of
from mlx_adapters.optimization.distributed import World
from mlx_adapters.optimization.feed import bins_of, largest_draw, make_feed
from mlx_adapters.optimization.log_probabilities import logits_bytes
from mlx_adapters.optimization.probe import AHEAD, Prober, adapter_bytes, first_block, probe_of, weight_bytes
from mlx_adapters.optimization.step import Again, MemoryPlan
from mlx_adapters.optimization.through_rounding import plan_rounding
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.starts.ranks import trained_parameters
from mlx_adapters.system.limits import one_at_a_time
from mlx_adapters.system.machine import on_gpu, usable_memory_bytes
from mlx_adapters.training import setup
from mlx_adapters.training.recipe import settings_in
from mlx_adapters.units import bytes_of, count, size


@dataclass(frozen=True)
class Wanted:
    """The run that is foreseen. Of several `processes`, which sum their gradients, `training` has the batch of one."""

    base: Base
    rows: Sequence[Row]
    lora: LoraConfig
    training: TrainConfig
    processes: int = 1

    @property
    def usable(self) -> int:
        """Bytes of memory that it may take."""
        limit = self.training.memory_limit
        return min(usable_memory_bytes(), bytes_of(limit)) if limit else usable_memory_bytes()


@dataclass(frozen=True)
class Parts:
    """Bytes in memory at the peak of a training step, by what they are for; `ahead_bytes`: of a GPU."""

    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    logits_bytes: int
    ahead_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """All of it: what `mx.get_peak_memory()` shows."""
        return sum(vars(self).values())


WAYS: tuple[Again, ...] = ("nothing", "mlp", "blocks")
SLOWER = {"nothing": "", "mlp": "about a fifth more time", "blocks": "about a third more time"}
ROOM = 0.95  # of the memory there is, for what MLX itself holds, and for what a forecast is off by


@dataclass(frozen=True)
class Rung:
    """One way to keep to the memory there is: what is computed again, how many of the longest rows are taken at a time
    (0: all), the peak it leads to, what it costs, and whether it fits."""

    again: Again
    rows: int
    peak_bytes: int
    cost: str
    fits: bool

    def __str__(self) -> str:
        what = {"nothing": "nothing is", "mlp": "MLPs are", "blocks": "blocks are"}[self.again]
        return f"{what} computed again" + (f", {count(self.rows, 'row')} at a time" if self.rows else "")


@dataclass(frozen=True, repr=False)
class Estimate(Table):
    """The forecast of a run.

    `seconds_per_iteration` is for a batch of the mean size, None if it was not timed; `largest_batch` is
    (rows, tokens). `ladder` holds the ways to need less, the cheapest first; a run takes the first that fits, whose
    parts and peak these are. `advice` names single changes that would make it fit, with the peak each leads to.
    `iterations`: those of the run. `full_finetune_bytes`, for comparison: weights, gradients and both of Adam's moments
    in float32.
    """

    parts: Parts
    peak_bytes: int
    usable_bytes: int
    fits: bool
    advice: tuple[str, ...]
    seconds_per_iteration: float | None
    largest_batch: tuple[int, int]
    trainable_parameters: int
    full_finetune_bytes: int
    iterations: int
    ladder: tuple[Rung, ...] = ()


@one_at_a_time
def estimate(
    base: BaseLike,
    data: Data,
    *,
    lora: LoraConfig | None = None,
    training: TrainConfig | None = None,
    timed: bool = True,
    on_event: OnEvent = log_warnings,
) -> Estimate:
    """Predict peak memory and time per iteration of `train` with the same arguments. Trains nothing.

    Args:
        base: the model to train for: "demo", a folder or a Hub id.
        data: the rows, whose lengths count.
        lora: as for `train`.
        training: as for `train`.
        timed: also time a few steps, which loads the model.
        on_event: called with progress and notes.

    Raises what `train` would raise for wrong settings or data.

    Example:
        >>> forecast = ma.estimate("demo", "data/sql", training=ma.TrainConfig(batch_size=8), timed=False)
        >>> forecast.fits, forecast.peak_bytes > 0
        (True, True)
    """
    lora, training, resolved = of_kind(LoraConfig, lora), of_kind(TrainConfig, training), resolve_base(base)
    tokenizer = load_tokenizer_of(resolved, training.template)
    rows = setup.tokenize_split(read_data(data, read=training), "train", tokenizer, training, on_event)
    setup.require_readable(rows, resolved)
    return _estimate(Wanted(resolved, rows, lora, settled(training, len(bins_of(rows, training)))), timed)


def _estimate(wanted: Wanted, timed: bool) -> Estimate:
    steps: list[tuple[Rung, MemoryPlan, Parts, Batch]] = []
    for step in _ladder(wanted):
        if step[1].positions is None or not any(rung.fits for rung, *_ in steps):
            steps.append(step)
    rung, memory, parts, largest = next((step for step in steps if step[0].fits), steps[-1])
    advice = () if rung.fits else tuple(_advice(wanted, memory))
    seconds = _seconds(wanted, memory) if timed and rung.fits else None
    module, _ = load_module(wanted.base)
    parameters = sum(int(np.prod(weight_shape(layer))) for _, layer in named_layers(module) if "weight" in layer)
    return Estimate(
        parts,
        parts.peak_bytes,
        wanted.usable,
        rung.fits,
        advice,
        seconds,
        largest.tokens.shape,
        trained_parameters(module, wanted.lora, setup.adapter_config(module, wanted.lora).keys),
        16 * parameters,
        wanted.training.course.iterations,
        tuple(rung for rung, *_ in steps),
    )


def settle_memory(wanted: Wanted, told: bool, on_event: OnEvent) -> MemoryPlan:
    """The cheapest way that fits, by the forecast; what it costs is said, and all of the forecast if `told`.

    On a CPU nothing is measured for a run that an eighth of the memory will do in any case, unless it is to be told.
    """
    if not (told or on_gpu()) and _needs_little(wanted):
        return MemoryPlan(_asked(wanted.training)[0])
    for rung, memory, parts, _ in _ladder(wanted):  # noqa: B007
        if rung.fits:
            break
    chosen = rung.again != _asked(wanted.training)[0] or memory.positions is not None
    why = ("so that it fits" if rung.fits else "the least there is") + (f" ({rung.cost})" if rung.cost else "")
    if chosen or told:
        on_event(Note(f"{_predicted(parts, wanted, told)}{f': {rung}, {why}' if chosen else ''}."))
    if not rung.fits:
        advice = "; ".join(_advice(wanted, memory))
        on_event(Note(f"This will hardly fit. What would help: {advice}.", "warning"))
    return _near(memory, parts, wanted)


def _near(memory: MemoryPlan, parts: Parts, wanted: Wanted) -> MemoryPlan:
    return replace(memory, near=min(int((1 + AHEAD) * (parts.peak_bytes - parts.ahead_bytes)), wanted.usable))


def _predicted(parts: Parts, wanted: Wanted, told: bool) -> str:
    each = ", ".join(f"{name.removesuffix('_bytes')} {size(number)}" for name, number in vars(parts).items() if number)
    share = f" ({each})" if told else ""
    return f"Predicted peak memory {size(parts.peak_bytes)}{share} of {size(wanted.usable)}"


def memory_of_run(wanted: Wanted, recipe: Mapping[str, Any], told: bool, world: World, on_event: OnEvent) -> MemoryPlan:
    """How a run keeps to the memory there is: as its `recipe` says, if it goes on and is asked for the same, since the
    order of sums depends on it; else what `settle_memory` chooses, on rank 0 for all: each has its share of a batch."""
    training = replace(wanted.training, batch_size=-(-wanted.training.batch_size // world.size))
    wanted = replace(wanted, training=training, processes=world.size)
    if "memory" in recipe:
        before = settings_in(recipe)[1]
        if (before.memory, before.memory_limit) == (training.memory, training.memory_limit):
            memory = from_mapping(MemoryPlan, recipe["memory"], "the run's recipe")
            if not (told or on_gpu()):
                return memory
            parts = Parts(**world.share(lambda: asdict(forecast(wanted, memory)[0])))
            on_event(Note(f"{_predicted(parts, wanted, told)}."))
            return _near(memory, parts, wanted)
    return MemoryPlan(**world.share(lambda: asdict(settle_memory(wanted, told, on_event))))


def _asked(training: TrainConfig) -> tuple[Again, ...]:
    """The ways that the settings leave open, the cheapest first."""
    if training.memory != "auto":
        return (training.memory,)
    return ("blocks",) if training.grad_checkpoint else WAYS


def _ladder(wanted: Wanted) -> Iterator[tuple[Rung, MemoryPlan, Parts, Batch]]:
    """The ways that are left open, and then the last of them with fewer and fewer rows at a time; each is measured as
    it is asked for. One that takes more than one before it is passed over."""
    training = wanted.training
    plans = [(MemoryPlan(again), 0) for again in _asked(training)]
    each = largest_draw(wanted.rows, training, on_gpu()).batches[0].tokens.size // training.batch_size
    few = training.batch_size
    while few > 1:
        few = -(-few // 2)
        plans.append((replace(plans[-1][0], positions=few * each), few))
    room, least = ROOM * wanted.usable, float("inf")
    for memory, few in plans:
        parts, largest = forecast(wanted, memory)
        if parts.peak_bytes <= least:
            least = parts.peak_bytes
            rung = Rung(memory.again, few, least, SLOWER[memory.again], least <= room)
            yield rung, memory, parts, largest


def _needs_little(wanted: Wanted) -> bool:
    """Whether a bound that is never reached, from shapes alone, is an eighth of the memory there is."""
    module, config = load_module(wanted.base)
    tokens, blocks = largest_draw(wanted.rows, wanted.training, on_gpu()).batches[0].tokens, len(module.layers)
    shapes = [weight_shape(layer)[-2:] for _, layer in named_layers(module) if "weight" in layer]
    wide = sum(shape[-1] + 2 * shape[0] for shape in shapes if len(shape) > 1)
    scores = blocks * int(config.get("num_attention_heads", 128)) * tokens.shape[1]
    most = weight_bytes(module, wanted.training.dtype) + 4 * tokens.size * 4 * (wide + scores)
    return most <= wanted.usable / 8


def forecast(wanted: Wanted, memory: MemoryPlan | None = None) -> tuple[Parts, Batch]:
    """Predict the peak, part by part, and give the largest batch."""
    training = wanted.training
    memory = memory or MemoryPlan(_asked(training)[0])
    prober = _prober(wanted, memory)
    draw = largest_draw(wanted.rows, training, on_gpu(), memory.positions)
    largest = max(draw.batches, key=lambda batch: batch.tokens.size)
    module, _ = load_module(wanted.base)
    reached = len(module.layers) - first_block(prober.adapter, len(module.layers))
    adapter, optimizer = adapter_bytes(module, prober.adapter, training)
    weights = weight_bytes(module, training.dtype, prober.adapter)
    del module  # its files are closed before the prober opens them
    with refusals(setup.cannot_train):
        step, over = map(int, prober.step_bytes(draw, max(reached, 1)))
    logits = min(logits_bytes(largest, prober.vocabulary, training), max(step - adapter, 0))
    needed = Parts(weights, adapter, optimizer, adapter, max(step - adapter - logits, 0), logits)
    room = int(ROOM * wanted.usable) - needed.peak_bytes
    ahead = max(over, min(int(AHEAD * needed.peak_bytes), room)) if on_gpu() else 0
    return replace(needed, ahead_bytes=ahead), largest


def _prober(wanted: Wanted, memory: MemoryPlan) -> Prober:
    lora, training, probe = wanted.lora, wanted.training, probe_of(wanted.rows)
    setup.require_together(lora, training)
    module, config = load_module(wanted.base)
    adapter, asked = setup.adapter_config(module, lora), training.fuse_aware
    setup.require_loadable(module, adapter)
    rounding, vocabulary = None, int(config.get("vocab_size", 1 << 16))
    if asked is not None:
        rounding = plan_rounding(module, adapter.keys, asked)
    return Prober(wanted.base, adapter, training, probe, vocabulary, rounding, memory, wanted.processes)


def _seconds(wanted: Wanted, memory: MemoryPlan) -> float:
    blocks, training = len(load_module(wanted.base)[0].layers), wanted.training
    prober = _prober(wanted, memory)
    feed = replace(make_feed(wanted.rows, training, gpu=on_gpu()), most=memory.positions)
    order = np.argsort(feed.lengths)
    middle = max(len(order) // 2 - training.batch_size // 2, 0)
    typical = feed.draw([order[middle : middle + training.batch_size]] * training.grad_accumulation)
    with refusals(setup.cannot_train):
        seconds = prober.seconds(typical, max(blocks - first_block(prober.adapter, blocks), 1))
    return seconds * feed.tokens_per_update / max(sum(batch.real_tokens for batch in typical.batches), 1)


def _advice(wanted: Wanted, memory: MemoryPlan) -> list[str]:
    lora, training = wanted.lora, wanted.training
    longest = max(row.length for row in wanted.rows)
    blocks = len(load_module(wanted.base)[0].layers)
    changes: list[tuple[str, LoraConfig, TrainConfig]] = []
    if memory.again != "blocks":
        changes.append(("--memory auto", lora, replace(training, memory="auto")))
    for length in (longest // 2, longest // 4, longest // 8):
        if length >= 2:
            changes.append((f"--max-seq-length {length}", lora, replace(training, max_seq_length=length)))
    if blocks > 4 and (lora.num_layers == "all" or lora.num_layers > 4):
        changes.append(("--num-layers 4", replace(lora, num_layers=4), training))
    advice: dict[str, str] = {}
    for text, lora_, training_ in changes:
        option = text.split()[0]
        if option in advice:  # a longer length fits already
            continue
        left = [row for row in (_cut(row, training_.max_seq_length) for row in wanted.rows) if row.can_be_trained]
        if not left:
            continue
        way = memory if training_.memory == training.memory else replace(memory, again="blocks")
        peak = forecast(replace(wanted, rows=left, lora=lora_, training=training_), way)[0].peak_bytes
        if peak <= ROOM * wanted.usable:
            advice[option] = f"{text}: {peak / 1e9:.2f} GB"
    return list(advice.values()) or ["a base model of fewer parameters or bits"]


def _cut(row: Row, length: int) -> Row:
    def part(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[:length]

    return replace(
        row,
        tokens=row.tokens[:length],
        trained=row.trained[:length],
        answer=part(row.answer),
        rejected=None if row.rejected is None else _cut(row.rejected, length),
    )
