"""Several threads of one process at work at once: each finds afterwards what it found before."""

import gc
import io
import subprocess
import sys
import threading
import warnings
from contextlib import ExitStack

import pytest
from transformers.utils import logging as transformers_logging

from mlx_adapters.errors import ModelError, refusals
from mlx_adapters.models import loading
from mlx_adapters.system.limits import garbage_later
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
    "transformers": (lambda: loading._QUIET, transformers_logging.get_verbosity),
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
