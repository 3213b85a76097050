"""The program `mlx-adapters`, which is also `python -m mlx_adapters`."""

import os
import signal


def main() -> None:
    """Run the program.

    A Ctrl-C before it is loaded ends it at once, when there is nothing to clear up, and one that comes when it has
    done its work changes nothing any more.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    import threading

    from mlx_adapters.cli import main as run

    try:
        run()
    except SystemExit as end:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if any(thread.daemon for thread in threading.enumerate()):  # one in MLX would abort while Python ends
            os._exit(int(end.code or 0))
        raise
    except KeyboardInterrupt:
        _leave()


def _leave(*_: object) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
