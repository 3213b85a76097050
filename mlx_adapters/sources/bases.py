"""Which base model a name means: `demo` (the embedded real model), a folder, or a Hub id with @revision or not."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from mlx_adapters.errors import ConfigError, HubError, NotFoundError, did_you_mean
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.sources.demo_base import DEMO_BASE, demo_base_folder
from mlx_adapters.sources.lookup import spelled, tell_folder
from mlx_adapters.sources.references import hub_id
from mlx_adapters.sources.snapshots import model_snapshot
from mlx_adapters.storage import paths
from mlx_adapters.storage.tensor_names import CONFIG_FILE

NAME_IT = "give it with --base."


def resolve_base(name: BaseLike, download: bool = True, everything: bool = False) -> Base:
    """Find a base model: `demo`, a folder, or a Hub id with an optional @revision (downloaded once).

    Raises NotFoundError, HubError or, for a name that no repository can have, ConfigError; without `download`,
    NotFoundError for what is not on this machine yet. `everything`: also what goes along with a model but is not needed
    to load it.
    """
    if not isinstance(name, str | Path):
        base = name if isinstance(name, Base) else getattr(name, "base", None)
        if isinstance(base, Base):
            return base
        name = spelled(name)  # type: ignore[arg-type]
    text = str(name)
    if text == DEMO_BASE:
        if not download and not (paths.home() / "bases" / DEMO_BASE).is_dir():
            raise NotFoundError(f"'{DEMO_BASE}' is not on this machine yet.", "'mlx-adapters demo' fetches it.")
        return Base(DEMO_BASE, demo_base_folder())
    folder = paths.expanded(text)
    if isinstance(name, Path) or paths.is_path(text) or folder.exists():
        if not (folder / "config.json").is_file():
            what = (
                "no config.json in it" if folder.is_dir() else "it is a file" if folder.exists() else "no such folder"
            )
            raise NotFoundError(f"There is no model at '{text}': {what}.", _hint(text, folder))
        if not isinstance(name, Path):
            tell_folder(text)
        return Base(str(folder), folder)
    if not (named := hub_id(text)):
        raise NotFoundError(f"There is no model '{text}'.", _hint(text, folder))
    repo, revision = named
    try:
        snapshot = model_snapshot(repo, revision, download=download, everything=everything)
    except HubError as error:
        if near := did_you_mean(text, _models_beside(text, folder)):
            raise HubError(error.message, f"{near} Else {error.hint or 'check the name.'}") from error
        raise
    if not (snapshot / "config.json").is_file():
        raise NotFoundError(f"There is no model in '{text}': no config.json in it.", _hint(text, snapshot))
    return Base(text, snapshot, snapshot.name if snapshot.parent.name == "snapshots" else revision)


def recorded_base(adapters: Iterable[Adapter], everything: bool = False) -> Base:
    """The base that the first adapter that names one was made for, which may have been a folder of another machine.

    Raises ConfigError where none names one, or what `resolve_base` raises, with the hint to name another one.
    """
    name = next((adapter.base_name for adapter in adapters if adapter.base_name), None)
    if name is None:
        raise ConfigError("Which base model? The adapter does not name it.", NAME_IT)
    try:
        return resolve_base(name, everything=everything)
    except (NotFoundError, HubError) as error:
        hint = f"name the base with --base. {error.hint or ''}".strip()
        raise type(error)(f"The base that the adapter was made for cannot be had. {error.message}", hint) from error


def _hint(text: str, folder: Path) -> str | None:
    """The next step where `folder`, called `text`, holds no model."""
    if (folder / CONFIG_FILE).is_file():
        return "it is an adapter: name it with --adapter."
    general = "a model is 'demo', a folder with config.json, or a Hub id such as 'mlx-community/Qwen3-0.6B-4bit'."
    return did_you_mean(text, _models_beside(text, folder), general)


def _models_beside(text: str, folder: Path) -> list[str]:
    """The model folders beside `folder`, spelled as `text` is."""
    start = text.rstrip("/").removesuffix(folder.name)
    with contextlib.suppress(OSError):
        return [f"{start}{path.name}" for path in paths.visible(folder.parent) if (path / "config.json").is_file()]
    return []
