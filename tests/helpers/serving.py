"""A server that tests ask."""

import contextlib
import queue
import threading
import time

from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.serving.start import make_engine, run_server


@contextlib.contextmanager
def running(folder, adapters, name="base", **settings):
    """A server with these adapters on a free port; gives (address, engine)."""
    engine = make_engine(str(folder), adapters, ServeSettings(port=0, **settings), name=name)
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


def eventually(holds, seconds=5.0):
    """Whether `holds` comes true in time."""
    deadline = time.monotonic() + seconds
    while not (there := holds()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return there
