"""What the system grants: a flushed disk, locks, open files, wired memory; and what state it is in."""

import fcntl
import os
import resource
from pathlib import Path

from mlx_adapters.demo.arithmetic import Outcome
from mlx_adapters.errors import TrainingError
from mlx_adapters.storage import files, locks, temporaries
from mlx_adapters.system.door import mx
from mlx_adapters.system.limits import raise_open_files, wire_memory
from mlx_adapters.units import count, size

ENOUGH_FILES = 1024


def flushed_writes(folder: Path) -> Outcome:
    """Write a file and read it back; on a Mac also whether the drive flushes its own cache when asked."""
    path = folder / "flushed"
    files.write_text(path, "whole\n")
    temporaries.flush_path(path)
    whole = path.read_text() == "whole\n"
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        return Outcome(whole, "fsync")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, full)
        return Outcome(whole, "F_FULLFSYNC")
    except OSError as error:
        return Outcome(whole, f"this disk refuses F_FULLFSYNC ({os.strerror(error.errno or 0)}): fsync")
    finally:
        os.close(descriptor)


def home_locks() -> Outcome:
    """A lock in the home folder keeps another holder out, and lets it in afterwards."""
    name = f"selftest-{os.getpid()}"
    with locks.lock(name):
        try:
            with locks.lock(name, wait=False):
                return Outcome(False, "this disk has no locks: do not write here from two programs at a time")
        except TrainingError:
            pass
    with locks.lock(name, wait=False):
        return Outcome(True, "one holder at a time")


def open_files() -> Outcome:
    """The limit of open files, raised."""
    now = raise_open_files()
    endless = now == resource.RLIM_INFINITY
    return Outcome(endless or now >= ENOUGH_FILES, "no limit" if endless else f"up to {count(now, 'file')}")


def wired_memory() -> Outcome:
    """The memory that stays where the GPU finds it."""
    wired = wire_memory()
    if not mx.metal.is_available():
        return Outcome(True, "no Metal here")
    return Outcome(wired > 0, f"up to {size(wired)}" if wired else "Metal refused the limit")
