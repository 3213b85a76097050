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


@dataclass(frozen=True)
class TrainReport(Event):
    """Means over the iterations since the last report. Tokens per second count trained and real tokens."""

    iteration: int
    iterations: int
    train_loss: float
    learning_rate: float
    trained_tokens_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class ValidationReport(Event):
    """The validation loss in nats per trained token; `best` if no earlier one was lower."""

    iteration: int
    validation_loss: float
    best: bool


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A whole checkpoint is on the disk."""

    iteration: int
    folder: str
    seconds: float


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default `on_event`."""
