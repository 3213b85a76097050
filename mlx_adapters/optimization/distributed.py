"""Several processes that train one adapter together (data parallel), started by `mlx.launch`.

Every process holds the whole model and takes its own rows of each global batch; the gradients of the summed
loss are added up, so the update is that of one process with the whole batch. Only rank 0 reads and writes the
run's folder; what the others need from it is sent to them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_adapters import errors
from mlx_adapters.errors import AdapterError
from mlx_adapters.models.adapter import Weights
from mlx_adapters.system.door import mx

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class LostPeerError(Exception):
    """Another process of the run is gone."""


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

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0 (plain JSON values), on every rank; its AdapterError is raised on all."""
        if self.size == 1:
            return make()
        answer: dict[str, Any] = {}
        if self.leads:
            try:
                answer = {"value": make()}
            except AdapterError as error:
                answer = {"error": [type(error).__name__, error.message, error.hint]}
        answer = json.loads(self._share_bytes(json.dumps(answer).encode()))
        if "error" in answer:
            kind, message, hint = answer["error"]
            raise getattr(errors, kind, AdapterError)(message, hint)
        return answer["value"]

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

    def _share_bytes(self, data: bytes) -> bytes:
        length = self.sum(mx.array([len(data) if self.leads else 0], mx.int32)).item()
        mine = np.frombuffer(data, np.uint8) if self.leads else np.zeros(length, np.uint8)  # type: ignore[arg-type]
        return bytes(np.array(self.sum(mx.array(mine))))


def start() -> World:
    """The world that `mlx.launch` (or MPI) made, or this process alone."""
    if not any(name in os.environ for name in LAUNCHED):
        return World()
    group = mx.distributed.init()
    return World(group.rank(), group.size(), group)
