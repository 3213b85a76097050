"""How many threads OpenBLAS takes."""

import ctypes

import mlx.core as mx
import pytest
from helpers.fusing import visible_adapter

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.events import Progress
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.system.machine import one_thread


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


def test_it_takes_one_within_the_block_and_as_many_as_before_behind_it(threads):
    with pytest.raises(ZeroDivisionError), one_thread():
        assert threads() == 1
        raise ZeroDivisionError
    assert threads() == 2


def test_another_blas_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with one_thread():
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
