"""Several threads of one process at work at once: each finds afterwards what it found before."""

import gc
import inspect
import io
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import Future
from contextlib import ExitStack

import pytest
from transformers.utils import logging as transformers_logging

import mlx_adapters as ma
from mlx_adapters.errors import ModelError, refusals
from mlx_adapters.models import loading
from mlx_adapters.system.limits import garbage_later, one_at_a_time
from mlx_adapters.system.machine import blas_threads
from mlx_adapters.threads import printing_to


class Other(threading.Thread):
    """A thread that enters a block while it is constructed, runs `inside` there, and leaves the block with `leave`."""

    def __init__(self, block, inside=lambda: None):
        super().__init__(daemon=True)
        self.block, self.inside, self.entered, self.end = block, inside, threading.Event(), threading.Event()
        self.start()
        assert self.entered.wait(30)

    def run(self):
        with self.block:
            self.inside()
            self.entered.set()
            self.end.wait(30)

    def leave(self):
        self.end.set()
        self.join(30)


STATES = {
    "standard output": (lambda: refusals(ModelError), lambda: sys.stdout),
    "prints": (lambda: printing_to(io.StringIO()), lambda: sys.stdout),
    "warnings": (lambda: refusals(ModelError), lambda: (list(warnings.filters), warnings.showwarning)),
    "transformers": (loading._quiet, transformers_logging.get_verbosity),
    "garbage": (garbage_later, gc.isenabled),
}


@pytest.mark.parametrize("block, told", STATES.values(), ids=STATES)
def test_blocks_that_overlap_leave_all_as_it_was(block, told):
    before = told()
    with block():
        other = Other(block())
    within = told()
    other.leave()
    assert told() == before and (within != before or told is STATES["warnings"][1])


def test_what_another_thread_prints_meanwhile_goes_where_it_went(capsys):
    ours, theirs = io.StringIO(), io.StringIO()
    other = Other(printing_to(theirs), lambda: print("theirs"))
    print("out")
    with printing_to(ours):
        print("ours")
        with printing_to(inner := io.StringIO()):
            print("inner")
        print("again")
    other.leave()
    print("at last")
    assert capsys.readouterr().out == "out\nat last\n"
    assert (ours.getvalue(), inner.getvalue(), theirs.getvalue()) == ("ours\nagain\n", "inner\n", "theirs\n")


def test_prints_are_taken_also_where_another_output_came_while_a_thread_was_inside(monkeypatch):
    """As a notebook's cells have each its own."""
    other = Other(printing_to(io.StringIO()))
    monkeypatch.setattr(sys, "stdout", new := io.StringIO())
    with printing_to(ours := io.StringIO()):
        print("ours")
    other.leave()
    print("out")
    assert (ours.getvalue(), new.getvalue()) == ("ours\n", "out\n") and sys.stdout is new


def test_of_overlapping_limits_of_threads_the_least_holds_and_the_last_puts_back(monkeypatch):
    from mlx_adapters.system import machine

    taken = [8]
    monkeypatch.setattr(machine, "_switches", lambda: [(lambda: taken[0], lambda count: taken.__setitem__(0, count))])
    seen = []
    with ExitStack() as first:
        first.enter_context(blas_threads(4))
        other = Other(blas_threads(2))
        seen += taken
        with blas_threads(6), blas_threads(1):
            seen += taken
        seen += taken
    seen += taken
    other.leave()
    assert seen + taken == [2, 1, 2, 2, 8]


def test_a_thread_that_loads_a_model_as_python_ends_does_not_abort_it(tiny_model):
    """Python is never made to leave the main thread (`setswitchinterval`), so that the others end when it does."""
    code = f"""
import sys, threading
import mlx_adapters as ma
from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base
base = resolve_base({str(tiny_model())!r})
threads = [threading.Thread(target=load_module, args=(base,)) for _ in range(4)]
for thread in threads:
    thread.start()
sys.setswitchinterval(100)
for thread in threads:
    thread.join()
"""
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stderr) == (0, "")


def in_a_thread(work):
    done = Future()

    def run():
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def test_one_work_waits_for_the_other_says_so_and_is_done():
    started, log, told = threading.Event(), [], []

    @one_at_a_time
    def first(on_event):
        started.set()
        second_waits.wait(30)
        log.append("first")

    @one_at_a_time
    def second(on_event):
        log.append("second")
        return inner(on_event=on_event)  # it has its turn

    @one_at_a_time
    def inner(on_event):
        return "done"

    second_waits = threading.Event()
    one = in_a_thread(lambda: first(on_event=told.append))
    assert started.wait(30)

    def tell(event):
        told.append(event.text)
        second_waits.set()

    assert second(on_event=tell) == "done" and one.result(30) is None
    assert log == ["first", "second"]
    assert told == ["Waiting: another thread of this process is at work (first)."]


def test_work_that_fails_gives_its_turn_back():
    @one_at_a_time
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_a_thread(fail).result(30)
    with pytest.raises(ZeroDivisionError):
        fail()


def test_the_long_works_of_the_api_take_turns():
    names = [
        "train",
        "plan_training",
        "estimate",
        "fuse",
        "fuse_peft",
        "check_fused",
        "evaluate",
        "run_tasks",
        "benchmark",
    ]
    assert all(getattr(ma, name).__code__.co_name == "in_turn" for name in names)
    for name in names:  # what they are called with stands in their signature
        assert "on_event" in inspect.signature(getattr(ma, name)).parameters


def test_ctrl_c_ends_the_wait_for_a_turn():
    started, end = threading.Event(), threading.Event()

    @one_at_a_time
    def work(wait=False):
        started.set()
        return wait and end.wait(30)

    one = in_a_thread(lambda: work(True))
    assert started.wait(30)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    end.set()
    assert one.result(30) and work() is False


def test_an_answer_can_be_read_from_several_threads(tiny_model):
    model = ma.load_model(tiny_model())
    whole = [step.token for step in model.stream([5, 6, 7], max_tokens=8)]
    steps = model.stream([5, 6, 7], max_tokens=8)
    begun = next(steps).token
    assert [begun, *in_a_thread(lambda: [step.token for step in steps]).result(60)] == whole
    steps = model.stream([5, 6, 7], max_tokens=8)
    next(steps)
    in_a_thread(steps.close).result(60)
