"""Locks between processes, which end with the process that holds them, however that ends."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import tempfile
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from mlx_adapters.errors import StorageError, TrainingError
from mlx_adapters.storage.paths import home, storage_errors

log = logging.getLogger("mlx_adapters.storage.locks")
held_here = threading.local()  # .names: the locks of the home folder that this thread holds
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def lock_file(path: Path, wait: bool = False, busy: str | None = None) -> Iterator[bool]:
    """Hold an exclusive lock on an existing file or folder; it ends with the process, however that ends.

    Gives whether it is held: some network shares have no locks, which is said once. Raises TrainingError(`busy`)
    at once if another process holds it and `wait` is false.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise TrainingError(busy or f"'{path}' is in use by another process.", "wait until it ends.") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            held = False
            _tell_once("This disk or network share has no locks: run one command at a time on it.")
        yield held
    finally:
        os.close(descriptor)


def place_name(path: Path) -> str:
    """The name of a lock on a place on the disk, whether there is anything or not, however its path is spelled."""
    spelled = os.path.join(os.path.realpath(path.parent), path.name)
    folded = unicodedata.normalize("NFC", spelled.casefold())
    readable = re.sub(r"[^a-z0-9._-]+", "", path.name.casefold())[:60]  # for people; the hash alone counts
    return f"{readable}-{hashlib.sha256(os.fsencode(folded)).hexdigest()[:16]}"


@functools.cache
def _tell_once(text: str) -> None:
    log.warning(text)


@contextlib.contextmanager
def lock(name: str, wait: bool = True, busy: str | None = None, of_all_homes: bool = False) -> Iterator[None]:
    """Hold the lock `name` of the home folder, whatever its case (see `lock_file`): many disks know no case.

    of_all_homes: one that this user's processes share whatever home folder they have.
    """
    folder = Path(tempfile.gettempdir(), f"mlx_adapters-locks-{os.getuid()}") if of_all_homes else home() / "locks"
    path = folder / f"{name.casefold()}.lock"
    try:
        with storage_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:  # below a file, or where none can be made
        hint = "is HOME right? --home (or MLX_ADAPTERS_HOME) names another place."
        raise StorageError(f"There can be no folder '{folder}': {str(error.strerror).lower()}.", hint) from error
    with lock_file(path, wait=wait, busy=busy):
        before = _held_names()
        held_here.names = before | {name.casefold()}
        try:
            yield
        finally:
            held_here.names = before


def _held_names() -> frozenset[str]:
    return getattr(held_here, "names", frozenset())


def change_of(folder: Path) -> str:
    """The name of the lock that is held while several files of a folder are replaced."""
    return f"change-{place_name(folder)}"


def wait_for_change(folder: Path) -> None:
    """Return when nobody else changes the folder; at once where this thread does, or where no lock can be held."""
    if change_of(folder).casefold() not in _held_names():
        with contextlib.suppress(StorageError, OSError), lock(change_of(folder)):
            pass
