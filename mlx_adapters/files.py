"""The only writer. Whatever this package leaves on disk is whole or absent.

A file is written under a temporary name beside its target, flushed to the disk and renamed; a folder
likewise. A crash leaves at most a `.tmp-*` entry, which nothing reads and the next writer sweeps away.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mlx_adapters.errors import ExistsError, FormatError, NotFoundError, StorageError, TrainingError
from mlx_adapters.locks import lock_file
from mlx_adapters.paths import storage_errors

TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def _made_in(folder: Path) -> Iterator[None]:
    """Make `folder`; StorageError if it, or what the block makes in it, cannot be because of what stands there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        hint = "a file stands in the way, or the system keeps the place for itself; choose another."
        raise StorageError(f"'{folder}' is no folder to write in.", hint) from error


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing bytes; rename it to `path` when the block ends well.

    It is flushed to the disk first, unless it lies in an `atomic_folder`, which flushes all its files at its end.
    Raises StorageError when the disk refuses; then nothing is left behind and an old `path` is untouched.
    """
    path = Path(path)
    draft = any(part.startswith(TEMPORARY_PREFIX) for part in path.absolute().parent.parts)
    with storage_errors(path):
        with _made_in(path.parent):
            descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                yield stream
                stream.flush()
                if not draft:
                    os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
            if not draft:
                _fsync_path(path.parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`; rename it to `path` when the block ends well.

    Raises ExistsError if `path` exists and `overwrite` is false (checked before and after the work), and with
    `overwrite` if it holds nothing of the kind that would replace it.
    """
    path = Path(path).absolute()
    refuse_existing(path, overwrite)
    with storage_errors(path):
        with _made_in(path.parent):
            sweep(path.parent)
            temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        try:
            with lock_file(temporary):
                yield temporary
                os.chmod(temporary, 0o755)
                for folder, _, files in os.walk(temporary):
                    for file in files:
                        _fsync_path(Path(folder) / file)
                    _fsync_path(Path(folder))
                refuse_existing(path, overwrite)
                refuse_other_things(path, (entry.name for entry in temporary.iterdir()))
                _swap_in(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def refuse_other_things(path: Path, names: Iterable[str]) -> None:
    """Raise ExistsError for a folder that holds something, but none of the names that what would replace it has."""
    old = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if old and old.isdisjoint(names):
        raise ExistsError(f"'{path}' holds other things than what would replace it.", "choose another folder to write.")


def _swap_in(new: Path, path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        os.replace(new, path)
    elif _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        os.replace(path, old / "old")
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)
    _fsync_path(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two entries of a disk in a single step, so that a kill cannot come between; False if that cannot be."""
    libc, swap = ctypes.CDLL(None), 2
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(one), os.fsencode(other), swap) == 0
        here = -100  # AT_FDCWD
        return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
    except AttributeError:
        return False


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ExistsError if `path` is there and may not be replaced (an empty folder may)."""
    if overwrite or not os.path.lexists(path):
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    raise ExistsError(f"'{path}' already exists.", "choose another name, or pass --overwrite to replace it.")


def sweep(folder: Path) -> None:
    """Remove temporary entries of writers that died; what is still being written is locked or young."""
    for entry in folder.glob(TEMPORARY_PREFIX + "*"):
        with contextlib.suppress(OSError, TrainingError):
            if time.time() - entry.stat().st_mtime < 60:
                continue
            with lock_file(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def json_text(value: Any, name: str | Path) -> str:
    """`value` as indented JSON with sorted keys, for the file `name`. Raises FormatError for NaN."""
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise FormatError(f"'{name}' would hold a number that JSON has not: {error}.") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all. NaN is refused."""
    write_text(path, json_text(value, path))


def append_line(path: Path, line: str) -> None:
    """Append one line to a log in a single write."""
    with storage_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as stream:
            stream.write(line.rstrip("\n").encode() + b"\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises NotFoundError or FormatError that name the file."""
    try:
        with open(path, "rb") as stream:
            value = json.loads(stream.read())
    except FileNotFoundError:
        raise NotFoundError(f"There is no file '{path}'.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"'{path}' is not readable JSON: {error}.") from None
    if not isinstance(value, dict):
        raise FormatError(f"'{path}' must hold a JSON object.")
    return value


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` (a hard link, or a copy where links are not possible)."""
    target = Path(target)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{target.name}"
    with storage_errors(target):
        try:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
                _fsync_path(temporary)
            os.replace(temporary, target)
            _fsync_path(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy one file, whole or not at all."""
    with atomic_file(target) as out, open(source, "rb") as stream:
        shutil.copyfileobj(stream, out, 1 << 20)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder on one disk in a single step. Raises ExistsError if `target` is there."""
    refuse_existing(target, overwrite=False)
    with storage_errors(target):
        os.rename(source, target)
        _fsync_path(Path(target).parent)


def remove(path: Path) -> None:
    """Remove a file or folder so that it is gone at once, even if the deletion is interrupted."""
    path = Path(path)
    with storage_errors(path):
        if path.is_dir() and not path.is_symlink():
            doomed = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
            os.replace(path, doomed / "old")
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink()


def sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
