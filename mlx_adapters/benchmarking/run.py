"""Run the plan: one process after the other, in shuffled rounds, and gather what they measured."""

import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_adapters.benchmarking.measurements import Run
from mlx_adapters.benchmarking.reports import Report
from mlx_adapters.benchmarking.schedule import BenchmarkConfig, schedule
from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.evaluating import EvaluationConfig
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.config.quantization import Dtype
from mlx_adapters.data.datasets import DEFAULTS, PYTHON, Data, DataSet, keep, read_as_trained
from mlx_adapters.evaluation.variants import Variant, prepare, read_variants, trained_on, workspace
from mlx_adapters.events import Note, OnEvent, Progress, ignore, log_warnings
from mlx_adapters.models.adapter import AdapterOrBase
from mlx_adapters.models.base import BaseLike
from mlx_adapters.storage import files
from mlx_adapters.storage.tensor_names import ROWS_FOLDER
from mlx_adapters.system.conditions import system_state, warnings
from mlx_adapters.system.door import trusts_remote_code
from mlx_adapters.system.limits import one_at_a_time
from mlx_adapters.system.machine import child_environment, environment, typed_command

WORKER = ("-m", "mlx_adapters.benchmarking.worker")


class BenchmarkInterrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop, in a benchmark.

    Args:
        report: what was finished by then.

    Example:
        >>> try:
        ...     report = ma.benchmark(["base", "sql"], prompt_tokens=8, decode_tokens=4, rounds=1, trials=1)
        ... except ma.BenchmarkInterrupted as stop:
        ...     report = stop.report
        >>> report.interrupted
        False
    """

    def __init__(self, report: Report) -> None:
        super().__init__("The benchmark was interrupted; its report holds the finished processes.")
        self.report = report


@one_at_a_time
def benchmark(
    variants: AdapterOrBase | Iterable[AdapterOrBase],
    base: BaseLike | None = None,
    *,
    prompt_tokens: int | Sequence[int] = 128,
    decode_tokens: int = 64,
    batch: int | Sequence[int] = 1,
    rounds: int = 5,
    trials: int = 3,
    data: Data | None = None,
    dtype: Dtype = "auto",
    cold_load: bool = True,
    any_base: bool = False,
    seed: int = 0,
    quality: Data | None = None,
    score: str | None = None,
    max_rows: int | None = None,
    on_event: OnEvent = log_warnings,
) -> Report:
    """Measure load time, time to the first token, speed of prefill and decode, memory and size of each variant.

    A variant that fails is a row with its error.

    Args:
        variants: "base", adapters, model folders or ids, and "fuse:REF:BITS": an adapter fused for the occasion.
        base: what "base" means; None: the first adapter's own.
        prompt_tokens: length of the prompts, or several lengths.
        decode_tokens: tokens to write after each.
        batch: sequences at a time, or several numbers.
        rounds: fresh processes for each variant.
        trials: measurements in each of them.
        data: rows that prompts are made of, as for `train`; None: random tokens.
        dtype: to compute in; "auto": float32 on a CPU, the model's own on a GPU.
        cold_load: also load with the system's file cache dropped, where that is possible.
        any_base: take adapters that were trained on another base.
        seed: of prompts and order.
        quality: data to judge the variants on as well (see `evaluate`).
        score: a task score for that.
        max_rows: at most so many of its rows.
        on_event: called with progress and notes.

    Raises ConfigError or NotFoundError when the plan itself is wrong; BenchmarkInterrupted, which holds the report of
    what is finished.

    Example:
        >>> report = ma.benchmark(["base", "sql"], prompt_tokens=8, decode_tokens=4, rounds=1, trials=1)
        >>> report.labels, report.failures
        (['base', 'sql'], {})
    """
    config = BenchmarkConfig(
        prompt_tokens=_tuple(prompt_tokens),
        decode_tokens=decode_tokens,
        batch=_tuple(batch),
        rounds=rounds,
        trials=trials,
        dtype=dtype,
        cold_load=cold_load,
        any_base=any_base,
        seed=seed,
    )
    with workspace() as folder:
        parsed = read_variants(variants, base, folder, on_event)
        own = trained_on(parsed)
        prompts, judged = at_hand(data, folder / "prompts", own), at_hand(quality, folder / "quality", own)
        check_data(prompts, judged, score, own)
        report = run(parsed, replace(config, data=prompts), on_event, folder, own=own)
        report = replace(report, config=replace(config, data=source_of(data)))
        if report.interrupted:
            raise BenchmarkInterrupted(report)
        if judged is None:
            return report
        try:
            found = _quality(report, judged, score, max_rows, folder, on_event)
            found["data"]["source"] = source_of(quality)
            return replace(report, quality=found)
        except KeyboardInterrupt:
            raise BenchmarkInterrupted(replace(report, interrupted=True)) from None


def at_hand(data: Data | None, folder: Path, own: DataConfig = DEFAULTS) -> str | None:
    """Where the processes read data: rows that no file holds are written into `folder`. Raises what is wrong."""
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data)
    keep(replace(read_as_trained(data, own, judging=True), source=PYTHON), folder)
    return str(folder / ROWS_FOLDER)


def source_of(data: Data | None) -> str | None:
    """What a report says of data."""
    if isinstance(data, DataSet):
        return data.source
    return str(data) if isinstance(data, str | Path) else None if data is None else PYTHON


def check_data(prompts: str | None, quality: str | None, score: str | None, own: DataConfig = DEFAULTS) -> None:
    """Read all data once before anything is measured, as `own` says. Raises what is wrong with it."""
    from mlx_adapters.evaluation.scores import parse_score

    if prompts is not None:
        read_as_trained(prompts, own, judging=True)
    if quality is not None:
        read_as_trained(quality, own, judging=True)
    if quality is not None and score is not None:
        parse_score(score, quality)


def _quality(
    report: Report, data: str, score: str | None, max_rows: int | None, folder: Path, on_event: OnEvent
) -> dict[str, Any]:
    """The evaluation of the measured variants, as plain values without the answers."""
    from mlx_adapters.evaluation.evaluate import evaluate_ready

    c = report.config
    config = EvaluationConfig(score=score, max_rows=max_rows, dtype=c.dtype, any_base=c.any_base)
    failed = {row.label: row.error for row in report.rows if row.error}
    ready = [prepare(replace(v, problem=failed.get(v.label)), folder, c.any_base, ignore) for v in report.variants]
    judged = evaluate_ready(ready, data, config, on_event).to_json()
    for evaluation in judged["evaluations"]:
        del evaluation["answers"]
    return judged


def run(
    variants: Sequence[Variant],
    config: BenchmarkConfig,
    on_event: OnEvent,
    folder: Path,
    *,
    own: DataConfig = DEFAULTS,
    worker: Sequence[str] = WORKER,
) -> Report:
    """Run all processes; `own` says how prompts are read and rendered, `worker` holds the arguments after the Python
    interpreter, for experiments."""
    start, before = time.perf_counter(), system_state()
    runs: list[Run] = []
    interrupted = False
    try:
        ready = [prepare(variant, folder, config.any_base, on_event) for variant in variants]
        runs += [Run(variant.label, 0, {"error": variant.problem}) for variant in ready if variant.problem]
        plan = schedule(len(variants), config.rounds, config.seed)
        for done, (number, index) in enumerate(plan):
            on_event(Progress("benchmark", done, len(plan), "run"))
            if not any(r.variant == variants[index].label and "error" in r.result for r in runs):
                runs.append(Run(variants[index].label, number, run_worker(ready[index], config, own, folder, worker)))
        on_event(Progress("benchmark", len(plan), len(plan), "run"))
    except KeyboardInterrupt:
        interrupted = True
        on_event(Note("Interrupted: the finished runs are kept.", "warning"))
    machine = environment()
    told = dict.fromkeys(text for run in runs for text in run.result.get("warnings", ()))
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=typed_command(),
        machine=machine.to_json(),
        state=before,
        config=config,
        variants=tuple(variants),
        runs=tuple(runs),
        warnings=(*told, *warnings(before, system_state(), machine.cores)),
        seconds=time.perf_counter() - start,
        interrupted=interrupted,
    )


def run_worker(
    variant: Variant, config: BenchmarkConfig, own: DataConfig, folder: Path, worker: Sequence[str]
) -> dict[str, Any]:
    """One process: its result, or {"error": ...} if it failed or died."""
    job, result = folder / "job.json", folder / "result.json"
    result.unlink(missing_ok=True)
    settings = {"variant": to_mapping(variant), "config": to_mapping(config), "data": to_mapping(own)}
    files.write_json(job, settings | {"trust_remote_code": trusts_remote_code()})
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *worker, str(job), str(result)],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.is_file():
        return files.read_json(result) | {"process_seconds": time.perf_counter() - start}
    if done.returncode in (-2, 130):
        raise KeyboardInterrupt
    last = next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "no message")
    if done.returncode < 0:
        last = f"killed by signal {-done.returncode}" + (", probably out of memory" if done.returncode == -9 else "")
    return {"error": f"The process failed: {last}.", "output": done.stdout[-4000:]}


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
