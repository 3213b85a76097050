"""How long work is ended before it is done: by a signal, by what watches it, or by what that raises."""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from mlx_adapters.events import Event, OnEvent, wants_to_stop
from mlx_adapters.system.machine import PARENT

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a shutdown, a closed terminal
NUDGE = signal.SIGURG  # one that nobody else uses, and that does nothing but end a wait


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the program is to end, also where a Ctrl-C would end less, as in a chat."""


def raising() -> None:
    """From now on the signals of STOPS raise KeyboardInterrupt, but for those that the caller has ignored."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _terminate)
    _end_waits(os.getpid())


@functools.cache
def _end_waits(process: int) -> None:
    """From now on a signal of STOPS ends whatever the main thread waits for.

    Python acts on a signal in the main thread, between two steps. One that comes just before that thread begins to
    wait, or that the system gives to another thread, leaves it waiting, for good if only the signal would end that. So
    a thread, which hears of each signal as it comes, sends the main one another until it has looked.
    """
    looked, (heard, told) = threading.Event(), os.pipe()
    os.set_blocking(told, False)
    signal.signal(NUDGE, lambda *_: looked.set())
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        while come := os.read(heard, 1):
            looked.clear()
            while come[0] in STOPS and not looked.wait(0.1):
                signal.pthread_kill(threading.main_thread().ident or 0, NUDGE)

    threading.Thread(target=listen, name="signals", daemon=True).start()


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def raise_again(lost: KeyboardInterrupt) -> None:
    """Send the signal of an exception that led nowhere once more, in a moment."""
    number = signal.SIGTERM if isinstance(lost, Terminated) else signal.SIGINT
    again = threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def handling(handle: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within the block `handle` gets the signals of STOPS (only the main thread can take them); under `nohup` a closed
    terminal stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    before = {number: signal.signal(number, handle) for number in STOPS if number not in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """From now on this process ends soon after the one that started it, in a `child_environment`, has ended. That one
    may be killed, and this one work on for minutes."""
    parent = int(os.environ.pop(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        """Take over the signals within the block, see `handling`."""
        with handling(self._handle):
            yield self
