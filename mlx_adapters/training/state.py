"""Everything that changes while training, and how it is kept on the disk.

A checkpoint is one atomic folder `checkpoints/NNNNNNN/` with the adapter's weights, the optimizer's arrays
and `state.json` (counters, losses, random state, and SHA-256 of all three). A crash therefore leaves whole
checkpoints only; a damaged one is noticed by its hash, and the one before it is taken instead. All else in
a run's folder (the best adapter, the copies of the weights, the metadata) is derived from these.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.display.notebook import html_block, html_facts, loss_curve
from mlx_adapters.display.tables import Table
from mlx_adapters.errors import AdapterError, FormatError, TrainingError
from mlx_adapters.models.adapter import Weights
from mlx_adapters.sources.references import Reference
from mlx_adapters.storage import files, replacing, temporaries, tensor_files
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    CHECKPOINT_FILE,
    CHECKPOINT_OUTPUT,
    CHECKPOINTS_FOLDER,
    checkpoint_file,
)
from mlx_adapters.units import count, duration

VERSION = 1
NUMBERED = re.compile(r"[0-9]{7}|[1-9][0-9]{7,}")  # as `path_of` writes it
CURVES = ("train_losses", "validation_losses", "train_figures", "validation_figures")
OPTIMIZER_FILE, STATE_FILE, RUN_RECIPE_FILE = "optimizer.safetensors", "state.json", "recipe.json"


@dataclass
class State:
    """The counters of a run. `batches` counts the batches drawn, which is the position in the data.

    `pending_*` belong to the report that is due next; `pending_tokens` counts examples where these are what a loss is
    the mean of. `train_losses` and `validation_losses` hold (iteration, loss), in nats per trained token or by the
    objective; `train_figures` and `validation_figures` likewise what else is watched of preferences. `random` is
    the key of MLX's random numbers (see `loop.random_state`).
    """

    iteration: int = 0
    batches: int = 0
    trained_tokens: int = 0
    real_tokens: int = 0
    pending_loss: float = 0.0
    pending_tokens: int = 0
    train_losses: list[tuple[int, float]] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    best_iteration: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    random: list[int] = field(default_factory=list)
    pending_figures: dict[str, list[float]] = field(default_factory=dict)
    train_figures: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    validation_figures: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def record_validation(self, loss: float, figures: dict[str, float] | None = None) -> bool:
        """Note a validation loss; True if it is the best so far. The untrained adapter cannot be the best."""
        self.validation_losses.append((self.iteration, loss))
        if figures:
            self.validation_figures.append((self.iteration, figures))
        if self.iteration == 0:
            return False
        if self.best_loss is not None and loss >= self.best_loss:
            self.evaluations_since_best += 1
            return False
        self.best_loss, self.best_iteration, self.evaluations_since_best = loss, self.iteration, 0
        return True

    def require_unfinished(self, new: TrainConfig, old: TrainConfig, reference: Reference) -> None:
        """Raise TrainingError if there is nothing left to do for a run that `new` resumes."""
        if self.stopped_early and new.early_stop == old.early_stop:
            raise TrainingError(
                f"'{reference}' stopped early at iteration {self.iteration}, its validation loss no longer improving.",
                f"to go on all the same, resume it with --early-stop above {old.early_stop}.",
            )
        self.stopped_early = False
        if self.iteration >= new.course.iterations:
            ended, done = self.iteration >= old.course.iterations, count(self.iteration, "iteration")
            at = f"has finished its {done}" if ended else f"has done {done} already"
            whole = "" if ended else f", or without for all {old.course.iterations}"
            raise TrainingError(
                f"'{reference}' {at}.", f"to train on, resume it with --iterations above {self.iteration}{whole}."
            )


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read back."""

    state: State
    weights: Weights
    optimizer: Weights


@dataclass(frozen=True, repr=False)
class TrainPlan(Table):
    """What a run would do.

    Args:
        folder: where the adapter would lie.
        base: the model's name.
        rows: those that are trained.
        validation_rows: those of one validation.
        iteration: where it would go on; 0 for a new run.
        iterations: the last one.
        passes: how often all iterations go through the rows.
        eval_every: iterations between validations.
        save_every: iterations between checkpoints.
        adapted_layers: how many layers are adapted.
        trained_parameters: how many numbers the adapter has.

    Example:
        >>> plan = ma.plan_training("demo", "data/sql", name="planned", training=ma.TrainConfig(iterations=60))
        >>> plan.iterations, plan.folder.exists()
        (60, False)
    """

    folder: Path
    base: str
    rows: int
    validation_rows: int
    iteration: int
    iterations: int
    passes: float
    eval_every: int
    save_every: int
    adapted_layers: int
    trained_parameters: int


@dataclass(frozen=True)
class TrainRun(Table):
    """A finished run.

    Args:
        folder: where the adapter lies.
        best: the checkpoint with the lowest validation loss, such as 'sql@500'. It is what the bare name means, unless
            `use` chose another.
        final: the last checkpoint.
        best_validation_loss: nats per trained token; None if nothing was validated.
        train_losses: (iteration, mean loss since the report before).
        validation_losses: (iteration, loss).
        trained_tokens: tokens that the loss counted, over the whole run.
        duration_seconds: the training steps alone.
        stopped_early: whether `early_stop` ended the run.
        rank: this process's among those that `mlx.launch` started.
        notes: the warnings of the run, such as rows that were dropped.
        stopped: whether an `on_event` ended the run; `resume=True` goes on.

    Example:
        >>> settings = ma.TrainConfig(iterations=2, eval_every=1, report_every=1)
        >>> run = ma.train("demo", "data/sql", name="short", training=settings)
        >>> [iteration for iteration, loss in run.train_losses]
        [1, 2]
    """

    folder: Path
    best: Reference
    final: Reference
    best_validation_loss: float | None
    train_losses: tuple[tuple[int, float], ...]
    validation_losses: tuple[tuple[int, float], ...]
    trained_tokens: int
    duration_seconds: float
    stopped_early: bool
    rank: int = 0
    notes: tuple[str, ...] = ()
    stopped: bool = False

    def records(self) -> list[dict[str, Any]]:
        """One for each iteration with a loss."""
        train, validation = dict(self.train_losses), dict(self.validation_losses)
        iterations = sorted({*train, *validation})
        return [{"iteration": i, "train_loss": train.get(i), "validation_loss": validation.get(i)} for i in iterations]

    @property
    def reference(self) -> str:
        """How the adapter is spelled: the bare name, which means the best checkpoint unless `use` chose another."""
        return str(replace(self.best, iteration=None))

    def __repr__(self) -> str:
        loss = "" if self.best_validation_loss is None else f", validation loss {self.best_validation_loss:.4g}"
        told = f", {count(len(self.notes), 'warning')} in notes" if self.notes else ""
        return f"TrainRun(best {self.best}, final {self.final}{loss}, {self.trained_tokens:,} trained tokens{told})"

    def _repr_html_(self) -> str:
        facts = {
            "best": self.best,
            "final": self.final,
            "best validation loss": self.best_validation_loss,
            "trained tokens": f"{self.trained_tokens:,}",
            "time": duration(self.duration_seconds),
            **{f"warning {number}": note for number, note in enumerate(self.notes, 1)},
        }
        return html_block(self.folder.name, html_facts(facts), loss_curve(self.train_losses, self.validation_losses))


def path_of(run: Path, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return run / CHECKPOINTS_FOLDER / f"{iteration:07d}"


def save(run: Path, state: State, weights: Weights, optimizer: Weights) -> None:
    """Write a checkpoint; it is there as a whole or not at all."""
    with files.atomic_folder(path_of(run, state.iteration), overwrite=True, ours=CHECKPOINT_OUTPUT) as folder:
        tensor_files.write_safetensors(folder / ADAPTER_FILE, weights)
        tensor_files.write_safetensors(folder / OPTIMIZER_FILE, optimizer)
        record = {"version": VERSION, "state": dataclasses.asdict(state)}
        record["sha256"] = {name: files.sha256(folder / name) for name in (ADAPTER_FILE, OPTIMIZER_FILE)}
        files.write_json(folder / STATE_FILE, record | {"checksum": _checksum(record)})


def _checksum(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def iterations(run: Path) -> list[int]:
    """The iterations that have a checkpoint folder, ascending, damaged ones among them."""
    folder = run / CHECKPOINTS_FOLDER
    found = [path for path in folder.iterdir() if NUMBERED.fullmatch(path.name)] if folder.is_dir() else []
    ours = (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE)
    return sorted(int(path.name) for path in found if any(os.path.lexists(path / name) for name in ours))


def read_state(run: Path, iteration: int) -> State:
    """Read and verify one checkpoint's state and the hashes of its files. Raises FormatError."""
    folder = path_of(run, iteration)
    record = files.read_json(folder / STATE_FILE)
    if isinstance(record.get("version"), int) and record["version"] > VERSION:
        raise NewerError(f"'{folder}' was written by a newer version of this program.", "update mlx_adapters.")
    checksum = record.pop("checksum", None)
    if checksum != _checksum(record):
        raise FormatError(f"'{folder / STATE_FILE}' is damaged.")
    for name, expected in record["sha256"].items():
        if not (folder / name).is_file() or files.sha256(folder / name) != expected:
            raise FormatError(f"'{folder / name}' is damaged.")
    return state_from(record["state"])


def state_from(values: dict[str, Any]) -> State:
    """A state from its JSON form."""
    curves = {name: [tuple(point) for point in values.get(name, ())] for name in CURVES}
    return State(**values | curves)


class NewerError(FormatError):
    """A checkpoint that only a newer version can read; no reason to fall back to an older one."""


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what was wrong with newer ones."""
    problems: list[str] = []
    for iteration in reversed(iterations(run)):
        try:
            state = read_state(run, iteration)
            folder = path_of(run, iteration)
            weights = tensor_files.read_safetensors(folder / ADAPTER_FILE)
            return Checkpoint(state, weights, tensor_files.read_safetensors(folder / OPTIMIZER_FILE)), problems
        except NewerError:
            raise
        except AdapterError as error:
            problems.append(error.message)
    return None, problems


def drop_after(run: Path, iteration: int) -> None:
    """Remove checkpoints later than `iteration`: damaged ones, which training will write again."""
    for later in iterations(run):
        if later > iteration:
            _remove(run, later)


def drop_half_written(run: Path) -> int:
    """Remove what a save left that was killed; how many there were. The caller holds the run's lock."""
    temporaries.sweep(run.parent)
    temporaries.sweep(run, young_seconds=0)
    return temporaries.sweep(run / CHECKPOINTS_FOLDER, young_seconds=0)


def prune(run: Path, keep: int | None, wanted: set[int | None], save_every: int) -> None:
    """Remove checkpoints that are neither the newest, nor wanted, nor a multiple of `save_every` (those were made
    for the time being: a former best, or a stop); then all but the last `keep` and the wanted ones."""
    there = iterations(run)
    regular = [i for i in there if (i and i % save_every == 0) or i == there[-1]]
    kept = {*regular[-keep if keep else 0 :], *wanted}
    for iteration in there:
        if iteration not in kept:
            _remove(run, iteration)


def _remove(run: Path, iteration: int) -> None:
    copy = run / checkpoint_file(iteration)
    if copy.exists():
        files.remove(copy)
    files.remove(path_of(run, iteration), CHECKPOINT_OUTPUT)


def copy_weights(run: Path, meant: int) -> None:
    """Give each checkpoint its `NNNNNNN_adapters.safetensors`, as mlx-lm names them, and let `adapters.safetensors` be
    that of checkpoint `meant`. Copies: mlx-lm's trainer would write into a link."""
    there = iterations(run)
    for iteration in there:
        copy, source = run / checkpoint_file(iteration), path_of(run, iteration)
        if not _is_copy(copy, source / ADAPTER_FILE) and not (copy.exists() and _is_damaged(source)):
            files.copy_file(source / ADAPTER_FILE, copy)
    for path in run.iterdir():
        if CHECKPOINT_FILE.fullmatch(path.name) and path.name not in {checkpoint_file(i) for i in there}:
            files.remove(path)
    chosen, target = run / checkpoint_file(meant), run / ADAPTER_FILE
    if files.chosen_iteration(run, None) != meant or not _is_copy(target, chosen):
        files.copy_file(chosen, target)


def _is_copy(path: Path, source: Path) -> bool:
    """Whether a file is a copy of `source`, and no hard link such as earlier versions made."""
    one, other = replacing.stat_of(path), replacing.stat_of(source)
    if not one or not other or one.st_nlink > 1:
        return False
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _is_damaged(checkpoint: Path) -> bool:
    """Whether a checkpoint's weights are not those that were saved: their copy may still be."""
    try:
        saved = files.read_json(checkpoint / STATE_FILE)["sha256"][ADAPTER_FILE]
        return bool(saved != files.sha256(checkpoint / ADAPTER_FILE))
    except (AdapterError, OSError, KeyError, TypeError):
        return True
