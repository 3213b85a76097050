"""Values of a row: what JSON can hold, what is text, and how a value is named in an error."""

import json
import math
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from mlx_adapters.errors import FormatError

DEEPEST = 100  # levels of lists and objects in a row; people's have a dozen


def is_missing(value: Any) -> bool:
    """Whether a value says that there is none: null, or what a table puts in its place (NaN, pandas' NA and NaT)."""
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


def plain(value: Any, nulls: bool = False) -> Any:
    """A value as JSON would hold it.

    Parquet, Arrow and tables fill the absent fields of a struct with null, which a chat template must not see: nulls
    in objects are left out, unless `nulls` asks for them; those in lists are somebody's values. Arrays become lists,
    numbers of numpy become Python's. What JSON has no form for becomes text.
    """
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): plain(item, nulls) for key, item in value.items() if nulls or not is_missing(item)}
    if isinstance(value, list | tuple):
        return [plain(item, nulls) for item in value]
    if is_missing(value):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if hasattr(value, "tolist") and not isinstance(value, memoryview):  # numpy's arrays and numbers
        return plain(value.tolist(), nulls)
    return str(value)


def kind(value: Any) -> str:
    """What a value is, in the words of an error."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", tuple: "a list", str: "text"}
    if is_missing(value):
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes"
    return names.get(type(value), f"a value of type {type(value).__name__}")


def text_of(value: Any, name: str, where: str) -> str:
    """The value, if it is text that any tokenizer takes. Raises FormatError, naming the place."""
    if not isinstance(value, str):
        raise FormatError(f"{where}: '{name}' must be text, not {kind(value)}.")
    return value


def require_unicode(values: Any, where: str) -> None:
    """Raise FormatError for half of a surrogate pair, which stands for no character, and for a bottomless row."""
    try:
        text = json.dumps(values, ensure_ascii=False, default=str)
        text.encode()
        if _is_deep(values, text):
            raise ValueError
    except UnicodeEncodeError:
        half = "the text holds half of a surrogate pair, which is no Unicode"
        raise FormatError(f"{where}: {half}.", "write the character whole, or leave it out.") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: the row is nested too deeply, or holds itself.") from None


def parsed(value: Any) -> Any:
    """The JSON that a text holds; any other value, and a text that is no JSON, as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return value if _is_deep(read, value) else read


def _is_deep(value: Any, text: str) -> bool:
    """Whether a value that `text` spells has more levels than code that descends into it can take."""
    level = [value] if text.count("[") + text.count("{") > DEEPEST else []
    for _ in range(DEEPEST):
        level = [item for one in level for item in (one.values() if isinstance(one, Mapping) else one)]
        level = [item for item in level if isinstance(item, Mapping | list | tuple)]
    return bool(level)
