"""Rows from Python: lists, generators, frames of pandas and polars, tables of Arrow, `datasets.Dataset`."""

from collections.abc import Iterable, Mapping
from typing import Any

from mlx_adapters.errors import FormatError
from mlx_adapters.rows import shapes, splits
from mlx_adapters.rows.files import Located
from mlx_adapters.rows.values import kind, require_unicode

HINT = 'a row is a mapping, such as {"prompt": "...", "completion": "..."} or {"messages": [...]}.'


def located(data: Any, source: str = "data") -> dict[str, list[Located]]:
    """The rows of each split, by "train", "valid" and "test", with the places where they stand.

    A mapping whose keys name splits is a data set in parts, one of lists a table. Raises FormatError for what holds
    no rows.
    """
    if isinstance(data, Mapping) and not isinstance(data, str):
        chosen = splits.choose([str(key) for key in data], source, "give one for each.")
        parts = {split: data[name] for split, name in chosen.items() if not _is_column(data[name])}
        if parts and len(parts) == len(chosen):
            return {split: rows(part, f"{split} row") for split, part in parts.items()}
    return {"train": rows(data, "row")}


def _is_column(values: Any) -> bool:
    """Whether these are values of one column, and not rows."""
    return isinstance(values, list | tuple) and bool(values) and not isinstance(values[0], Mapping)


def rows(data: Any, what: str) -> list[Located]:
    """The rows of one split, each with its place: `what` and its number. Raises FormatError for what holds none."""
    numbered: list[Located] = []
    for number, row in enumerate(_mappings(data), 1):
        where = f"{what} {number}"
        if not isinstance(row, Mapping):
            raise FormatError(f"{where} is {kind(row)}.", HINT)
        try:
            values = {str(name): _without_arrays(value) for name, value in row.items()}
        except RecursionError:
            raise FormatError(f"{where} is nested too deeply, or holds itself.") from None
        require_unicode(values, where)
        numbered.append((values, where))
    return numbered


def _mappings(data: Any) -> Iterable[Any]:
    for name, options in (("iterrows", ("records",)), ("to_dicts", ()), ("to_pylist", ())):  # pandas, polars, Arrow
        if hasattr(data, name):
            if not getattr(getattr(data, "columns", None), "is_unique", True):
                raise FormatError("The frame has two columns of one name.", "rename one, or leave it out.")
            records = getattr(data, name.replace("iterrows", "to_dict"))(*options)
            return _renamed(records)
    if isinstance(data, Mapping):
        return _from_columns(data)
    if isinstance(data, str | bytes):
        raise FormatError(f"The data is {kind(data)}, not rows.", HINT)
    if not isinstance(data, Iterable) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[i] for i in range(len(data)))  # torch's kind of data set
    if not isinstance(data, Iterable):
        raise FormatError(f"The data is {kind(data)}, not rows.", HINT)
    return data


def _renamed(rows: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """Rows of a frame. Two columns of known names may have capitals; of two unknown ones the first is the prompt."""
    if not rows or len(rows[0]) != 2 or shapes.is_known({str(name): value for name, value in rows[0].items()}):
        return rows
    small = {str(name).strip().lower(): value for name, value in rows[0].items()}
    names = tuple(small) if len(small) == 2 and shapes.is_known(small) else ("prompt", "completion")
    return [dict(zip(names, row.values(), strict=True)) for row in rows]


def _from_columns(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table given as {"prompt": [...], "completion": [...]}."""
    columns = {str(name): _without_arrays(values) for name, values in data.items()}
    lengths = {len(values) if isinstance(values, list | tuple) else None for values in columns.values()}
    if len(lengths) != 1 or None in lengths:
        raise FormatError("The data is one object, not rows.", f"give a list of rows; {HINT}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _without_arrays(value: Any) -> Any:
    """Arrays of numpy, as pandas has them in its cells, as lists."""
    if isinstance(value, Mapping):
        return {key: _without_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(item) for item in value]
    if getattr(value, "ndim", 0) and hasattr(value, "tolist"):
        return _without_arrays(value.tolist())
    return value
