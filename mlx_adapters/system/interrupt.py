"""How long work is ended before it is done: by a signal, by what watches it, or by what that raises."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mlx_adapters.events import Event, OnEvent, wants_to_stop

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a shutdown, a closed terminal


class InterruptedWork(Exception):
    """A signal came: the work at hand is left as if it had not begun."""


class Interrupt:
    """What ends a run before its last iteration: the run saves what its last whole iteration left.

    `requested` is set by the first signal of STOPS; a second Ctrl-C stops at once. `stopped`: an `on_event` gave back
    `Stop`. `raised`: what an `on_event` raised while the run was `saving` what it had; from then on it hears no more.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = self.saving = False
        self.raised: BaseException | None = None

    def heeding(self, on_event: OnEvent) -> OnEvent:
        """An `on_event` that passes everything on and notes what comes back."""

        def tell(event: Event) -> None:
            if self.raised is not None:
                return
            try:
                self.stopped |= wants_to_stop(on_event(event))
            except BaseException as error:
                if not self.saving:
                    raise
                self.raised = error

        return tell

    @property
    def ends(self) -> bool:
        """Whether the run is to end."""
        return self.requested or self.stopped or self.raised is not None

    def heed(self) -> None:
        """Called in the middle of an iteration or an evaluation, which nobody waits for once a signal has come."""
        if self.requested:
            raise InterruptedWork

    @contextlib.contextmanager
    def ending(self, work: Any, allowed: bool) -> Iterator[None]:
        """Within the block `work.heed`, which it calls when it may be left, ends it once a signal has come."""
        if allowed:
            work.heed = self.heed
        try:
            yield
        finally:
            work.heed = lambda: None

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
