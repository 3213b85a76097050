"""Ctrl-C that lets an iteration end, so that the run can save before it stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a shutdown, a closed terminal


class Interrupt:
    """`requested` is set by the first signal of STOPS; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def watching(self) -> Iterator["Interrupt"]:
        """Take over the signals within the block (only the main thread can); under `nohup` a
        closed terminal stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        heeded = [number for number in STOPS if number not in ignored]
        before = {number: signal.signal(number, self._handle) for number in heeded}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
