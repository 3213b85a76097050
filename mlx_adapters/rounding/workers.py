"""Rounding in several processes: on a CPU layers are rounded each by itself, and one of them keeps one core busy.

A worker is this module run as a program, with one BLAS thread, so that a result does not depend on how many
workers there are. It is neither forked (MLX's threads do not survive that) nor a child of `multiprocessing` (which
would run a script without a main guard once more). Tasks and results go through its pipes. A GPU needs none: there
layers are rounded one after the other, experts many at a time.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import ModelError
from mlx_adapters.rounding.engines import NUMPY, Engine
from mlx_adapters.rounding.feedback import (
    DAMPING,
    OUTPUT_DAMPING,
    SWEEPS,
    calibrated,
    column_feedback,
    damped,
    nearest_if_better,
)
from mlx_adapters.rounding.grids import Array
from mlx_adapters.rounding.packed import Packed
from mlx_adapters.system.interrupt import end_with_parent
from mlx_adapters.system.machine import blas_threads, child_environment, memory_beside_model_bytes, performance_cores

MOST_WORKERS = 64
WORTH_WORKERS = 1e10  # multiplications (in² · out, summed over the layers); below, starting them costs more
STACKED = "weight", "hessian", "outputs", "update", "start", "unit", "output_damping", "doubt"
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
COMMAND = (sys.executable, "-P", "-m", "mlx_adapters.rounding.workers")


class Way(NamedTuple):
    """One precision to round to, and how: see `calibrated`."""

    quantization: Quantization
    together: bool = True
    sweeps: int = SWEEPS


@dataclass(frozen=True)
class Task:
    """Calls of `calibrated` for one matrix, one for each of `ways`: its arguments, with `dtype` by name; the error is
    given in units of `unit`.

    `doubt` is the damping under which rounding to nearest is judged. A batch of matrices has one axis more everywhere;
    its error is the sum of theirs.
    """

    weight: mx.array
    hessian: Array
    ways: tuple[Way, ...]
    dtype: str
    start: Packed | None
    unit: Array | float = 1.0
    outputs: Array | None = None
    output_damping: Array | float = OUTPUT_DAMPING
    update: mx.array | None = None
    doubt: Array | float = DAMPING

    def run(self, engine: Engine = NUMPY) -> "list[Done]":
        """The rounded weight by each way: calibrated, or to nearest where that is better."""
        return [Done(packed, float(errors.sum()), bool(mask.all())) for packed, errors, mask in self._rounded(engine)]

    def run_each(self, engine: Engine) -> "list[list[Done]]":
        """The same of each matrix of a batch."""
        made = [
            [Done(packed[i], float(errors[i]), bool(mask[i])) for i in range(len(errors))]
            for packed, errors, mask in self._rounded(engine)
        ]
        return [list(dones) for dones in zip(*made, strict=True)]

    def _rounded(self, engine: Engine) -> Iterator[tuple[Packed, Array, Array]]:
        """By each way the weight, its errors (...), and whether (...) it was rounded to nearest."""
        dtype, outputs, damping = getattr(mx, self.dtype), self.outputs, self.output_damping
        factor = column_feedback(damped(self.hessian, engine=engine), engine)
        for way in self.ways:
            packed, loss = calibrated(
                self.weight,
                self.hessian,
                way.quantization,
                dtype,
                self.start,
                outputs,
                way.sweeps,
                way.together,
                damping,
                self.update,
                engine,
                factor,
            )
            plain, plain_loss, better = nearest_if_better(
                packed, self.weight, self.hessian, dtype, outputs, self.doubt, damping, engine
            )
            pairs = {name: (plain.tensors[name], part) for name, part in packed.tensors.items()}
            mask = mx.array(better)
            chosen = {name: mx.where(mask.reshape(*mask.shape, 1, 1), *pair) for name, pair in pairs.items()}
            mx.eval(chosen)
            yield Packed.of(chosen, way.quantization), self.unit * engine.xp.where(better, plain_loss, loss), better

    def __getitem__(self, i: int) -> "Task":
        """One matrix of a batch."""
        parts = {name: part[i] for name, part in vars(self).items() if name in STACKED and part is not None}
        return replace(self, **parts)

    @property
    def arrays(self) -> list[mx.array]:
        """All MLX arrays."""
        start = list(self.start.tensors.values()) if self.start else []
        return [self.weight, *start, *([] if self.update is None else [self.update])]

    @property
    def nbytes(self) -> int:
        """About what running it takes: H, its factor and copies; the matrix, its errors and copies; G and its."""
        out, width = self.weight.shape
        return 4 * (6 * width * width + 7 * width * out + (3 * out * out if self.outputs is not None else 0))


def stacked(tasks: Sequence[Task]) -> Task:
    """Tasks of matrices of one shape as the task of a batch. All have a start, or G, or an update, or none has."""
    first, parts = tasks[0], dict[str, Any]()
    for name in ("weight", "hessian", "outputs", "update"):
        arrays = [getattr(task, name) for task in tasks]
        parts[name] = None if arrays[0] is None else mx.stack(arrays)
    for name in ("unit", "output_damping", "doubt"):
        parts[name] = mx.array([getattr(task, name) for task in tasks])
    starts = [task.start.tensors for task in tasks if task.start is not None]
    if first.start is not None:
        together = {name: mx.stack([start[name] for start in starts]) for name in starts[0]}
        parts["start"] = Packed.of(together, first.start.quantization)
    return replace(first, **parts)


@dataclass(frozen=True)
class Done:
    """A rounded weight, its error, and whether it was rounded to nearest after all."""

    packed: Packed
    loss: float
    nearest: bool = False


def worker_count(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many workers layers of these shapes (..., out, in) are worth: one for each fast core up to 64, or none."""
    work = sum(float(np.prod(shape)) * shape[-1] for shape in shapes)
    cores = performance_cores()
    return min(cores, MOST_WORKERS) if work > WORTH_WORKERS and cores > 1 else 0


class Workers:
    """A context manager around `count` processes; with 0, tasks run in this one, by `engine`.

    Tasks under way are two for each, and take at most `memory` bytes (default: `memory_beside_model_bytes`); one always
    runs. The processes are started with the first task; from then on OpenBLAS has half as many threads in this one.
    """

    def __init__(
        self, count: int, memory: int | None = None, command: Sequence[str] = COMMAND, engine: Engine = NUMPY
    ) -> None:
        self.count, self.memory, self.command = count, memory or memory_beside_model_bytes(), command
        self.engine = engine
        self._processes: list[subprocess.Popen] = []
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._cores = contextlib.ExitStack()
        self._room, self._used, self._flying = threading.Condition(), 0, 0

    def __enter__(self) -> "Workers":
        return self

    def _start(self) -> ThreadPoolExecutor:
        environment = child_environment() | dict.fromkeys(THREADS, "1")
        # Theirs stays blocked: Ctrl-C is this process's to handle.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self.count):
                process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                self._processes.append(process)
                self._idle.put(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._cores.enter_context(blas_threads(max(1, self.count // 2)))
        return ThreadPoolExecutor(self.count)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._cores.close()
        for process in self._processes:
            if kind is not None:
                process.kill()
            _close(process.stdin)
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            _close(process.stdout)

    def submit(self, task: Task) -> "Future[list[Done]]":
        """Run a task; waits until there is room for it."""
        if not self.count:
            done: Future[list[Done]] = Future()
            with blas_threads(1):
                done.set_result(task.run(self.engine))
            return done
        self._threads = self._threads or self._start()
        mx.eval(task.arrays)  # another thread than the one that made them cannot
        need = task.nbytes
        with self._room:
            self._room.wait_for(lambda: self._has_room(need))
            self._used, self._flying = self._used + need, self._flying + 1
        future = self._threads.submit(self._run, task)
        future.add_done_callback(lambda _: self._leave(need))
        return future

    def _has_room(self, need: int) -> bool:
        few = self._flying < 2 * self.count
        return not self._flying or (few and self._used + need <= self.memory)

    def _leave(self, need: int) -> None:
        with self._room:
            self._used, self._flying = self._used - need, self._flying - 1
            self._room.notify_all()

    def _run(self, task: Task) -> list[Done]:
        process = self._idle.get()
        try:
            assert process.stdin and process.stdout
            pickle.dump(task, process.stdin, protocol=5)
            process.stdin.flush()
            result, failure = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            less = ": --quick takes half" if any(way.together for way in task.ways) else ""
            raise ModelError("A process that rounds layers ended.", f"probably for lack of memory{less}.") from error
        finally:
            self._idle.put(process)
        if failure:
            raise RuntimeError(failure)
        return result


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):  # what was not sent to a process that is gone
            pipe.close()


def main() -> None:
    """Answer tasks on standard input until it ends, or nobody reads the answers."""
    mx.set_default_device(mx.cpu)
    pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            task = pickle.load(pipe_in)
        except EOFError:
            return
        try:
            result, problem = task.run(), None
        except Exception:
            result, problem = None, traceback.format_exc()
        try:
            pickle.dump((result, problem), pipe_out, protocol=5)
            pipe_out.flush()
        except BrokenPipeError:
            os._exit(1)  # without another try to write


if __name__ == "__main__":
    end_with_parent()
    main()
