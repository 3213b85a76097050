"""Results as tables: records, pandas frames, HTML, and rows by their name."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from mlx_adapters.display.notebook import html_block, html_table
from mlx_adapters.errors import ConfigError, did_you_mean
from mlx_adapters.units import number

Row = TypeVar("Row")
MAIN = ("value", "median")  # of a figure with its spread: what stands under the figure's own name


class Table:
    """A result that is rows or facts. `records` says which; all else follows."""

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain values by column."""
        return [flat(self)]

    def to_pandas(self) -> Any:
        """The rows as a pandas frame.

        Raises ConfigError if pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError("pandas is not installed.", "pip install pandas; or take records().") from None
        return pandas.DataFrame(self.records())

    def __repr__(self) -> str:
        fields: Iterable[dataclasses.Field[Any]] = getattr(self, "__dataclass_fields__", {}).values()
        facts = {field.name: getattr(self, field.name) for field in fields if field.repr}
        shown = [f"{name}={_brief(value)}" for name, value in facts.items() if value is not None]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        records = self.records()
        columns = list(dict.fromkeys(name for record in records for name in record))
        if len(records) == 1:
            return html_block(type(self).__name__, html_table(("", ""), [(c, _cell(records[0][c])) for c in columns]))
        return html_block(
            type(self).__name__, html_table(columns, ([_cell(r.get(c)) for c in columns] for r in records))
        )


class Rows(list[Row], Table, Generic[Row]):
    """A list that shows itself as a table, and whose entries are also found by name."""

    def records(self) -> list[dict[str, Any]]:
        """One for each entry."""
        return [flat(entry) for entry in self]

    def __getitem__(self, place: Any) -> Any:
        return named(self, place, "name") if isinstance(place, str) else super().__getitem__(place)


def named(rows: Iterable[Any], name: str, key: str) -> Any:
    """The row whose `key` is `name`. Raises ConfigError that suggests the nearest."""
    there = {getattr(row, key): row for row in rows}
    if name not in there:
        known = f"there are: {', '.join(there)}." if there else "it is empty."
        raise ConfigError(f"There is no '{name}' in it.", did_you_mean(name, there, known))
    return there[name]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A dataclass or mapping as one record: what is inside it under `outer.inner`; longer lists are left out."""
    if dataclasses.is_dataclass(value):
        inside: Mapping[str, Any] = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
    elif isinstance(value, Mapping):
        inside = {str(key): item for key, item in value.items()}
    else:
        return {} if isinstance(value, list | tuple) and any(map(_is_inner, value)) else {name: value}
    record: dict[str, Any] = {}
    for key, item in inside.items():
        record |= flat(item, name if name and key in MAIN else f"{name}.{key}" if name else key)
    return record


def _is_inner(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, Mapping | list | tuple)


def _brief(value: Any) -> str:
    """A plain value as it is written, of what holds others how many."""
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, Path):
        return repr(value.name)
    if isinstance(value, list | tuple | Mapping) and value:
        return f"<{len(value)}>"
    return f"<{type(value).__name__}>" if dataclasses.is_dataclass(value) else repr(value)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return (
        "" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )
