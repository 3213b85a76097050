"""Adapters from elsewhere into the registry, trusting nothing: folders, packs, files of weights, the Hub's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_adapters.adapters.packing import ENDINGS, EXTRAS, MODEL_CONFIG
from mlx_adapters.checkpoints.contents import files_below
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import AdapterError, ConfigError, FormatError, IncompatibleError, NotFoundError
from mlx_adapters.events import Note, OnEvent, Progress, log_warnings
from mlx_adapters.models.adapter import Adapter, read_adapter
from mlx_adapters.models.base import Base
from mlx_adapters.models.layers import adaptable_layers, check_fits, nn
from mlx_adapters.models.loading import load_module
from mlx_adapters.models.metadata import iterations_of, read_metadata
from mlx_adapters.peft_format.foreign import fit_paths, read_foreign, weights_in
from mlx_adapters.sources import lookup, references, registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, paths, replacing, tensor_files
from mlx_adapters.storage.hf_names import NPZ
from mlx_adapters.storage.replacing import Output
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    ADAPTER_OUTPUT,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    METADATA_FILE,
    checkpoint_file,
)
from mlx_adapters.storage.unpacking import MAX_BYTES, TEMPLATES, unpack

MODEL_OUTPUT = Output(MODEL_CONFIG, rf"({TEMPLATES}/)?[^/]+", any_readme=True)


@dataclass(frozen=True)
class Added:
    """What was taken in: an adapter (with its name in the registry, if it went there) or a model."""

    kind: str
    folder: Path
    name: str | None
    iterations: tuple[int, ...] = ()


def add(
    source: str | Path,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    base: str | Path | Base | None = None,
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
    path = paths.expanded(source)
    if path.name.endswith(ENDINGS) and path.is_file():
        own = path.name.removesuffix(".tgz").removesuffix(".tar.gz")

        def unpacked(folder: Path, named: str) -> None:
            unpack(path, folder, max_bytes, on_event)
            if (folder / CONFIG_FILE).is_file():
                _in_own_form(folder, folder, named, base, on_event)

        return _tell_strength(_take_in(unpacked, path, own, name, out, overwrite, str(source)), on_event)
    if path.is_file():
        require(path.suffix in (".safetensors", NPZ), f"'{source}' is no folder, .tar.gz or file of weights.")

        def alone(folder: Path, named: str) -> None:
            _in_own_form(path.parent, folder, named, base, on_event, path)

        taken = _take_in(alone, path, path.absolute().parent.name, name, out, overwrite, str(source))
        return _tell_strength(taken, on_event)
    reference = references.parse_reference(str(source if isinstance(source, str) else path))
    if reference.kind == "name":
        hint = f"for the folder write './{source}'." if path.exists() else "give a path, or user/repo for the Hub."
        raise ConfigError(f"'{source}' is a name, not a place to add an adapter from.", hint)
    require(reference.iteration is None, "A whole folder is added, not one checkpoint.")
    folder, _ = lookup.locate(reference)
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder or .tar.gz file '{folder}'.")
    own = reference.own_name if reference.kind == "hub" else folder.name

    def copied(target: Path, named: str) -> None:
        _in_own_form(folder, target, named, base, on_event)

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


def _in_own_form(
    source: Path,
    target: Path,
    named: str,
    base: str | Path | Base | None,
    on_event: OnEvent,
    weights: Path | None = None,
) -> None:
    """Write the adapter in `source`, and nothing else of it, into `target`: mlx-lm's form, whoever made it.

    weights: the one file to take; None: the adapter's and its checkpoints'.
    """
    chosen = weights or weights_in(source)
    taken = {ADAPTER_FILE: chosen}
    if weights is None:
        taken |= {path.name: path for path in paths.visible(source) if CHECKPOINT_FILE.fullmatch(path.name)}
    extras = [source / name for name in EXTRAS if (source / name).is_file()]
    for path in (*taken.values(), *extras, source / CONFIG_FILE):
        if path.is_symlink() and not is_cached(path):
            raise FormatError(f"'{path}' is a link.", "put the file itself there.")
    paths.require_free_space(target, sum(path.stat().st_size for path in (*taken.values(), *extras)))
    for done, (name, path) in enumerate(taken.items(), start=1):
        foreign = read_foreign(source, path, named)
        if name == ADAPTER_FILE:  # the first; the checkpoints are of the same base
            layers = _layers_of_base(foreign.adapter, base)
        adapter = _on_its_base(foreign.adapter, layers, base)
        if name == ADAPTER_FILE:
            first, config = adapter, adapter.spelled(foreign.beside)
            for note in foreign.notes:
                on_event(Note(note, "warning"))
        if not foreign.as_is or adapter is not foreign.adapter:
            tensor_files.write_safetensors(target / name, adapter.weights)
        elif path != target / name:
            files.copy_file(path, target / name)
        on_event(Progress("add", done, len(taken), "file"))
    files.write_json(target / METADATA_FILE, first.metadata)
    files.write_json(target / CONFIG_FILE, config)
    if source != target:
        for path in extras:
            files.copy_file(path, target / path.name)
        return
    for path in paths.visible(target):
        if path.name not in (*taken, METADATA_FILE, CONFIG_FILE, *EXTRAS):
            path.unlink()


def is_cached(path: Path) -> bool:
    """Whether a link is one of huggingface_hub's cache: from a snapshot to a file of the same repository."""
    blob = path.resolve()
    return (
        blob.is_file()
        and blob.parent.name == "blobs"
        and path.absolute().is_relative_to(blob.parent.parent / "snapshots")
    )


def _layers_of_base(adapter: Adapter, name: str | Path | Base | None) -> Mapping[str, nn.Module]:
    """The layers of the base that is named, or of the adapter's own, where that is on this machine; {} for none."""
    own = name or adapter.base_name
    if own is None:
        return {}
    try:
        return adaptable_layers(load_module(resolve_base(own, download=name is not None))[0])
    except AdapterError:
        if name is not None:
            raise
        return {}


def _on_its_base(adapter: Adapter, layers: Mapping[str, nn.Module], name: str | Path | Base | None) -> Adapter:
    """The adapter under the paths of the base's layers, if they are known and it fits.

    Raises IncompatibleError for one that does not fit the base that is named.
    """
    fitting = fit_paths(adapter, layers)
    try:
        if layers:
            check_fits(fitting, layers, f"'{name or adapter.base_name}'")
    except IncompatibleError:
        if name is not None:
            raise
        return adapter
    return fitting


def _check_contents(folder: Path, name: str, source: str) -> str:
    """Hold what was unpacked or copied to the same standard as our own; "adapter" or "model"."""
    if not (folder / CONFIG_FILE).is_file():
        if not (folder / MODEL_CONFIG).is_file():
            raise FormatError(f"'{source}' holds neither an adapter nor a model.")
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
    files.write_json(folder / METADATA_FILE, metadata | {"name": name, "sha256": hashes, "added_from": source})
    return "adapter"
