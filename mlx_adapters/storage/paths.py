"""Paths and the disks behind them: where things of ours are kept, how a path is spelled, how much room there is."""

import contextlib
import errno
import glob
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from mlx_adapters.errors import AdapterError, FormatError, NotFoundError, StorageError
from mlx_adapters.units import size

PURGEABLE = " Finder counts what it could delete (purgeable space) as available; that is not free yet."
HOME_VARIABLE = "MLX_ADAPTERS_HOME"
TEMPORARY_PREFIX = ".mlx-adapters-tmp-"
LITTER = (".DS_Store", ".localized", "Icon\r", "Thumbs.db", "desktop.ini")  # what systems put into folders they show


def home() -> Path:
    """The folder that holds everything of ours: `$MLX_ADAPTERS_HOME`, else `~/.mlx_adapters`."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".mlx_adapters").expanduser().absolute()


def is_path(text: str) -> bool:
    """Whether a reference is spelled as a path: with a beginning that no name and no Hub id has."""
    return text.startswith((".", "/", "~"))


def expanded(path: str | Path) -> Path:
    """The absolute path that a user's `path` means. Raises NotFoundError where there can be no such path."""
    try:
        whole = Path(path)
        whole = (whole.expanduser() if str(path).startswith("~") else whole).absolute()
        whole.exists()
        return whole
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, ~nobody
        raise NotFoundError(f"There can be no path {str(path)[:80]!r}.", "is it spelled right?") from None


def glob_there(pattern: str) -> list[str]:
    """`glob.glob`, sorted, in a folder whose own name may hold what a pattern does: "my [4bit] model"."""
    folder, name = os.path.split(pattern)
    return sorted(glob.glob(os.path.join(glob.escape(folder), name)))


def why_gone(path: str | Path) -> str:
    """What to do about a file that is not there."""
    if os.path.islink(path):
        return f"it is a link to '{os.readlink(path)}', where nothing is: put the file itself there."
    return "is it spelled right, and copied whole?"


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to the same file or folder, whatever their spelling, links and the disk's rules of case.

    Where one leads nowhere, their spelling tells, with links resolved.
    """
    try:
        return os.path.samefile(one, other)
    except ValueError:  # a NUL: no path at all
        return False
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a path leads to a folder or into it, there or not, however both are spelled (see `same_place`)."""
    try:
        whole = Path(path).expanduser().resolve()
    except (OSError, ValueError, RuntimeError):  # no path at all, or a circle of links
        return False
    return any(same_place(part, folder) for part in (whole, *whole.parents))


def is_litter(name: str) -> bool:
    """Whether a file of this name was put there by an operating system, for itself: it is nobody's data."""
    return name in LITTER or name.startswith("._")


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What `pattern` finds below `folder`, sorted, without names that begin with a dot: those are never data."""
    matches = folder.glob(pattern)
    return sorted(path for path in matches if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def same_source(one: str, other: str) -> bool:
    """Whether two names of a model are one: the same id on the Hub, or paths to the same place."""
    if is_path(one) and is_path(other):
        return same_place(os.path.expanduser(one), os.path.expanduser(other))
    return one == other


ROOM_HINT = "free some space, or choose another disk with --home or another output folder."


@contextlib.contextmanager
def storage_errors(path: Path, room_hint: str = ROOM_HINT) -> Iterator[None]:
    """Turn the disk's refusals into StorageError with a next step; `room_hint` is that of a full disk."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: room_hint,
            errno.EDQUOT: "your disk quota is used up.",
            errno.EFBIG: "the file is larger than this process may write (see 'ulimit -f').",
            errno.EROFS: "the disk is read-only; choose another place.",
            errno.EACCES: "you have no permission there; choose another place.",
            errno.EPERM: "you have no permission there; choose another place.",
            errno.ENOTSUP: "this disk or network share cannot do it; choose a disk of this machine.",
            errno.EOPNOTSUPP: "this disk or network share cannot do it; choose a disk of this machine.",
        }
        about = error.filename
        if isinstance(about, str | bytes) and not _belongs_to(Path(os.fsdecode(about)), Path(path)):
            read = undrafted(Path(os.fsdecode(about)))
            raise unreadable(read, error) from error
        if error.errno not in hints:
            raise
        raise StorageError(f"Cannot write '{undrafted(path)}': {_reason(error)}.", hints[error.errno]) from error


def unreadable(path: str | Path, error: OSError) -> StorageError:
    """The error for what the system refuses to let us read."""
    hint = "'ulimit -n' sets how many." if error.errno == errno.EMFILE else "is it there, and yours?"
    return StorageError(f"Cannot read '{path}': {_reason(error)}.", hint)


POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: str | Path) -> None:
    """Raise FormatError for what git leaves in place of a large file unless Git LFS fetches the file itself."""
    try:
        with open(path, "rb") as stream:
            is_pointer = stream.read(len(POINTER)) == POINTER
    except OSError:  # whoever reads it is told why that cannot be
        return
    if is_pointer:
        hint = "run 'git lfs pull' where it was cloned, or download the file itself."
        raise FormatError(f"'{undrafted(Path(path))}' is a Git LFS pointer, not the file that it stands for.", hint)


@contextlib.contextmanager
def named(folder: Path, name: str) -> Iterator[None]:
    """Let errors about a folder, such as a draft that nobody has seen, call it as the user did."""
    try:
        yield
    except AdapterError as error:
        message = error.message.replace(str(folder), name).replace(str(undrafted(folder)), name)
        raise type(error)(message, error.hint) from None


def undrafted(path: Path) -> Path:
    """The path that a file of a draft will have in the end: what the user knows."""
    return Path(*(part for part in Path(path).parts if not part.startswith(TEMPORARY_PREFIX)))


def _reason(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _belongs_to(named: Path, written: Path) -> bool:
    """Whether a path that the system refused belongs to the writing of `written`: it, around it, in it or a draft."""
    named, written = named.absolute(), written.absolute()
    draft = any(part.startswith(TEMPORARY_PREFIX) for part in named.parts)
    return draft or written.is_relative_to(named) or named.is_relative_to(written)


def require_free_space(
    path: Path, needed_bytes: int, what: str = "", hint: str = "free some space, or choose another disk."
) -> None:
    """Raise StorageError if the disk that will hold `path` has less than `needed_bytes` free.

    what: what cannot be done then, as in "download 'user/repo'"; "": write `path`.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        task = what or f"write '{undrafted(path)}'"
        raise StorageError(
            f"Cannot {task}: it needs {size(needed_bytes)}, but the disk has {size(free)} free.",
            hint + (PURGEABLE if sys.platform == "darwin" else ""),
        )


def size_on_disk(path: Path, without: Collection[Path] = ()) -> int:
    """Bytes of a file, or of all files below a folder but those below `without`, hard links counted once."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    inside = (file for file in path.rglob("*") if file.is_file())
    stats = [file.stat() for file in inside if not any(file.is_relative_to(left) for left in without)]
    return sum({(s.st_dev, s.st_ino): s.st_size for s in stats}.values())
