"""What a run was asked to do, fixed when it starts and compared when it goes on."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import from_mapping, to_mapping
from mlx_adapters.config.settings import of_kind
from mlx_adapters.config.training import LoraConfig, Objective, TrainConfig, settled
from mlx_adapters.data.datasets import Data, DataSet
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import ConfigError, FormatError, IncompatibleError, NotFoundError
from mlx_adapters.events import OnEvent
from mlx_adapters.models import metadata
from mlx_adapters.models.adapter import Adapter, AdapterLike
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.optimization.distributed import World
from mlx_adapters.optimization.optimizers import learning_rate, schedule_end
from mlx_adapters.storage import files
from mlx_adapters.system.interrupt import Interrupt
from mlx_adapters.training.state import RUN_RECIPE_FILE, VERSION

KINDS = metadata.WholeRecord(
    base=metadata.WholeRecord(name=str, fingerprint=str),
    data=metadata.WholeRecord(source=str, splits={"*": {"sha256": str}}),
    lora=metadata.WholeRecord(rank=int, scale=float),
    training=metadata.WholeRecord(iterations=int, batch_size=int, learning_rate=float),
    world_size=int,
)
# Settings that may differ when a run goes on: they do not change what is computed up to then.
FREE = (
    "iterations",
    "epochs",
    "schedule_iterations",
    "keep",
    "save_every_minutes",
    "early_stop",
    "memory",
    "memory_limit",
)


@dataclass(frozen=True)
class Watched:
    """How a run is watched and stopped, and with whom it runs."""

    world: World
    interrupt: Interrupt
    on_event: OnEvent
    forecast: bool
    dry: bool  # nothing is written


@dataclass(frozen=True)
class Asked:
    """What `train` was asked for, as it was typed."""

    base: BaseLike | None
    data: Data | None
    lora: LoraConfig | None
    training: TrainConfig | None
    objective: Objective | str | None
    init_from: AdapterLike | None
    reference: AdapterLike | None
    command: str | None

    def __post_init__(self) -> None:
        of_kind(LoraConfig, self.lora)
        of_kind(TrainConfig, self.training)


@dataclass(frozen=True)
class Request:
    """What `train` was asked for, resolved."""

    base: Base
    data: DataSet
    lora: LoraConfig
    training: TrainConfig
    adapter: Adapter | None
    reference: Adapter | None
    command: str | None
    watched: Watched

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.watched.world

    @property
    def on_event(self) -> OnEvent:
        """Who watches."""
        return self.watched.on_event

    @property
    def writes(self) -> bool:
        """Whether this process keeps what is trained."""
        return self.world.leads and not self.watched.dry


def make_recipe(
    base: Base,
    data: DataSet,
    lora: LoraConfig,
    training: TrainConfig,
    init_from: str | None,
    reference: Mapping[str, str] | None,
    world_size: int,
    command: str | None,
    started: str,
) -> dict[str, Any]:
    """The recipe as plain JSON values. `init_from` is the fingerprint of the adapter it starts from; `reference`: name
    and fingerprint of the adapter that preferences are held against, None for the bare base; `started`: when it began,
    in ISO form, which is the date that its chat template prints."""
    return {
        "version": VERSION,
        "base": base.record(),
        "base_config": _digest(files.read_json(base.folder / "config.json")),
        "data": data.describe(),
        "lora": to_mapping(lora),
        "training": to_mapping(training),
        "init_from": init_from,
        "reference": None if reference is None else dict(reference),
        "world_size": world_size,
        "command": command,
        "started": started,
    }


def text_record(tokenizer: Any, splits: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """What the rows became: hashes of the chat template and of each split's tokens and trained marks."""
    return {
        "chat_template": _digest(str(getattr(tokenizer, "chat_template", None))),
        "rows": {name: _digest([_row_digest(row) for row in rows]) for name, rows in splits.items()},
    }


def _row_digest(row: Row) -> str:
    digest = hashlib.sha256(row.tokens.tobytes() + row.trained.tobytes())
    if row.answer is not None:
        digest.update(row.answer.tobytes() + bytes([row.desirable]))
    if row.rejected is not None:
        digest.update(_row_digest(row.rejected).encode())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of the run in `folder`. Raises NotFoundError if there is no run, FormatError if it is newer."""
    if not (folder / RUN_RECIPE_FILE).is_file():
        what = "no training run in it" if folder.is_dir() else "no such adapter"
        raise NotFoundError(f"'{folder.name}' cannot be resumed: {what}.", "start it without --resume.")
    recipe = files.read_json(folder / RUN_RECIPE_FILE)
    if not isinstance(recipe.get("version"), int) or recipe["version"] > VERSION:
        raise FormatError(f"'{folder.name}' was written by a newer version of this program.", "update mlx_adapters.")
    metadata.check(recipe, KINDS, f"The recipe of the run '{folder.name}'")
    try:  # all that a resume reads of it
        datetime.fromisoformat(recipe.get("started") or "2026-01-01")
        whole = not changes(recipe, recipe) and {"command", "init_from"} <= recipe.keys()
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise FormatError(
            f"The recipe of the run '{folder.name}' is damaged.", "start anew: --init-from takes over its weights."
        )
    return recipe


def settings_in(recipe: Mapping[str, Any]) -> tuple[LoraConfig, TrainConfig]:
    """The settings that a recipe holds."""
    where = "the run's recipe"
    return from_mapping(LoraConfig, recipe["lora"], where), from_mapping(TrainConfig, recipe["training"], where)


def resumed(training: TrainConfig, recipe: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run that goes on: what they leave to the rows is as the run began. Raises ConfigError."""
    before, lines = settings_in(recipe)[1].course, recipe.get("lines")
    if training.epochs is None:
        training, lines = replace(training, iterations=training.iterations or before.iterations), 1
    if not isinstance(lines, int) or lines < 1:
        raise ConfigError("The run does not say how many rows an epoch has.", "resume it with --iterations.")
    evaluated, saved = training.eval_every or before.eval_every, training.save_every or before.save_every
    return settled(replace(training, eval_every=evaluated, save_every=saved), lines)


def require_same(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> None:
    """Raise IncompatibleError, saying what changed, unless `new` continues `old`."""
    changed = changes(old, new)
    if changed:
        raise IncompatibleError(
            f"'{name}' cannot be resumed, because this changed: {'; '.join(changed)}.",
            "put it back, or start a new run (--init-from takes over its weights).",
        )


def changes(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = FREE) -> list[str]:
    """What differs between two recipes and matters, in words; the settings `free` do not."""
    changed = []
    if old["base"]["fingerprint"] != new["base"]["fingerprint"]:
        before, after = old["base"]["name"], new["base"]["name"]
        another = f"the base model ({before} -> {after})"
        changed.append(another if before != after else f"the weights of the base model '{after}'")
    if "base_config" in old and old["base_config"] != new["base_config"]:  # a run of an older version has none
        changed.append("the base model's config.json")
    changed += _changed_text(old.get("text"), new.get("text"))
    splits = {*old["data"]["splits"], *new["data"]["splits"]}
    for split in sorted(splits):
        before, after = (recipe["data"]["splits"].get(split, {}) for recipe in (old, new))
        if split != "test" and before.get("sha256") != after.get("sha256"):
            counts = before.get("rows", 0), after.get("rows", 0)
            said = f"other {counts[0]} rows" if counts[0] == counts[1] else f"{counts[0]} -> {counts[1]} rows"
            changed.append(f"the data ({split}: {said})")
    defaults = {"lora": to_mapping(LoraConfig()), "training": to_mapping(TrainConfig())}
    for group, known in defaults.items():  # what a run of an older version did not know was as it is by default
        for key in sorted({*old[group], *new[group]}):
            before, after = (recipe[group].get(key, known.get(key)) for recipe in (old, new))
            if key not in free and before != after:
                changed.append(f"{key} ({before} -> {after})")
    if old.get("init_from") != new.get("init_from"):
        changed.append("the adapter that it starts from")
    if (old.get("reference") or {}).get("fingerprint") != (new.get("reference") or {}).get("fingerprint"):
        changed.append("the adapter of the reference")
    return changed


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs in what two processes of one run were asked for, or work with, in words."""
    unlike = [
        f"{name} ({first[name]} -> {other[name]})"
        for name in first
        if name != "recipe" and first[name] != other.get(name)
    ]
    return unlike + (changes(first["recipe"], other["recipe"], free=()) if "recipe" in first else [])


def _changed_text(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    if old is None or new is None:  # not tokenized yet, or a run of an older version
        return []
    if not isinstance(old.get("rows"), Mapping) or not isinstance(new.get("rows"), Mapping):  # a damaged record
        return ["the record of the text"]
    if old.get("chat_template") != new.get("chat_template"):
        return ["the base's chat template"]
    return [
        f"the tokens of split '{split}'"
        for split in sorted(old["rows"])
        if old["rows"].get(split) != new["rows"].get(split)
    ]


def rate_jump(old: TrainConfig, new: TrainConfig, iteration: int) -> str | None:
    """What to say if the learning rate after `iteration` goes on from another value than it would have had."""
    before, after = (learning_rate(config, iteration + 1) for config in (old, new))
    if math.isclose(before, after, rel_tol=1e-6):
        return None
    ends = f"the {new.schedule} schedule now ends at iteration {schedule_end(new)}, not {schedule_end(old)}"
    keep = f"--schedule-iterations {schedule_end(old)} (schedule_iterations) keeps it"
    return f"The learning rate jumps from {before:.3g} to {after:.3g}: {ends}; {keep}."
