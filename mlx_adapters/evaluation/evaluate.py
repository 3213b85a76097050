"""Evaluate variants on a data set: loss, distance from a reference, a task score; with errors and differences.

The rows are the independent units: standard errors come from the spread between rows, and two variants are
compared row by row, which takes the rows' own difficulty out of the comparison.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.config.data import DataConfig, TemplateConfig
from mlx_adapters.config.evaluating import EvaluationConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.settings import of_kind
from mlx_adapters.config.training import DPO, KTO, Objective
from mlx_adapters.data.datasets import Data, RawRow, columns_of, read_as_trained, spread
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import AdapterError, FormatError, NotFoundError
from mlx_adapters.evaluation.figures import Evaluation, TokenFigures
from mlx_adapters.evaluation.reports import EvaluationReport
from mlx_adapters.evaluation.scores import Score, greedy_answers, parse_score, questions
from mlx_adapters.evaluation.statistics import mean, placements, weighted_mean
from mlx_adapters.evaluation.tokens import Batches, judge, judged_rows
from mlx_adapters.evaluation.variants import BASE, Variant, prepare, read_variants, workspace
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.adapter import AdapterOrBase
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.metadata import data_config, read_metadata
from mlx_adapters.models.model import Model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter, locate
from mlx_adapters.sources.registry import changing, names
from mlx_adapters.storage import files
from mlx_adapters.storage.tensor_names import METADATA_FILE
from mlx_adapters.system.limits import one_at_a_time

PREFERENCES = ("preference", "reward")  # scores of pairs, and of answers with a label


@one_at_a_time
def evaluate(
    variants: AdapterOrBase | Iterable[AdapterOrBase],
    data: Data,
    *,
    base: BaseLike | None = None,
    config: EvaluationConfig | None = None,
    on_event: OnEvent = log_warnings,
) -> EvaluationReport:
    """Judge variants on rows: loss, KL against one of them, and a task score. A variant that fails keeps its error.

    Args:
        variants: spelled as for `benchmark`.
        data: a folder or file with rows, or rows, as for `train`.
        base: what "base" means; None: the first adapter's own.
        config: which rows, which score.
        on_event: called with progress and notes.

    Raises ConfigError, NotFoundError or FormatError for wrong settings or data.

    Example:
        >>> config = ma.EvaluationConfig(score="exact", max_rows=4, max_tokens=8)
        >>> report = ma.evaluate(["base", "sql"], "data/sql", config=config)
        >>> [(e.variant, e.rows, e.error) for e in report.evaluations]
        [('base', 4, None), ('sql', 4, None)]
    """
    config = of_kind(EvaluationConfig, config)
    with workspace() as folder:
        parsed = read_variants(variants, base, folder, on_event)
        ready = [prepare(variant, folder, config.any_base, on_event) for variant in parsed]
        return evaluate_ready(ready, data, config, on_event)


def evaluate_ready(
    variants: Sequence[Variant], data: Data, config: EvaluationConfig, on_event: OnEvent
) -> EvaluationReport:
    """`evaluate` for variants that are ready to load."""
    given, config = config.template, _as_trained(config, variants)
    rows, record = choose_rows(data, config)
    place = data if isinstance(data, str | Path) else None
    config, objective = _with_score(config, rows, variants)
    record |= {"preferences": objective.rows} if objective else {}
    score = parse_score(config.score, place) if config.score and not objective else None
    label = choose_reference(variants, config)
    reference = _load(next(v for v in variants if v.label == label), config, given) if label else None
    batches: Batches | None = None
    preferences: Preferences | None = None
    evaluations = []
    for variant in variants:
        try:
            if variant.problem:
                raise NotFoundError(variant.problem)
            model = reference if reference and variant.label == label else _load(variant, config, given)
            if batches is None:
                judged = judged_rows(rows, reference or model, config.max_seq_length, objective)
                batches = Batches(judged, reference)
                if objective:
                    preferences = Preferences(judged, reference or model, batches, config.score)
            _check_vocabulary(model, reference)
            evaluations.append(_evaluate(variant.label, model, rows, batches, preferences or score, config, on_event))
        except AdapterError as error:
            if not variant.problem:  # else it was said already
                on_event(Note(f"'{variant.label}' could not be evaluated: {error.message}", "warning"))
            evaluations.append(Evaluation(variant.label, error=error.with_hint))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return EvaluationReport(created, record, config.score, label, tuple(evaluations))


def choose_rows(data: Data, config: EvaluationConfig) -> tuple[list[RawRow], dict[str, Any]]:
    """The rows to judge, and what a report says of them."""
    read = read_as_trained(data, config, judging=True)
    split = config.split or read.judging
    rows = list(read.rows(split))
    if not rows:
        raise NotFoundError(f"The data '{read.source}' has no rows of '{split}'.", f"it has: {', '.join(read.splits)}.")
    rows = spread(rows, config.max_rows or len(rows))
    source = str(data) if isinstance(data, str | Path) else read.source
    return rows, {"source": source, "split": split, "sha256": read.splits[split].sha256, "rows": len(rows)}


def choose_reference(variants: Sequence[Variant], config: EvaluationConfig) -> str | None:
    """The label of the variant that the others are held against."""
    labels = [variant.label for variant in variants if not variant.problem]
    if config.reference is not None:
        require(
            config.reference in labels,
            f"The reference '{config.reference}' is not among the variants.",
            f"one of: {', '.join(labels)}.",
        )
        return config.reference
    adapters = [variant.label for variant in variants if variant.adapter and not variant.problem]
    return adapters[0] if adapters and len(labels) > 1 else None


def _as_trained(config: EvaluationConfig, variants: Sequence[Variant]) -> EvaluationConfig:
    """The settings; how rows are read and rendered, where they do not say it, is as the first adapter was trained, or
    the first that is fused in."""
    own = DataConfig()
    for variant in sorted((v for v in variants if not v.problem), key=lambda v: v.adapter is None):
        with contextlib.suppress(AdapterError):  # it will be said of the variant
            if variant.adapter:
                own = data_config(load_adapter(variant.adapter).metadata)
                break
            if variant.base is not None and own == DataConfig():
                own = DataConfig(**vars(resolve_base(variant.base).template))
    columns: dict[str, Any] = (
        {} if columns_of(config) else {f"{kind}_column": name for kind, name in columns_of(own).items()}
    )
    return replace(config, **columns, **vars(config.template.over(own.template)))


def _load(variant: Variant, config: EvaluationConfig, given: TemplateConfig) -> Model:
    assert variant.base is not None
    adapter = load_adapter(variant.adapter) if variant.adapter else None
    template = replace(given, chat_template=config.chat_template)  # the rows themselves hold the arguments
    return load_model(
        resolve_base(variant.base), adapter, dtype=config.dtype, any_base=config.any_base, template=template
    )


def _check_vocabulary(model: Model, reference: Model | None) -> None:
    if reference is None or model is reference:
        return
    text = "The same text, 123 times: ä → SELECT * FROM x;"
    same = model.tokenizer.encode(text) == reference.tokenizer.encode(text)
    require(same, f"'{model.base.name}' and the reference have different tokenizers.", "evaluate them separately.")


def _evaluate(
    label: str,
    model: Model,
    rows: list[RawRow],
    batches: Batches,
    score: "Score | Preferences | None",
    config: EvaluationConfig,
    on_event: OnEvent,
) -> Evaluation:
    figures = judge(model, batches, on_event)
    tokens = list(figures.tokens)
    result = Evaluation(
        label,
        len(tokens),
        int(sum(tokens)),
        weighted_mean(list(figures.loss), tokens),
        kl=None if figures.kl is None else weighted_mean(list(figures.kl), tokens),
        same_top=None if figures.same_top is None else weighted_mean(list(figures.same_top), tokens),
        figures=figures,
    )
    if score is None:
        return result
    if isinstance(score, Preferences):
        values = score.judge(model, figures, on_event)
        return replace(result, score=mean(values, score.groups), row_scores=tuple(values), groups=score.groups)
    asked = questions(rows, model)
    prompts = [question.prompt for question in asked]
    kv = CacheQuantization(config.kv_bits, config.kv_group_size, quantized_kv_start=0)
    answers = greedy_answers(
        model, prompts, max_tokens=config.max_tokens, batch_size=config.batch_size, kv=kv, on_event=on_event
    )
    scores = [score(a, q.expected, q.row.record) for a, q in zip(answers, asked, strict=True)]
    return replace(result, score=mean(scores), row_scores=tuple(scores), answers=tuple(answers))


def _with_score(
    config: EvaluationConfig, rows: Sequence[RawRow], variants: Sequence[Variant]
) -> tuple[EvaluationConfig, Objective | None]:
    """Preferences are scored as such, unless another score is asked for, and read as that objective takes them;
    rewards are gained on the base."""
    objective = _objective(rows)
    both = objective is not None and (objective.rows == "pairs" or len({row.label for row in rows}) == 2)
    asked = config.score or ("preference" if both else None)
    if asked not in PREFERENCES:
        return config, None
    hint = "rows with 'chosen' and 'rejected', or with a 'label' that is true or false."
    require(objective is not None, f"The score '{asked}' needs pairs, or answers with a label.", hint)
    require(both or asked == "reward", "The score 'preference' needs good answers and bad ones.", "all have one label.")
    if asked == "reward" and config.reference is None:
        there = any(variant.label == BASE and not variant.problem for variant in variants)
        require(there, "Rewards are gained on a reference.", "name 'base' among the variants, or give --reference.")
        config = replace(config, reference=BASE)
    return replace(config, score=asked), objective


def _objective(rows: Sequence[RawRow]) -> Objective | None:
    """One that takes these rows, if they are preferences."""
    if all(row.rejected is not None for row in rows):
        return DPO()
    with contextlib.suppress(FormatError):  # a label that says something else
        if all(row.format != "text" and row.label in (True, False) for row in rows):
            return KTO()
    return None


class Preferences:
    """How each variant compares good answers with bad ones, by a score of PREFERENCES."""

    def __init__(self, rows: Sequence[Row], model: Model, answers: Batches, score: str | None) -> None:
        rejected = [row.rejected for row in rows if row.rejected is not None]
        self.labels = () if rejected else tuple(row.desirable for row in rows)
        self.groups = self.labels if score == "preference" else ()
        self._rejected = Batches(rejected) if rejected else None
        self._before = self._figures(model, judge(model, answers)) if score == "reward" else None

    def _figures(self, model: Model, answers: TokenFigures, on_event: OnEvent = log_warnings) -> list[TokenFigures]:
        return [answers, *([judge(model, self._rejected, on_event)] if self._rejected else [])]

    def judge(self, model: Model, answers: TokenFigures, on_event: OnEvent) -> list[float]:
        """Of each row 1 if the variant is right, 0 if it is wrong, 0.5 if it is for neither: about a pair, about what
        an answer with a label gained; or `placements` of such answers."""
        rows = self._figures(model, answers, on_event)
        if self._before is None:
            worth = [-figures.loss / figures.tokens for figures in rows]
        else:
            worth = [before.loss - figures.loss for before, figures in zip(self._before, rows, strict=True)]
        if self.groups:
            return placements(worth[0], self.groups)
        lead = worth[0] - worth[1] if self._rejected else np.where(self.labels, 1, -1) * worth[0]
        return (0.5 + 0.5 * np.sign(lead)).tolist()


def save(report: EvaluationReport, references: Sequence[str], *, on_event: OnEvent = log_warnings) -> list[str]:
    """Write each registered adapter's figures into its metadata, under `evaluations`; the names written to.

    An earlier evaluation of the same checkpoint on the same rows with the same score is replaced. An adapter that
    cannot be written to now is told as a warning.
    """
    written = []
    by_label = {evaluation.variant: evaluation for evaluation in report.evaluations if evaluation.error is None}
    for text in dict.fromkeys(references):
        if text in by_label and text != BASE and text.partition("@")[0].casefold() in map(str.casefold, names()):
            try:
                _keep(report, by_label[text], *locate(text))
                written.append(text)
            except AdapterError as error:
                on_event(Note(f"The figures are not kept with '{text}': {error.message}", "warning"))
    return written


def _keep(report: EvaluationReport, evaluation: Evaluation, folder: Path, iteration: int | None) -> None:
    with changing(folder.name):
        metadata = read_metadata(folder)
        entry = _entry(report, evaluation, iteration)
        same = ("data", "sha256", "rows", "iteration", "score")
        kept = [e for e in metadata.get("evaluations", []) if any(e.get(k) != entry[k] for k in same)]
        files.write_json(folder / METADATA_FILE, metadata | {"evaluations": [*kept, entry]})


def _entry(report: EvaluationReport, evaluation: Evaluation, iteration: int | None) -> dict[str, Any]:
    """One evaluation as the adapter's metadata keeps it: `metrics` and their standard `errors` by name."""
    figures = {"loss": evaluation.loss, (report.score or "score").partition(":")[0]: evaluation.score}
    means = {name: value for name, value in figures.items() if value is not None}
    metrics = {name: value.value for name, value in means.items()} | {"perplexity": evaluation.perplexity}
    data = report.data
    return {
        "date": report.created,
        "data": data["source"],
        "split": data["split"],
        "sha256": data["sha256"],
        "rows": data["rows"],
        "iteration": iteration,
        "score": report.score,
        "metrics": metrics,
        "errors": {name: value.error for name, value in means.items()},
    }
