"""Several processes that train one adapter together (data parallel), started by `mlx.launch`.

Every process holds the whole model and takes its own rows of each global batch; the gradients of the summed
loss are added up, so the update is that of one process with the whole batch. Only rank 0 reads and writes the
run's folder; what the others need from it is sent to them.

Before the first step they meet in `gather` alone, and one that fails comes there with its error: so all end with it.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters import errors
from mlx_adapters.errors import AdapterError, IncompatibleError, TrainingError
from mlx_adapters.models.adapter import Weights
from mlx_adapters.surgery import calls
from mlx_adapters.system.door import mx

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SIZES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # files with an entry for each process


class LostPeerError(Exception):
    """Another process of the run is gone."""


class _FailedError(Exception):
    """What one of the processes raised, known to all."""

    def __init__(self, error: AdapterError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True)
class World:
    """The processes of a run; one alone is a world too."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, array: mx.array) -> mx.array:
        """The sum over all processes, evaluated. Raises LostPeerError."""
        if self.size == 1:
            return array
        try:
            total = mx.distributed.all_sum(array, group=self.group)
            mx.eval(total)
        except RuntimeError as error:
            raise LostPeerError(str(error)) from error
        return total

    def sum_all(self, arrays: Weights) -> Weights:
        """Sums of float32 arrays over all processes, in one message."""
        if self.size == 1:
            return arrays
        names = sorted(arrays)
        flat = self.sum(mx.concatenate([arrays[name].astype(mx.float32).reshape(-1) for name in names]))
        summed, offset = {}, 0
        for name in names:
            size = arrays[name].size
            summed[name] = flat[offset : offset + size].reshape(arrays[name].shape).astype(arrays[name].dtype)
            offset += size
        return summed

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around all that comes before the first step: what one process raises ends all, by the name of its host."""
        try:
            yield
        except _FailedError as failed:
            raise failed.error from None
        except LostPeerError:
            hint = "its own output says why."
            raise TrainingError("Another process of this run ended before the first step.", hint) from None
        except Exception as error:
            with contextlib.suppress(_FailedError, LostPeerError):
                self._exchange(_spelled(error))
            raise

    def gather(self, make: Callable[[], Any]) -> list[Any]:
        """What `make` gives on each rank (plain JSON values), on every rank; an error of one is raised on all."""
        if self.size == 1:
            return [make()]
        try:
            answer = {"value": make()}
        except AdapterError as error:
            answer = _spelled(error)
        return [one["value"] for one in self._exchange(answer)]

    def _exchange(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All answers. Raises _FailedError if one is an error: with a rank's own on that rank, else with the first."""
        if self.size == 1:
            return [dict(answer)]
        answers = self._gather_json({"host": socket.gethostname(), **answer})
        failed = [rank for rank, one in enumerate(answers) if "error" in one]
        if failed:
            rank = self.rank if self.rank in failed else failed[0]
            kind, message, hint = answers[rank]["error"]
            if rank != self.rank:
                message = f"On '{answers[rank]['host']}' (rank {rank}): {message}"
            raise _FailedError(getattr(errors, kind, TrainingError)(message, hint))
        return answers

    def _gather_json(self, value: Any) -> list[Any]:
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = np.zeros(self.size, np.int32)
        lengths[self.rank] = len(data)
        ends = np.cumsum(np.array(self.sum(mx.array(lengths))))
        mine = np.zeros(ends[-1], np.uint8)
        mine[ends[self.rank] - len(data) : ends[self.rank]] = data
        together = bytes(np.array(self.sum(mx.array(mine))))
        return [json.loads(together[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0 (plain JSON values), on every rank; its AdapterError is raised on all."""
        return self.gather(make if self.leads else lambda: None)[0]

    def require_equal(self, make: Callable[[], Any], differences: Callable[[Any, Any], list[str]]) -> None:
        """Raise IncompatibleError that names the first process of which `make` gives something else than on rank 0.

        `differences(first, other)` says in words what differs.
        """
        if self.size == 1:
            return
        answers = self.gather(lambda: [socket.gethostname(), make()])
        for rank, (host, other) in enumerate(answers[1:], start=1):
            if unlike := differences(answers[0][1], other):
                raise IncompatibleError(
                    f"'{host}' (rank {rank}) differs from '{answers[0][0]}' (rank 0): {'; '.join(unlike)}.",
                    "'mlx-adapters doctor --hosts' compares them; docs/distributed.md says what must be where.",
                )

    @contextlib.contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Within the block each of several processes draws numbers of its own; after it all go on with the same key."""
        if self.size == 1:
            yield
            return
        following, *own = mx.random.split(calls.random_key(), self.size + 1)
        calls.set_random_key(own[self.rank])
        yield
        calls.set_random_key(following)

    def share_arrays(self, arrays: Weights | None) -> Weights:
        """Rank 0's arrays, bit by bit, on every rank."""
        if self.size == 1:
            return arrays or {}
        layout = self.share(lambda: {n: [str(a.dtype), list(a.shape)] for n, a in sorted((arrays or {}).items())})
        shared = {}
        for name, (dtype, shape) in layout.items():
            kind = getattr(mx, dtype.removeprefix("mlx.core."))
            mine = arrays[name] if self.leads and arrays else mx.zeros(shape, kind)
            shared[name] = self.sum(mine)
        return shared


def _spelled(error: Exception) -> dict[str, Any]:
    """An error as plain JSON values."""
    if isinstance(error, AdapterError):
        return {"error": [type(error).__name__, error.message, error.hint]}
    return {"error": ["TrainingError", f"{type(error).__name__}: {error}.", "its own output says more."]}


def start() -> World:
    """The world that `mlx.launch` (or MPI) made, or this process alone.

    Raises TrainingError if it was started as one of several and cannot reach the others.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return World()
    wanted, why = _launched_size(), ""
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        group, why = None, f" ({' '.join(str(error).split())[:200]})"
    size = group.size() if group is not None else 0
    if size == 0 or size < wanted:
        raise TrainingError(
            f"This process was started as one of {max(wanted, 2)}, but MLX does not reach the others{why}.",
            "use 'mlx.launch' (docs/distributed.md); under mpirun MLX needs the MPI library: MLX_MPI_LIBNAME.",
        )
    return World(group.rank(), size, group)


def _launched_size() -> int:
    """Of how many processes the environment says this is one."""
    sizes = [int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdecimal()]
    for name in LISTS:
        with contextlib.suppress(KeyError, OSError, ValueError):
            listed = json.loads(Path(os.environ[name]).read_text() or "[]")
            sizes.append(len(listed))
    return max(sizes, default=1)
