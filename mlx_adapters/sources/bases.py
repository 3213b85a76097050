"""Which base model a name means: `demo` (the embedded real model), a folder, or a Hub id with @revision or not.

A full fine-tune among the named adapters is a base too: the one it was made of, with other weights.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from mlx_adapters.errors import (
    AdapterError,
    ConfigError,
    FormatError,
    HubError,
    IncompatibleError,
    NotFoundError,
    did_you_mean,
)
from mlx_adapters.models.adapter import Adapter, weights_file
from mlx_adapters.models.base import Base, BaseLike, Trained
from mlx_adapters.models.dense import first_not_finite
from mlx_adapters.models.metadata import base_of, read_metadata
from mlx_adapters.sources import hub
from mlx_adapters.sources.demo_base import DEMO_BASE, demo_base_folder
from mlx_adapters.sources.lookup import iteration_of, place_of_full, spelled
from mlx_adapters.sources.references import NAME, Reference, hub_id, of_page
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.sources.snapshots import model_snapshot
from mlx_adapters.storage import files, paths, tensor_files
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
    if (made := full_fine_tune(text)) is not None:
        return made
    folder = paths.expanded(text)
    if isinstance(name, Path) or paths.is_path(text) or folder.exists():
        if not (folder / "config.json").is_file():
            what = (
                "no config.json in it" if folder.is_dir() else "it is a file" if folder.exists() else "no such folder"
            )
            raise NotFoundError(f"There is no model at '{text}': {what}.", _hint(text, folder))
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


def full_fine_tune(text: str) -> Base | None:
    """The model that a full fine-tune is, ours or mlx-lm's, by its name, NAME@ITERATION or folder; it may be one of
    another. Raises FormatError for one that is a fine-tune of itself, IncompatibleError for one whose base changed."""
    made_of: list[tuple[str, Path, Reference, dict]] = []
    while (place := place_of_full(text)) is not None:
        folder, reference = place
        if any(folder == other for _, other, *_ in made_of):
            raise FormatError(f"'{text}' is a fine-tune of itself: it took its own base's name.", "train it anew.")
        made_of.append((text, folder, reference, base_of(read_metadata(folder))))
        if not (name := made_of[-1][-1].get("name")):
            why = f"Which model is '{text}' a fine-tune of? It does not say."
            raise ConfigError(why, "'mlx-adapters extract' asks.")
        text = name
    if not made_of:
        return None
    base = resolve_base(text)
    for called, folder, reference, recorded in reversed(made_of):
        if recorded.get("fingerprint", base.fingerprint) != base.fingerprint:
            why = f"'{called}' was trained on other weights than '{base.name}' holds now."
            raise IncompatibleError(why, "put them back.")
        base = tuned(base, folder, iteration_of(folder, reference), called)
    return base


def tuned(base: Base, folder: Path, iteration: int | None = None, name: str | None = None) -> Base:
    """`base` with the weights of the full fine-tune in `folder`, ours or mlx-lm's. Raises FormatError."""
    path = weights_file(folder, iteration)
    if (digest := _known_digest(path)) is None:
        version, weights, digest = _version(path), full_weights(folder, iteration), files.sha256(path)
        with contextlib.suppress(AdapterError):  # a full disk: it is read again next time
            files.write_json(_kept_digest(path), {"version": version, "sha256": digest})
    else:
        weights = tensor_files.read_safetensors(path)
    tuned, record = (base.tuned or "") + digest, Trained(read_metadata(folder), folder)
    parameters = base.parameters | weights
    return replace(base, name=name or base.name, parameters=parameters, tuned=tuned, trained=record)


def full_weights(folder: Path, iteration: int | None = None) -> dict[str, Any]:
    """The tensors of the full fine-tune in `folder`, all read. Raises FormatError for NaN or Inf."""
    weights = tensor_files.read_safetensors(weights_file(folder, iteration))
    if bad := first_not_finite(weights):
        why = f"The full fine-tune '{folder.name}' holds NaN or Inf in '{bad}'."
        raise FormatError(why, "its training diverged; take an earlier checkpoint.")
    return weights


def _known_digest(path: Path) -> str | None:
    """The SHA-256 of weights that were read before, and had no NaN; None where they may have changed since."""
    with contextlib.suppress(AdapterError):
        known = files.read_json(_kept_digest(path))
        if known.get("version") == _version(path) and isinstance(known.get("sha256"), str):
            return known["sha256"]
    return None


def _version(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _kept_digest(path: Path) -> Path:
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return paths.home() / "checks" / f"full-{name}.json"


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
    for place in (folder, adapter_folder(text) if NAME.fullmatch(text) else folder):
        if (place / CONFIG_FILE).is_file():
            of = base_of(read_metadata(place)).get("name")
            return f"it is an adapter{f' of {of!r}' if of else ''}: name it with --adapter."
    if page := of_page(text):
        return f"write '{page}' for the repository of that page."
    general = "a model is 'demo', a folder with config.json, or a Hub id such as 'mlx-community/Qwen3-0.6B-4bit'."
    ids = [entry["id"] for entry in to_begin_with()] + [f"{user}/{name}" for user, name in hub.cached_repositories()]
    if whole := sorted({one for one in ids if one.rpartition("/")[2].lower().startswith(text.lower())}):
        return f"did you mean {' or '.join(map(repr, whole[:3]))}? {general}"
    return did_you_mean(text, _models_beside(text, folder), general)


def to_begin_with() -> list[dict[str, Any]]:
    """Bases that people begin with, as the package lists them: `known_models` says what the fields mean."""
    return json.loads((package_files("mlx_adapters.sources") / "known_models.json").read_text(encoding="utf-8"))


def _models_beside(text: str, folder: Path) -> list[str]:
    """The model folders beside `folder`, spelled as `text` is."""
    start = text.rstrip("/").removesuffix(folder.name)
    with contextlib.suppress(OSError):
        return [f"{start}{path.name}" for path in paths.visible(folder.parent) if (path / "config.json").is_file()]
    return []
