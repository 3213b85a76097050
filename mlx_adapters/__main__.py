"""The program `mlx-adapters`, which is also `python -m mlx_adapters`."""

import atexit
import os
import signal
import sys

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # not from `system.interrupt`: that loads


def main() -> None:
    """Run the program.

    A signal before it is loaded ends it at once, when there is nothing to clear up, and one that comes when it has
    done its work changes nothing any more. It leaves without Python's clearing up: threads of MLX that are still there
    then, its own or ours, abort the process.
    """
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    from contextlib import suppress

    from mlx_adapters.cli import main as run

    try:
        run()
    except SystemExit as end:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        if isinstance(end.code, str):
            os.write(2, f"{end.code}\n".encode())
        if _is_watched():
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or its reader is gone
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except KeyboardInterrupt:
        _leave()


def _is_watched() -> bool:
    """Whether a profiler or debugger is at work, which says what it saw when the program has ended."""
    tools = getattr(sys, "monitoring", None)  # from Python 3.12 on
    named = tools is not None and any(map(tools.get_tool, range(6)))
    return named or sys.getprofile() is not None or sys.gettrace() is not None


def _leave(*_: object) -> None:
    try:
        os.write(2, b"Interrupted.\n")
    finally:  # also where nobody hears it: a terminal that is gone
        os._exit(130)


if __name__ == "__main__":
    main()
