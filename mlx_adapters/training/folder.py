"""A run's folder: an adapter that plain mlx-lm loads, with all that is needed to go on training it.

`recipe.json` is there from the start, `checkpoints/` holds the truth, and the rest is derived from it after
each save: the best adapter, the links to each checkpoint's weights, and the metadata.
"""

import datetime
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_adapters import files, paths, registry
from mlx_adapters.adapter import AdapterConfig, Weights
from mlx_adapters.config import LoraConfig, TrainConfig
from mlx_adapters.errors import ConfigError
from mlx_adapters.machine import versions
from mlx_adapters.registry import Reference
from mlx_adapters.tensor_names import ADAPTER_FILE, ADAPTER_OUTPUT, CONFIG_FILE, METADATA_FILE
from mlx_adapters.training import state as states
from mlx_adapters.training.recipe import settings_of
from mlx_adapters.training.state import RECIPE_FILE, State


def place_of(name: str) -> tuple[Reference, Path]:
    """A run's reference and folder: a name is in the registry, a path (./out) is where it says."""
    reference = registry.parse_reference(name)
    if reference.kind == "hub" or reference.iteration is not None:
        raise ConfigError(f"'{name}' cannot name a training run.", "give a name, or a path such as ./out.")
    if reference.kind == "name":
        return reference, registry.adapter_folder(reference.target)
    path = paths.expanded(reference.target)
    return Reference("path", str(path)), path


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes. `writes` is false in all but one of several processes."""

    reference: Reference
    path: Path
    recipe: dict[str, Any]
    writes: bool = True

    @property
    def settings(self) -> tuple[LoraConfig, TrainConfig]:
        """The settings that the recipe holds."""
        return settings_of(self.recipe)

    def create(self, adapter: AdapterConfig, overwrite: bool) -> None:
        """Make the folder, whole, with nothing trained yet. Raises ExistsError."""
        if not self.writes:
            return
        with files.atomic_folder(self.path, overwrite, ADAPTER_OUTPUT) as folder:
            files.write_json(folder / RECIPE_FILE, self.recipe)
            config = adapter.to_mlx_lm() | {"model": self.recipe["base"]["name"]}
            files.write_json(folder / CONFIG_FILE, config)
            files.write_json(folder / METADATA_FILE, self._metadata(folder, State()))

    def update_recipe(self) -> None:
        """Record the settings that a resumed run may change."""
        if self.writes and files.read_json(self.path / RECIPE_FILE) != self.recipe:
            files.write_json(self.path / RECIPE_FILE, self.recipe)

    def save(self, state: State, weights: Weights, optimizer: Weights) -> Path:
        """Write a checkpoint and bring everything else up to date; the checkpoint's folder."""
        if self.writes:
            states.save(self.path, state, weights, optimizer)
            self.refresh(state)
        return states.path_of(self.path, state.iteration)

    def refresh(self, state: State) -> None:
        """Derive all other files from the checkpoints and `state`. Doing it again changes nothing."""
        if not self.writes:
            return
        config = self.settings[1]
        states.prune(self.path, config.keep, state.best_iteration, config.save_every)
        states.link_weights(self.path, state.best_iteration)
        files.write_json(self.path / METADATA_FILE, self._metadata(self.path, state))

    def how_to_resume(self) -> str:
        """What to type to go on."""
        if self.writes and not states.iterations(self.path):
            return "Nothing was saved yet."
        return f"Go on with: mlx-adapters train --resume {self.reference}"

    def best(self, state: State) -> Reference:
        """The checkpoint that the bare name means."""
        iteration = state.iteration if state.best_iteration is None else state.best_iteration
        return replace(self.reference, iteration=iteration)

    def final(self, state: State) -> Reference:
        """The last checkpoint."""
        return replace(self.reference, iteration=state.iteration)

    def _metadata(self, folder: Path, state: State) -> dict[str, Any]:
        lora, config = self.settings
        losses = {"train": dict(state.train_losses), "validation": dict(state.validation_losses)}
        rank = max([lora.rank, *lora.ranks.values()])
        weights = folder / ADAPTER_FILE
        done = state.iteration >= config.iterations
        return {
            "name": self.path.name,
            "source": "train",
            "status": "finished" if done else "stopped early" if state.stopped_early else "unfinished",
            "base": self.recipe["base"],
            "data": self.recipe["data"],
            "type": lora.type,
            "rank": rank,
            "ranks": lora.ranks,
            "scale": lora.scale,
            "alpha": lora.scale * rank,
            "training": self.recipe["training"],
            "init_from": self.recipe["init_from"],
            "seed": config.seed,
            "iteration": self.best(state).iteration,
            "iterations": state.iteration,
            "trained_tokens": state.trained_tokens,
            "best_validation_loss": state.best_loss,
            "final_validation_loss": state.validation_losses[-1][1] if state.validation_losses else None,
            "final_train_loss": state.train_losses[-1][1] if state.train_losses else None,
            "train_losses": state.train_losses,
            "validation_losses": state.validation_losses,
            "checkpoints": {
                str(i): {kind: curve[i] for kind, curve in losses.items() if i in curve}
                for i in states.iterations(folder)
            },
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "duration_seconds": state.seconds,
            "versions": versions(),
            "command": self.recipe["command"],
            "sha256": {ADAPTER_FILE: files.sha256(weights)} if weights.exists() else {},
        }
