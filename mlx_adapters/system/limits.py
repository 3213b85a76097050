"""What this process may hold: open files, memory that stays where the GPU finds it, one long work at a time.

A Mac's shell allows 256 open files, which a base in many shards exceeds. Metal may move weights out of memory
between two uses unless the process asks for them to stay (from macOS 15 on); mlx-lm asks in its own loops alone.
"""

import contextlib
import functools
import gc
import resource
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from mlx_adapters.events import Note, log_warnings
from mlx_adapters.system.machine import memory_bytes, on_gpu, usable_memory_bytes
from mlx_adapters.threads import overlapping
from mlx_adapters.units import count

P = ParamSpec("P")
R = TypeVar("R")
CACHED = 4  # at most one such part of the memory: a gigabyte taken anew costs a GPU 0.1 s
LONGEST_TEXT = 10_000_000  # characters that are tokenized as one: a tokenizer takes some hundred bytes for each
MOST_FILES = 10_240  # macOS refuses more, also where the hard limit is "unlimited"


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one, up to MOST_FILES; gives what holds now. Never lowers it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # a system with a lower bound of its own
        return soft
    return wanted


def files_hint(needed: int) -> str | None:
    """What to do where opening `needed` files, three times and with a few others, is more than this process may."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or 3 * needed + 50 <= soft:
        return None
    return f"it is in {count(needed, 'file')}, and this process may open {soft}: run 'ulimit -n {MOST_FILES}' before."


@functools.cache
def wire_memory() -> int:
    """Keep MLX's memory resident, and within the size that Metal recommends, until the process ends; once for all work.

    Gives that size in bytes; 0 without Metal, or where it is refused: the work then goes on, only slower.
    """
    import mlx.core as mx

    size = int(mx.device_info().get("max_recommended_working_set_size", 0)) if mx.metal.is_available() else 0
    with contextlib.suppress(RuntimeError, ValueError):
        if size:
            mx.set_wired_limit(size)
            mx.set_memory_limit(size)  # MLX's own is half as much again, which a Mac has not got
            return size
    return 0


def out_of_memory(error: RuntimeError) -> bool:
    """Whether MLX found no room for an array; Metal's and CUDA's words for it differ. (Metal may end the process.)"""
    return any(
        words in str(error).lower() for words in ("alloc", "out of memory", "outofmemory", "insufficient memory")
    )


def trim_cache() -> None:
    """Give back what MLX holds for its next arrays, if it is much (on a CPU it holds little)."""
    import mlx.core as mx

    if mx.get_cache_memory() > _memory() // CACHED:
        mx.clear_cache()


@functools.cache
def _memory() -> int:
    return usable_memory_bytes() if on_gpu() else memory_bytes()


@contextlib.contextmanager
def memory_near(size: int | None) -> Iterator[None]:
    """Within the block a GPU's work waits, once it holds `size` bytes, for what is under way before more is started.

    With room to spare MLX is some 300 operations ahead on a GPU, and holds the results of all. Work that needs more
    than `size` gets it all the same. On a CPU, ten operations ahead at most, nothing changes; nor with None.
    """
    import mlx.core as mx

    before = mx.set_memory_limit(size) if size is not None and on_gpu() else None
    try:
        yield
    finally:
        if before is not None:
            mx.set_memory_limit(before)


def as_little_memory_as_will_do() -> contextlib.AbstractContextManager[None]:
    """Within the block a GPU's work is never ahead: what is measured here is what the work needs."""
    return memory_near(1)


@contextlib.contextmanager
def for_good() -> Iterator[None]:
    """What is made within the block, such as imported modules, and all before it, is never searched for garbage.

    For a program's beginning, not for a library: to go through what mlx-lm imports takes 0.04 s each time.
    """
    with garbage_later():
        yield
        gc.freeze()


@overlapping
def garbage_later() -> Iterator[None]:
    """Within the block garbage is not searched for: where much is made that stays, that takes 0.05 s and finds none."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


_turn = threading.RLock()
_at_work: list[str] = []  # the names of what holds `_turn`, the outermost first


def one_at_a_time(work: Callable[P, R]) -> Callable[P, R]:
    """`work`, which waits while another thread of this process does such work, and says so; within itself it does not.

    Its memory, and what is told of that, are the whole process's: a forecast beside a training would count both, and
    two trainings at once would each find the room for one.
    """

    @functools.wraps(work)
    def in_turn(*arguments: P.args, **options: P.kwargs) -> R:
        if not _turn.acquire(blocking=False):
            tell: Any = options.get("on_event", log_warnings)
            tell(Note(f"Waiting: another thread of this process is at work ({next(iter(_at_work), '')}).", "warning"))
            while not _turn.acquire(timeout=1):
                pass  # a Ctrl-C that comes just before such a wait is seen when it ends
        try:
            _at_work.append(work.__name__)
            return work(*arguments, **options)
        finally:
            _at_work.pop()
            _turn.release()

    return in_turn
