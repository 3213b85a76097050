"""How a fresh adapter begins, where that takes more than its base: another model, or the rows of training."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.events import Note, OnEvent
from mlx_adapters.models.layers import adaptable_layers, nn
from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.starts.factors import start_from_residual
from mlx_adapters.starts.inputs import start_from_inputs
from mlx_adapters.units import count


def begin(
    adapted: Mapping[str, nn.Module],
    lora: LoraConfig,
    ranks: Mapping[str, int],
    run: Callable[[mx.array], mx.array],
    rows: Sequence[Row],
    training: TrainConfig,
    on_event: OnEvent,
) -> None:
    """Let the `adapted` layers of a model start as `lora.init` says; `run` is the model, `ranks` are the layers' own.

    Raises ConfigError for what cannot start so, and what looking up and loading an original model raises.
    """
    if lora.init == "loftq":
        original, _ = load_module(resolve_base(str(lora.original)))
        start_from_residual(adapted, adaptable_layers(original), ranks, lora.scale)
    if lora.init == "eva":
        settled = start_from_inputs(adapted, run, _in_any_order(rows, training), ranks, training.seed)
        least, most = min(settled.values()), max(settled.values())
        on_event(
            Note(f"EVA gave {count(len(settled), 'layer')} ranks of {least} to {most}, {sum(settled.values())} in all.")
        )
    mx.eval([layer.trainable_parameters() for layer in adapted.values()])


def _in_any_order(rows: Sequence[Row], training: TrainConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, positions at which a trained token is foretold) of all rows, once, a batch at a time."""
    order = np.random.default_rng(training.seed).permutation(len(rows))
    for i in range(0, len(order), training.batch_size):
        batch = make_batch([[rows[j]] for j in order[i : i + training.batch_size]])
        yield batch.tokens[:, :-1], batch.positions[batch.weights > 0]
