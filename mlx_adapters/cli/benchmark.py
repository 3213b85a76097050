"""`benchmark`: measure variants side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import (
    OUTPUT_FILE,
    OUTPUT_FOLDER,
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
from mlx_adapters.cli._settings import option, options
from mlx_adapters.config.evaluating import EvaluationConfig

if TYPE_CHECKING:
    from mlx_adapters.benchmarking.reports import Report


class Percent(click.ParamType):
    """ "5%" or "5" as 0.05."""

    name = "percent"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            share = float(str(value).strip().removesuffix("%")) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share < 10:
            self.fail(f"'{value}' is not a percentage such as 5%.", param, ctx)
        return share


@click.command("benchmark", cls=LongCommand)
@click.argument("variants", nargs=-1, required=True, metavar="VARIANT...", shell_complete=complete_references)
@base_option
@options(BenchmarkConfig, "prompt_tokens decode_tokens batch rounds trials data")
@option(BenchmarkConfig, "cold_load", flag="--cold/--no-cold", show_default=True)
@option(BenchmarkConfig, "seed")
@any_base_option
@dtype_option
@click.option("--quality", metavar="DIR", help="Also judge the variants on this data: loss, KL, same top token.")
@option(EvaluationConfig, "score", help="With --quality: exact, regex:PATTERN, sqlite[:FILE] or command:COMMAND.")
@option(EvaluationConfig, "max_rows", help="With --quality: judge only so many rows, evenly spaced.")
@click.option("-o", "--output", type=OUTPUT_FILE, help="Save the report as JSON.")
@click.option("--markdown", type=OUTPUT_FILE, help="Write it as Markdown.")
@click.option("--html", type=OUTPUT_FILE, help="Write it as a page: the verdict, a chart, the figures.")
@click.option("--plots", type=OUTPUT_FOLDER, help="Write the plots as SVG and PNG into a folder.")
@click.option("--against", type=UserPath(exists=True, dir_okay=False, path_type=Path), help="An older saved report.")
@click.option("--fail-over", type=Percent(), metavar="5%", help="With --against: fail if something got worse by more.")
@trust_option
@json_option
@Reads(needs={"score": "quality", "max_rows": "quality", "fail_over": "against"})
def benchmark_command(
    variants: tuple[str, ...],
    base: str | None,
    quality: str | None,
    score: str | None,
    max_rows: int | None,
    output: Path | None,
    markdown: Path | None,
    html: Path | None,
    plots: Path | None,
    against: Path | None,
    fail_over: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure load time, speed, memory and size of VARIANTs: `base`, adapters, models, `fuse:ADAPTER:BITS`.

    Each variant runs in a fresh process in every round; differences come with a 95 % interval.

    \b
    Example:
      mlx-adapters benchmark base sql@500 out/sql-4bit fuse:sql:8 --html report.html
    """
    from mlx_adapters.benchmarking.reports import changes, read_report
    from mlx_adapters.benchmarking.run import BenchmarkInterrupted, benchmark
    from mlx_adapters.benchmarking.words import failures
    from mlx_adapters.evaluation.statistics import MIN_ROUNDS

    refuse_outputs_that_are_read()
    old = read_report(against) if against else None
    if old and fail_over is not None and min(settings["rounds"], old.config.rounds) < MIN_ROUNDS:
        raise click.UsageError(f"--fail-over needs --rounds {MIN_ROUNDS} in both reports: fewer prove nothing.")
    try:
        report = benchmark(
            variants,
            base,
            quality=quality,
            score=score,
            max_rows=max_rows,
            on_event=_output.progress(),
            **settings,
        )
    except BenchmarkInterrupted as stop:
        report = stop.report
    try:
        save(report, output, markdown, html, plots)
    finally:  # whatever becomes of the files, what took so long is shown
        if as_json:
            _output.emit_json(report.to_json())
        else:
            show(report, old)
    tell_outputs()
    if report.interrupted:
        raise KeyboardInterrupt
    if not as_json and any(row.error is None for row in report.rows):
        _output.next_steps(_next(variants, quality, output))
    worse = [c for c in changes(report, old) if fail_over is not None and c.fails(fail_over)] if old else []
    _output.end_if_failed([*failures(report.readable), *(f"{change} than in {against}" for change in worse)])


def _next(variants: tuple[str, ...], quality: str | None, output: Path | None) -> str:
    """What to type after a benchmark: to decide by it, or to know more."""
    from mlx_adapters.sources.registry import names

    mine = next((one for one in variants if one.partition("@")[0] in names()), None)
    if mine and output and len(variants) > 1:
        return f"mlx-adapters advise {_output.word(mine)} --report {_output.word(output)}"
    again = " ".join(map(_output.word, variants)) + carried("benchmark") + ("" if quality else " --quality DATA")
    return f"mlx-adapters benchmark {again} --html report.html"


def save(report: "Report", output: Path | None, markdown: Path | None, html: Path | None, plots: Path | None) -> None:
    """Write the report in the forms that were asked for."""
    from mlx_adapters.benchmarking import page, words
    from mlx_adapters.display import png, svg
    from mlx_adapters.storage import files

    if output:
        files.write_json(output, report.to_json())
    if markdown:
        files.write_text(markdown, words.markdown(report))
    if html:
        files.write_text(html, page.html(report))
    if plots:
        for title, chart in (page.overview(report) | page.details(report)).items():
            name = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
            files.write_text(plots / f"{name}.svg", svg.picture(chart))
            with files.atomic_file(plots / f"{name}.png") as stream:
                stream.write(png.picture(chart))


def show(report: "Report", old: "Report | None" = None) -> None:
    """Head, table, differences, changes and the verdict, to stdout; warnings to stderr."""
    from mlx_adapters.benchmarking import words
    from mlx_adapters.benchmarking.reports import changes, other_conditions

    saved, report = report, report.readable
    for line in words.head(report):
        _output.say(f"# {line}")
    headers, lines = words.table(report)
    _output.table(headers, lines, right=range(1, len(headers)))
    for line in words.sentences(report):
        _output.say(line)
    if old is not None:
        _output.out(f"Since {old.created}:")
        for change in changes(saved, old):
            _output.out(f"  {change}")
        for note in other_conditions(saved, old):
            _output.warn(f"The older report was made under other conditions: {note}.")
    for note in words.notes(report):
        _output.warn(note)
    _output.out(words.verdict(report))
