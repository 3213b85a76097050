"""What a model expects, token by token: loss, and how far it is from a reference model.

Judged are the answers of chat and prompt-completion rows, and all of a text row. With p the reference's
distribution over the next token and q the model's, KL(p ‖ q) in nats says what is lost by taking q for p;
"same top token" is the share of tokens where both put the same token first.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_adapters.config.training import Objective, TrainConfig
from mlx_adapters.data.batches import Batch, make_batch
from mlx_adapters.data.datasets import Data, RawRow, read_data
from mlx_adapters.data.preferences import tokenize_preference
from mlx_adapters.data.tokenizing import Row, tokenize_row
from mlx_adapters.errors import FormatError
from mlx_adapters.evaluation.figures import TokenFigures
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.model import Model, names_of, no_numbers
from mlx_adapters.sources.bases import recorded_base, resolve_base
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.surgery import taps
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import memory_bytes

BATCH_TOKENS = 2048
MAX_SEQ_LENGTH = 2048  # of the rows that `losses_on` judges


def judged_rows(
    rows: Sequence[RawRow], model: Model, max_seq_length: int, objective: Objective | None = None
) -> list[Row]:
    """The rows tokenized, answers marked (everything in a text row), cut where the model has no more positions.

    Preferences are read as `objective` takes them, or as their chosen answers without one. Raises FormatError.
    """
    judged: list[Row] = []
    asked, max_seq_length = max_seq_length, min(max_seq_length, model.positions or max_seq_length)
    for raw in rows:
        if objective is None:
            row = tokenize_row(raw, model.tokenizer, max_seq_length, mask_prompt=raw.format != "text")
        else:
            config = TrainConfig(objective=objective, max_seq_length=max_seq_length)
            (row,) = tokenize_preference(raw, model.tokenizer, config)
        if not row.can_be_trained:
            raise FormatError(
                f"{raw.where}: no token of the answer fits into {max_seq_length} tokens.",
                f"{'raise --max-seq-length, or ' if max_seq_length == asked else ''}shorten the row.",
            )
        for sequence in row.sequences:
            model.base.check_tokens(sequence.tokens, raw.where)
        judged.append(row)
    return judged


class Batches:
    """Rows in batches of like length, and a reference's log-probabilities for them, kept while they fit.

    What does not fit in an eighth of the machine's memory is computed again for each model.
    """

    def __init__(self, rows: Sequence[Row], reference: Model | None = None) -> None:
        self.count, self.reference = len(rows), reference
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        self.groups: list[list[int]] = [[]]
        for i in order:
            if len(rows[i].tokens) * (len(self.groups[-1]) + 1) > BATCH_TOKENS and self.groups[-1]:
                self.groups.append([])
            self.groups[-1].append(i)
        self.batches = [make_batch([[replace(rows[i], rejected=None)] for i in group]) for group in self.groups]
        self._kept: dict[int, mx.array] = {}
        self._room = memory_bytes() // 8

    def expected(self, number: int) -> mx.array | None:
        """(judged tokens, vocabulary) log-probabilities of the reference."""
        if self.reference is None:
            return None
        if number in self._kept:
            return self._kept[number]
        logs = log_probabilities(self.reference, self.batches[number])
        if logs.nbytes <= self._room:
            self._room -= logs.nbytes
            self._kept[number] = logs
        return logs


def log_probabilities(model: Model, batch: Batch) -> mx.array:
    """(judged tokens, vocabulary) float32. Raises ModelError for logits of NaN or Inf and for tokens it has not."""
    model.base.check_tokens(batch.targets, "A judged row")
    logits = model.logits(mx.array(batch.tokens[:, :-1]))
    judged = logits.reshape(-1, logits.shape[-1])[mx.array(batch.positions[: batch.trained_tokens])]
    result = taps.log_probabilities(judged)
    if mx.isnan(result).any().item():
        raise no_numbers(model.module, *names_of(model))
    return result


def judge(model: Model, batches: Batches, on_event: OnEvent = log_warnings) -> TokenFigures:
    """The figures of one model on all batches."""
    sums = {name: np.zeros(batches.count) for name in ("tokens", "loss", "kl", "same_top")}
    for number, (batch, group) in enumerate(zip(batches.batches, batches.groups, strict=True)):
        expected = batches.expected(number)
        logs = expected if model is batches.reference else log_probabilities(model, batch)
        assert logs is not None
        targets = mx.array(batch.targets[: batch.trained_tokens])  # beyond are padding
        loss = -mx.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]
        per_token = {"tokens": mx.ones(len(targets)), "loss": loss}
        if expected is not None:
            per_token["kl"] = mx.maximum(taps.divergence(expected, logs), 0)
            per_token["same_top"] = expected.argmax(axis=-1) == logs.argmax(axis=-1)
        rows = np.array(group)[batch.positions[: len(targets)] // (batch.tokens.shape[1] - 1)]
        for name, values in per_token.items():
            np.add.at(sums[name], rows, as_numpy(values).astype(np.float64))
        mx.clear_cache()
        on_event(Progress("judge", number + 1, len(batches.batches), "batch"))
    if batches.reference is None:
        return TokenFigures(sums["tokens"], sums["loss"])
    return TokenFigures(**sums)


def losses_on(
    data: Data,
    adapters: Sequence[Adapter],
    base: BaseLike | None,
    any_base: bool = False,
    on_event: OnEvent = log_warnings,
) -> list[float]:
    """Loss of each adapter on the test rows of `data` (else valid, else train), in nats per judged token.

    The base is loaded once. Raises ConfigError, NotFoundError, FormatError or IncompatibleError.
    """
    read = read_data(data, judging=True)
    rows = read.rows(read.judging)
    model = load_model(recorded_base(adapters) if base is None else resolve_base(base))
    batches = Batches(judged_rows(rows, model, MAX_SEQ_LENGTH))
    losses = []
    for adapter in adapters:
        model.attach(adapter, any_base=any_base)
        figures = judge(model, batches, on_event)
        losses.append(float(figures.loss.sum() / figures.tokens.sum()))
    return losses
