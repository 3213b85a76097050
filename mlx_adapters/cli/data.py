"""`data check` and `data split`."""

from collections.abc import Sequence
from typing import Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import UserPath, json_option, overwrite_option
from mlx_adapters.cli._settings import options
from mlx_adapters.config.training import TrainConfig


@click.group("data")
def data_command() -> None:
    """Look at training data before training, and split it.

    \b
    Example:
      mlx-adapters data split rows.jsonl data/mine
      mlx-adapters data check data/mine
    """


@data_command.command("check")
@click.argument("data", metavar="DIR")
@click.option("--base", default="demo", show_default=True, help="The model whose tokenizer counts.")
@options(TrainConfig, "max_seq_length mask_prompt last_turn_only")
@json_option
def data_check_command(data: str, base: str, as_json: bool, **settings: Any) -> None:
    """Count rows and tokens; find duplicates, overlaps, empty answers and rows that are cut.

    \b
    Example:
      mlx-adapters data check data/sql --mask-prompt
    """
    from mlx_adapters.data.checking import check_data

    report = check_data(data, base, TrainConfig(**settings))
    if as_json:
        _output.emit_json(report)
        return
    rows = [
        (
            name,
            str(s.rows),
            ", ".join(s.formats),
            f"{s.tokens:,}",
            f"{s.trained_tokens:,}",
            f"{s.median_length:.0f}",
            str(s.longest),
            str(s.truncated),
            str(len(s.dropped)),
            str(s.duplicates),
            str(len(s.empty_answers)),
            str(report.overlaps.get(name, "-")),
        )
        for name, s in report.splits.items()
    ]
    heads = (
        "SPLIT",
        "ROWS",
        "FORMAT",
        "TOKENS",
        "TRAINED",
        "MEDIAN",
        "LONGEST",
        "CUT",
        "NOTHING LEFT",
        "DUPLICATES",
        "EMPTY ANSWERS",
        "IN TRAIN TOO",
    )
    _output.table(heads, rows, right=(1, *range(3, 12)))
    train = report.splits["train"]
    most = max((count for *_, count in train.histogram), default=1) or 1
    _output.out("\ntokens per training row")
    for low, high, count in train.histogram:
        _output.out(f"{low:>6}-{high:<6} {count:>6}  {'#' * round(40 * count / most)}".rstrip())
    for name, split in report.splits.items():
        for what, where in (("empty answer", split.empty_answers), ("nothing left to train", split.dropped)):
            if where:
                more = f" and {len(where) - 3} more" if len(where) > 3 else ""
                _output.out(f"{name}, {what}: {'; '.join(where[:3])}{more}")
    _output.out("\nfirst training row; the loss counts what stands between [[ and ]]")
    _output.out("".join(f"[[{text}]]" if trained else text for text, trained in _bounded(report.first_row)))


def _bounded(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Long pieces with their middle left out, and of many pieces the first and the last."""
    short = [(_output.middle_out(text, 600), trained) for text, trained in pieces]
    return short if len(short) <= 12 else [*short[:8], (f" … {len(short) - 12} parts more … ", False), *short[-4:]]


@data_command.command("split")
@click.argument("file", type=UserPath(dir_okay=False))
@click.argument("out", type=UserPath())
@click.option("--valid", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share for validation.")
@click.option("--test", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share for testing.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the shuffle.")
@overwrite_option
@json_option
def data_split_command(
    file: str, out: str, valid: float, test: float, seed: int, overwrite: bool, as_json: bool
) -> None:
    """Split FILE into the folder OUT with train.jsonl, valid.jsonl and test.jsonl. Equal rows stay together.

    \b
    Example:
      mlx-adapters data split rows.jsonl data/mine --valid 0.1 --test 0.1
    """
    from mlx_adapters.data.checking import split_data

    counts = split_data(file, out, valid=valid, test=test, seed=seed, overwrite=overwrite)
    if as_json:
        _output.emit_json(counts)
    else:
        _output.out(f"{out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
