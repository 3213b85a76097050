"""Rounding in processes of their own."""

import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import ModelError
from mlx_adapters.rounding import workers
from mlx_adapters.rounding.engines import NUMPY, MlxEngine
from mlx_adapters.rounding.packed import nearest
from mlx_adapters.rounding.workers import Task, Way, Workers
from mlx_adapters.system.machine import child_environment


def make_task(seed: int, width: int = 128, out: int = 96, outputs: bool = True) -> Task:
    random = np.random.default_rng(seed)
    x, g = random.normal(size=(256, width)), random.normal(size=(256, out))
    weight = mx.array(random.normal(size=(out, width)).astype(np.float32)) + 0  # not computed yet
    felt = (g.T @ g).astype(np.float32) if outputs else None
    hessian, start = (x.T @ x).astype(np.float32), nearest(weight, Quantization(4, 64), mx.bfloat16)
    ways = Way(Quantization(4, 64)), Way(Quantization(8, 64), together=False, sweeps=1)
    return Task(weight, hessian, ways, "bfloat16", start, 3.0, felt, update=0.01 * weight)


def same(ones, others) -> bool:
    parts = [
        pair
        for one, other in zip(ones, others, strict=True)
        for pair in zip(one.packed.tensors.values(), other.packed.tensors.values(), strict=True)
    ]
    equal = all(a.dtype == b.dtype and mx.array_equal(a, b).item() for a, b in parts)
    return equal and [one.loss for one in ones] == [other.loss for other in others]


def test_workers_give_what_the_process_itself_gives():
    tasks = [make_task(seed, outputs=seed % 2 == 0) for seed in range(5)]
    with Workers(2) as several, Workers(0) as none:
        results = [future.result() for future in [several.submit(task) for task in tasks]]
        assert all(same(a, none.submit(task).result()) for a, task in zip(results, tasks, strict=True))
    assert not same(results[0], results[2])
    for four, eight in results:
        assert (four.packed.quantization.bits, eight.packed.quantization.bits) == (4, 8)
        assert 0 < eight.loss < 0.02 * four.loss


@pytest.mark.parametrize("engine", [NUMPY, MlxEngine()], ids=["numpy", "mlx"])
def test_several_ways_share_one_factor_and_give_what_each_gives_alone(engine, monkeypatch):
    task, factors, factor = make_task(1), [], type(engine).factor
    if engine is not NUMPY:
        task = replace(task, hessian=mx.array(task.hessian), outputs=None)
    monkeypatch.setattr(type(engine), "factor", lambda *a: (factors.append(len(a[1])), factor(*a))[1])
    both = task.run(engine)
    width = task.weight.shape[1]
    assert factors.count(width) == 1
    assert same(both, [replace(task, ways=(way,)).run(engine)[0] for way in task.ways])


def test_tasks_under_way_stay_within_the_memory():
    task, most = make_task(0), 0
    with Workers(3, memory=2 * task.nbytes) as pool:
        futures = []
        for _ in range(6):
            futures.append(pool.submit(task))
            most = max(most, pool._used)
        assert all(future.result()[0].loss > 0 for future in futures)
    assert task.nbytes <= most <= 2 * task.nbytes
    with Workers(2) as pool:  # two for each: the next one is there when one is done
        assert max((pool.submit(task), pool._flying)[1] for _ in range(8)) == 4
    with Workers(1, memory=1) as pool:  # one always runs
        assert pool.submit(task).result()[0].loss > 0


def test_a_worker_that_dies_is_an_error_and_not_a_wait():
    command = [sys.executable, "-c", "import sys; sys.stdin.buffer.read(10)"]
    with pytest.raises(ModelError, match="ended") as caught, Workers(1, command=command) as pool:
        futures = [pool.submit(make_task(seed)) for seed in range(2)]
        [future.result() for future in futures]
    assert caught.value.hint == "probably for lack of memory: --quick takes half."
    quick = replace(make_task(0), ways=tuple(way._replace(together=False) for way in make_task(0).ways))
    with pytest.raises(ModelError, match="ended") as caught, Workers(1, command=command) as pool:
        pool.submit(quick).result()
    assert caught.value.hint == "probably for lack of memory."


def test_what_fails_in_a_worker_is_told():
    task = make_task(0)
    broken = Task(task.weight, np.zeros((3, 3), np.float32), task.ways, "bfloat16", None)
    with pytest.raises(RuntimeError, match="Traceback"), Workers(1) as pool:
        pool.submit(broken).result()


def test_leaving_on_an_error_leaves_no_process():
    with pytest.raises(KeyboardInterrupt), Workers(2) as pool:
        pool.submit(make_task(0))
        processes: list[subprocess.Popen] = pool._processes
        raise KeyboardInterrupt
    assert [process.poll() is not None for process in processes] == [True, True]


def test_a_worker_whose_answer_nobody_reads_ends_without_a_word():
    worker = subprocess.Popen(workers.COMMAND, stdin=-1, stdout=-1, stderr=-1, env=child_environment())
    worker.stdout.close()
    pickle.dump(make_task(0), worker.stdin, protocol=5)
    worker.stdin.close()
    assert worker.stderr.read() == b"" and worker.wait() == 1
    worker.stderr.close()


def test_ctrl_c_is_the_parent_s_from_a_worker_s_start_on():
    show = "import signal, sys; sys.stdout.buffer.write(bytes([signal.SIGINT in signal.pthread_sigmask(0, ())]))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with Workers(1, command=[sys.executable, "-c", show]) as pool:
        pool._start()
        assert pool._processes[0].stdout.read() == b"\1"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_only_large_work_is_worth_workers(monkeypatch):
    assert workers.worker_count([(64, 64)] * 10) == 0
    monkeypatch.setattr(workers, "performance_cores", lambda: 6)
    assert workers.worker_count([(4096, 4096)]) == 6
    assert workers.worker_count([(8, 1024, 1536)]) == 6  # experts count too
