"""What long jobs report while they run. `on_event` gets these; without one, warnings are logged. Nothing is printed."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlx_adapters.errors import in_python

log = logging.getLogger("mlx_adapters.events")


@dataclass(frozen=True)
class Event:
    """Something happened. `on_event` gets these, or a class derived from it.

    Example:
        >>> events: list[ma.Event] = []
        >>> settings = ma.TrainConfig(iterations=1)
        >>> run = ma.train("demo", "data/sql", name="seen", training=settings, on_event=events.append)
        >>> [type(event).__name__ for event in events if isinstance(event, (ma.TrainReport, ma.CheckpointSaved))]
        ['TrainReport', 'CheckpointSaved']
    """


@dataclass(frozen=True)
class Progress(Event):
    """`done` of `total` units of `stage` (e.g. "fuse", unit "layer") are finished.

    Args:
        stage: what is being done, such as "fuse".
        done: units that are finished.
        total: how many there are.
        unit: what is counted, such as "layer".
        later: seconds that what comes after this stage is expected to take.

    Example:
        >>> bar = ma.progress_bar()
        >>> bar(ma.Progress("fuse", 3, 12, "layer"))
    """

    stage: str
    done: int
    total: int
    unit: str = ""
    later: float = 0.0


@dataclass(frozen=True)
class Note(Event):
    """A sentence for the user.

    Args:
        text: the sentence.
        level: "warning" for what may make the result another than was wanted.

    Example:
        >>> ma.Note("2 train rows cut at max_seq_length 512.", "warning").level
        'warning'
    """

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class TrainReport(Event):
    """Means over the iterations since the last report. Tokens per second count trained and real tokens of all
    `processes` together; the memory is this one's.

    Args:
        iteration: the last of them.
        iterations: how many the run has.
        train_loss: nats per trained token, or by the objective.
        learning_rate: of the last one.
        trained_tokens_per_second: tokens that the loss counts.
        tokens_per_second: all tokens that are read.
        peak_memory_bytes: of MLX in this process so far.
        figures: of preferences "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_log_probability",
            "rejected_log_probability" and, with KTO, "kl".
        processes: how many train together.

    Example:
        >>> events: list[ma.Event] = []
        >>> settings = ma.TrainConfig(iterations=1)
        >>> run = ma.train("demo", "data/sql", name="told", training=settings, on_event=events.append)
        >>> [event.train_loss < 20 for event in events if isinstance(event, ma.TrainReport)]
        [True]
    """

    iteration: int
    iterations: int
    train_loss: float
    learning_rate: float
    trained_tokens_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int
    figures: Mapping[str, float] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True)
class ValidationReport(Event):
    """A validation loss was measured.

    Args:
        iteration: after which; 0: before the first.
        validation_loss: nats per trained token, or by the objective.
        best: whether no earlier one was lower.
        figures: as of `TrainReport`.

    Example:
        >>> ma.ValidationReport(100, 1.25, True).best
        True
    """

    iteration: int
    validation_loss: float
    best: bool
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A whole checkpoint is on the disk.

    Args:
        iteration: its number.
        folder: where it lies.
        seconds: that saving took.

    Example:
        >>> ma.CheckpointSaved(100, "sql/checkpoints/0000100", 0.1).iteration
        100
    """

    iteration: int
    folder: str
    seconds: float


@dataclass(frozen=True)
class Stop:
    """What an `on_event` gives back, the class or one of it, to end a training: it saves and returns what it has.

    Example:
        >>> settings = ma.TrainConfig(iterations=50, report_every=1)
        >>> run = ma.train(
        ...     "demo",
        ...     "data/sql",
        ...     name="enough",
        ...     training=settings,
        ...     on_event=lambda event: ma.Stop if isinstance(event, ma.TrainReport) and event.iteration == 2 else None,
        ... )
        >>> print(run.final, run.stopped)
        enough@2 True
    """


OnEvent = Callable[[Event], object]  # what it gives back means nothing unless it is `Stop`


def wants_to_stop(answer: object) -> bool:
    """Whether an `on_event` gave back `Stop`."""
    return answer is Stop or isinstance(answer, Stop)


def ignore(event: Event) -> None:
    """An `on_event` for what nobody is to be told."""


def log_warnings(event: Event) -> None:
    """The default `on_event`: warnings go to a logger, so that they stand on stderr and under a notebook's cell."""
    if isinstance(event, Note) and event.level == "warning":
        log.warning(in_python(event.text))


def without_notes(on_event: OnEvent) -> OnEvent:
    """An `on_event` that passes on progress and warnings: for a step of something larger."""
    return lambda event: None if isinstance(event, Note) and event.level != "warning" else on_event(event)


def noting(on_event: OnEvent) -> tuple[OnEvent, list[str]]:
    """(an `on_event` that passes everything on, the texts of the warnings that come by)."""
    texts: list[str] = []

    def note(event: Event) -> object:
        if isinstance(event, Note) and event.level == "warning":
            texts.append(event.text)
        return on_event(event)

    return note, texts
