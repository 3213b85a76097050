"""A notification where a command that took long has ended, on macOS."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from mlx_adapters.cli import _output
from mlx_adapters.units import duration

LONG = {"train", "fuse", "benchmark", "eval", "advise", "demo", "extract"}
AFTER_SECONDS = 60
SETTING = "MLX_ADAPTERS_NOTIFY"
# Texts come as arguments, so none of them can be a program.
SCRIPT = ("on run {title, said}", "display notification said with title title", "end run")


@contextlib.contextmanager
def notifying(running: Callable[[], str | None]) -> Iterator[None]:
    """Tell macOS when a long command ends, well or not; nobody is told without a terminal, or with --quiet.

    running: the command's name, asked for at the end, when it is known.
    """
    start, how = time.monotonic(), "stopped"
    try:
        yield
        how = "done"
    finally:
        took, command = time.monotonic() - start, running()
        if command in LONG and took >= AFTER_SECONDS and _wanted():
            notify(f"mlx-adapters {command}", f"{how} after {duration(took)}")


def _wanted() -> bool:
    off = os.environ.get(SETTING, "").lower() in ("0", "off", "no", "false")
    return sys.platform == "darwin" and _output.heard() and not off


def notify(title: str, said: str) -> None:
    """Show a notification; where that is not possible, nothing happens."""
    from mlx_adapters.system.machine import tool

    tool("osascript", *(part for line in SCRIPT for part in ("-e", line)), title, said)
