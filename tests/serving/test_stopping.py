"""A signal ends the server wherever it comes: before it listens, as it says so, with nothing or much to do."""

import contextlib
import signal
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from mlx_adapters.generation.batching import Batcher
from mlx_adapters.serving.engine import Engine
from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.serving.start import make_engine, run_server
from mlx_adapters.system.interrupt import STOPS

SECONDS = 10  # after which a server that did not hear is stopped otherwise


class Clearing:
    """What a library clears up: an exception that is raised meanwhile leads nowhere."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


def before(owner, name, act):
    """`owner.name` with `act()` before it, the first time."""
    original, acts = getattr(owner, name), [act]

    def first(*arguments, **keywords):
        if acts:
            acts.pop()()
        return original(*arguments, **keywords)

    return first


STAGES = {
    "run": (uvicorn.Server, "run", signal.SIGTERM),
    "config": (uvicorn.Config, "load", signal.SIGINT),
    "serve": (uvicorn.Server, "_serve", signal.SIGHUP),
    "startup": (uvicorn.Server, "startup", signal.SIGINT),
    "engine": (Engine, "start", signal.SIGTERM),
    "tick": (uvicorn.Server, "on_tick", signal.SIGINT),
}


@pytest.fixture
def serve(tiny_model, monkeypatch):
    """serve(told=act, ask=...): run a server in this thread until a signal ends it; how that went. `told()` is called
    when it says where it listens, `ask(address)` meanwhile in another thread."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    def serve(told=lambda: None, ask=None, drain=0.0):
        engine = make_engine(str(tiny_model()), (), ServeSettings(port=0, drain_seconds=drain), name="base")
        done, began = SimpleNamespace(heard=True, answer=None, leaving=[]), []

        def listens(address, stop):
            def late():
                done.heard = False
                stop()

            began.append(threading.Timer(SECONDS, late))
            if ask:
                began.append(threading.Thread(target=lambda: setattr(done, "answer", ask(address))))
            for thread in began:
                thread.start()
            told()

        before_it = [signal.getsignal(number) for number in STOPS]
        with contextlib.suppress(KeyboardInterrupt):
            run_server(engine, listens, on_leaving=done.leaving.append)
        began[0].cancel()
        for thread in began:
            thread.join(SECONDS)
        assert [signal.getsignal(number) for number in STOPS] == before_it
        done.ended = not engine._thread.is_alive()
        return done

    return serve


def interrupt():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.parametrize("stage", ["told", *STAGES])
def test_a_signal_is_heard_at_every_stage_of_starting(stage, serve, monkeypatch):
    """Each comes where an exception would be lost."""
    if stage == "told":
        done = serve(told=lambda: Clearing(signal.SIGINT))
    else:
        owner, name, number = STAGES[stage]
        monkeypatch.setattr(owner, name, before(owner, name, lambda: Clearing(number)))
        done = serve()
    assert done.heard and done.ended and not done.leaving


@pytest.mark.parametrize("prompt", [[5] * 8, [5] * 1500], ids=["writing", "reading"])
def test_a_signal_lets_what_is_under_way_finish(prompt, serve, monkeypatch):
    def ask(address):
        body = {"model": "base", "prompt": prompt, "max_tokens": 40, "stream": True, "temperature": 0}
        with httpx.stream("POST", address + "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            if len(prompt) < 100:
                next(lines)
                interrupt()
            return list(lines)

    step = Batcher.step  # so slow that it is not over before the server looks
    monkeypatch.setattr(Batcher, "step", lambda self: time.sleep(0.01) or step(self))
    if len(prompt) > 100:
        monkeypatch.setattr(Batcher, "step", before(Batcher, "step", interrupt))
    done = serve(ask=ask)
    assert done.heard and done.ended and "data: [DONE]" in done.answer and done.leaving == [0]


def test_a_second_signal_ends_the_time_in_which_a_proxy_asks_others(serve):
    def ask(address):
        interrupt()
        while httpx.get(address + "/health/ready").status_code == 200:
            pass
        time.sleep(0.15)
        interrupt()

    done = serve(ask=ask, drain=600.0)
    assert done.heard and done.ended and done.leaving == [600]
