"""What is on the disk for the time of one write: hidden folders that prove to be ours, and reaching the platter.

Such a folder lies beside what is written, has a name that nobody else gives, holds a marker, and the marker is
locked while its writer lives. Only a folder with all of that, old and not locked, is swept away.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mlx_adapters.errors import TrainingError
from mlx_adapters.storage.locks import lock_file
from mlx_adapters.storage.paths import TEMPORARY_PREFIX

MARKER = "written-by-mlx-adapters"
OLD = f"{TEMPORARY_PREFIX}old"  # what a swap on a disk without exchange has put aside
YOUNG_SECONDS = 60  # its writer may be about to lock it
UNLOCKABLE_SECONDS = 7 * 24 * 3600  # where there are no locks, nothing is written for longer
FICLONE = 0x40049409  # of linux/fs.h
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def draft(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent`, ours while the block runs and gone with all that is in it afterward."""
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent))
    try:
        os.close(os.open(folder / MARKER, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
        with lock_file(folder / MARKER):
            yield folder
    finally:
        with contextlib.suppress(OSError):
            _discard(folder)


def in_draft(path: Path) -> bool:
    """Whether `path` lies in a draft, which goes as a whole."""
    return any(part.startswith(TEMPORARY_PREFIX) for part in path.absolute().parent.parts)


def sweep(parent: Path, young_seconds: float = YOUNG_SECONDS) -> int:
    """Remove from `parent` what writers that died have left; how many there were."""
    swept = 0
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        abandoned = [
            Path(e.path) for e in entries if e.name.startswith(TEMPORARY_PREFIX) and e.is_dir(follow_symlinks=False)
        ]
        for folder in abandoned:
            with contextlib.suppress(OSError, TrainingError):
                swept += _sweep_one(folder, young_seconds)
    return swept


def _sweep_one(folder: Path, young_seconds: float) -> bool:
    age, marker = time.time() - folder.stat().st_mtime, folder / MARKER
    if age < young_seconds:
        return False
    if not marker.is_file():
        folder.rmdir()  # killed before the marker or after it; whatever is in there without one is not ours
        return True
    with lock_file(marker) as locked:
        if not locked and age < UNLOCKABLE_SECONDS:
            return False
        _put_back(folder)
        _discard(folder)
    return True


def _put_back(folder: Path) -> None:
    """A kill came between the two renames of `swap_in`: the old one is whole, and nothing stands in its place."""
    aside = folder / OLD
    for entry in aside.iterdir() if aside.is_dir() else ():
        if not os.path.lexists(folder.parent / entry.name):
            os.rename(entry, folder.parent / entry.name)


def _discard(folder: Path) -> None:
    """Remove a draft, its marker last: what is left by a kill still proves to be ours."""
    for entry in folder.iterdir():
        if entry.name != MARKER:
            remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, also where folders in it are protected from writing. Raises OSError."""
    for place, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            os.chmod(place, stat.S_IRWXU)
    shutil.rmtree(folder)


def swap_in(new: Path, path: Path) -> None:
    """Let the folder `new`, which lies in a draft beside `path`, take the place of the folder `path`."""
    if exchange(new, path):
        return
    aside = new.parent / OLD
    aside.mkdir()
    os.rename(path, aside / path.name)
    os.rename(new, path)


def exchange(one: Path, other: Path) -> bool:
    """Swap two entries of a disk in a single step, so that a kill cannot come between; False if that cannot be."""
    libc, swap = ctypes.CDLL(None), 2
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(one), os.fsencode(other), swap) == 0
        here = -100  # AT_FDCWD
        return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
    except AttributeError:
        return False


def clone(source: IO[bytes], new: IO[bytes]) -> bool:
    """Let an empty file share the blocks of `source` until one of both is written; False if that cannot be.

    On macOS another file takes the place of `new`, which is then to be found by its name alone.
    """
    if sys.platform == "darwin":
        libc, twin = ctypes.CDLL(None), f"{new.name}-clone"
        locked = getattr(os.fstat(source.fileno()), "st_flags", 0)  # in Finder, say: so would the clone be
        if locked or not hasattr(libc, "clonefile") or libc.clonefile(os.fsencode(source.name), os.fsencode(twin), 0):
            return False
        os.chmod(twin, os.fstat(new.fileno()).st_mode)
        os.replace(twin, new.name)
        return True
    try:
        fcntl.ioctl(new, FICLONE, source.fileno())
        return True
    except OSError:
        return False


def flush(descriptor: int, platter: bool = True) -> None:
    """Put a file or folder on the disk; with `platter` past the drive's own cache, where macOS's fsync stops."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if platter and full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError:  # a share, or a disk that refuses: what fsync does is what there is
            pass
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def flush_path(path: Path, platter: bool = True) -> None:
    """`flush` an entry of the disk by its path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor, platter)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Put a folder and all that is in it on the disk; the drive's cache is emptied once, at the end."""
    inside = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    regular = [path for path in inside if not path.is_symlink()]
    for path in (*regular, *(Path(place) for place, _, _ in os.walk(folder))):
        flush_path(path, platter=False)
    for path in regular[-1:]:
        flush_path(path)
