"""`advise`: adapter or fused, and at which precision."""

import contextlib
from pathlib import Path

import click

from mlx_adapters.benchmarking.schedule import BenchmarkConfig, Pace
from mlx_adapters.cli import _output
from mlx_adapters.cli._options import REFERENCE, Reads, UserPath, base_option, json_option, trust_option
from mlx_adapters.config.evaluating import EvaluationConfig
from mlx_adapters.errors import AdapterError
from mlx_adapters.units import count, duration

PROBE = BenchmarkConfig(decode_tokens=8, rounds=1, trials=1, cold_load=False)
ROUNDED = {True: 20e6, False: 6e6}  # weights a second that a fuse rounds: seen on one H200, on two CPU cores


def _known(ref: str, base: str | None, bits: tuple[str, ...], quality: str | None) -> tuple[list[str], str | None]:
    """The variants to measure and the data to judge them by: what is fused already is taken as it is, and where
    nothing is asked for, the data that the adapter was trained on, if that was here."""
    from mlx_adapters.data.datasets import read_as_trained
    from mlx_adapters.fusion.recipe import fused_here
    from mlx_adapters.models.metadata import data_config
    from mlx_adapters.sources.bases import recorded_base, resolve_base
    from mlx_adapters.sources.lookup import load_adapter
    from mlx_adapters.system.origin import made_here

    adapter, fused, there = load_adapter(ref), list[str](), dict[str, Path]()
    with contextlib.suppress(AdapterError):  # it will be said of the variants
        there = fused_here(adapter, resolve_base(base) if base else recorded_base([adapter]), Path.cwd())
    for one in bits:
        if one in there:
            fused.append(f"./{_output.place(there[one])}")
            _output.note(f"'{fused[-1]}' is fused of it already.")
        else:
            fused.append(f"fuse:{ref}:{one}")
    for made, path in there.items():
        if made.partition(" ")[0] in bits and made not in bits:
            fused.append(f"./{_output.place(path)}")
            _output.note(f"'{fused[-1]}' is measured, too: {made}.")
    source = (adapter.metadata.get("data") or {}).get("source")
    trained_here = isinstance(source, str) and made_here(source, adapter.metadata.get("signature"))
    if quality is None and trained_here and Path(str(source)).exists():
        try:
            read_as_trained(str(source), data_config(adapter.metadata), judging=True)
        except AdapterError as error:
            _output.note(f"Not judged by the adapter's own data: {error.message} --quality DIR names other rows.")
        else:
            quality = str(source)
            _output.note(f"Judged by the adapter's own data, {_output.place(quality)}; --quality DIR names other rows.")
    return ["base", ref, *fused], quality


def _forecast(
    variants: list[str], base: str | None, config: BenchmarkConfig, quality: str | None, max_rows: int
) -> str:
    """How long all of it will take, roughly, from one short process; "" where that fails."""
    from mlx_adapters.benchmarking.run import WORKER, run_worker
    from mlx_adapters.calibration.texts import choose_text
    from mlx_adapters.config.fusing import FuseOptions
    from mlx_adapters.data.tokenizing import tokenize
    from mlx_adapters.evaluation.evaluate import choose_rows
    from mlx_adapters.evaluation.variants import parse_variants, trained_on, workspace
    from mlx_adapters.models.adapter import template_of
    from mlx_adapters.models.loading import load_tokenizer_of
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.sources.lookup import load_adapter
    from mlx_adapters.system.machine import on_gpu

    parsed, defaults = parse_variants(variants, base), FuseOptions()
    own, adapter = trained_on(parsed), next(v for v in parsed if v.adapter and not v.problem)
    on, loaded = resolve_base(adapter.base or ""), load_adapter(adapter.adapter or "")
    tokenizer = load_tokenizer_of(on, template_of(loaded))
    text = choose_text(None, [loaded], tokenizer, defaults.calibration_rows, defaults.check_rows, on)
    rows = choose_rows(quality, EvaluationConfig(max_rows=max_rows, **vars(own)))[0] if quality else []
    with workspace() as folder:
        result = run_worker(adapter, PROBE, own, folder, WORKER)
    if "error" in result:
        return ""
    pace = Pace.of(result, PROBE, ROUNDED[on_gpu()])
    calibration, check = (sum(len(tokens) for tokens, _ in part) for part in (text.calibration, text.check))
    stored = on.quantization if on_gpu() else None
    bits = stored.bits + 32 / stored.group_size if stored else 16 if on_gpu() else 32
    weights = round(8 * result["weights_bytes"] / bits)
    judged = sum(len(row.tokens) for row in tokenize(rows, tokenizer).rows)
    parts = {
        "fusing": sum(
            pace.fusing(v.fuse_bits not in ("8", "none"), weights, calibration, check) for v in parsed if v.fuse_bits
        ),
        "measuring": config.rounds * len(parsed) * pace.process(config),
        "judging": (pace.load_seconds + pace.reading(judged)) * len(parsed) if judged else 0.0,
    }
    told = ", ".join(f"{name} {_roughly(seconds)}" for name, seconds in parts.items() if seconds)
    return f"This takes about {_roughly(sum(parts.values()))}: {told}."


def _roughly(seconds: float) -> str:
    """So many minutes, or seconds to one digit; no forecast knows more."""
    if seconds < 55:
        return f"{max(float(f'{seconds:.0e}'), 1):.0f} s"
    return duration(60 * round(seconds / 60)).removesuffix(" 0 s")


def _recorded(ref: str) -> str | None:
    """The base that the adapter was made for, if it is here and says so."""
    from mlx_adapters.sources.lookup import load_adapter

    with contextlib.suppress(AdapterError):
        return load_adapter(ref).base_name
    return None


def _next(choice: str, ref: str, base: str | None) -> str:
    """What to type to have what was chosen."""
    kind, _, rest = choice.partition(":")
    adapter, _, bits = rest.rpartition(":")
    if kind == "fuse" and adapter:
        name = adapter.replace("@", "-").rpartition("/")[2]
        into = f" --base {_output.word(base)}" if base else ""
        return f"mlx-adapters fuse {_output.word(adapter)} out/{_output.word(name)}-{bits}bit --bits {bits}{into}"
    if choice == ref:
        return f"mlx-adapters serve {_output.word(base or _recorded(ref) or 'BASE')} --adapter {_output.word(ref)}"
    return f'mlx-adapters generate "..." --base {_output.word(choice)}'


@click.command("advise")
@click.argument("ref", type=REFERENCE)
@click.option("--adapters", type=click.IntRange(min=1), default=1, show_default=True, help="So many on one base.")
@click.option("--serves", type=click.IntRange(min=1), default=1, show_default=True, help="Requests at a time.")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Memory for the model.")
@click.option("--quality", metavar="DIR", help="Data to judge what fusing loses [the adapter's own].")
@click.option("--score", metavar="SCORE", help="Judge by a task score, too; see 'eval'.")
@click.option("--max-rows", type=click.IntRange(min=1), default=50, show_default=True, help="Rows to judge.")
@click.option("--bits", multiple=True, default=("4", "8"), show_default=True, help="Precisions to try; repeatable.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of measuring.")
@click.option(
    "--report",
    type=UserPath(exists=True, dir_okay=False, path_type=Path),
    help="Take the figures from this saved benchmark instead of measuring.",
)
@base_option
@trust_option
@json_option
@Reads(modes={"report": "ref adapters serves memory as_json"})
def advise_command(
    ref: str,
    adapters: int,
    serves: int,
    memory: float | None,
    quality: str | None,
    score: str | None,
    max_rows: int,
    bits: tuple[str, ...],
    rounds: int,
    report: Path | None,
    base: str | None,
    as_json: bool,
) -> None:
    """Measure REF, its base and fused variants, and say which to use, with the figures behind each sentence.

    \b
    Example:
      mlx-adapters advise sql --adapters 3 --memory 8 --quality data/sql
    """
    from mlx_adapters.benchmarking.advice import advise
    from mlx_adapters.benchmarking.reports import read_report
    from mlx_adapters.benchmarking.run import benchmark
    from mlx_adapters.benchmarking.words import failures
    from mlx_adapters.evaluation.variants import short_names

    if report is not None:
        measured = read_report(report)
    else:
        variants, quality = _known(ref, base, bits, quality)
        if quality is None:
            Reads(needs={"score": "quality", "max_rows": "quality"}).check(click.get_current_context())
        begins = count(rounds * len(variants), "fresh process")
        _output.note(f"Measuring {count(len(variants), 'variant')} in {count(rounds, 'round')}, {begins} in all.")
        with contextlib.suppress(AdapterError):  # the benchmark says it
            config = BenchmarkConfig(batch=(serves,), rounds=rounds)
            if said := _forecast(variants, base, config, quality, max_rows):
                _output.note(said)
        measured = benchmark(
            variants,
            base,
            batch=serves,
            rounds=rounds,
            quality=quality,
            score=score,
            max_rows=max_rows if quality else None,
            on_event=_output.progress(),
        )
    shown = measured if as_json else measured.readable
    advice = advise(
        shown,
        ref if as_json else short_names(measured.labels).get(ref, ref),
        adapters=adapters,
        batch=serves,
        memory_bytes=None if memory is None else int(memory * 1e9),
    )
    if as_json:
        _output.emit_json({"advice": advice, "report": measured.to_json()})
    else:
        _output.say(advice.decision)
        for reason in advice.reasons:
            _output.say(f"- {reason}")
        _output.next_steps(_next(advice.choice, ref, base))
    _output.end_if_failed(failures(measured.readable))
