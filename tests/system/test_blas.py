"""How many threads OpenBLAS takes."""

import ctypes

import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import visible_adapter

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.events import Progress
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.rounding.workers import Task, Way, Workers
from mlx_adapters.system.machine import blas_threads


@pytest.fixture
def threads():
    """How many OpenBLAS takes now; two of them until somebody says otherwise."""
    mx.eval(mx.ones((4, 4)) @ mx.ones((4, 4)))
    process = ctypes.CDLL(None)
    if not hasattr(process, "openblas_set_num_threads"):
        pytest.skip("another BLAS")
    before = process.openblas_get_num_threads()
    process.openblas_set_num_threads(2)
    yield process.openblas_get_num_threads
    process.openblas_set_num_threads(before)


@pytest.mark.parametrize("count, taken", [(1, 1), (2, 2), (3, 2)])
def test_it_takes_at_most_so_many_within_the_block_and_as_many_as_before_behind_it(threads, count, taken):
    with pytest.raises(ZeroDivisionError), blas_threads(count):
        assert threads() == taken
        raise ZeroDivisionError
    assert threads() == 2


def test_another_blas_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with blas_threads(1):
        done = True
    assert done


def test_a_fuse_writes_layers_with_one(threads, tiny_model, tmp_path):
    folder, seen = tiny_model("llama", bits=4), []
    adapter = visible_adapter(folder)

    def on_event(event):
        if isinstance(event, Progress) and event.stage == "write":
            seen.append(threads())

    fuse(folder, adapter, tmp_path / "out", options=FuseOptions(method="nearest", check=False), on_event=on_event)
    assert set(seen) == {1} and threads() == 2


def test_from_the_first_task_on_workers_have_half_of_the_cores(threads):
    task = Task(mx.ones((64, 64)), np.eye(64, dtype=np.float32), (Way(Quantization(4, 64)),), "bfloat16", None)
    with Workers(2) as workers:
        assert threads() == 2 and not workers._processes
        workers.submit(task).result()
        assert threads() == 1 and len(workers._processes) == 2
    assert threads() == 2
