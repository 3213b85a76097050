"""What long jobs report while they run. `on_event` gets these; the library itself prints nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Event:
    """Something happened."""


@dataclass(frozen=True)
class Progress(Event):
    """`done` of `total` units of `stage` (e.g. "fuse", unit "layer") are finished."""

    stage: str
    done: int
    total: int
    unit: str = ""


@dataclass(frozen=True)
class Note(Event):
    """A sentence for the user."""

    text: str
    level: Literal["info", "warning"] = "info"


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default `on_event`."""
