"""Signals at any moment, on a terminal: the program ends soon, in a word, and leaves nothing half done.

Each command is a new interpreter in a session of its own. What Python itself does before the program begins, which the
program tells, is its own.
"""

import os
import pty
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator

from helpers.torture_place import Place, in_rounds

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 20.0  # seconds for the end
PROGRAM = "import os, sys; from mlx_adapters import __main__ as program; os.close({begun}); program.main()"
# What runs, for how many seconds a signal may come, and which.
COMMANDS = {
    "serve BASE --adapter a --port 0": (2.5, ALL),
    "chat --base BASE": (2.5, ALL[1:]),  # Ctrl-C lets go of the line there
    "generate hi --base BASE --max-tokens 200": (2.0, ALL),
    "train --name t --iterations 40": (3.0, ALL),
    "fuse a out/new --bits 4": (3.0, ALL),
    "benchmark base --base BASE --rounds 2 --trials 1 --prompt-tokens 8 --decode-tokens 4 --no-cold": (6.0, ALL),
}


def ended(place: Place, words: list[str], number: int, delay: float) -> tuple[int | None, str, bool]:
    """How a command ended that got the signal after `delay` seconds (None: not at all), what it said, and whether the
    program had begun."""
    waiting, begun = os.pipe()
    child, terminal = pty.fork()
    if child == 0:
        for each in ALL:
            signal.signal(each, signal.SIG_DFL)
        os.chdir(place.folder)
        os.environ["MLX_ADAPTERS_HOME"] = str(place.folder / "home")
        os.set_inheritable(begun, True)
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM.format(begun=begun), *words])
    os.close(begun)
    said, began, sent, had_begun = b"", time.monotonic(), False, False
    try:
        while time.monotonic() < began + delay + PATIENCE:
            if select.select([terminal], [], [], 0.005)[0]:
                try:
                    said += os.read(terminal, 65536)
                except OSError:  # its end, on Linux
                    time.sleep(0.005)
            if not sent and time.monotonic() > began + delay:
                sent, had_begun = True, bool(select.select([waiting], [], [], 0)[0])  # closed by the program
                os.write(terminal, b"\x03") if number == signal.SIGINT else os.kill(child, number)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), said.decode(errors="replace"), had_begun
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None, said.decode(errors="replace"), had_begun
    finally:
        os.close(terminal)
        os.close(waiting)


def trial(place: Place, line: str, rng: random.Random) -> str | None:
    longest, numbers = COMMANDS[line]
    number, delay = rng.choice(numbers), rng.uniform(0, longest)
    place.fresh()
    status, said, had_begun = ended(place, place.words(line), number, delay)
    where, words = f"signal {number} after {delay:.3f} s", said.strip().splitlines()[-1:] or [""]
    if not had_begun and status in (1, -number) and "mlx_adapters/" not in said:
        return None
    if status not in (0, 130) or "Traceback" in said or "terminate called" in said:
        return f"{where}: status {status}, {words[0][:120]!r}"
    left = place.rubbish()
    return f"{where}: leaves {left[0].name}" if left else None


def trials(place: Place, seed: int, times: Callable[[str], int]) -> Iterator[tuple[str, str, Callable[[], str | None]]]:
    for number, line in in_rounds(COMMANDS, times):
        rng = random.Random(f"{seed} {line} {number}")
        yield line, f"round {number}", lambda r=rng, of=line: trial(place, of, r)
