"""A run's folder: an adapter that plain mlx-lm loads, with all that is needed to go on training it.

A run leaves nothing on the disk before its first checkpoint: with that the folder comes into being, whole, and only
then takes the place of an older adapter. `checkpoints/` holds the truth, and the rest is derived from it after each
save: the adapter that the bare name means, copies of each checkpoint's weights, and the metadata.
"""

import contextlib
import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import require, shown
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.datasets import DataSet, keep
from mlx_adapters.errors import AdapterError, ConfigError, FormatError
from mlx_adapters.events import Note, OnEvent
from mlx_adapters.models.adapter import Weights
from mlx_adapters.models.base import Named
from mlx_adapters.models.metadata import FULL, AdapterConfig
from mlx_adapters.sources import references, registry
from mlx_adapters.sources.references import Reference
from mlx_adapters.storage import files, locks, paths, replacing
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, ADAPTER_OUTPUT, CONFIG_FILE, METADATA_FILE
from mlx_adapters.system import origin
from mlx_adapters.system.machine import versions
from mlx_adapters.training import reference_model
from mlx_adapters.training import state as states
from mlx_adapters.training.recipe import settings_in
from mlx_adapters.training.reference_model import Values
from mlx_adapters.training.state import CURVES, RUN_RECIPE_FILE, Checkpoint, State

ARITHMETIC = ("mlx", "mlx-lm")  # the libraries that decide what is computed


def arithmetic() -> dict[str, str]:
    """The versions on which tokens and numbers depend."""
    there = versions()
    return {name: there.get(name, "none") for name in ("mlx_adapters", *ARITHMETIC, "transformers")}


def place_of(name: str | Path | Named) -> tuple[Reference, Path]:
    """A run's reference and folder: a name is in the registry, a path (out/sql) where it says; none is on the Hub."""
    text = str(paths.expanded(name)) if isinstance(name, Path) else getattr(name, "reference", name)
    hint = "give a name, or a path such as ./out."
    if not isinstance(text, str):
        raise ConfigError(f"{shown(name)} cannot name a training run.", hint)
    bare = "/" in text and not paths.is_path(text)
    reference = references.parse_reference(f"./{text}" if bare else text)
    require(reference.iteration is None, f"'{text}' cannot name a training run.", hint)
    if reference.kind == "name":
        return reference, registry.adapter_folder(reference.target)
    path = paths.expanded(reference.target)
    return Reference("path", str(path)), path


@dataclass
class RunFolder:
    """Where a run writes.

    `adapter` is known from its first step on. `writes` is false in all but one of several processes. `begun`: whether
    the folder at `path` is this run's; what is there before that stays as it is. `held`: locks, until the run ends.
    `data`: what it is trained on, which is kept here if no file holds it.
    """

    reference: Reference
    path: Path
    recipe: dict[str, Any]
    held: contextlib.ExitStack
    adapter: AdapterConfig | None = None
    writes: bool = True
    begun: bool = False
    overwrite: bool = False
    data: DataSet | None = None
    reference_values: Values = field(default_factory=dict)

    @property
    def settings(self) -> tuple[LoraConfig, TrainConfig]:
        """The settings that the recipe holds."""
        return settings_in(self.recipe)

    def require_place(self) -> None:
        """Raise ExistsError or StorageError, before there is anything to lose, if the run could not be kept here."""
        replacing.refuse_existing(self.path, self.overwrite, ADAPTER_OUTPUT)
        files.require_writable(self.path)

    def require_space(self, weights: Weights, optimizer: Weights) -> None:
        """Raise StorageError, before there is anything to lose, if the disk has no room for a checkpoint."""
        copied = 3 * sum(array.nbytes for array in weights.values())  # its own, its copy, and what the bare name means
        paths.require_free_space(self.path, copied + sum(array.nbytes for array in optimizer.values()))

    def update_recipe(self, recipe: dict[str, Any]) -> None:
        """Record the settings that a resumed run may change; what else the record holds stays."""
        self.recipe = self.recipe | recipe
        if self.writes and self.begun and files.read_json(self.path / RUN_RECIPE_FILE) != self.recipe:
            files.write_json(self.path / RUN_RECIPE_FILE, self.recipe)

    def keep_reference(self, values: Values) -> None:
        """Keep what the reference says of the answers: in the folder, or, before there is one, with the first save."""
        self.reference_values = values
        if self.writes and self.begun:
            self._write_reference(self.path)

    def _write_reference(self, folder: Path) -> None:
        if self.reference_values:
            reference_model.write(folder, self.reference_values, reference_model.bound_to(self.recipe))

    def save(self, state: State, weights: Weights, optimizer: Weights) -> Path:
        """Write a checkpoint and bring everything else up to date; the checkpoint's folder."""
        if self.writes and self.begun and (self.path / RUN_RECIPE_FILE).is_file():
            states.save(self.path, state, weights, optimizer)
            self.refresh(state)
        elif self.writes:  # the first time, or somebody took the folder away
            with files.atomic_folder(self.path, self.overwrite, ADAPTER_OUTPUT) as folder:
                files.write_json(folder / RUN_RECIPE_FILE, self.recipe)
                if self.data is not None:
                    keep(self.data, folder)
                states.save(folder, state, weights, optimizer)
                self._write_reference(folder)
                self._derive(folder, state)
            self.hold(wait=True)
        self.begun = True
        return states.path_of(self.path, state.iteration)

    def hold(self, wait: bool = False) -> None:
        """Lock the folder that is at `path` until the run ends. Raises TrainingError if another run holds it."""
        busy = f"'{self.path.name}' is being trained by another process."
        self.held.enter_context(locks.lock_file(self.path, wait=wait, busy=busy))

    def refresh(self, state: State) -> None:
        """Derive all other files from the checkpoints and `state`. Doing it again changes nothing."""
        if self.writes and self.begun:
            with locks.lock(locks.change_of(self.path)):  # weights and record are two files: whoever reads waits
                self._derive(self.path, state)

    def _derive(self, folder: Path, state: State) -> None:
        config, before = self.settings[1], _json_in(folder / METADATA_FILE)
        chosen = chosen_by_hand(before)
        states.prune(folder, config.keep, {state.best_iteration, chosen}, config.course.save_every)
        there = states.iterations(folder)
        meant = next((i for i in (chosen, state.best_iteration) if i in there), there[-1])
        states.copy_weights(folder, meant)
        if self.adapter is not None:
            ours, present = self.adapter.to_mlx_lm(), _json_in(folder / CONFIG_FILE)
            ours["model"] = self.recipe["base"]["name"]
            if ours != {name: present.get(name) for name in ours}:
                files.write_json(folder / CONFIG_FILE, ours)
        known = self._metadata(folder, state) | {"iteration": meant}
        digest = {ADAPTER_FILE: files.sha256(folder / ADAPTER_FILE)}
        after = before | known | {"sha256": registry.checksums_of(before) | digest}
        if meant != chosen:
            after.pop("chosen_by", None)
        if _without_times(after) != _without_times(before):
            files.write_json(folder / METADATA_FILE, after)

    def other_versions(self) -> list[str]:
        """The libraries that compute otherwise than at the last save, as "mlx 0.32.3 -> 0.32.4"."""
        before, now = _json_in(self.path / METADATA_FILE).get("versions"), versions()
        before = before if isinstance(before, dict) else {}
        return [
            f"{name} {before[name]} -> {now[name]}"
            for name in ARITHMETIC
            if name in before and before[name] != now.get(name)
        ]

    def newest(self, on_event: OnEvent) -> Checkpoint:
        """The newest whole checkpoint; later ones are damaged and removed. Raises FormatError if there is none."""
        if self.writes and states.drop_half_written(self.path):
            on_event(Note("A half-written checkpoint was removed: the run ended while saving.", "warning"))
        checkpoint, problems = states.newest(self.path)
        if checkpoint is None and not problems:
            raise FormatError(f"'{self.reference}' cannot be resumed: it has no checkpoint.", "start it anew.")
        if checkpoint is None:
            raise FormatError(
                f"No checkpoint of '{self.reference}' is whole: {' '.join(problems)}",
                f"begin a new run with its weights: --init-from {self.reference}.",
            )
        for problem in problems:
            on_event(Note(f"{problem} Taking the checkpoint before it.", "warning"))
        if others := self.other_versions():
            text = f"The run goes on with other versions ({', '.join(others)}), so not to the bit as it would have."
            on_event(Note(text, "warning"))
        if self.writes:
            states.drop_after(self.path, checkpoint.state.iteration)
        self.refresh(checkpoint.state)  # a crash may have come between a save and its copies
        return checkpoint

    def how_to_resume(self) -> str:
        """What to type to go on."""
        if self.begun:
            return f"Go on with: mlx-adapters train --resume {self.reference}"
        if not self.writes:
            return f"If the first process has saved it, go on with: mlx-adapters train --resume {self.reference}"
        old = f" '{self.reference}' is as it was." if self.path.is_dir() else ""
        return f"Nothing was saved yet.{old}"

    def chosen(self) -> int | None:
        """The checkpoint that 'use' chose for the bare name, or None."""
        return chosen_by_hand(_json_in(self.path / METADATA_FILE)) if self.writes else None

    def best(self, state: State) -> Reference:
        """The checkpoint with the lowest validation loss, or the last one."""
        gone = self.writes and state.best_iteration not in states.iterations(self.path)
        return replace(self.reference, iteration=state.iteration if gone else state.best_iteration or state.iteration)

    def final(self, state: State) -> Reference:
        """The last checkpoint."""
        return replace(self.reference, iteration=state.iteration)

    def _metadata(self, folder: Path, state: State) -> dict[str, Any]:
        """What training knows of the adapter."""
        lora, config = self.settings
        losses = {"train": dict(state.train_losses), "validation": dict(state.validation_losses)}
        rank, scale = max([lora.rank, *lora.ranks.values()]), lora.scale
        strength = {"rank": rank, "ranks": lora.ranks, "scale": scale, "alpha": scale * rank}
        done = state.iteration >= config.course.iterations
        return {
            "name": self.path.name,
            "source": "train",
            "status": "finished" if done else "stopped early" if state.stopped_early else "unfinished",
            "base": self.recipe["base"],
            "data": self.recipe["data"],
            "signature": origin.signature(self.recipe["data"]["source"]),
            "type": lora.type,
            "init": lora.init,
            **({} if lora.type == FULL else strength),
            "training": self.recipe["training"],
            "init_from": self.recipe["init_from"],
            "seed": config.seed,
            "iterations": state.iteration,
            "trained_tokens": state.trained_tokens,
            "best_validation_loss": state.best_loss,
            "final_validation_loss": state.validation_losses[-1][1] if state.validation_losses else None,
            "final_train_loss": state.train_losses[-1][1] if state.train_losses else None,
            "train_losses": state.train_losses,
            "validation_losses": state.validation_losses,
            **{name: curve for name in CURVES[2:] if (curve := getattr(state, name))},
            "checkpoints": {
                str(i): {kind: curve[i] for kind, curve in losses.items() if i in curve}
                for i in states.iterations(folder)
            },
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "duration_seconds": state.seconds,
            "versions": versions(),
            "command": self.recipe["command"],
        }


def _json_in(path: Path) -> dict[str, Any]:
    """What a file says by now, also what training knows nothing of; a damaged one says nothing."""
    with contextlib.suppress(AdapterError):
        return files.read_json(path)
    return {}


def _without_times(metadata: Mapping[str, Any]) -> str:
    return files.json_text({k: v for k, v in metadata.items() if k not in ("date", "versions")}, METADATA_FILE)


def chosen_by_hand(metadata: Mapping[str, Any]) -> int | None:
    """The checkpoint that 'use' chose for the bare name, or None."""
    return metadata.get("iteration") if metadata.get("chosen_by") == "use" else None
