"""Chat templates are programs of the base's maker: they get some seconds, some memory, and no more.

transformers renders them in jinja's sandbox, which keeps them from the machine but not from endless work. `Bounded`
is that sandbox with limits. A loop is ended by an exception that a watching thread sets in the thread that renders;
a single operation that would make something huge cannot be ended so, and is refused before it begins.
"""

import contextlib
import ctypes
import functools
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_adapters.errors import AdapterError
from mlx_adapters.storage import files
from mlx_adapters.storage.hf_names import TEMPLATE_FILE, TEMPLATE_FOLDER, TEMPLATE_SETTINGS
from mlx_adapters.storage.paths import glob_there

SECONDS, MEMORY_BYTES = 5.0, 1_000_000_000
LONGEST = 10_000_000  # characters or items that one operation may make
MOST_BITS = 100_000  # of a number
LONG_TEXT, GROWTH = 1_000_000, 8  # a longer text must come from a conversation at least an eighth as long
_WIDTH = re.compile(r"\d{7,}|\*")  # in a format: a width or precision of ten million, or taken from a value


def templates_in(folder: Path, processor: bool = True) -> dict[str, str]:
    """{name: text} of the chat templates in a folder, from any of the files where transformers keeps them; a single one
    is the "default". None that can be read: {}. `processor`: its template counts where the tokenizer has none."""
    with contextlib.suppress(AdapterError, OSError, UnicodeError):
        paths = {Path(path).stem: Path(path) for path in glob_there(str(folder / TEMPLATE_FOLDER / "*.jinja"))}
        if (folder / TEMPLATE_FILE).is_file():
            paths["default"] = folder / TEMPLATE_FILE
        if paths:
            return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
        for file in TEMPLATE_SETTINGS if processor else TEMPLATE_SETTINGS[:1]:
            found = files.read_json(folder / file).get("chat_template") if (folder / file).is_file() else None
            if isinstance(found, list):  # as it is written; transformers has it as a mapping
                found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            named = found if isinstance(found, dict) else {"default": found}
            if texts := {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}:
                return texts
    return {}


def template_in(folder: Path) -> str | None:
    """The chat templates in a folder as one; None where there is none for any conversation."""
    named = templates_in(folder)
    return in_one(named) if "default" in named else None


def in_one(named: Mapping[str, str]) -> str:
    """Named templates as one, which renders what transformers renders: "tool_use" where there are tools, be it an empty
    list of them, "default" elsewhere.

        >>> in_one({"default": "a", "tool_use": "b"})
        '{% if tools is none +%}a{%+ else +%}b{%+ endif %}'
    """
    if "tool_use" not in named:
        return named["default"]
    plain, with_tools = (named[name].removesuffix("\n") for name in ("default", "tool_use"))  # as jinja does at an end
    return "{% if tools is none +%}" + plain + "{%+ else +%}" + with_tools + "{%+ endif %}"


class LimitError(TemplateRuntimeError):
    """A template does more than a template has to."""


class _TooLongError(LimitError):
    """Set in a thread from outside, which gives the class alone."""

    def __init__(self) -> None:
        super().__init__(f"it takes more than {SECONDS:g} seconds or {MEMORY_BYTES / 1e9:g} GB")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Watch:
    """One thread that looks at all renderings at work, every 20 ms, and sleeps while there are none."""

    def __init__(self) -> None:
        self._lock, self._begun = threading.Lock(), threading.Event()
        self._at_work: dict[int, tuple[float, int]] = {}  # thread -> (when to end it, peak memory at which)
        self._ended: set[int] = set()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limits(self) -> Iterator[None]:
        """Raise _TooLongError in the block when it takes too long or too much; a block inside a block is part of it."""
        here = threading.get_ident()
        if here in self._at_work:
            yield
            return
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="chat templates", daemon=True)
            self._thread.start()
        self._at_work[here] = (time.monotonic() + SECONDS, _peak_bytes() + MEMORY_BYTES)
        self._begun.set()
        try:
            yield
        finally:
            with self._lock:
                self._at_work.pop(here, None)
            if here in self._ended:  # it comes at the next step of this thread, if it did not come yet
                self._ended.discard(here)
                with contextlib.suppress(_TooLongError):
                    time.sleep(0.001)

    def _look(self) -> None:
        while self._begun.wait():
            time.sleep(0.02)
            peak, now = _peak_bytes(), time.monotonic()
            with self._lock:
                for thread, (end, memory) in list(self._at_work.items()):
                    if now > end or (peak > memory and now > end - SECONDS + 0.1):
                        del self._at_work[thread]
                        self._ended.add(thread)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(_TooLongError)
                        )
                if not self._at_work:
                    self._begun.clear()


_watch = _Watch()


def _renew() -> None:
    global _watch
    _watch = _Watch()  # a fork has no watching thread, and may have its lock held


os.register_at_fork(after_in_child=_renew)


@dataclass(frozen=True)
class Call:
    """A rendering that was seen: the template, its variables by name, and the text."""

    template: "LimitedTemplate"
    variables: Mapping[str, Any]
    text: str


_seen: ContextVar[list[Call] | None] = ContextVar("renderings seen", default=None)


@contextlib.contextmanager
def seen_renderings() -> Iterator[list[Call]]:
    """What is rendered within the block, by whomever: so one sees what a tokenizer hands to its template."""
    calls: list[Call] = []
    token = _seen.set(calls)
    try:
        yield calls
    finally:
        _seen.reset(token)


class LimitedTemplate(Template):
    """A template of `Bounded`. It knows its `source`."""

    source: str
    traced: "LimitedTemplate | None" = None  # see `tracing`

    def render(self, *args: Any, **kwargs: Any) -> str:
        """See jinja2.Template.render. Raises LimitError."""
        with _watch.limits():
            text = super().render(*args, **kwargs)
        if len(text) > LONG_TEXT and len(text) > GROWTH * len(str((args, kwargs))):
            raise LimitError(f"it makes {len(text):,} characters of a short conversation")
        if (seen := _seen.get()) is not None:
            seen.append(Call(self, dict(*args, **kwargs), text))
        return text


class Bounded(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which no operation makes something huge and a whole rendering has its limits."""

    template_class = LimitedTemplate
    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse products, powers and formats that would be huge."""
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse calls of methods of texts and numbers that would make something huge."""
        if isinstance(__obj, BuiltinMethodType) or isinstance(getattr(__obj, "__self__", None), str):
            _check_call(__obj.__name__, (__obj.__self__, *args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See jinja2's sandbox; the method that it makes of a text's `format` is bounded."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_call("format", (value.__self__, *args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """See jinja2.Environment.from_string; the filters that are there by now are bounded as calls are."""
        self.filters.update({name: _bounded(name, function) for name, function in self.filters.items()})
        template: Any = super().from_string(source, *args, **kwargs)
        template.source = source
        return template


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # jinja's marks of what is to be passed go along
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, (*args, *kwargs.values()))
        return function(*args, **kwargs)

    return checked


def _check_binop(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        if isinstance(left, str) and _WIDTH.search(left):
            raise LimitError("it writes a number of huge width")
        return
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise LimitError("it computes a huge number")
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__") and one * len(other) > LONGEST:
            raise LimitError("it makes a huge text or list")


def _check_call(name: str, values: tuple[Any, ...]) -> None:
    if any(isinstance(value, int) and not isinstance(value, bool) and abs(value) > LONGEST for value in values[1:]):
        raise LimitError(f"it calls '{name}' with a huge number")
    lengths = [len(value) for value in values if isinstance(value, str | bytes | list | tuple)]
    if name in ("replace", "join", "indent") and len(lengths) > 1 and lengths[0] * max(lengths[1:]) > LONGEST:
        raise LimitError(f"it calls '{name}' with huge texts")
    if name in ("format", "format_map") and any(isinstance(v, str) and _WIDTH.search(v) for v in values[:2]):
        raise LimitError("it writes a number of huge width")
