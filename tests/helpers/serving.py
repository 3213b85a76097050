"""Servers that tests and scripts ask."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.serving.start import make_engine, run_server


@contextlib.contextmanager
def running(folder, adapters, name="base", drafting=None, dtype="auto", **settings):
    """A server with these adapters on a free port; gives (address, engine)."""
    settings = ServeSettings(port=0, **settings)
    engine = make_engine(str(folder), adapters, settings, name=name, drafting=drafting, dtype=dtype)
    started = queue.Queue()
    thread = threading.Thread(target=run_server, args=(engine, lambda *at: started.put(at)), daemon=True)
    thread.start()
    address, stop = started.get(timeout=60)
    try:
        yield address, engine
    finally:
        stop()
        thread.join(20)
    assert not thread.is_alive() and not engine._thread.is_alive()


def eventually(holds, seconds=60.0):
    """Whether `holds` comes true; a machine that does much else may need long."""
    deadline = time.monotonic() + seconds
    while not (there := holds()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return there


class Served:
    """`mlx-adapters serve` in a process of its own, which listens when this is made. `lines`: what it said."""

    def __init__(self, base: str | Path, *options: object, adapters: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "mlx_adapters", "serve", str(base), "--name", "base", *map(str, options)]
        command += [] if "--port" in options else ["--port", "0"]
        command += [word for name in adapters for word in ("--adapter", name)]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        told = os.environ | {"PYTHONPATH": path}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=told)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("Listening"):
                break
        else:
            raise RuntimeError("".join(self.lines))
        self.address = self.lines[-1].split()[2]
        self._listened = len(self.lines)
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        """What it said since it listens."""
        return "".join(self.lines[self._listened :]).strip()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join(5)
