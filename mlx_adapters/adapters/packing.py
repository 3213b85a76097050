"""Adapters and models in one file, and from elsewhere into the registry, trusting nothing.

A pack is a gzipped tar with one folder of regular files; equal contents give equal bytes. `unpacking` reads it.
"""

import contextlib
import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ConfigError, ExistsError, FormatError, NotFoundError
from mlx_adapters.events import Note, OnEvent, Progress, ignore
from mlx_adapters.models.adapter import read_adapter
from mlx_adapters.models.base import Base
from mlx_adapters.models.metadata import check_config, iterations_of, read_config, read_metadata
from mlx_adapters.sources import lookup, references, registry
from mlx_adapters.storage import files, paths, replacing
from mlx_adapters.storage.replacing import Output, read_whole
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    ADAPTER_OUTPUT,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    METADATA_FILE,
    checkpoint_file,
)
from mlx_adapters.storage.unpacking import BLOCK, CHUNK, MAX_BYTES, is_safe, unpack

MODEL_CONFIG = "config.json"
ENDINGS = (".tar.gz", ".tgz")
MODEL_OUTPUT = Output(MODEL_CONFIG, r"[^/]+")
EXTRAS = ("README.md", "LICENSE", "NOTICE")


@dataclass(frozen=True)
class Pack:
    """A pack that was written: the names in it, its size and its hash."""

    path: Path
    files: tuple[str, ...]
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Added:
    """What was taken in: an adapter (with its name in the registry, if it went there) or a model."""

    kind: str
    folder: Path
    name: str | None
    iterations: tuple[int, ...] = ()


def pack(
    source: str, target: str | Path, *, checkpoints: bool = False, overwrite: bool = False, on_event: OnEvent = ignore
) -> Pack:
    """Write an adapter or a model into one .tar.gz file, as of one version of its files.

    Args:
        source: an adapter's reference (one with an iteration packs that checkpoint as what the bare name means), or a
            model's folder.
        target: the file.
        checkpoints: take an adapter's checkpoints along, too.
        overwrite: replace the file.
        on_event: called with progress and notes.

    Raises ConfigError, NotFoundError, FormatError or ExistsError.

    Example:
        >>> ma.pack("sql", "sql.tar.gz").path.name
        'sql.tar.gz'
    """
    target = paths.expanded(target)
    require(target.name.endswith(ENDINGS), f"'{target}' must end in .tar.gz.")
    replacing.refuse_existing(target, overwrite)
    if target.exists() and not _is_pack(target):
        raise ExistsError(f"'{target}' is no pack of this program.", "choose another name.")
    folder, iteration = lookup.locate(source)
    if not folder.is_dir():
        raise NotFoundError(
            f"There is no adapter or model folder '{folder}'.", "'mlx-adapters list' shows the adapters."
        )
    opened = contextlib.ExitStack()

    def members_of() -> dict[str, IO[bytes]]:
        opened.close()  # those of an attempt that came between two versions
        if (folder / CONFIG_FILE).is_file():
            return _adapter_members(folder, iteration, checkpoints, opened)
        require(not checkpoints and iteration is None, "Only adapters have checkpoints.")
        return _model_members(folder, opened, on_event)

    # Once they are open, what replaces or removes the files does not touch what is packed.
    names = tuple(path.name for path in paths.visible(folder))
    with opened, contextlib.ExitStack() as writing:
        members = read_whole(folder, (ADAPTER_FILE, CONFIG_FILE, METADATA_FILE, *names), members_of)
        raw = writing.enter_context(files.atomic_file(target))
        stream = writing.enter_context(gzip.GzipFile("", "wb", 1, raw, mtime=0))
        for done, (name, content) in enumerate(sorted(members.items()), start=1):
            _write_member(stream, f"{folder.name[:60]}/{name}", content)
            on_event(Progress("pack", done, len(members), "file"))
        stream.write(bytes(2 * BLOCK))
    return Pack(target, tuple(sorted(members)), target.stat().st_size, files.sha256(target))


def _is_pack(path: Path) -> bool:
    """Whether a file begins as our packs do: with a file of a safe kind in a folder, and without a date."""
    try:
        with gzip.open(path) as stream:
            info = tarfile.TarInfo.frombuf(stream.read(BLOCK), "utf-8", "surrogateescape")
    except (OSError, EOFError, zlib.error, tarfile.HeaderError):
        return False
    return info.mtime == 0 and info.name.count("/") == 1 and is_safe(info.name.partition("/")[2])


def _adapter_members(
    folder: Path, iteration: int | None, checkpoints: bool, opened: contextlib.ExitStack
) -> dict[str, IO[bytes]]:
    adapter = read_adapter(folder, iteration)
    chosen = folder / (ADAPTER_FILE if iteration is None else checkpoint_file(iteration))
    members = {ADAPTER_FILE: chosen}
    members |= {name: folder / name for name in EXTRAS if (folder / name).is_file()}
    if checkpoints:
        members |= {checkpoint_file(i): folder / checkpoint_file(i) for i in iterations_of(folder)}
    streams = _open_all(members, opened)
    weights = {name: stream for name, stream in streams.items() if name.endswith(ADAPTER_FILE)}
    checksums = {name: hashlib.file_digest(stream, "sha256").hexdigest() for name, stream in weights.items()}  # type: ignore[arg-type]
    metadata = adapter.metadata | {"sha256": checksums} | ({"iteration": iteration} if iteration is not None else {})
    config = adapter.config.to_mlx_lm(read_config(folder))
    return {**streams, METADATA_FILE: _in_memory(metadata), CONFIG_FILE: _in_memory(config)}


def _in_memory(value: dict[str, Any]) -> IO[bytes]:
    return io.BytesIO(json.dumps(value, indent=2, sort_keys=True).encode())


def _model_members(folder: Path, opened: contextlib.ExitStack, on_event: OnEvent) -> dict[str, IO[bytes]]:
    if not (folder / MODEL_CONFIG).is_file():
        raise NotFoundError(f"'{folder}' is neither an adapter nor a model: no {CONFIG_FILE}, no {MODEL_CONFIG}.")
    members = [path for path in paths.visible(folder) if path.is_file()]
    left = sorted(path.name for path in members if not is_safe(path.name))
    if left:
        on_event(Note(f"left out, because such files are not taken in again: {', '.join(left)}", "warning"))
    return _open_all({path.name: path for path in members if is_safe(path.name)}, opened)


def _open_all(members: dict[str, Path], opened: contextlib.ExitStack) -> dict[str, IO[bytes]]:
    return {name: opened.enter_context(path.open("rb")) for name, path in members.items()}


def _write_member(stream: gzip.GzipFile, name: str, content: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = content.seek(0, io.SEEK_END), 0o644
    content.seek(0)
    stream.write(info.tobuf(tarfile.GNU_FORMAT))
    while block := content.read(CHUNK):
        stream.write(block)
    stream.write(bytes(-info.size % BLOCK))


def add(
    source: str | Path,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    max_bytes: int = MAX_BYTES,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> Added:
    """Take in an adapter, checked, as a copy.

    Folders made by plain `mlx_lm.lora` of any year are taken, checkpoints too; the config becomes one that mlx-lm reads
    today.

    Args:
        source: a folder, a .tar.gz file or "user/repo[@revision]" on the Hub.
        name: its name in the registry; None: the file's, folder's or repository's.
        out: put it into this folder instead; a packed model needs one.
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
    if path.is_file():
        require(path.name.endswith(ENDINGS), f"'{source}' is neither a folder nor a .tar.gz file.")
        own = path.name.removesuffix(".tgz").removesuffix(".tar.gz")
        taken = _take_in(
            lambda folder: unpack(path, folder, max_bytes, on_event), path, own, name, out, overwrite, str(source)
        )
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
    taken = _take_in(lambda target: _copy(folder, target, on_event), folder, own, name, out, overwrite, str(reference))
    return _tell_strength(taken, on_event)


def _tell_strength(added: Added, on_event: OnEvent) -> Added:
    if added.kind == "adapter" and (note := read_adapter(added.folder, name=added.name).strength_note):
        on_event(Note(note, "warning"))
    return added


def _take_in(
    fill: Callable[[Path], None],
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
            fill(folder)
            kind = _check_contents(folder, target.name, source)
            names = "|".join(re.escape(path.name) for path in folder.iterdir())
            new = Output(MODEL_CONFIG, names)  # another model's files look like this one's: none of them may vanish
            replacing.refuse_existing(target, overwrite, ADAPTER_OUTPUT if kind == "adapter" else new)
        return Added(kind, target, None, iterations_of(target) if kind == "adapter" else ())
    if name is None and not references.NAME.fullmatch(own):
        raise ConfigError(f"'{own}' cannot be an adapter's name.", "give it one with --name.")
    name = name or own
    target = registry.adapter_folder(name)
    replacing.refuse_existing(target, overwrite, ADAPTER_OUTPUT)
    replacing.refuse_reading_inside(target, [read])
    with registry.changing(name), files.atomic_folder(target, overwrite, ADAPTER_OUTPUT) as folder:
        fill(folder)
        if _check_contents(folder, name, source) == "model":
            raise ConfigError(f"'{source}' is a model, not an adapter.", "give --out FOLDER to unpack it there.")
    return Added("adapter", target, name, iterations_of(target))


def _copy(source: Path, target: Path, on_event: OnEvent) -> None:
    """Copy the files of an adapter, and nothing else, from a folder."""
    check_config(read_config(source), f"'{source}'")
    wanted = [path for path in paths.visible(source) if path.is_file() and _belongs(path.name)]
    for path in wanted:
        if path.is_symlink():
            raise FormatError(f"'{path}' is a link.", "put the file itself there.")
    paths.require_free_space(target, sum(path.stat().st_size for path in wanted))
    for done, path in enumerate(wanted, start=1):
        files.copy_file(path, target / path.name)
        on_event(Progress("add", done, len(wanted), "file"))


def _belongs(name: str) -> bool:
    return name in (ADAPTER_FILE, CONFIG_FILE, METADATA_FILE, *EXTRAS) or bool(CHECKPOINT_FILE.fullmatch(name))


def _check_contents(folder: Path, name: str, source: str) -> str:
    """Hold what was unpacked or copied to the same standard as our own; "adapter" or "model"."""
    if not (folder / CONFIG_FILE).is_file():
        if not (folder / MODEL_CONFIG).is_file():
            raise FormatError(f"'{source}' holds neither an adapter nor a model.")
        _ = Base(name, folder).weight_files
        return "model"
    raw = read_config(folder)
    check_config(raw, f"'{source}'")
    metadata = read_metadata(folder)
    recorded, hashes = registry.checksums_of(metadata), {}
    for iteration in (None, *iterations_of(folder)):
        with paths.named(folder, source):
            adapter = read_adapter(folder, iteration, name)
        file = ADAPTER_FILE if iteration is None else checkpoint_file(iteration)
        hashes[file] = files.sha256(folder / file)
        if recorded.get(file, hashes[file]) != hashes[file]:
            raise FormatError(f"'{file}' in '{source}' is not the file that its record names.", "it may be damaged.")
    files.write_json(folder / CONFIG_FILE, adapter.config.to_mlx_lm(raw))  # whatever the year, mlx-lm loads it
    files.write_json(folder / METADATA_FILE, metadata | {"name": name, "sha256": hashes, "added_from": source})
    return "adapter"
