"""Adapters from elsewhere into the registry, trusting nothing: folders, packs, files of weights, the Hub's."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_adapters.adapters.packing import ENDINGS, MODEL_CONFIG
from mlx_adapters.checkpoints.contents import files_below
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ConfigError, FormatError, NotFoundError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.adapter import read_adapter
from mlx_adapters.models.base import Base, BaseLike, Named
from mlx_adapters.models.metadata import read_metadata
from mlx_adapters.sources import lookup, references, registry
from mlx_adapters.sources.intake import write_own_form
from mlx_adapters.storage import files, paths, replacing
from mlx_adapters.storage.files import iterations_of
from mlx_adapters.storage.hf_names import NPZ, TEMPLATE_FOLDER
from mlx_adapters.storage.replacing import README, Output
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    ADAPTER_OUTPUT,
    CONFIG_FILE,
    METADATA_FILE,
    checkpoint_file,
)
from mlx_adapters.storage.unpacking import MAX_BYTES, unpack

MODEL_OUTPUT = Output(MODEL_CONFIG, rf"({TEMPLATE_FOLDER}/)?[^/]+", any_readme=True)


@dataclass(frozen=True)
class Added:
    """What was taken in: an adapter (with its name in the registry, if it went there) or a model."""

    kind: str
    folder: Path
    name: str | None
    iterations: tuple[int, ...] = ()

    @property
    def reference(self) -> str:
        """How it is spelled where an adapter or a model is asked for."""
        return self.name or str(self.folder)


def add(
    source: str | Path | Named,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    base: BaseLike | None = None,
    subfolder: str | None = None,
    text_only: bool = False,
    max_bytes: int = MAX_BYTES,
    overwrite: bool = False,
    on_event: OnEvent = log_warnings,
) -> Added:
    """Take in an adapter, checked, as a copy.

    Adapters of plain mlx-lm of any year, mlx-vlm, mlx-tune, unsloth and optiq come out in the one form that
    `mlx_lm.load(adapter_path=...)` takes, checkpoints too; a note says what strength was taken where that is in doubt.

    Args:
        source: a folder, the file of an adapter's weights in it, a .tar.gz file or "user/repo[@revision]" on the Hub.
        name: its name in the registry; None: the file's, folder's or repository's.
        out: put it into this folder instead; a packed model needs one.
        base: the base to hold it against, whose paths it gets where only their beginnings differ; None: its own, if
            it is on this machine.
        subfolder: where in the folder or repository it lies; on the Hub also as in "user/repo/folder".
        text_only: leave out layers that are not of the base's text model; a warning names them.
        max_bytes: most that a file may unpack to.
        overwrite: replace what is there.
        on_event: called with progress and notes.

    Raises ConfigError, NotFoundError, FormatError, ExistsError, StorageError or HubError.

    Example:
        >>> packed = ma.pack("sql", "sql.tar.gz")
        >>> ma.add("sql.tar.gz", name="sql-copy").name
        'sql-copy'
    """
    require(name is None or out is None, "Give a name or an output folder, not both.")
    source = source if isinstance(source, str | Path) else source.reference
    path = paths.expanded(source)
    if path.name == CONFIG_FILE and path.is_file():
        source = path = path.parent
    if path.is_file():
        require(subfolder is None, f"'{source}' is a file: --subfolder is for folders and repositories.")
    if path.name.endswith(ENDINGS) and path.is_file():
        own = path.name.removesuffix(".tgz").removesuffix(".tar.gz")

        def unpacked(folder: Path, named: str) -> None:
            unpack(path, folder, max_bytes, on_event)
            if (folder / CONFIG_FILE).is_file():
                write_own_form(folder, folder, named, base, on_event, text_only=text_only)

        return _tell_strength(_take_in(unpacked, path, own, name, out, overwrite, str(source)), on_event)
    if path.is_file():
        require(path.suffix in (".safetensors", NPZ), f"'{source}' is no folder, .tar.gz or file of weights.")

        def alone(folder: Path, named: str) -> None:
            write_own_form(path.parent, folder, named, base, on_event, path, text_only=text_only)

        taken = _take_in(alone, path, path.absolute().parent.name, name, out, overwrite, str(source))
        return _tell_strength(taken, on_event)
    reference = lookup.reference_of(source)
    if reference.kind == "name":
        hint = "give a path, or user/repo for the Hub."
        raise ConfigError(f"'{source}' is a name, not a place to add an adapter from.", hint)
    require(reference.iteration is None, "A whole folder is added, not one checkpoint.")
    reference = references.below(reference, subfolder)
    folder = lookup.inside(lookup.locate(reference, base, on_event)[0], None if reference.kind == "hub" else subfolder)
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder or .tar.gz file '{folder}'.", "is it spelled right?")
    own = reference.own_name if reference.kind == "hub" else folder.name

    def copied(target: Path, named: str) -> None:
        write_own_form(folder, target, named, base, on_event, text_only=text_only)

    return _tell_strength(_take_in(copied, folder, own, name, out, overwrite, str(reference)), on_event)


def _tell_strength(added: Added, on_event: OnEvent) -> Added:
    if added.kind == "adapter" and (note := read_adapter(added.folder, name=added.name).strength_note):
        on_event(Note(note, "warning"))
    return added


def _take_in(
    fill: Callable[[Path, str], None],
    read: Path,
    own: str,
    name: str | None,
    out: str | Path | None,
    overwrite: bool,
    source: str,
) -> Added:
    if out is not None:
        target = paths.expanded(out)
        ours = ADAPTER_OUTPUT if (target / CONFIG_FILE).is_file() else MODEL_OUTPUT
        replacing.refuse_reading_inside(target, [read])
        with files.atomic_folder(target, overwrite, ours) as folder:
            kind = _fill(fill, folder, target.name, source)
            names = "|".join(map(re.escape, files_below(folder)))
            # Another model's files look like this one's: none of them may vanish.
            new = Output(MODEL_CONFIG, names, any_readme=True)
            replacing.refuse_existing(target, overwrite, ADAPTER_OUTPUT if kind == "adapter" else new)
        return Added(kind, target, None, iterations_of(target) if kind == "adapter" else ())
    if name is None and not references.NAME.fullmatch(own):
        raise ConfigError(f"'{own}' cannot be an adapter's name.", "give it one with --name.")
    name = name or own
    target = registry.adapter_folder(name)
    replacing.refuse_existing(target, overwrite, ADAPTER_OUTPUT)
    replacing.refuse_reading_inside(target, [read])
    with registry.changing(name), files.atomic_folder(target, overwrite, ADAPTER_OUTPUT) as folder:
        if _fill(fill, folder, name, source) == "model":
            raise ConfigError(f"'{source}' is a model, not an adapter.", "give --out FOLDER to unpack it there.")
    return Added("adapter", target, name, iterations_of(target))


def _fill(fill: Callable[[Path, str], None], folder: Path, name: str, source: str) -> str:
    """Fill the folder that is being made, check it, and say what it holds, "adapter" or "model"."""
    with paths.named(folder, source):  # that folder is nothing that the user knows
        fill(folder, name)
        return _check_contents(folder, name, source)


def _check_contents(folder: Path, name: str, source: str) -> str:
    """Hold what was unpacked or copied to the same standard as our own; "adapter" or "model"."""
    if not (folder / CONFIG_FILE).is_file():
        if not (folder / MODEL_CONFIG).is_file():
            raise FormatError(
                f"'{source}' holds neither an adapter nor a model.", "'mlx-adapters pack' makes such files."
            )
        _ = Base(name, folder).weight_files
        return "model"
    metadata = read_metadata(folder)
    recorded, hashes = registry.checksums_of(metadata), {}
    for iteration in (None, *iterations_of(folder)):
        read_adapter(folder, iteration, name)
        file = ADAPTER_FILE if iteration is None else checkpoint_file(iteration)
        hashes[file] = files.sha256(folder / file)
        if recorded.get(file, hashes[file]) != hashes[file]:
            raise FormatError(f"'{file}' in '{source}' is not the file that its record names.", "it may be damaged.")
    known = {"name": name, "sha256": hashes, "added_from": source}
    if (folder / README).is_file():
        known["readme"] = files.sha256(folder / README)
    files.write_json(folder / METADATA_FILE, metadata | known)
    return "adapter"
