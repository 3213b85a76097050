"""Settings to and from plain values. Imports no MLX.

`from_mapping` is the one strict way from YAML, JSON or a command line to a setting: an unknown key or a
wrong type is a ConfigError that names the key and its nearest neighbor.
"""

import contextlib
import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar

from mlx_adapters.errors import ConfigError, NotFoundError, did_you_mean
from mlx_adapters.units import count

Config = TypeVar("Config")

UNIONS = (typing.Union, types.UnionType)
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
WORDS |= {tuple: "a list", dict: "a mapping"}
MOST_BYTES, MOST_VALUES = 1_000_000, 100_000  # of a config file


def require(condition: bool, message: str, hint: str | None = None) -> None:
    """Raise ConfigError(message, hint) unless `condition` holds."""
    if not condition:
        raise ConfigError(message, hint)


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def finite(value: Any, name: str) -> float:
    """A number as Python's float. Raises ConfigError, with `name`, for what is none or is not finite."""
    number = math.nan
    if isinstance(value, numbers.Number) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, OverflowError):  # complex, and beyond all floats
            number = float(value)  # type: ignore[arg-type]
    require(math.isfinite(number), f"{name} must be a finite number, not {shown(value)}.")
    return number


def weights_of(given: Any, adapters: int, each: float) -> list[float]:
    """One weight for each adapter; `each` where none are given. Raises ConfigError."""
    if given is None:
        return [each] * adapters
    weights = [finite(one, "Every weight") for one in (given if isinstance(given, Iterable) else [given])]
    there = f"{count(adapters, 'adapter')}, but {count(len(weights), 'weight')}"
    require(len(weights) == adapters, f"There are {there}.", "give --weight once for each, in the same order.")
    return weights


hints_of: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str = "the settings") -> Config:
    """Build the dataclass `cls` from `values`, converting lists to tuples and integers to floats.

    Raises ConfigError for an unknown key, a value of the wrong type or a lack of one.
    """
    hints = hints_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    checked = {}
    for key, value in values.items():
        key = str(key)
        if key not in fields:
            raise ConfigError(f"Unknown setting '{key}' in {where}.", did_you_mean(key, fields))
        checked[key] = converted(value, hints[key], key, where)
    for name, field in fields.items():
        known = name in checked or field.default is not field.default_factory  # MISSING both: it has no default
        require(known, f"There is no '{name}' in {where}.")
    return cls(**checked)


def converted(value: Any, hint: Any, key: str, where: str | None = None) -> Any:
    """A value as the annotation `hint` says: NumPy's numbers become Python's, lists tuples.

    `where` it stands, if not in Python: there mappings become settings, which in Python are given as such.

    Raises ConfigError that names its `key`, and where it stands.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in UNIONS:
        kinds = {str(option.name): option for option in options if hasattr(option, "name")}
        if where and kinds and len(kinds) == len(options):  # settings that say by their name which they are
            return _named(kinds, value, key, where)
        for option in options:
            if where and dataclasses.is_dataclass(option) and isinstance(value, Mapping):
                return converted(value, option, key, where)
            with contextlib.suppress(ConfigError):
                return converted(value, option, key, where)
    elif origin is Literal:
        if isinstance(value, str | int) and value in options:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(converted(item, options[0], key, where) for item in value)
    elif origin is dict:
        if isinstance(value, Mapping):
            made = {str(k): converted(v, options[1], key, where) for k, v in value.items()}
            require(len(made) == len(value), f"{key} has a name twice: {shown(value)}.")
            return made
    elif hint is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return float(value)
    elif hint is int:
        if is_whole(value):
            return int(value)
    elif where and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(hint, value, f"'{key}' of {where}")  # type: ignore[arg-type]
    elif isinstance(value, hint):
        return value
    named = f"'{key}' in {where}" if where else key
    raise ConfigError(f"{named} cannot be {shown(value)}.", _instead(value, hint, where))


def _named(kinds: Mapping[str, Any], value: Any, key: str, where: str) -> Any:
    """One of several dataclasses: by its name alone, or a mapping with its name and settings."""
    values = {"name": value} if isinstance(value, str) else value
    name = values.get("name", value) if isinstance(values, Mapping) else value
    name = converted(name, Literal[*kinds], key, where)
    return from_mapping(kinds[name], values, f"'{key}' of {where}")


def shown(value: Any) -> str:
    """A value as the short text of an error."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length():,} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def to_mend(field: str, value: Any) -> str:
    """What to do about a value in an adapter's config that is not of its kind."""
    quoted = isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value)
    return "take the quotes away." if quoted else f"write the '{field}' of its training there."


def _instead(value: Any, hint: Any, where: str | None) -> str | None:
    """The hint of an error: what looks like `value`, and what it may be."""
    choices = choices_of(hint)
    if choices and isinstance(value, str) and not kinds_of(hint):
        return did_you_mean(value, choices, f"there are: {', '.join(choices)}.")
    return f"it must be {_describe(hint, where)}."


def _describe(hint: Any, where: str | None) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if origin in UNIONS:
        return " or ".join(_describe(option, where) for option in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        fields = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"a mapping with {fields}" if where else f"ma.{hint.__name__}(...)"  # type: ignore[union-attr]
    if hint is NoneType:
        return "null" if where else "None"
    return WORDS.get(origin or hint, str(hint))


def alternatives(hint: Any) -> tuple[Any, ...]:
    """What an annotation allows: the parts of `A | B`, or it alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows besides None and its `choices_of`."""
    return tuple(k for k in alternatives(hint) if typing.get_origin(k) is not Literal and k is not NoneType)


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words that an annotation allows."""
    literals = [kind for kind in alternatives(hint) if typing.get_origin(kind) is Literal]
    return tuple(str(word) for literal in literals for word in typing.get_args(literal))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping. Numbers such as 1e-5 are numbers, as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    pattern = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))
    try:
        with open(path, "rb") as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        loader = Loader(text)
        tree = loader.get_single_node()
        _check_keys(tree)
        value = None if tree is None else loader.construct_document(tree)
        _check_size(value)
    except FileNotFoundError:
        raise NotFoundError(f"There is no config file '{path}'.", "'train --print-config' makes one.") from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"The config file '{path}' cannot be read: {detail}.") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"The config file '{path}' must hold 'key: value' lines.")
    return {str(key): item for key, item in value.items()}


def _check_keys(tree: Any) -> None:
    """Raise ValueError for a key that stands twice in one mapping of a YAML tree: nobody knows which is meant."""
    left, seen = [tree], set[int]()
    while left:
        node = left.pop()
        if not isinstance(getattr(node, "value", None), list) or id(node) in seen:
            continue
        seen.add(id(node))
        pairs = [pair for pair in node.value if isinstance(pair, tuple)]
        for key, times in Counter(str(key.value) for key, _ in pairs).items():
            if times > 1:
                raise ValueError(f"'{key}' stands in it twice")
        left += [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]


def _check_size(value: Any) -> None:
    """Raise ValueError for a value that its YAML aliases make huge: written out, it would fill the memory."""
    left = [value]
    for _ in range(MOST_VALUES):
        if not left:
            return
        item = left.pop()
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple | set) else ()
    raise ValueError(f"it holds more than {MOST_VALUES:,} values")


def to_mapping(config: Any) -> dict[str, Any]:
    """The settings as plain JSON values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))
