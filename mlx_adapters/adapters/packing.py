"""Adapters and models in one file.

A pack is a gzipped tar with one folder of regular files; equal contents give equal bytes. `adding` takes it in again.
"""

import contextlib
import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_adapters.checkpoints.contents import files_below
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ExistsError, NotFoundError
from mlx_adapters.events import Note, OnEvent, Progress, log_warnings
from mlx_adapters.models.adapter import Adapter, AdapterOrBase, read_adapter, write_adapter
from mlx_adapters.models.base import Base
from mlx_adapters.models.metadata import read_config, read_version
from mlx_adapters.sources import lookup
from mlx_adapters.storage import files, paths, replacing
from mlx_adapters.storage.files import iterations_of
from mlx_adapters.storage.hf_names import TEMPLATE_FOLDER
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    CONFIG_FILE,
    EXTRAS,
    METADATA_FILE,
    checkpoint_file,
)
from mlx_adapters.storage.unpacking import BLOCK, CHUNK, is_safe

MODEL_CONFIG = "config.json"
ENDINGS = (".tar.gz", ".tgz")


@dataclass(frozen=True)
class Pack:
    """A pack that was written: the names in it, its size and its hash."""

    path: Path
    files: tuple[str, ...]
    size_bytes: int
    sha256: str

    @property
    def reference(self) -> str:
        """How it is spelled where `add` asks for it."""
        return str(self.path)


def pack(
    source: AdapterOrBase,
    target: str | Path,
    *,
    checkpoints: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = log_warnings,
) -> Pack:
    """Write an adapter or a model into one .tar.gz file, as of one version of its files.

    Args:
        source: an adapter's reference (one with an iteration packs that checkpoint as what the bare name means), an
            `Adapter` (as it is in memory), or a model's folder.
        target: the file.
        checkpoints: take an adapter's checkpoints along, too; an `Adapter` has none.
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
    if isinstance(source, Adapter):
        require(not checkpoints, "An adapter in memory has no checkpoints.", "give its name.")
        with files.draft_beside(target) as place:
            own = source.name.partition("@")[0].rpartition("/")[2]  # the folder's name in the pack
            return pack(write_adapter(source, place / own), target, overwrite=overwrite, on_event=on_event)
    lookup.refuse_full(source)
    folder, iteration = (source.folder, None) if isinstance(source, Base) else lookup.locate(source)
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
        members = read_version(folder, members_of, names)
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
    return info.mtime == 0 and info.name.count("/") in (1, 2) and is_safe(info.name.partition("/")[2])


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
        raise NotFoundError(
            f"'{folder}' is neither an adapter nor a model: no {CONFIG_FILE}, no {MODEL_CONFIG}.", "name its folder."
        )
    if lacking := Base(folder.name, folder).lacking:
        raise NotFoundError(
            f"'{folder}' lacks {lacking[0]}, which its index names.", "copy or download the whole model."
        )
    members = {name: folder / name for name in files_below(folder) if is_safe(name) and _has_place(name)}
    if left := [name for name in files_below(folder) if name not in members]:
        on_event(Note(f"left out, because such files are not taken in again: {', '.join(left)}", "warning"))
    return _open_all(members, opened)


def _has_place(name: str) -> bool:
    """Whether a file, by its path in a model's folder, has a place in a pack."""
    return "/" not in name or bool(re.fullmatch(rf"{TEMPLATE_FOLDER}/[^/]+\.jinja", name))


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
