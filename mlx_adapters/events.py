"""What long jobs report while they run. `on_event` gets these; without one, warnings are logged. Nothing is printed."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

log = logging.getLogger("mlx_adapters.events")


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
    """Means over the iterations since the last report. Tokens per second count trained and real tokens.

    `figures`: of preferences "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_log_probability",
    "rejected_log_probability" and, with KTO, "kl".
    """

    iteration: int
    iterations: int
    train_loss: float
    learning_rate: float
    trained_tokens_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationReport(Event):
    """The validation loss, in nats per trained token or by the objective; `best` if no earlier one was lower.
    `figures`: as of training."""

    iteration: int
    validation_loss: float
    best: bool
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A whole checkpoint is on the disk."""

    iteration: int
    folder: str
    seconds: float


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `on_event` for what nobody is to be told."""


def log_warnings(event: Event) -> None:
    """The default `on_event`: warnings go to a logger, so that they stand on stderr and under a notebook's cell."""
    if isinstance(event, Note) and event.level == "warning":
        log.warning(event.text)


def warnings_only(on_event: OnEvent) -> OnEvent:
    """An `on_event` that passes on nothing but warnings."""
    return lambda event: on_event(event) if isinstance(event, Note) and event.level == "warning" else None


def noting(on_event: OnEvent) -> tuple[OnEvent, list[str]]:
    """(an `on_event` that passes everything on, the texts of the warnings that come by)."""
    texts: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Note) and event.level == "warning":
            texts.append(event.text)
        on_event(event)

    return note, texts
