"""Command options made of the settings' fields (`config.settings`)."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

from mlx_adapters.config.settings import Setting, settings_of
from mlx_adapters.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])
MACHINE_WORD = 1 << 32  # a bound as large as this says nothing to people


class Counts(click.ParamType):
    """Whole numbers of at least 1, separated by commas."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
            self.fail(f"'{value}' is not a list of whole numbers such as 128,512.", param, ctx)
        return tuple(int(part) for part in parts)


class Names(click.ParamType):
    """Names between commas; or the one word that means all of them."""

    name = "names"

    def __init__(self, word: str | None) -> None:
        self.word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...] | str:
        if value == self.word or isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())


class CountOr(click.ParamType):
    """A whole number, or a word; the class checks the bounds."""

    name = "integer"

    def __init__(self, word: str) -> None:
        self.word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in (self.word, "-1"):  # -1: as mlx-lm spells it
            return self.word
        if isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            name = param.opts[0] if param else ""
            raise ConfigError(f"{name} '{value}' is neither a number nor '{self.word}'.") from None


class TextFile(click.ParamType):
    """A file, for the text that it holds."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return Path(value).expanduser().read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            self.fail(f"'{value}' is not UTF-8 text.", param, ctx)
        except (OSError, ValueError) as error:
            self.fail(f"'{value}' cannot be read: {getattr(error, 'strerror', None) or error}.", param, ctx)


class KeyValue(click.ParamType):
    """KEY=VALUE: a name, and a value as JSON writes it (also True, False and None), or else a text."""

    name = "key=value"
    words: ClassVar = {"true": True, "false": False, "none": None, "null": None}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not (key.isidentifier() or key.isdecimal()):
            self.fail(f"'{value}' is not KEY=VALUE, such as enable_thinking=false.", param, ctx)
        if text.lower() in self.words:
            return key, self.words[text.lower()]
        try:
            return key, json.loads(text)
        except (ValueError, RecursionError):
            return key, text


def options(cls: type, only: str = "", without: str = "", over_file: bool = False) -> Callable[[Command], Command]:
    """Decorates a command: an option for each setting of the class (those of `only`, or all but those of `without`).

    `over_file`: what is not typed stays None, since a config file may give it, and the class checks the bounds.
    """
    names = only.split() or [name for name in settings_of(cls) if name not in without.split()]

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = option(cls, name, over_file)(command)
        return command

    return decorate


def option(
    cls: type, name: str, over_file: bool = False, *, flag: str | None = None, **changed: Any
) -> Callable[[Command], Command]:
    """The option of one setting, spelled `flag`; `changed` goes to `click.option` in place of what the setting says."""
    one = settings_of(cls)[name]
    told: dict[str, Any] = {"help": help_of(one, over_file), "metavar": one.metavar}
    if one.kinds == (dict[str, Any],):  # --chat-template-arg KEY=VALUE, as often as one likes
        nothing: dict[str, Any] | None = None if over_file else {}
        told |= {"type": KeyValue(), "multiple": True, "callback": lambda _, __, pairs: dict(pairs) or nothing}
        one, flag = dataclasses.replace(one, default=None), flag or _flag(re.sub("args$", "arg", name))
    elif one.repeated:
        told |= {"type": str, "multiple": True}
    elif bool not in one.kinds:
        kind = changed.get("type") or _type(one, bounded=not over_file)
        told |= {"type": kind, "show_default": not over_file and one.default is not None}
    elif one.default is False:
        told |= {"is_flag": True}
    else:
        flag = flag or f"{_flag(name)}/{_flag(one.off or f'no_{name}')}"
    told |= {"default": None if over_file else one.default}
    return click.option(flag or _flag(name), name, **told | changed)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def help_of(one: Setting, over_file: bool = False) -> str:
    """The help of a setting's option; the default stands in it where click does not show it."""
    text = re.sub(r"`(\w+)`", lambda other: _flag(other[1]), one.help)
    if one.means and not over_file and one.default is not None:
        return f"{text}; {one.means}."
    words = one.means or (one.shown_default if over_file and bool not in one.kinds else "")
    return f"{text} [{words}]." if words else f"{text}."


def _type(one: Setting, bounded: bool) -> Any:
    word = one.choices[0] if one.choices else None
    if one.from_file:
        return TextFile()
    if one.kinds == (tuple[int, ...],):
        return Counts()
    if one.kinds == (tuple[str, ...],):
        return Names(word)
    if word is not None:
        return CountOr(word) if int in one.kinds else click.Choice(one.choices)
    if str in one.kinds:
        return str
    (kind,) = one.kinds
    bounds = {rule: bound for rule, bound in one.bounds.items() if bounded and bound < MACHINE_WORD}
    if kind not in (int, float) or not bounds:
        return kind
    low, high = bounds.get("at_least", bounds.get("above")), bounds.get("at_most", bounds.get("below"))
    span: Any = click.IntRange if kind is int else click.FloatRange
    return span(low, high, min_open="above" in bounds, max_open="below" in bounds)
