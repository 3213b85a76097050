"""`eval`: judge variants on data."""

from pathlib import Path
from typing import Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import (
    OUTPUT_FILE,
    Reads,
    UserPath,
    any_base_option,
    base_option,
    carried,
    complete_references,
    dtype_option,
    json_option,
    refuse_outputs_that_are_read,
    tell_outputs,
    trust_option,
)
from mlx_adapters.cli._settings import options
from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.evaluating import EvaluationConfig
from mlx_adapters.config.settings import settings_of
from mlx_adapters.units import listed


@click.command("eval", cls=LongCommand)
@click.argument("variants", nargs=-1, required=True, metavar="VARIANT...", shell_complete=complete_references)
@click.option("--data", metavar="DIR", help="Folder or file with rows, or hf:user/name.")
@click.option("--tasks", metavar="A,B", help="Instead of --data: tasks of lm-evaluation-harness (extra 'eval').")
@click.option("--task-folder", type=UserPath(exists=True, file_okay=False), help="With --tasks: YAML tasks of yours.")
@options(EvaluationConfig, "split score reference max_rows max_tokens max_seq_length batch_size kv_bits kv_group_size")
@options(DataConfig)
@click.option("--save/--no-save", default=True, show_default=True, help="Keep the figures with the adapters.")
@base_option
@any_base_option
@dtype_option
@click.option("-o", "--output", type=OUTPUT_FILE, help="Save figures and answers as JSON.")
@trust_option
@json_option
@Reads(
    modes={
        "data": "variants split score reference max_rows max_tokens max_seq_length batch_size kv_bits kv_group_size "
        "save base any_base dtype output trust_remote_code as_json " + " ".join(settings_of(DataConfig)),
        "tasks": "variants task_folder max_rows batch_size base any_base dtype output trust_remote_code as_json",
    },
    needs={"max_tokens": "score", "kv_bits": "score", "kv_group_size": "score"},
)
def eval_command(
    variants: tuple[str, ...],
    data: str | None,
    tasks: str | None,
    task_folder: str | None,
    save: bool,
    base: str | None,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Judge VARIANTs (spelled as for `benchmark`) on unseen rows; differences are taken row by row.

    \b
    Example:
      mlx-adapters eval base sql out/sql-4bit --data data/sql --score sqlite
      mlx-adapters eval base sql --tasks arc_easy,hellaswag --max-rows 200
    """
    if data is None and tasks is None:
        raise click.UsageError("Give --data or --tasks.")
    refuse_outputs_that_are_read()
    if tasks is not None:
        _public_tasks(variants, tasks, task_folder, base, EvaluationConfig(**settings), output, as_json)
        return
    from mlx_adapters.evaluation import evaluate as evaluation
    from mlx_adapters.evaluation import reports
    from mlx_adapters.storage import files

    config = EvaluationConfig(**settings)
    assert data is not None
    report = evaluation.evaluate(variants, data, base=base, config=config, on_event=_output.progress())
    kept = list(evaluation.save(report, variants, on_event=_output.progress())) if save else []
    try:
        if output:
            files.write_json(output, _output.plain(report.to_json()))
    finally:  # whatever becomes of the file, what took so long is shown
        if as_json:
            _output.emit_json(report.to_json())
        else:
            shown = report.readable
            headers, lines = reports.table(shown)
            _output.table(headers, lines, right=range(1, len(headers)))
            for line in (*reports.sentences(shown), *reports.notes(shown)):
                _output.say(line)
    tell_outputs()
    if kept:
        _output.note(f"The figures are kept with {listed([repr(name) for name in kept])}.")
        of_it = _output.word(kept[-1])
        _output.next_steps(
            f"mlx-adapters show {of_it}",
            f"mlx-adapters advise {of_it} --quality {_output.word(data)}{carried('advise')}",
        )
    _output.end_if_failed(f"'{e.variant}' failed: {e.error}" for e in report.readable.evaluations if e.error)


def _public_tasks(
    variants: tuple[str, ...],
    tasks: str,
    folder: str | None,
    base: str | None,
    config: EvaluationConfig,
    output: Path | None,
    as_json: bool,
) -> None:
    from mlx_adapters.evaluation.harness import run_tasks
    from mlx_adapters.evaluation.variants import short_names
    from mlx_adapters.storage import files

    report = run_tasks(
        variants,
        [task.strip() for task in tasks.split(",")],
        base=base,
        folder=folder,
        max_rows=config.max_rows,
        dtype=config.dtype,
        any_base=config.any_base,
        batch_size=config.batch_size,
        on_event=_output.progress(),
    )
    try:
        if output:
            files.write_json(output, _output.plain(report))
    finally:
        if as_json:
            _output.emit_json(report)
        else:
            _output.table(*report.table(), right=(3,))
    tell_outputs()
    names = short_names(e.variant for e in report.evaluations)
    _output.end_if_failed(f"'{names[e.variant]}' failed: {e.error}" for e in report.evaluations if e.error)
