"""Public tasks: EleutherAI's lm-evaluation-harness, through the wrapper that mlx-lm has for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_adapters.display.tables import Table, flat, named
from mlx_adapters.errors import AdapterError, ConfigError, NotFoundError
from mlx_adapters.evaluation.variants import (
    Variant,
    prepare,
    read_variants,
    short_names,
    workspace,
)
from mlx_adapters.events import Note, OnEvent, Progress, log_warnings
from mlx_adapters.generation.live import load_model
from mlx_adapters.models.adapter import AdapterOrBase
from mlx_adapters.models.base import BaseLike
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.system.door import harness_model
from mlx_adapters.system.limits import one_at_a_time


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, with its standard error where the harness gives one."""

    task: str
    metric: str
    value: float
    error: float | None
    rows: int | None


@dataclass(frozen=True)
class TaskEvaluation:
    """What one variant reached, or why it could not be evaluated."""

    variant: str
    results: tuple[TaskResult, ...] = ()
    error: str | None = None


def _failed(evaluation: TaskEvaluation) -> dict[str, Any]:
    return {"error": evaluation.error}


@dataclass(frozen=True)
class TaskReport(Table):
    """All variants on the same tasks. `harness`: the version of lm-eval."""

    created: str
    tasks: tuple[str, ...]
    harness: str
    max_rows: int | None
    evaluations: tuple[TaskEvaluation, ...] = field(repr=False)

    def records(self) -> list[dict[str, Any]]:
        """One for each variant, task and metric."""
        return [
            {"variant": e.variant} | flat(result) for e in self.evaluations for result in e.results or (_failed(e),)
        ]

    def __getitem__(self, variant: str) -> TaskEvaluation:
        return named(self.evaluations, variant, "variant")

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers and lines for people."""
        lines: list[tuple[str, ...]] = []
        names = short_names(e.variant for e in self.evaluations)
        for e in self.evaluations:
            if e.error is not None:
                lines.append((names[e.variant], "-", "-", "-", e.error))
            for r in e.results:
                value = f"{r.value:.4g}" + (f" ± {r.error:.2g}" if r.error is not None else "")
                lines.append((names[e.variant], r.task, r.metric, str(r.rows or "-"), value))
        return ("VARIANT", "TASK", "METRIC", "ROWS", "VALUE ± STANDARD ERROR"), lines


@one_at_a_time
def run_tasks(
    variants: AdapterOrBase | Iterable[AdapterOrBase],
    tasks: Sequence[str],
    *,
    base: BaseLike | None = None,
    folder: str | Path | None = None,
    max_rows: int | None = None,
    dtype: str = "auto",
    any_base: bool = False,
    batch_size: int = 8,
    on_event: OnEvent = log_warnings,
) -> TaskReport:
    """Judge variants on tasks of lm-evaluation-harness (the extra `eval`); one that does not load keeps its error.

    Args:
        variants: spelled as for `benchmark`.
        tasks: names of the harness's tasks.
        base: what "base" means; None: the first adapter's own.
        folder: where tasks of your own (YAML) lie.
        max_rows: so many of each task; None: all.
        dtype: to compute in; "auto": float32 on a CPU, the model's own on a GPU.
        any_base: take adapters that were trained on another base.
        batch_size: requests at a time.
        on_event: called with progress and notes.

    Raises ConfigError if the harness is missing or knows no such task.

    Example:
        >>> report = ma.run_tasks(["base", "sql"], ["arc_easy"], max_rows=200)  # doctest: +SKIP
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is missing ({error}).", "pip install 'mlx_adapters[eval]'.") from None
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"There is no task '{unknown[0]}'.", "'lm-eval ls tasks' lists all; --task-folder adds yours."
        )
    evaluations: list[TaskEvaluation] = []
    with workspace() as place:
        parsed = read_variants(variants, base, place, on_event)
        for variant in parsed:
            on_event(Progress("tasks", len(evaluations), len(parsed), "variant"))
            model = None  # let the one before go first
            try:
                ready = prepare(variant, place, any_base, on_event)
                model = _load(ready, dtype, any_base, batch_size)
                raw = lm_eval.simple_evaluate(
                    model=model,
                    tasks=list(tasks),
                    limit=max_rows,
                    task_manager=manager,
                    log_samples=False,
                    apply_chat_template=model.use_chat_template,
                    bootstrap_iters=1000,
                )
                evaluations.append(TaskEvaluation(variant.label, tuple(results(raw))))
            except Exception as error:  # the harness raises what its data sets raise: no network, no access, ...
                why = error.with_hint if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
                on_event(Note(f"'{variant.label}' could not be evaluated: {why}", "warning"))
                evaluations.append(TaskEvaluation(variant.label, error=why))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return TaskReport(created, tuple(tasks), lm_eval.__version__, max_rows, tuple(evaluations))


def _load(variant: Variant, dtype: str, any_base: bool, batch_size: int) -> Any:
    if variant.problem:
        raise NotFoundError(variant.problem)
    adapter = load_adapter(variant.adapter) if variant.adapter else None
    model = load_model(str(variant.base), adapter, dtype=dtype, any_base=any_base)
    model.generate([0], max_tokens=1)  # the harness would count NaN or Inf as right or wrong
    return harness_model(model.module, model.tokenizer, batch_size)


def results(raw: dict[str, Any]) -> list[TaskResult]:
    """The harness's own result by task and metric: `acc,none` has its standard error in `acc_stderr,none`."""
    figures = []
    for task, values in raw["results"].items():
        rows = raw.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{kind}")
                error = float(error) if isinstance(error, int | float) else None
                name = metric if kind == "none" else f"{metric} ({kind})"
                figures.append(TaskResult(task, name, float(value), error, rows))
    return figures
