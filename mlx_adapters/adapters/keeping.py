"""Naming, renaming, tagging, choosing and removing what is in the registry.

Each step is one rename on the disk, so a kill leaves the old state or the new one. Short changes of one
adapter wait for each other; an adapter that is being trained is left alone.
"""

import contextlib
import itertools
import os
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import AdapterError, ConfigError, ExistsError, did_you_mean
from mlx_adapters.models.adapter import AdapterLike, weights_file
from mlx_adapters.models.metadata import losses_of, read_metadata
from mlx_adapters.sources import lookup, registry
from mlx_adapters.sources.lookup import iteration_of, registered
from mlx_adapters.sources.references import Reference, check_name
from mlx_adapters.sources.registry import Entry
from mlx_adapters.storage import files, paths, temporaries, tensor_files
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, CHECKPOINT_OUTPUT, CHECKPOINTS_FOLDER, METADATA_FILE


@dataclass(frozen=True)
class Removed:
    """What was taken away: iterations of checkpoints ("whole": the adapter itself), and the bytes freed."""

    name: str
    iterations: tuple[int, ...]
    freed_bytes: int
    whole: bool = False


@contextlib.contextmanager
def _changing(name: str) -> Iterator[Path]:
    """The folder of a named adapter, held while it is changed."""
    known = Reference("name", check_name(name))
    temporaries.sweep(registry.adapters_folder())  # also where a kill came after the adapter had gone
    lookup.locate(known)
    with registry.changing(name):
        yield lookup.locate(known)[0]


def rename(name: AdapterLike, new: str) -> Entry:
    """Give an adapter another name.

    Args:
        name: the adapter, by its old name.
        new: the new one.

    Raises NotFoundError, ExistsError or ConfigError; TrainingError if it is being trained.

    Example:
        >>> ma.rename("sql", "sql-v1").name
        'sql-v1'
    """
    old, target = registered(name, "names are those of whole adapters"), registry.adapters_folder() / check_name(new)
    with registry.changing(old.target, new):
        folder, _ = lookup.locate(old)
        require(folder.name != new, f"'{new}' has this name already.")
        taken = registry.adapter_folder(new)  # the same adapter's where only the case changes
        if os.path.lexists(taken) and not paths.same_place(taken, folder):
            if not taken.is_dir():
                raise ExistsError(f"'{taken}' stands in the way, and is no adapter.", "move it away, or remove it.")
            raise ExistsError(f"There is an adapter named '{new}' already.", f"remove it first: 'remove {new}'.")
        files.move(folder, target)
        with contextlib.suppress(AdapterError):  # the folder's name counts; a damaged record hinders nobody
            _update_metadata(target, name=new)
    return registry.read_entry(target)


def tag(name: AdapterLike, add: Sequence[str] = (), remove: Sequence[str] = ()) -> tuple[str, ...]:
    """Add and remove tags; the tags there are now.

    Args:
        name: the adapter.
        add: tags it is to have.
        remove: tags it is no longer to have.

    Raises NotFoundError or ConfigError.

    Example:
        >>> ma.tag("sql", ["production"], remove=["candidate"])
        ('production',)
    """
    known = registered(name, "tags are those of whole adapters")
    for text in (*add, *remove):
        require(
            bool(registry.TAG.fullmatch(text)), f"'{text}' cannot be a tag.", "letters, digits, '.', '_', ':', '-'."
        )
    if not add and not remove:
        return registry.read_entry(lookup.locate(known)[0]).tags
    with _changing(known.target) as folder:
        now = (set(registry.tags_of(read_metadata(folder))) | set(add)) - set(remove)
        _update_metadata(folder, tags=sorted(now))
    return tuple(sorted(now))


def use(reference: AdapterLike) -> Entry:
    """Let the bare name mean one of the adapter's checkpoints.

    Args:
        reference: a checkpoint: "name@iteration", "name@best", "name@last" or `run.best`.

    Raises ConfigError, NotFoundError, or FormatError if the checkpoint is damaged.

    Example:
        >>> ma.use("sql@600").iteration
        600
    """
    ref = registered(reference)
    if ref.iteration is None:
        raise ConfigError(f"'{ref}' names no checkpoint.", "give NAME@ITERATION, for example sql@600.")
    with _changing(ref.target) as folder:
        chosen = weights_file(folder, iteration := iteration_of(folder, ref))
        tensor_files.read_safetensors_header(chosen)
        metadata = read_metadata(folder)
        checksums = registry.checksums_of(metadata) | {ADAPTER_FILE: files.sha256(chosen)}
        metadata |= {"iteration": iteration, "chosen_by": "use", "sha256": checksums}
        # The weights file alone decides, in one step. The metadata are whole on the disk before it, and follow it.
        with files.atomic_file(folder / METADATA_FILE) as stream:
            stream.write(files.json_text(metadata, METADATA_FILE).encode())
            stream.flush()
            temporaries.flush(stream.fileno())  # a full disk shows here
            files.copy_file(chosen, folder / ADAPTER_FILE)
    return registry.read_entry(folder)


def remove(reference: AdapterLike) -> Removed:
    """Remove an adapter, or one of its checkpoints.

    Args:
        reference: "name" or "name@iteration".

    Raises ConfigError, NotFoundError, or TrainingError if it is being trained.

    Example:
        >>> ma.remove("chat@100").iterations
        (100,)
    """
    with _removing(reference) as (entry, iteration):
        if iteration is not None:
            return _remove_checkpoints(entry, [iteration])
        size = paths.size_on_disk(entry.folder)
        files.remove(entry.folder)
    return Removed(entry.name, entry.iterations, size, whole=True)


def removable(references: Sequence[str]) -> list[str]:
    """What `remove` takes one after the other so that all of `references` go: each once, checkpoints before adapters.

    Raises what `remove` would raise at any of them, with nothing removed.
    """
    unique: dict[tuple[Path, int | None], str] = {}
    for reference in references:
        with _removing(reference) as (entry, iteration):
            unique.setdefault((entry.folder, iteration), reference)
    return [reference for (_, iteration), reference in sorted(unique.items(), key=lambda item: item[0][1] is None)]


@contextlib.contextmanager
def _removing(reference: AdapterLike) -> Iterator[tuple[Entry, int | None]]:
    """The adapter that is held, and the one checkpoint that is meant, once nothing speaks against their removal."""
    ref = registered(reference)
    with _changing(ref.target) as folder:
        entry = registry.read_entry(folder)
        iteration = iteration_of(folder, ref)
        if iteration is not None:
            weights_file(folder, iteration)  # raises where there is none
            if entry.iteration == iteration:
                raise ConfigError(
                    f"'{ref.target}' means this checkpoint.", "choose another first: 'use NAME@ITERATION'."
                )
        yield entry, iteration


def prune(name: AdapterLike, *, keep_best: bool = True, keep_last: int = 1, dry_run: bool = False) -> Removed:
    """Remove checkpoints, except the one in use.

    Args:
        name: the adapter.
        keep_best: keep the best by validation loss.
        keep_last: keep so many of the last ones.
        dry_run: remove nothing, only say what would go.

    Raises ConfigError, NotFoundError, or TrainingError if it is being trained.

    Example:
        >>> ma.prune("sql", keep_last=1, dry_run=True).iterations
        (200, 500)
    """
    known = registered(name, "only whole adapters are pruned")
    require(keep_last >= 0, f"keep_last must not be negative, not {keep_last}.")
    with _changing(known.target) as folder:
        entry = registry.read_entry(folder)
        kept = {*(entry.iterations[-keep_last:] if keep_last else ()), entry.iteration}
        if keep_best:
            kept.add(best_iteration(entry))
        doomed = [iteration for iteration in entry.iterations if iteration not in kept]
        return _remove_checkpoints(entry, doomed, dry_run)


def best_iteration(entry: Entry) -> int | None:
    """The checkpoint with the lowest validation loss, the earlier one in a tie; None if no loss is known."""
    _, validation = losses_of(entry.metadata)
    known = [(loss, iteration) for iteration, loss in validation if iteration in entry.iterations]
    return min(known)[1] if known else None


def _remove_checkpoints(entry: Entry, iterations: Sequence[int], dry_run: bool = False) -> Removed:
    before = paths.size_on_disk(entry.folder)
    doomed = [
        path
        for i in iterations
        for path in (entry.folder / CHECKPOINTS_FOLDER / f"{i:07d}", registry.checkpoint_path(entry, i))
        if path.exists()
    ]
    if dry_run:
        return Removed(entry.name, tuple(iterations), before - paths.size_on_disk(entry.folder, without=doomed))
    for path in doomed:
        files.remove(path, CHECKPOINT_OUTPUT)
    return Removed(entry.name, tuple(iterations), before - paths.size_on_disk(entry.folder))


def _update_metadata(folder: Path, **values: Any) -> None:
    files.write_json(folder / METADATA_FILE, read_metadata(folder) | values)


def fill_template(template: str, task: str, **known: str | int | None) -> str:
    """A name by the field's habit, e.g. "{task}_{version}_{date}" -> "sql_v2_20260131".

    Fields: task, date, time, version (the first free one: v1, v2, ...), and what the caller knows (base, rank,
    method). Raises ConfigError for another field.
    """
    now = datetime.now()
    given = {"task": task, "date": f"{now:%Y%m%d}", "time": f"{now:%H%M%S}", "version": "", **known}
    fields = {key: _as_name(str(value)) for key, value in given.items() if value is not None}
    try:
        parts = [(text, name, spec, how) for text, name, spec, how in string.Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(
            f"The name template '{template}' cannot be read: {error}.", "a field is {task}, say."
        ) from None
    for _, name, spec, how in parts:
        hint = did_you_mean(name or "", fields, f"fields: {', '.join(sorted(fields))}.")
        require(name is None or (name in fields and not spec and not how), f"A name has no field '{name}'.", hint)
    for number in itertools.count(1):
        fields["version"] = f"v{number}"
        filled = check_name("".join(text + (fields[name] if name else "") for text, name, _, _ in parts))
        folder = registry.adapter_folder(filled)
        free = not os.path.lexists(folder) and not registry.is_being_trained(folder)
        if free or "version" not in {name for _, name, _, _ in parts}:
            return filled
    raise AssertionError


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text.rsplit("/", 1)[-1])
