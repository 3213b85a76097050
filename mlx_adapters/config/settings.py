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
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType
from typing import Any, TypeVar

from mlx_adapters.config.mapping import (
    alternatives,
    choices_of,
    converted,
    hints_of,
    kinds_of,
    require,
    shown,
    to_mapping,
)
from mlx_adapters.errors import ConfigError

Class = TypeVar("Class", bound=type)
Given = TypeVar("Given")


RULES = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Setting:
    """One field, as people are told of it.

    `bounds`: those of RULES that it has; `hint`: its annotation.
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
    hint: Any

    @functools.cached_property
    def kinds(self) -> tuple[Any, ...]:
        """What its value may be, besides None and the `choices`."""
        return kinds_of(self.hint)

    @functools.cached_property
    def choices(self) -> tuple[str, ...]:
        """The words that it is chosen from."""
        return choices_of(self.hint)

    @functools.cached_property
    def as_given(self) -> frozenset[Any]:
        """Types whose values need no look: each request of a server has settings that are checked."""
        return frozenset(alternatives(self.hint)) & {bool, int, float, str, NoneType}

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

    def checked(self, value: Any) -> Any:
        """The value: NumPy's numbers become Python's, lists tuples. Raises ConfigError if it is not of the annotation's
        kind or not within the bounds."""
        if type(value) not in self.as_given:
            value = converted(value, self.hint, self.name)
        if type(value) is float:
            require(math.isfinite(value), f"{self.name} must be a number, not {value}.")
        if type(value) in (int, float):
            for rule, bound in self.bounds.items():
                if not RULES[rule](value, bound):
                    number = "a number " if float in self.kinds and list(self.bounds) == ["above"] else ""
                    wanted = f"{number}{rule.replace('_', ' ')} {_number(bound)}"
                    raise ConfigError(f"{self.name} must be {wanted}, not {shown(value)}.")
        return value


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


def _settings_of(cls: type) -> dict[str, Setting]:
    """All settings of a class by name, in its order."""
    hints, known = hints_of(cls), dict[str, Setting]()
    for field in sorted(
        dataclasses.fields(cls), key=lambda field: field.kw_only is True
    ):  # those of a base class come last
        default = field.default if field.default_factory is MISSING else field.default_factory()
        known[field.name] = Setting(field.name, default, **field.metadata, hint=hints[field.name])
    return known


settings_of: Callable[[type], dict[str, Setting]] = functools.cache(_settings_of)


def check(config: Any) -> None:
    """Make each value of its setting's kind (`Setting.checked`). Raises ConfigError for the first that is not."""
    for name, one in settings_of(type(config)).items():
        object.__setattr__(config, name, one.checked(getattr(config, name)))


def of_kind(kind: type[Given], value: object) -> Given:
    """The settings `value`, or those by default for None. Raises ConfigError for anything else, such as a mapping."""
    known = isinstance(value, kind | None)
    require(known, f"The settings cannot be {shown(value)}.", f"give a {kind.__name__}: ma.{kind.__name__}(...).")
    return kind() if value is None else value  # type: ignore[return-value]


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
