"""The only writer. Whatever this package leaves on disk is whole or absent.

A file is written in a hidden folder beside its target, flushed to the disk and renamed; a folder likewise. A crash
leaves at most such a draft (see `temporaries`), which nothing reads and the next writer sweeps away. Who may read
what is written is the user's umask to say, and never more people than could read what it replaces.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlx_adapters.errors import FormatError, NotFoundError, StorageError
from mlx_adapters.storage.paths import (
    TEMPORARY_PREFIX,
    refuse_pointer,
    same_place,
    storage_errors,
    unreadable,
    why_gone,
)
from mlx_adapters.storage.replacing import NOTHING, Output, refuse_existing, stat_of
from mlx_adapters.storage.temporaries import clone, draft, flush_path, flush_tree, in_draft, remove_tree, swap_in
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, CHECKPOINT_FILE, checkpoint_file

DAMAGED = "it may be damaged, or saved as another kind of file; copy or download it again."

IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def _made_in(folder: Path) -> Iterator[None]:
    """Make `folder`; StorageError if it, or what the block makes in it, cannot be because of what stands there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        hint = "a file stands in the way, or the system keeps the place for itself; choose another."
        raise StorageError(f"'{folder}' is no folder to write in.", hint) from error


@contextlib.contextmanager
def draft_beside(path: Path) -> Iterator[Path]:
    """A draft beside `path`, whose own refusals by the disk are told as those of `path`."""
    with storage_errors(path), contextlib.ExitStack() as stack:
        with _made_in(path.parent):
            folder = stack.enter_context(draft(path.parent))
        yield folder


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing bytes; rename it to `path` when the block ends well.

    It is flushed to the disk first, unless it lies in an `atomic_folder`, which flushes all its files at its end.
    Raises StorageError when the disk refuses; then nothing is left behind and an old `path` is untouched.
    """
    path = Path(path)
    refuse_device(path)
    if path.is_dir():
        raise StorageError(f"'{path}' is a folder, not a file to write.", "name a file in it.")
    drafted = in_draft(path)
    with storage_errors(path), contextlib.ExitStack() as stack:
        with _made_in(path.parent):
            folder = path.parent if drafted else stack.enter_context(draft(path.parent))
            temporary = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}"
            stream = stack.enter_context(open(temporary, "xb"))
        try:
            _keep_private(path, temporary)
            with stream:
                yield stream
            if not drafted:
                flush_path(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if not drafted:
            flush_path(path.parent)


def refuse_device(path: Path) -> None:
    """Raise StorageError for a device, a pipe, or a link to one: what is written takes the place of what was there."""
    with contextlib.suppress(OSError):  # nothing is there
        kind = path.stat().st_mode
        own = path.is_symlink() and path.absolute().is_relative_to("/dev")  # /dev/stdout may lead to a file
        if own or not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise StorageError(
                f"'{path}' is no file that could be replaced.", "name a file: pipes and devices are none."
            )


@contextlib.contextmanager
def atomic_folder(path: Path, overwrite: bool = False, ours: Output = NOTHING) -> Iterator[Path]:
    """Give a temporary folder beside `path`; rename it to `path` when the block ends well.

    A link is followed: the folder behind it is written. Raises ExistsError if `path` exists and `overwrite` is
    false, or if it holds a file that is none of `ours` (both checked before and after the work).
    """
    path = _behind_link(Path(path).absolute())
    refuse_existing(path, overwrite, ours)
    with draft_beside(path) as folder:
        new = folder / path.name  # so that without the draft its files' paths are the ones they will have
        new.mkdir()
        _keep_private(path, new)
        yield new
        flush_tree(new)
        try:
            os.rename(new, path)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            refuse_existing(path, overwrite, ours)
            swap_in(new, path)
        flush_path(path.parent)


def _behind_link(path: Path) -> Path:
    if not path.is_symlink() and ".." not in path.parts:
        return path
    real = Path(os.path.realpath(path))
    if path.is_symlink() and not real.exists():
        raise StorageError(f"'{path}' is a link to '{real}', which is not there.", "choose another place to write.")
    return real


def _keep_private(old: Path, new: Path) -> None:
    """What replaces something is open to nobody whom that was closed to."""
    with contextlib.suppress(OSError):  # nothing is there, or a disk without rights
        both = old.stat().st_mode & new.stat().st_mode
        os.chmod(new, stat.S_IMODE(both))


def require_writable(path: Path) -> None:
    """Raise StorageError unless a folder can be made at `path`: better known before hours of work than after."""
    with draft_beside(_behind_link(path)):
        pass


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def json_text(value: Any, name: str | Path) -> str:
    """`value` as indented JSON with sorted keys, for the file `name`. Raises FormatError for NaN."""
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise FormatError(
            f"'{name}' would hold a number that JSON has not: {error}.", "take NaN or Infinity out."
        ) from None


def tagged(value: Any) -> Any:
    """`value` with what JSON has no number for as transformers 5 and mlx-lm write it: {"__float__": "Infinity"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: tagged(inner) for key, inner in value.items()}
    return [tagged(inner) for inner in value] if isinstance(value, list) else value


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
        raise NotFoundError(f"There is no file '{path}'.", why_gone(path)) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise FormatError(f"'{path}' is not readable JSON: {error}.", DAMAGED) from None
    if not isinstance(value, dict):
        raise FormatError(f"'{path}' must hold a JSON object, which begins with '{{'.", DAMAGED)
    return value


def no_object(folder: Path, name: str) -> str | None:
    """The name of a file of the folder if it is there and holds no JSON object, else None."""
    with contextlib.suppress(NotFoundError):
        try:
            read_json(folder / name)
        except FormatError:
            return name
    return None


def copy_file(source: Path, target: Path) -> None:
    """Copy one file with its time, by which a copy is known, whole or not at all.

    Where the disk can, both share their blocks until one is written. Never a hard link: other programs write in place.
    """
    with atomic_file(target) as out, open(source, "rb") as stream:
        if not clone(stream, out):
            shutil.copyfileobj(stream, out, 1 << 20)
            out.flush()
        facts = os.fstat(stream.fileno())
        os.utime(out.name, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def move(source: Path, target: Path) -> None:
    """Rename a file or folder on one disk in a single step.

    Raises ExistsError if `target` is there, unless it is the same thing: a disk that knows no case finds it there.
    """
    if not same_place(source, target):
        refuse_existing(target, overwrite=False)
    with storage_errors(target):
        if target.is_symlink():
            target.unlink()
        try:
            os.rename(source, target)
        except OSError as error:
            error.filename = str(target)  # the source can be read: it cannot be there
            raise
        flush_path(Path(target).parent)


def remove(path: Path, ours: Output | None = None) -> None:
    """Remove a file or folder so that it is gone at once, even if the deletion is interrupted.

    With `ours`, of a folder that holds anything else only these files go.
    """
    path = Path(path)
    with storage_errors(path):
        if ours is not None and path.is_dir() and (own := ours.among(path)) is not None:
            for name in own:
                (path / name).unlink()
            return
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return
        try:
            with draft(path.parent) as folder:
                os.replace(path, folder / "gone")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remove_tree(path)  # there is no room for a draft; what is deleted makes some


def sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def chosen_iteration(folder: Path, recorded: int | None) -> int | None:
    """The checkpoint that `adapters.safetensors` is a copy of, or a hard link to, as earlier versions made.

    It is known by its size and time; where several have these, by its bytes. If by none, it is the one `recorded`.
    """
    weights = stat_of(folder / ADAPTER_FILE)
    if weights is None:
        return recorded
    stats = {iteration: stat_of(folder / checkpoint_file(iteration)) for iteration in iterations_of(folder)}
    known = (weights.st_size, weights.st_mtime_ns)
    likely = [iteration for iteration, s in stats.items() if s and (s.st_size, s.st_mtime_ns) == known]
    if len(likely) > 1:
        own = sha256(folder / ADAPTER_FILE)
        likely = [iteration for iteration in likely if sha256(folder / checkpoint_file(iteration)) == own]
    return recorded if recorded in likely or len(likely) != 1 else likely.pop()


def iterations_of(folder: Path) -> tuple[int, ...]:
    """The iterations that the folder has checkpoints of, ascending."""
    matches = (CHECKPOINT_FILE.fullmatch(path.name) for path in Path(folder).iterdir() if path.is_file())
    return tuple(sorted(int(match.group(1)) for match in matches if match))
