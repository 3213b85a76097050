"""Where a person types: a line that can be edited, what was typed before, and pasted text of many lines in one piece.

What was typed is kept beside the adapters (`chat_history`), the newest last; a line is one JSON text.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_adapters.cli import _output
from mlx_adapters.errors import AdapterError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

KEPT = 1000  # lines that a new prompt remembers


class Prompt:
    """Reads what is typed, from a terminal or from a file."""

    def __init__(self) -> None:
        self._session: PromptSession[str] | None = None

    def read(self, who: str) -> str | None:
        """The next line after a prompt that tells `who` answers; None at the end."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            if sys.stdin.isatty():
                _output.note_inline(f"{who}> ")
            line = sys.stdin.readline()
            return line.strip() if line else None
        with suppress(EOFError):
            return self._terminal().prompt(f"{_output.printable(who, line=True)}> ").strip()
        return None

    def _terminal(self) -> "PromptSession[str]":
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output.defaults import create_output

        if self._session is None:
            self._session = PromptSession(history=_history(), output=create_output(stdout=sys.stderr))
        return self._session


def _history() -> Any:
    from prompt_toolkit.history import History

    from mlx_adapters.storage import files
    from mlx_adapters.storage.paths import home

    class Kept(History):
        """What was typed in chats of this home."""

        def load_history_strings(self) -> Iterable[str]:
            return list(typed(home() / "chat_history"))[-KEPT:][::-1]

        def store_string(self, string: str) -> None:
            with suppress(AdapterError):  # a history that cannot be kept stops no chat
                files.append_line(home() / "chat_history", json.dumps(string))

    return Kept()


def typed(file: Path) -> Iterator[str]:
    """The texts of a history, the oldest first; what is none is left out."""
    with suppress(OSError), open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                if isinstance(text := json.loads(line), str):
                    yield text
