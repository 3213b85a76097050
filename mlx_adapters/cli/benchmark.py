"""`benchmark`: measure variants side by side."""

from pathlib import Path

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import any_base_option, base_option, dtype_option, json_option


class Counts(click.ParamType):
    """Whole numbers of at least 1, separated by commas."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
            self.fail(f"'{value}' is not a list of whole numbers such as 128,512.", param, ctx)
        return tuple(int(part) for part in parts)


@click.command("benchmark")
@click.argument("variants", nargs=-1, required=True, metavar="VARIANT...")
@base_option
@click.option("--prompt-tokens", type=Counts(), default="128", show_default=True, help="Prompt lengths: 128,512,2048.")
@click.option("--decode-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens to write.")
@click.option("--batch", type=Counts(), default="1", show_default=True, help="Batch sizes: 1,4.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True,
              help="Fresh processes per variant, in shuffled rounds.")  # fmt: skip
@click.option("--trials", type=click.IntRange(min=1), default=2, show_default=True, help="Trials per process.")
@click.option("--data", metavar="DIR", help="Take the prompts from this data [random tokens].")
@click.option("--cold/--no-cold", default=True, show_default=True, help="Also load with the file cache dropped.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order and of the random prompts.")
@any_base_option
@dtype_option
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Save the report as JSON.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write it as Markdown.")
@json_option
def benchmark_command(
    variants: tuple[str, ...], base: str | None, prompt_tokens: tuple[int, ...], decode_tokens: int,
    batch: tuple[int, ...], rounds: int, trials: int, data: str | None, cold: bool, seed: int, any_base: bool,
    dtype: str, output: Path | None, markdown: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure load time, speed, memory and size of VARIANTs: `base`, adapters, models, `fuse:ADAPTER:BITS`.

    Each variant runs in a fresh process in every round; differences come with a 95 % interval.

    \b
    Example:
      mlx-adapters benchmark base sql@500 out/sql-4bit fuse:sql:8
    """
    from mlx_adapters import files
    from mlx_adapters.benchmarking import text
    from mlx_adapters.benchmarking.run import benchmark

    report = benchmark(
        variants, base, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, batch=batch, rounds=rounds,
        trials=trials, data=data, dtype=dtype, cold_load=cold, any_base=any_base, seed=seed,
        on_event=_output.progress(),
    )  # fmt: skip
    if output:
        files.write_json(output, report.to_json())
    if markdown:
        files.write_text(markdown, text.markdown(report))
    if as_json:
        _output.emit_json(report.to_json())
    else:
        show(report)
    if report.interrupted:
        raise KeyboardInterrupt
    if not any(row.error is None for row in report.rows):
        raise click.exceptions.Exit(1)


def show(report: object) -> None:
    """Head, table, differences and notes, to stdout."""
    from mlx_adapters.benchmarking import text
    from mlx_adapters.benchmarking.report import Report

    assert isinstance(report, Report)
    for line in text.head(report):
        _output.out(f"# {line}")
    headers, lines = text.table(report)
    _output.table(headers, lines, right=range(1, len(headers)))
    for line in text.sentences(report):
        _output.out(line)
    for note in text.notes(report):
        _output.warn(note)
