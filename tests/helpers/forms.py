"""What stands for an adapter, a model or rows in the public functions, and which parameters take which."""

import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

import mlx_lm
import pandas
from helpers.public import NAMES

import mlx_adapters as ma
from mlx_adapters.benchmarking.reports import Report
from mlx_adapters.data.datasets import DataSet, read_data
from mlx_adapters.models.adapter import Adapter, AdapterLike
from mlx_adapters.models.base import Base, BaseLike, Named
from mlx_adapters.sources.bases import resolve_base

METHODS = ("LiveModel.attach", "LiveModel.using")
TYPES = {"Adapter": Adapter, "AdapterLike": AdapterLike, "BaseLike": BaseLike, "Named": Named}


def public_functions() -> dict[str, Callable[..., Any]]:
    """Every public function, and the methods that take what they take."""
    functions = {name: getattr(ma, name) for name in NAMES if inspect.isfunction(getattr(ma, name))}
    return functions | {name: getattr(ma.LiveModel, name.partition(".")[2]) for name in METHODS}


def parts_of(hint: Any) -> set[Any]:
    """The types of a union, with those in the unions and iterables inside it."""
    if isinstance(hint, UnionType) or typing.get_origin(hint) in (typing.Union, list, tuple) or _holds_several(hint):
        return {part for inner in typing.get_args(hint) for part in parts_of(inner)}
    return {hint}


def _holds_several(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, typing.Iterable) and not issubclass(origin, Mapping)


def kind_of(hint: Any) -> str | None:
    """ "adapter", "model", "either", "data" or "report" by what a parameter's type takes; "place" for another path."""
    parts = parts_of(hint)
    if DataSet in parts:
        return "data"
    if Adapter in parts and Named in parts:
        return "either" if Base in parts else "adapter"
    if Base in parts:
        return "model"
    if Report in parts and Path in parts:
        return "report"
    return "place" if parts & {Path, Named} else None


def parameters_of(function: Callable[..., Any]) -> dict[str, str]:
    """{parameter: kind} of those that take one of the kinds."""
    hints = typing.get_type_hints(function, localns=TYPES)
    kinds = {name: kind_of(hints[name]) for name in inspect.signature(function).parameters if name in hints}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def takes_several(function: Callable[..., Any], parameter: str) -> bool:
    """Whether the parameter of adapters also takes an iterable of them."""
    hint = typing.get_type_hints(function, localns=TYPES)[parameter]
    return kind_of(hint) in ("adapter", "either") and any(map(_holds_several, typing.get_args(hint)))


class Indexed:
    """Rows as torch's data sets give them."""

    def __init__(self, rows: list[dict]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict:
        return self._rows[place]


class Columned(Indexed):
    """Rows as `datasets.Dataset` gives them: iterated, and whole columns by name."""

    @property
    def column_names(self) -> list[str]:
        return list(self._rows[0])

    def __iter__(self) -> Iterator[dict]:
        return iter(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return [row[place] for row in self._rows] if isinstance(place, str) else self._rows[place]


@dataclass
class World:
    """One base, one adapter, rows and a report, in all their forms: {kind: {name of the form: how to get one}}."""

    folder: Path
    base: Path
    run: ma.TrainRun
    forms: dict[str, dict[str, Callable[[], Any]]]


def make_world(folder: Path, base: Path, report: Report) -> World:
    """The world in `folder`, which is the current one, under a home of its own."""
    (folder / "tiny").symlink_to(base)
    rows = [{"prompt": f"List {i}.", "completion": f"SELECT {i} FROM courses WHERE n = {i};"} for i in range(45)]
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ma.TrainConfig(
        iterations=2, batch_size=2, save_every=2, eval_every=2, valid_fraction=0.05, learning_rate=0.1
    )
    run = ma.train(base, "rows", name="sql", lora=ma.LoraConfig(rank=2), training=settings)
    (folder / "o5").symlink_to(run.folder)
    ma.merge(["sql"], [1.0], name="merged")
    changed = {name: 3 * array for name, array in ma.load_adapter("sql").weights.items()}
    ma.write_adapter(ma.load_adapter("sql").with_weights(changed), folder / "other")
    options = ma.FuseOptions(method="nearest", check=False)
    fused = ma.fuse("tiny", "sql", "fused", quantization="none", options=options)
    (folder / "report.json").write_text(json.dumps(report.to_json()))
    forms = {
        "adapter": same_each_time(adapters(run)),
        "model": same_each_time(models(base, fused)),
        "data": data(folder / "rows" / "train.jsonl", rows),
        "report": same_each_time(
            {"Report": report, "path": "report.json", "Path": Path("report.json"), "abs": str(folder / "report.json")}
        ),
    }
    return World(folder, base, run, {**forms, "either": forms["adapter"]})


def same_each_time(values: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    return {name: (lambda value=value: value) for name, value in values.items()}


def adapters(run: ma.TrainRun) -> dict[str, Any]:
    sql = ma.load_adapter("sql")
    return {
        "name": "sql",
        "name@iteration": "sql@2",
        "name@best": "sql@best",
        "name@last": "sql@last",
        "path": "./o5",
        "path@iteration": "./o5@2",
        "folder": "o5",
        "Path": Path("o5"),
        "absolute": str(run.folder),
        "absolute Path": run.folder,
        "Adapter": sql,
        "Adapter@iteration": ma.load_adapter("sql@2"),
        "read_adapter": ma.read_adapter("o5"),
        "in memory": sql.with_weights(dict(sql.weights)),
        "scale": ma.scale("sql", 1.0),
        "merge": ma.merge(["sql"], [1.0]),
        "registered merge": ma.load_adapter("merged"),
        "TrainRun": run,
        "run.best": run.best,
        "run.final": run.final,
        "entry": ma.list_adapters()["sql"],
        "Details": ma.describe("sql"),
        "Added": ma.add("o5", out="added"),
    }


def models(base: Path, fused: ma.FuseResult) -> dict[str, Any]:
    return {
        "absolute": str(base),
        "absolute Path": base,
        "folder": "tiny",
        "path": "./tiny",
        "Path": Path("tiny"),
        "Base": resolve_base(base),
        "FuseResult": replace(fused, folder=base),
        "Added": ma.add(ma.pack("tiny", "tiny.tar.gz"), out="again"),
        "LiveModel": ma.load_model(base),
        "mlx-lm": ma.wrap_model(*mlx_lm.load(str(base))[:2], base),
    }


def data(file: Path, rows: list[dict]) -> dict[str, Callable[[], Any]]:
    """Made anew each time: a generator is used up by one call."""
    columns = {name: [row[name] for row in rows] for name in ("prompt", "completion")}
    renamed = {"question": columns["prompt"], "sql": columns["completion"]}
    return {
        "absolute": lambda: str(file),
        "file": lambda: "rows/train.jsonl",
        "file Path": lambda: Path("rows/train.jsonl"),
        "folder": lambda: "rows",
        "path": lambda: "./rows",
        "Path": lambda: Path("rows"),
        "list": lambda: rows,
        "tuple": lambda: tuple(rows),
        "generator": lambda: iter(rows),
        "frame": lambda: pandas.DataFrame(rows),
        "frame of two columns": lambda: pandas.DataFrame(renamed),
        "frame of messages": lambda: pandas.DataFrame({"messages": map(conversation, rows)}),
        "columns": lambda: columns,
        "indexed": lambda: Indexed(rows),
        "Dataset": lambda: Columned(rows),
        "splits": lambda: {"train": Columned(rows)},
        "conversations": lambda: [{"messages": conversation(row)} for row in rows],
        "DataSet": lambda: read_data("rows"),
    }


def conversation(row: dict) -> list[dict]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
