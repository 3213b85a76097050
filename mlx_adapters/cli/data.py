"""`data check` and `data split`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import UserPath, carried, json_option, overwrite_option, trust_option
from mlx_adapters.cli._settings import option, options
from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.training import OBJECTIVES, TrainConfig, with_objective
from mlx_adapters.errors import FormatError
from mlx_adapters.units import count

if TYPE_CHECKING:
    from mlx_adapters.data.checking import DataReport, SplitReport

NO_STOP = "No trained row holds a token that stops a generation: the model will not learn to stop."


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
@click.option("--row", type=click.IntRange(1), default=1, show_default=True, help="The training row to show.")
@option(TrainConfig, "objective", over_file=True, type=click.Choice(list(OBJECTIVES)))
@options(TrainConfig, "max_seq_length mask_prompt last_turn_only")
@options(DataConfig)
@trust_option
@json_option
def data_check_command(data: str, base: str, row: int, objective: str | None, as_json: bool, **settings: Any) -> None:
    """Count rows and tokens, show what is trained of a row, and find what may be wrong.

    Found are duplicates, overlaps, rows that are cut, empty answers, text that the chat template leaves out, turns
    that end in no token that stops a generation, doubled BOS tokens, text that is read as special tokens, and tokens
    that the model does not have.

    \b
    Example:
      mlx-adapters data check data/sql --mask-prompt
      mlx-adapters data check data/sql --mask-prompt --row 2
    """
    from mlx_adapters.data.checking import check_data

    report = check_data(data, base, with_objective(TrainConfig(**settings), objective), row)
    if as_json:
        _output.emit_json(report)
        return
    for note in report.notes:
        _output.note(note)
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
    most = max((many for *_, many in train.histogram), default=1) or 1
    width = min(40, _output.columns() - 23)
    _output.say("\ntokens per training row")
    for low, high, many in train.histogram:
        _output.say(f"{low:>6}-{high:<6} {many:>6}  {'#' * round(width * many / most)}".rstrip())
    for name, split in report.splits.items():
        _list(name, split)
    shown = report.shown
    _output.say(f"\ntraining row {row}; the loss counts what stands between [[ and ]]")
    _output.out(_marked(shown.pieces))
    if shown.rejected:
        _output.out(f"\nits rejected answer\n{_marked(shown.rejected)}")
    for turn in shown.turns:
        ends = "" if turn.stops else ", and ends in no token that stops a generation"
        _output.say(f"message {turn.message}: {count(turn.trained_tokens, 'token')}{ends}")
    if not report.stops:
        _output.warn(NO_STOP)
    _output.say(f"\n{_verdict(report)}")
    folder, first = _output.word(data), list[str]()
    if Path(data).is_file():
        out = _output.word(Path(data).with_suffix("") / "split")
        folder, first = out, [f"mlx-adapters data split {folder} {out}"]
    train_it = f"mlx-adapters train {_output.word(base)} --data {folder} --name NAME{carried('train')}"
    _output.next_steps(*first, train_it)


def _verdict(report: "DataReport") -> str:
    """What is trained, and what of it one may want to look at."""
    train, found = report.splits["train"], list[str]()
    for name, split in report.splits.items():
        odd = {
            "cut": split.truncated,
            "with nothing left": len(split.dropped),
            "left out": len(split.unusable),
            "double": split.duplicates,
            "with an empty answer": len(split.empty_answers),
            "in train too": report.overlaps.get(name, 0),
            "with words that never reach the model": len({text.where for text in split.left_out}),
            "with two BOS tokens": len(split.doubled_bos),
            "with text that is read as special tokens": len(split.control_tokens),
            "with tokens that the model does not have": len(split.outside_model),
        }
        found += [f"{many:,} of {name} {what}" for what, many in odd.items() if many]
    trained = f"{count(train.rows, 'row')} train {count(train.trained_tokens, 'token')}"
    judged = "" if "valid" in report.splits else "; there are no validation rows"
    return f"{trained}{judged}; {'worth a look: ' + ', '.join(found) if found else 'nothing stands out'}."


def _list(name: str, split: "SplitReport") -> None:
    """What stands out in a split, with the first places."""
    if split.turn_tokens is not None:
        least, median, most = split.turn_tokens
        many = split.endless_turns
        endless = f"; {many} {'ends' if many == 1 else 'end'} in no token that stops a generation" if many else ""
        turns = count(split.turns, "turn")
        _output.say(f"{name}, {turns} of the assistant: {least} to {most} tokens, median {median:g}{endless}")
    by_field: dict[tuple[str, str], list[str]] = {}
    for text in split.left_out:
        message = f", message {text.message}" if text.message else ""
        place = f"{text.where}{message}: {_output.middle_out(text.text, 60)!r}"
        by_field.setdefault((text.role, text.field), []).append(place)
    for (role, field), places in by_field.items():
        whose = f"{field} of '{role}'" if role else f"{field} of the row"
        _output.say(f"{name}, never reaches the model, {whose} ({len(places)}): {_first(places)}")
    for role, many in split.unknown_roles.items():
        _output.say(f"{name}, messages of an unknown role '{role}' ({many}): only 'assistant' is trained")
    for what, where in (
        ("empty answer", split.empty_answers),
        ("nothing left to train", split.dropped),
        ("left out", split.unusable),
        ("put otherwise, since the chat template refuses it as it stands", split.changed),
        ("answers with calls alone", split.calls_only),
        ("begins with two BOS tokens", split.doubled_bos),
        ("text that is read as special tokens", split.control_tokens),
        ("has tokens that the model does not have, and cannot be trained", split.outside_model),
    ):
        if where:
            _output.say(f"{name}, {what} ({len(where)}): {_first(where)}")


def _first(places: Sequence[str], most: int = 3) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return "; ".join(places[:most]) + more


def _marked(pieces: Sequence[tuple[str, bool]]) -> str:
    return "".join(f"[[{text}]]" if trained else text for text, trained in _bounded(pieces))


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
        _output.say(f"{_output.place(out)}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
        there, how = _output.word(out), _how_to_train(Path(out) / "train.jsonl")
        _output.next_steps(
            f"mlx-adapters data check {there}{how}", f"mlx-adapters train BASE --data {there} --name NAME{how}"
        )


def _how_to_train(rows: Path) -> str:
    """The options that rows of this file's kind, as its first one tells it, need or allow."""
    from mlx_adapters.rows.row import RawRow

    with rows.open(encoding="utf-8") as stream:
        values = json.loads(stream.readline())
    try:
        row = RawRow(values, "the first row")
        objective = " --objective dpo" if row.rejected is not None else ""
        return objective + (" --mask-prompt" if row.format != "text" else "")
    except FormatError:  # columns that only their owner knows
        return " --prompt-column COLUMN --completion-column COLUMN --mask-prompt"
