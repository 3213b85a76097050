"""How far a fused model strays from the adapter model, measured on rows that calibration never saw.

For every judged token (the answers of chat and prompt-completion rows, everything of a text) both models give a
distribution over the next token. KL(adapter ‖ fused), in nats, is what is lost by using one for the other:
0 means that nothing was. All models compute in dense float32, so that only the weights differ.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.texts import as_memory_allows
from mlx_adapters.data.batches import TokenBatch, TokenRow
from mlx_adapters.errors import FormatError
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.models.base import Base
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.surgery.blocks import Call
from mlx_adapters.surgery.taps import divergence, log_probabilities, perplexity
from mlx_adapters.system.door import mx
from mlx_adapters.system.limits import trim_cache

Variants = tuple[BlockwiseModel, BlockwiseModel, BlockwiseModel | None]  # exact, fused, base


@dataclass(frozen=True)
class Fidelity:
    """Figures over `tokens` judged tokens of `rows` rows. Losses and KL in nats per token.

    `kl_*`: KL(adapter ‖ fused). `same_top`: share of tokens where both put the same token first. `base_kl` is
    KL(adapter ‖ base), for scale: what fusing badly could cost at most; None where the base alone was fused.
    """

    rows: int
    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    same_top: float
    loss_adapter: float
    loss_fused: float
    loss_base: float | None = None
    base_kl: float | None = None
    base_same_top: float | None = None

    @property
    def perplexity_adapter(self) -> float:
        """exp of the mean loss in nats."""
        return perplexity(self.loss_adapter)

    @property
    def perplexity_fused(self) -> float:
        """exp of the mean loss in nats."""
        return perplexity(self.loss_fused)

    @property
    def judged_by(self) -> str:
        """What the fused model is compared with: the base with an "adapter", or a "model" that is fused by itself."""
        return "model" if self.base_kl is None else "adapter"

    @property
    def reference(self) -> str:
        """`judged_by` in a sentence."""
        return "the model before rounding" if self.base_kl is None else "the adapter model"

    @property
    def verdict(self) -> str:
        """What the figures say, in a sentence."""
        like = "like" if self.same_top >= 0.99 else "nearly like" if self.same_top >= 0.95 else "otherwise than"
        base = f" (base {self.base_kl:.3g})" if self.base_kl is not None else ""
        return f"Answers {like} the {self.judged_by}: same token {self.same_top:.1%}, KL {self.kl_mean:.2g}{base}."

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers and lines for people."""
        headers = ("MODEL", "KL", "MEDIAN", "99 %", "SAME TOP", "LOSS", "PERPLEXITY")
        lines: list[tuple[str, ...]] = [
            (self.judged_by, "", "", "", "", f"{self.loss_adapter:.4f}", f"{self.perplexity_adapter:.3f}"),
            (
                "fused",
                f"{self.kl_mean:.5f}",
                f"{self.kl_median:.5f}",
                f"{self.kl_p99:.4f}",
                f"{self.same_top:.2%}",
                f"{self.loss_fused:.4f}",
                f"{self.perplexity_fused:.3f}",
            ),
        ]
        if self.base_kl is not None and self.base_same_top is not None and self.loss_base is not None:
            lines.append(
                ("base", f"{self.base_kl:.3f}", "", "", f"{self.base_same_top:.2%}", f"{self.loss_base:.4f}", "")
            )
        return headers, lines


@dataclass
class _Tally:
    """Per-token figures of one model against the reference."""

    kl: list[np.ndarray]
    same: list[np.ndarray]
    loss: list[np.ndarray]

    def mean(self, name: str) -> float:
        return float(np.concatenate(getattr(self, name)).mean())


def last_states(
    models: Sequence[BlockwiseModel], batches: Sequence[TokenBatch], on_event: OnEvent = log_warnings
) -> list[list[list[mx.array]]]:
    """states[v][b]: the state after the last block of model v on batch b.

    All models go through the blocks together; as long as one has the same weights as the base and the same
    input as the first model of that kind, it shares the result.
    """
    count = len(models[0].blocks)
    states: list[list[list[mx.array]]] = []
    calls: list[list[list[Call]]] = []
    for v, model in enumerate(models):
        model.prepare(count)
        twin = _twin(models, v, count, range(v))
        entered = [] if twin is not None else [model.blocks.enter(batch.tokens) for batch in batches]
        states.append([state for state, _ in entered] if twin is None else states[twin])
        calls.append([call for _, call in entered] if twin is None else calls[twin])
        mx.eval(states[-1], [call.given for each in calls[-1] for call in each])
        model.prepare(count)  # (the embedding is large, and done)
    for index in range(count):
        before = list(states)
        for v, model in enumerate(models):
            twin = _twin(models, v, index, [u for u in range(v) if before[u] is before[v]])
            if twin is not None:
                states[v] = states[twin]
                model.release(index)
                continue
            model.prepare(index)
            states[v] = [_step(model, index, s, c[index]) for s, c in zip(before[v], calls[v], strict=True)]
            model.release(index)
        on_event(Progress("check", index + 1, count, "block"))
    return states


def _twin(models: Sequence[BlockwiseModel], v: int, index: int, others: Iterable[int]) -> int | None:
    """One of the `others` that has the base's weights in block `index`, if model v has them too."""
    if models[v].differs(index):
        return None
    return next((u for u in others if not models[u].differs(index)), None)


def _step(model: BlockwiseModel, index: int, state: list[mx.array], call: Call) -> list[mx.array]:
    out = model.blocks.step(index, state, call)
    mx.eval(out)
    return out


def measure_fidelity(
    adapter: BlockwiseModel,
    fused: BlockwiseModel,
    base: BlockwiseModel | None,
    batches: Sequence[TokenBatch],
    on_event: OnEvent = log_warnings,
) -> Fidelity:
    """Judge `fused` (and, for scale, `base`) by `adapter`. Raises FormatError for NaN or Inf logits."""
    models = [v for v in (base, adapter, fused) if v is not None]
    states = last_states(models, batches, on_event)
    reference, outside = models.index(adapter), len(adapter.blocks)
    twins = [_twin(models, v, outside, range(v)) for v in range(len(models))]  # whose head is the same: it is large
    heads = [models[v if twin is None else twin] for v, twin in enumerate(twins)]
    tallies = [_Tally([], [], []) for _ in models]
    for b, batch in enumerate(batches):
        done = 0
        for positions in adapter.blocks.pieces(states[reference][b], batch.judged):
            logs = [_log_probabilities(head, s[b], positions) for head, s in zip(heads, states, strict=True)]
            targets = batch.targets[done : done + positions.shape[0]]
            for tally, log in zip(tallies, logs, strict=True):
                _judge(tally, logs[reference], log, targets)
            done += positions.shape[0]
            trim_cache()
    for model in models:
        model.release(outside)  # (embedding and head are large)
    return _summary(tallies, models.index(fused), reference, base is not None, batches)


def _log_probabilities(model: BlockwiseModel, state: list[mx.array], positions: mx.array) -> mx.array:
    result = log_probabilities(model.blocks.finish(state, positions))
    if mx.isnan(result).any().item():
        raise FormatError("The model computes NaN or Inf on the check's text.", "are its weights whole?")
    return result


def _judge(tally: _Tally, reference: mx.array, log: mx.array, targets: mx.array) -> None:
    kl = divergence(reference, log)
    same = reference.argmax(axis=-1) == log.argmax(axis=-1)
    loss = -mx.take_along_axis(log, targets[:, None], axis=-1)[:, 0]
    for name, values in (("kl", kl), ("same", same), ("loss", loss)):
        getattr(tally, name).append(as_numpy(values).astype(np.float64))


def _summary(
    tallies: list[_Tally], fused: int, reference: int, has_base: bool, batches: Sequence[TokenBatch]
) -> Fidelity:
    kl = np.maximum(np.concatenate(tallies[fused].kl), 0)
    return Fidelity(
        rows=sum(batch.tokens.shape[0] for batch in batches),
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=quantile(kl, 0.99),
        same_top=tallies[fused].mean("same"),
        loss_adapter=tallies[reference].mean("loss"),
        loss_fused=tallies[fused].mean("loss"),
        loss_base=tallies[0].mean("loss") if has_base else None,
        base_kl=tallies[0].mean("kl") if has_base else None,
        base_same_top=tallies[0].mean("same") if has_base else None,
    )


def quantile(values: np.ndarray, share: float) -> float:
    """NumPy's, between neighbours of which one may be infinite."""
    upper = np.sort(values)[math.ceil(share * (len(values) - 1))]
    return float(np.quantile(values, share) if np.isfinite(upper) else upper)


def measured(
    variants: Callable[[], Variants], rows: list[TokenRow], base: Base, on_event: OnEvent = log_warnings
) -> Fidelity:
    """`measure_fidelity` of new variants (they go through their blocks once) on rows, as memory allows."""
    return as_memory_allows(lambda batches: measure_fidelity(*variants(), batches, on_event), rows, base)
