"""Reading a .tar.gz from a stranger.

Only regular files of known kinds come out, side by side in one folder: no path that leads elsewhere, no link,
no device, no pickle, no file twice, no unbounded size. What is read never exceeds the limit by more than one
chunk, whether the bytes are in files, in headers or in padding.
"""

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from mlx_adapters.errors import FormatError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.storage import files
from mlx_adapters.storage.hf_names import TEMPLATE_FOLDER
from mlx_adapters.units import size

BLOCK = 512
CHUNK = 1 << 20
MAX_BYTES = 200_000_000_000
MAX_FILES = 10_000
PACK_AGAIN = "'mlx-adapters pack' makes such files; ask for another one."
# gzip can unfold a thousandfold. Weights hardly shrink, so a hundredfold (beyond a little text) is an attack.
MAX_RATIO, FREE_BYTES = 100, 64 << 20
SAFE_SUFFIXES = (".safetensors", ".json", ".txt", ".md", ".model", ".tiktoken", ".jinja", ".yaml", ".yml")
SAFE_NAMES = re.compile(r"[^.]+|.*\.model\.v\d+")  # LICENSE, USE_POLICY; Mistral's tokenizer.model.v3
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")


def is_safe(name: str) -> bool:
    """Whether a file of this name is of a kind that cannot run code when it is read."""
    return not name.startswith(".") and bool(SAFE_NAMES.fullmatch(name) or name.endswith(SAFE_SUFFIXES))


def unpack(path: Path, folder: Path, max_bytes: int = MAX_BYTES, on_event: OnEvent = log_warnings) -> None:
    """Put the files of a .tar.gz side by side into `folder`; a folder around them all is taken off.

    Raises FormatError for whatever is not a plain, whole, honest archive, StorageError if the disk is full.
    """
    skipped = []
    with open(path, "rb") as raw:
        stream = _Unzipped(raw, path, max_bytes)
        for info in _headers(stream):
            name = _file_name(info, path)
            if is_safe(name):
                if (folder / name).exists():
                    raise FormatError(f"'{path}' holds '{name}' twice.", PACK_AGAIN)
                with files.atomic_file(folder / name) as target:
                    for chunk in stream.chunks(info.size):
                        target.write(chunk)
            else:
                skipped.append(name)
                for _ in stream.chunks(info.size):
                    pass
            stream.take(-info.size % BLOCK)
        stream.finish()
    if shown := [name for name in skipped if not name.startswith(".")]:
        on_event(Note(f"not taken from '{path.name}': {', '.join(shown[:10])}"))


class _Unzipped:
    """The bytes inside a gzip file, with a limit to how many there may be."""

    def __init__(self, raw: IO[bytes], path: Path, max_bytes: int) -> None:
        self._stream, self._path = gzip.GzipFile(fileobj=raw), path
        self.left = min(max_bytes, MAX_RATIO * path.stat().st_size + FREE_BYTES)

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes, at most a chunk."""
        self.left -= count
        if self.left < 0:
            raise FormatError(f"'{self._path}' unfolds to more than it may.", "--max-size raises the limit.")
        try:
            data = self._stream.read(count)
        except (OSError, EOFError, zlib.error):
            data = b""
        if len(data) < count:
            raise FormatError(f"'{self._path}' is damaged or no .tar.gz file.", "copy or download it again.")
        return data

    def chunks(self, count: int) -> Iterator[bytes]:
        """`count` bytes in chunks. A size beyond the limit is refused before anything is written."""
        if not 0 <= count <= self.left:
            raise FormatError(
                f"'{self._path}' holds a file of {size(count)}, more than it may.", "--max-size raises the limit."
            )
        while count:
            yield (data := self.take(min(count, CHUNK)))
            count -= len(data)

    def finish(self) -> None:
        """Read what is left, padding at most, so that the checksum at the end is checked."""
        try:
            if len(self._stream.read(CHUNK)) == CHUNK:
                raise FormatError(f"'{self._path}' goes on after its end.", PACK_AGAIN)
        except (OSError, EOFError, zlib.error):
            raise FormatError(f"'{self._path}' is damaged.", "copy or download it again.") from None


def _headers(stream: _Unzipped) -> Iterator[tarfile.TarInfo]:
    """The headers of regular files; the caller reads each one's contents before it asks for the next."""
    for _ in range(MAX_FILES):
        block = stream.take(BLOCK)
        if not any(block):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            raise FormatError("The archive holds a damaged header.", "copy or download it again.") from None
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE) and 0 <= info.size < CHUNK:
            # Extra attributes such as times; a name in here would be one that does not fit a plain header.
            if b"path=" in stream.take(info.size + -info.size % BLOCK):
                raise FormatError("The archive holds a file name that is too long, or a link.", PACK_AGAIN)
        elif info.isreg() and not info.issparse() and info.type != tarfile.CONTTYPE:
            yield info
        elif not info.isdir() or info.size:
            raise FormatError(
                f"The archive holds '{_shown(info.name)}', which is no regular file.", "links and devices are refused."
            )
    raise FormatError(f"The archive holds more than {MAX_FILES:,} entries.", PACK_AGAIN)


def _file_name(info: tarfile.TarInfo, path: Path) -> str:
    parts = [part for part in PurePosixPath(info.name).parts if part != "."]
    inner = f"{TEMPLATE_FOLDER}/" if parts[-2:-1] == [TEMPLATE_FOLDER] and parts[-1].endswith(".jinja") else ""
    bad = info.name.startswith("/") or "\\" in info.name or "\0" in info.name or any(part == ".." for part in parts)
    if (
        bad
        or not 1 <= len(parts) <= (3 if inner else 2)
        or not info.name.isprintable()
        or len(info.name.encode(errors="replace")) > 250
    ):
        raise FormatError(
            f"'{path}' holds the path '{_shown(info.name)}'.", "files lie side by side, in at most one folder."
        )
    if parts[-1].endswith(PICKLES):
        raise FormatError(
            f"'{path}' holds '{parts[-1]}', a kind of file that can run code.", "only safetensors weights."
        )
    return inner + parts[-1]


def _shown(name: str) -> str:
    return ascii(name)[1:-1][:100]
