"""What is the whole process's, where several threads of it work at once."""

import atexit
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def overlapping(block: Callable[[], Iterator[None]]) -> "Callable[[], contextlib._GeneratorContextManager[None]]":
    """`contextlib.contextmanager` for a block that threads are in at the same time: the first enters, the last leaves.

    Each for itself would put back what another had changed, and leave it so for good.
    """
    once, lock, held, inside = contextlib.contextmanager(block), threading.Lock(), contextlib.ExitStack(), 0

    @contextlib.contextmanager
    @functools.wraps(block)
    def shared() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                held.enter_context(once())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    held.close()

    return shared


_here = threading.local()  # `.stream`: where a thread's prints go


class _Output:
    """Standard output, but for the threads that have another stream. `inside`: how many blocks need it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.inside = stream, 0

    def __getattr__(self, name: str) -> Any:
        own = getattr(_here, "stream", None)
        if own is None:
            return getattr(self.stream, name)
        return (lambda: None) if name == "close" else getattr(own, name)


_changing = threading.Lock()


@contextlib.contextmanager
def printing_to(stream: Any) -> Iterator[None]:
    """Within the block what this thread prints goes to `stream`; that of others goes where it went."""
    with _changing:
        output = sys.stdout if isinstance(sys.stdout, _Output) else _Output(sys.stdout)
        sys.stdout = output  # type: ignore[assignment]
        output.inside += 1
    before = getattr(_here, "stream", None)
    _here.stream = stream
    try:
        yield
    finally:
        _here.stream = before
        with _changing:
            output.inside -= 1
            if not output.inside and sys.stdout is output:  # nobody has put another in its place
                sys.stdout = output.stream


def end_before_python() -> None:
    """Called where MLX makes random numbers: if that is another thread than the main one, Python's end waits for it.

    Such a thread gives its random state back when it has ended for Python already and may be joined. It needs Python
    for that, and where that is about to end as well, the process is aborted ("terminate called ..."; Python 3.11 to
    3.13, MLX 0.32.4). So Python's end leaves such threads a moment.
    """
    if threading.current_thread() is not threading.main_thread():
        _wait_at_the_end()


@functools.cache
def _wait_at_the_end() -> None:
    atexit.register(time.sleep, 0.1)
