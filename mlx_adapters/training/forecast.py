"""How much memory and time a training run will take, told beforehand.

What lies in memory all the time (weights, adapter, optimizer) is counted from shapes. What a step needs on top
is measured on this device with a few of the model's blocks, at the shape of the largest batch, and extended to
all: each block that the backward pass reaches keeps its activations, the blocks before keep nothing. So a
model that does not fit can be judged too. On a GPU it is what a step needs; with room to spare MLX works some 300
operations ahead there and holds more, and waits once memory is used up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.batches import Batch
from mlx_adapters.data.datasets import Data, read_data
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.layers import named_layers
from mlx_adapters.models.loading import load_module, load_tokenizer_of
from mlx_adapters.optimization.feed import make_feed
from mlx_adapters.optimization.probe import Prober, adapter_bytes, first_block, weight_bytes
from mlx_adapters.optimization.step import chunk_rows
from mlx_adapters.optimization.through_rounding import plan_rounding
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.door import refusals
from mlx_adapters.system.machine import on_gpu, usable_memory_bytes
from mlx_adapters.training import setup
from mlx_adapters.units import size


@dataclass(frozen=True)
class Parts:
    """Bytes in memory at the peak of a training step, by what they are for."""

    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    logits_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it: what a CPU's `mx.get_peak_memory()` shows. A GPU with room to spare works ahead and holds more."""
        standing = self.weights_bytes + self.adapter_bytes + self.optimizer_bytes
        return standing + self.gradients_bytes + self.activations_bytes + self.logits_bytes


@dataclass(frozen=True)
class Estimate:
    """The forecast of a run.

    `seconds_per_iteration` is for a batch of the mean size, None if it was not timed; `largest_batch` is
    (rows, tokens). `advice` names single changes that would make it fit, with the peak each leads to.
    `full_finetune_bytes`, for comparison: weights, gradients and both of Adam's moments in float32.
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


def estimate(
    base: str | Path | Base,
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
    resolved, lora, training = resolve_base(base), lora or LoraConfig(), training or TrainConfig()
    tokenizer = load_tokenizer_of(resolved, training.template)
    rows = setup.tokenize_split(read_data(data, read=training), "train", tokenizer, training, on_event)
    setup.require_readable(rows, resolved)
    return estimate_rows(resolved, rows, lora, training, timed)


def estimate_rows(
    base: Base, rows: Sequence[Row], lora: LoraConfig, training: TrainConfig, timed: bool = True
) -> Estimate:
    """`estimate` for rows that are already tokenized."""
    parts, largest = forecast(base, rows, lora, training)
    usable = usable_memory_bytes()
    fits = parts.peak_bytes <= usable
    advice = () if fits else tuple(_advice(base, rows, lora, training, usable))
    seconds = _seconds(base, rows, lora, training) if timed else None
    module, _ = load_module(base)
    parameters = sum(int(np.prod(weight_shape(layer))) for _, layer in named_layers(module) if "weight" in layer)
    return Estimate(
        parts,
        parts.peak_bytes,
        usable,
        fits,
        advice,
        seconds,
        largest.tokens.shape,
        parts.adapter_bytes // 4,
        16 * parameters,
    )


def announce(base: Base, rows: Sequence[Row], lora: LoraConfig, training: TrainConfig, on_event: OnEvent) -> None:
    """Say what `estimate_rows` predicts, and warn of a run that will not fit."""
    estimated = estimate_rows(base, rows, lora, training, timed=False)
    parts = ", ".join(f"{name.removesuffix('_bytes')} {size(count)}" for name, count in vars(estimated.parts).items())
    text = f"Predicted peak memory {size(estimated.peak_bytes)} ({parts}) of {size(estimated.usable_bytes)}."
    on_event(Note(text))
    if not estimated.fits:
        on_event(Note(f"This will hardly fit. What would help: {'; '.join(estimated.advice)}.", "warning"))


def forecast(base: Base, rows: Sequence[Row], lora: LoraConfig, training: TrainConfig) -> tuple[Parts, Batch]:
    """Predict the peak, part by part, and give the largest batch."""
    prober = _prober(base, lora, training)
    feed = make_feed(rows, training, gpu=on_gpu())
    draw = feed.draw([np.argsort(feed.lengths)[-training.batch_size :]] * training.grad_accumulation)
    largest = draw.batches[0]
    module, _ = load_module(base)
    reached = len(module.layers) - first_block(prober.adapter, len(module.layers))
    adapter, optimizer = adapter_bytes(module, prober.adapter, training)
    weights = weight_bytes(module, training.dtype)
    del module  # its files are closed before the prober opens them
    with refusals(setup.cannot_train):
        step = int(prober.step_bytes(draw, max(reached, 1)))
    logits = min(_logits_bytes(largest, prober.vocabulary, training), max(step - adapter, 0))
    activations = max(step - adapter - logits, 0)
    return Parts(weights, adapter, optimizer, adapter, activations, logits), largest


def _prober(base: Base, lora: LoraConfig, training: TrainConfig) -> Prober:
    module, config = load_module(base)
    adapter, asked = setup.adapter_config(module, lora), training.fuse_aware
    setup.require_loadable(module, adapter)
    rounding = None if asked is None else plan_rounding(module, adapter.keys, asked)
    return Prober(base, adapter, training, int(config.get("vocab_size", 1 << 16)), rounding)


def _logits_bytes(batch: Batch, vocabulary: int, training: TrainConfig) -> int:
    """Logits, softmax and gradient, float32, of a chunk or (plain) of every position."""
    every = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
    chunk = min(len(batch.positions), chunk_rows(vocabulary))
    return 3 * 4 * vocabulary * (every if training.chunked_loss == "off" else chunk)


def _seconds(base: Base, rows: Sequence[Row], lora: LoraConfig, training: TrainConfig) -> float:
    blocks = len(load_module(base)[0].layers)
    prober, feed = _prober(base, lora, training), make_feed(rows, training, gpu=on_gpu())
    order = np.argsort(feed.lengths)
    middle = max(len(order) // 2 - training.batch_size // 2, 0)
    typical = feed.draw([order[middle : middle + training.batch_size]] * training.grad_accumulation)
    reached = blocks - first_block(prober.adapter, blocks)
    with refusals(setup.cannot_train):
        seconds = prober.seconds(typical, max(reached, 1))
    return seconds * feed.tokens_per_update / max(sum(batch.real_tokens for batch in typical.batches), 1)


def _advice(base: Base, rows: Sequence[Row], lora: LoraConfig, training: TrainConfig, usable: int) -> list[str]:
    half = max(row.length for row in rows) // 2
    blocks = len(load_module(base)[0].layers)
    changes: list[tuple[str, LoraConfig, TrainConfig]] = [
        ("--grad-checkpoint", lora, replace(training, grad_checkpoint=True)),
        ("--batch-size 1", lora, replace(training, batch_size=1)),
    ]
    if half >= 2:
        changes.append((f"--max-seq-length {half}", lora, replace(training, max_seq_length=half)))
    if blocks > 4 and (lora.num_layers == "all" or lora.num_layers > 4):
        changes.append(("--num-layers 4", replace(lora, num_layers=4), training))
    advice = []
    for text, lora_, training_ in changes:
        cut = [_cut(row, training_.max_seq_length) for row in rows]
        left = [row for row in cut if row.can_be_trained]
        if not left:
            continue
        peak = forecast(base, left, lora_, training_)[0].peak_bytes
        if peak <= usable:
            advice.append(f"{text}: {peak / 1e9:.2f} GB")
    return advice or ["a base model of fewer parameters or bits"]


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
