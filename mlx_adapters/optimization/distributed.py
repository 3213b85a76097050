"""Several processes that train one adapter together (data parallel), started by `mlx.launch`.

Every process holds the whole model and takes its own rows of each global batch; the gradients of the summed
loss are added up, so the update is that of one process with the whole batch. Only rank 0 reads and writes the
run's folder; what the others need from it is sent to them.

Before the first step they meet in `gather` alone, and one that fails comes there with its error: so all end with it.
On GPUs a sum waits for ever for a process that is gone; `Peers` tells before.
"""

import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters import errors
from mlx_adapters.errors import AdapterError, IncompatibleError, TrainingError
from mlx_adapters.models.adapter import Weights
from mlx_adapters.surgery import calls
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import compile_apart

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SIZES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # files with an entry for each process
WAITING = ("NCCL_HOST_IP", "MLX_JACCL_COORDINATOR")  # rank 0's address, where a sum waits for a process that is gone
HERE, SILENCE, REACHED = b".", 10.0, 60.0  # what all say when they meet; seconds in a sum, and to reach rank 0
KEEP_ALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

log = logging.getLogger("mlx_adapters.optimization.distributed")


class LostPeerError(Exception):
    """Another process of the run is gone."""


class _FailedError(Exception):
    """What one of the processes raised, known to all."""

    def __init__(self, error: AdapterError) -> None:
        super().__init__(error.message)
        self.error = error


class Peers:
    """Connections that end when a process does: rank 0 has one to each, the others have one to it.

    All meet before each sum, so that none begins it without the others. One that is lost within the sum itself,
    milliseconds, leaves the others in it, where nothing can be saved: there `lost` ends them.
    """

    def __init__(self, connections: Sequence[socket.socket], leads: bool, silence: float = SILENCE) -> None:
        self.connections, self.leads, self.silence = list(connections), leads, silence
        self.lost: Callable[[], Any] = _end
        self._since: float | None = None
        for connection in self.connections:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for name in (name for name in KEEP_ALIVE if hasattr(socket, name)):  # a host without power says nothing
                level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
                connection.setsockopt(level, getattr(socket, name), KEEP_ALIVE[name])
        threading.Thread(target=self._watch, daemon=True).start()

    def meet(self) -> None:
        """Wait until all are here. Raises LostPeerError, on all, if one is gone."""
        try:
            for answering in (False, True):
                for connection in self.connections:
                    if answering == self.leads:
                        connection.sendall(HERE)
                    elif connection.recv(1) != HERE:
                        raise OSError("closed")
        except OSError as error:
            self.close()
            raise LostPeerError(str(error)) from error

    @contextlib.contextmanager
    def summing(self) -> Iterator[None]:
        """Within the block a process that is gone ends this one, if the block does not end."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def close(self) -> None:
        """Let the others know that this process goes on no more."""
        for connection in self.connections:
            connection.close()

    def _watch(self) -> None:
        while all(connection.fileno() >= 0 for connection in self.connections):
            time.sleep(self.silence / 10)
            since = self._since
            if since is not None and time.monotonic() - since > self.silence and any(map(_ended, self.connections)):
                self.lost()
                return


def _ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _end() -> None:
    log.error("Error: Another process of this run was lost in the middle of a step.\nHint: go on with --resume.")
    os._exit(1)


@dataclass(frozen=True)
class World:
    """The processes of a run; one alone is a world too. `peers`: where a sum would wait for ever for a lost one."""

    rank: int = 0
    size: int = 1
    group: Any = None
    peers: Peers | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def close(self) -> None:
        """Nothing more is summed."""
        if self.peers is not None:
            self.peers.close()

    def sum(self, array: mx.array) -> mx.array:
        """The sum over all processes, evaluated. Raises LostPeerError."""
        if self.size == 1:
            return array
        if self.peers is not None:
            mx.eval(array)  # it takes longest, and one that is lost meanwhile is missed when all meet
            self.peers.meet()
        try:
            with self.peers.summing() if self.peers is not None else contextlib.nullcontext():
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
        parts = zip(names, mx.split(flat, np.cumsum([arrays[name].size for name in names])[:-1].tolist()), strict=True)
        return {name: part.reshape(arrays[name].shape).astype(arrays[name].dtype) for name, part in parts}

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around all that comes before the first step: what one process raises ends all, by the name of its host."""
        try:
            yield
        except _FailedError as failed:
            raise failed.error from None
        except LostPeerError:
            raise _ended_early() from None
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

    def of_each(self, number: int) -> np.ndarray:
        """The processes' whole numbers (int32), by rank."""
        return np.array(self.sum(mx.array([number * (rank == self.rank) for rank in range(self.size)])))

    def _gather_json(self, value: Any) -> list[Any]:
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        ends = np.cumsum(self.of_each(len(data)))
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
            shared[name] = self.sum(arrays[name] if self.leads and arrays else mx.zeros(shape, kind))
        return shared


def _ended_early() -> TrainingError:
    return TrainingError("Another process of this run ended before the first step.", "its own output says why.")


def _spelled(error: Exception) -> dict[str, Any]:
    """An error as plain JSON values."""
    if isinstance(error, AdapterError):
        return {"error": [type(error).__name__, error.message, error.hint]}
    return {"error": ["TrainingError", f"{type(error).__name__}: {error}.", "its own output says more."]}


def start() -> World:
    """The world that `mlx.launch` (or MPI) made, or this process alone.

    Raises TrainingError if it was started as one of several and cannot reach the others, or reaches another run's.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return World()
    wanted, why = _launched_size(), ""
    compile_apart(next(os.environ[name] for name in LAUNCHED if name in os.environ))
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
    world = World(group.rank(), size, group)
    try:
        _require_own(world)
        return replace(world, peers=_peers(world))
    except LostPeerError:
        raise _ended_early() from None


def _require_own(world: World) -> None:
    """Raise TrainingError where the sums are partly another run's: what this process gives is not in what it gets.

    MLX's ring takes whoever calls at its port: two runs over the same ports at once may become one ring of twice the
    length, which goes round half of it for each sum. (Two that only exchange processes differ in what was asked for.)
    """
    mine = 1 + secrets.randbits(30)
    if world.of_each(mine)[world.rank] != mine:
        raise TrainingError(
            "Processes of another run answer at this one's addresses.",
            "start one when the other has ended, or over other ports: mlx.launch --starting-port.",
        )


def _peers(world: World) -> Peers | None:
    """The connections, over the address that the environment gives for rank 0; None where none is needed."""
    host = next((os.environ[name] for name in WAITING if os.environ.get(name)), None)
    if host is None or world.size == 1:
        return None
    host = host.rpartition(":")[0] if "MLX_JACCL_COORDINATOR" in os.environ else host
    try:
        if not world.leads:
            port, key = world.share(lambda: None)
            connection = socket.create_connection((host, port), REACHED)
            connection.sendall(bytes.fromhex(key))
            return Peers([connection], False)
        others: list[socket.socket] = []
        key = secrets.token_bytes(16)
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            server.settimeout(REACHED)
            world.share(lambda: [server.getsockname()[1], key.hex()])
            while len(others) < world.size - 1:
                other, _ = server.accept()
                other.settimeout(REACHED)
                others += [other] if hmac.compare_digest(other.recv(len(key), socket.MSG_WAITALL), key) else []
        return Peers(others, True)
    except OSError as error:
        raise TrainingError(
            f"Rank {world.rank} does not reach the others at '{host}': {error.strerror or error}.",
            "the processes of a run need a connection to rank 0's address: is there a firewall?",
        ) from None


def _launched_size() -> int:
    """Of how many processes the environment says this is one."""
    sizes = [int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdecimal()]
    for name in LISTS:
        with contextlib.suppress(KeyError, OSError, ValueError):
            sizes.append(len(json.loads(Path(os.environ[name]).read_text() or "[]")))
    return max(sizes, default=1)
