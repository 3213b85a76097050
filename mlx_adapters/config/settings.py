"""A setting is spelled once: its dataclass field holds the default, what it means, its bounds and its choices.

    @settings
    @dataclass(frozen=True)
    class Kiln:
        hours: int = setting(8, "How long to fire", at_least=1)
        glaze: Literal["matt", "clear"] = setting("matt", "What goes on top")

        def __post_init__(self) -> None:
            check(self)

Command options (`cli._settings`), the docstring's `Args`, docs/settings.md, the comments of a printed config and the
errors for values out of range are made of it. Choices are the annotation's `Literal`. Imports no MLX.
"""

import dataclasses
import functools
import math
import operator
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, TypeVar

from mlx_adapters.config.mapping import converted, require, shown, to_mapping
from mlx_adapters.errors import ConfigError, did_you_mean

Class = TypeVar("Class", bound=type)
Given = TypeVar("Given")


RULES = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Setting:
    """One field, as people are told of it.

    `bounds`: those of RULES that it has; `kinds`: what its value may be, besides None and the `choices`.
    """

    name: str
    default: Any
    help: str
    more: str
    means: str | None
    bounds: dict[str, float]
    off: str | None
    metavar: str | None
    from_file: bool
    repeated: bool
    kinds: tuple[Any, ...]
    choices: tuple[str, ...]

    @property
    def shown_default(self) -> str:
        """The default as people write it; "" for none."""
        if isinstance(self.default, tuple):
            return ", ".join(map(str, self.default))
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if dataclasses.is_dataclass(self.default):  # settings that say by their name which they are
            return str(self.default.name)  # type: ignore[union-attr]
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return "" if self.default in (None, {}) else str(self.default)

    @property
    def range(self) -> str:
        """ "at least 0, below 1"; "" if it has no bounds."""
        return ", ".join(f"{rule.replace('_', ' ')} {_number(bound)}" for rule, bound in self.bounds.items())

    def check(self, value: Any) -> None:
        """Raise ConfigError if `value` is not among the choices or not within the bounds."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            finite = isinstance(value, int) or math.isfinite(value)
            require(finite, f"{self.name} must be a number, not {value}.")
            number = "a number " if float in self.kinds and list(self.bounds) == ["above"] else ""
            for rule, bound in self.bounds.items():
                wanted = f"{number}{rule.replace('_', ' ')} {_number(bound)}"
                require(RULES[rule](value, bound), f"{self.name} must be {wanted}, not {value}.")
        elif self.choices and not self.kinds and value is not None and value not in self.choices:
            hint = did_you_mean(str(value), self.choices, f"there are: {', '.join(self.choices)}.")
            raise ConfigError(f"{self.name} cannot be '{value}'.", hint)


def setting(
    default: Any,
    help: str,
    *,
    more: str = "",
    means: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    off: str | None = None,
    metavar: str | None = None,
    from_file: bool = False,
    repeated: bool = False,
    secret: bool = False,
) -> Any:
    """A field of a settings class.

    Args:
        default: its value, or a function that makes it (`dict`).
        help: what it is, in a few words without a full stop; other settings in `backquotes`. The option's help.
        more: what the pages say besides.
        means: the default in words, where the value itself does not say it.
        at_least, above, at_most, below: the bounds of a number.
        off: the option that turns a switch off, if not "no-" and its name.
        metavar: what the value is called in the help.
        from_file: the option, and a config file, name a file with the value in it.
        repeated: the option is given once for each of the values.
        secret: never shown when the settings are.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    told: dict[str, Any] = {"help": help, "more": more, "means": means, "off": off, "metavar": metavar}
    told |= {"from_file": from_file, "repeated": repeated}
    told |= {"bounds": {rule: bound for rule, bound in bounds.items() if bound is not None}}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=told)
    return dataclasses.field(default=default, repr=not secret, metadata=told)


_known: dict[type, dict[str, Setting]] = {}  # each request of a server has settings that are checked


def settings_of(cls: type) -> dict[str, Setting]:
    """All settings of a class by name, in its order."""
    if cls not in _known:
        _known[cls] = _read_settings(cls)
    return _known[cls]


def _read_settings(cls: type) -> dict[str, Setting]:
    hints, known = typing.get_type_hints(cls), dict[str, Setting]()
    for field in sorted(
        dataclasses.fields(cls), key=lambda field: field.kw_only is True
    ):  # those of a base class come last
        kinds = [hint for hint in _alternatives(hints[field.name]) if hint is not type(None)]
        choices = [choice for hint in kinds if typing.get_origin(hint) is Literal for choice in typing.get_args(hint)]
        kinds = [hint for hint in kinds if typing.get_origin(hint) is not Literal]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        known[field.name] = Setting(
            field.name, default, **field.metadata, kinds=tuple(kinds), choices=tuple(map(str, choices))
        )
    return known


def _alternatives(hint: Any) -> Sequence[Any]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def check(config: Any, kinds: bool = False) -> None:
    """Raise ConfigError for the first value that is not among its setting's choices or within its bounds, or if `kinds`
    not of its annotation's kind."""
    for name, one in settings_of(type(config)).items():
        one.check(getattr(config, name))
    if kinds:
        _check_kinds(config)


def _check_kinds(config: Any) -> None:
    """Raise ConfigError for the first value that is not of its annotation's kind. NumPy's numbers become Python's and
    lists tuples; settings in settings are left to themselves."""
    cls: Any = type(config)
    for name, hint in _hints(cls).items():
        value = getattr(config, name)
        made = converted(value, hint, name, "the settings")
        if type(value) not in (int, float, str, bool):  # 2 for 2.0 stays as it was given
            object.__setattr__(config, name, made)


def of_kind(kind: type[Given], value: object) -> Given:
    """The settings `value`, or those by default for None. Raises ConfigError for anything else, such as a mapping."""
    known = isinstance(value, kind | None)
    require(known, f"The settings cannot be {shown(value)}.", f"give a {kind.__name__}: ma.{kind.__name__}(...).")
    return kind() if value is None else value  # type: ignore[return-value]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = {name: typing.get_type_hints(cls)[name] for name in settings_of(cls)}
    inner = {name for name, hint in hints.items() if any(map(dataclasses.is_dataclass, typing.get_args(hint)))}
    return {name: hint for name, hint in hints.items() if name not in inner}


def settings(cls: Class) -> Class:
    """Decorates a dataclass: its docstring tells all settings, before what it raises."""
    lines = [
        textwrap.fill(f"{one.name}: {told(one, choices=True)}", 112, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for one in settings_of(cls).values()
    ]
    before, raises, after = (cls.__doc__ or "").partition("    Raises ")
    cls.__doc__ = "\n".join([f"{before}    Args:", *lines, "", raises + after])
    return cls


def told(one: Setting, choices: bool = False) -> str:
    """What the pages say of a setting: its help, what its default stands for, and more."""
    means = f"; None: {one.means}" if one.means and one.default is None else ""
    if one.means and one.means.startswith(f"{one.default}: "):
        means = f"; {one.means}"
    return f"{one.help}{_choices(one) if choices else ''}{means}.{f' {one.more}' if one.more else ''}"


def commented(config: Any, names: Sequence[str] = ()) -> str:
    """The settings (those of `names`, else all) as lines of YAML, each with its help as a comment."""
    import yaml

    known, values = settings_of(type(config)), to_mapping(config)
    lines = [
        (known[name], yaml.safe_dump({name: values[name]}, default_flow_style=True, width=math.inf))
        for name in names or known
    ]
    width = max(len(line) for _, line in lines)
    return "".join(f"{line.strip()[1:-1]:{width}}# {one.help.replace('`', '')}{_choices(one)}\n" for one, line in lines)


def _choices(one: Setting) -> str:
    return f" ({', '.join(one.choices)})" if one.choices and not one.kinds else ""


def _number(bound: float) -> str:
    if isinstance(bound, int) and bound >= 1 << 32 and bound & (bound - 1) == 0:
        return f"2**{bound.bit_length() - 1}"
    return f"{bound:,}"
