"""What can be asked for, and which adapters are in memory: brought in when one is, put out when others need the room.

There may be `max_adapters` of them and so many bytes. The least recently used one that no request holds goes first;
one that is served no more goes when its last answer is written. Files are read in threads of their own: neither answers
that are being written nor the server's end wait for a disk.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import IncompatibleError, did_you_mean
from mlx_adapters.generation.live import LiveModel
from mlx_adapters.models.adapter import Adapter, template_of
from mlx_adapters.protocols.errors import ApiError
from mlx_adapters.runtime.attached import Attached
from mlx_adapters.serving.metrics import Metrics
from mlx_adapters.serving.settings import ServeSettings, TrafficSplit
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.system.door import mx

READ_AT_ONCE = 4  # adapters: one that a disk does not give keeps few others waiting


@dataclass(eq=False)
class Served:
    """An adapter that can be asked for. `attached` is None while it is out of memory.

    `fingerprint`: of the adapter that was first read, which is the one that is served: a name may come to mean another.
    `nbytes`: what its weights take, or once it was in memory what it took there; None until it was read.
    `stored_bytes`: what they take in its file; 0 until then.
    `template`: how it was trained to see conversations. `reading`: while its files are read, and until it is taken in.
    """

    name: str
    reference: str
    attached: Attached | None = None
    nbytes: int | None = None
    fingerprint: str | None = None
    stored_bytes: int = 0
    template: TemplateConfig = field(default=TemplateConfig())
    reading: Future[Adapter] | None = None

    def read(self) -> Adapter:
        """The adapter, from the disk. Raises IncompatibleError if it is no longer the one that was first read."""
        adapter = load_adapter(self.reference)
        fingerprint = adapter.fingerprint
        self.fingerprint = self.fingerprint or fingerprint
        if fingerprint != self.fingerprint:
            raise IncompatibleError(
                f"'{self.reference}' has changed since it was first served as '{self.name}'.",
                "remove it from the server and add it anew, or start the server again.",
            )
        self.template = template_of(adapter)
        self.stored_bytes = sum(weight.nbytes for weight in adapter.weights.values())
        return adapter

    @property
    def resident(self) -> bool:
        """Whether it is in memory."""
        return self.attached is not None and self.attached.alive


class Catalog:
    """Every name that a request may have in `model`. Threads may share it."""

    def __init__(self, base_name: str, template: TemplateConfig, splits: Sequence[TrafficSplit]) -> None:
        self.base_name, self._template, self._splits = base_name, template, splits
        self.served: dict[str, Served] = {}

    @property
    def names(self) -> list[str]:
        """Every model name that can be asked for."""
        return [self.base_name, *self.served, *(split.name for split in self._splits)]

    def resolve(self, name: str, user: str | None) -> str:
        """The adapter (or base) that a request for `name` gets. Raises ApiError 404 with the list."""
        for split in self._splits:
            if split.name == name:
                return split.choose(user if user is not None else f"request {time.time_ns()}")
        if name != self.base_name and name not in self.served:
            hint = did_you_mean(name, self.names)
            message = f"The model '{name[:100]}' does not exist. Served: {', '.join(self.names)}."
            raise ApiError(
                404, message + (f" {hint[0].upper()}{hint[1:]}" if hint else ""), param="model", code="model_not_found"
            )
        return name

    def require_new(self, name: str) -> None:
        """Raise ApiError 409 if the name can be asked for already."""
        if name in self.names:
            raise ApiError(409, f"'{name}' is served already.", param="name")

    def adapter(self, name: str) -> Served | None:
        """The adapter that `resolve` gave, None for the base. Raises ApiError 404 if it was removed since."""
        if name == self.base_name:
            return None
        served = self.served.get(name)  # once: other threads remove adapters
        if served is None:
            raise ApiError(404, f"The model '{name}' was removed.", param="model", code="model_not_found")
        return served

    def template_of(self, name: str) -> TemplateConfig:
        """How conversations are written for the adapter (or base) that `resolve` gave."""
        served = self.served.get(name)
        return served.template if served else self._template


class Residents:
    """The adapters of one model that are in memory. To be used from one thread.

    `on_read` is called in another when files were read, `on_leave` with what nobody can ask for any more.
    """

    def __init__(
        self,
        model: LiveModel,
        settings: ServeSettings,
        metrics: Metrics,
        on_read: Callable[[], None],
        on_leave: Callable[[Served], None],
    ) -> None:
        self.model, self.metrics, self._on_read, self._on_leave = model, metrics, on_read, on_leave
        self._most, self._byte_limit = settings.max_adapters, settings.max_adapter_bytes or math.inf
        self._serial = itertools.count()
        self._places = threading.Semaphore(READ_AT_ONCE)
        self._readers: set[threading.Thread] = set()
        self.leaving: list[Served] = []

    def read(self, served: Served) -> Future[Adapter]:
        """Begin to read the adapter's files, if that has not begun. Any thread may call this."""
        if served.reading is None:
            reading: Future[Adapter] = Future()
            served.reading = reading
            reading.add_done_callback(lambda _: self._on_read())
            reader = threading.Thread(target=self._read, args=(served, reading), name="reader", daemon=True)
            self._readers.add(reader)
            try:
                reader.start()
            except RuntimeError:  # no further thread can be had now; the next request tries again
                self._readers.discard(reader)
                served.reading = None
                raise
        return served.reading

    def _read(self, served: Served, reading: Future[Adapter]) -> None:
        reading.set_running_or_notify_cancel()
        try:
            with self._places:
                adapter = served.read()
                mx.eval(adapter.weights)  # in this thread, not when the engine's first looks at them
            reading.set_result(adapter)
        except BaseException as error:
            reading.set_exception(error)
        finally:
            self._readers.discard(threading.current_thread())

    def bring_in(self, served: Served) -> Attached | None:
        """The adapter in memory; None while it is read, or while others that are in use leave no room for it.

        Raises what reading it raises.
        """
        if served.resident:
            return served.attached
        if served.nbytes is not None and self._to_go(served, served.nbytes) is None:
            return None
        reading = self.read(served)
        if not reading.done():
            return None
        served.reading = None  # also when it failed: the next request tries again
        return self.attach(served, reading.result())

    def attach(self, served: Served, adapter: Adapter) -> Attached | None:
        """What was read, in memory; None while others that are in use leave no room for it."""
        pool = self.model.pool
        served.nbytes = served.nbytes or sum(w.size for w in adapter.weights.values()) * pool.dtype.size
        going = self._to_go(served, served.nbytes)
        if going is None:
            return None
        for entry in going:
            pool.remove(entry.name)
            self.metrics.add("adapter_evictions_total", adapter=entry.name.rpartition("#")[0])
        name = f"{served.name}#{next(self._serial)}"
        self.model.attach(adapter, name=name, use=False)
        served.attached = pool.get(name)
        served.attached.weights = served  # which never has others: what they computed holds when it comes back
        served.nbytes = served.attached.nbytes
        if pool.nbytes > self._byte_limit:  # in groups of layers it takes more than in its file
            pool.remove(name)
            return self.attach(served, adapter)
        self.metrics.add("adapter_loads_total", adapter=served.name)
        return served.attached

    def _to_go(self, served: Served, nbytes: int) -> list[Attached] | None:
        """The adapters to put out so that this one is within the limits; None if those in use leave no room."""
        pool, limit = self.model.pool, self._byte_limit
        require(nbytes <= limit, f"'{served.name}' has {nbytes / 1e6:.1f} MB; all may have {limit / 1e6:.1f} MB.")
        number, total, idle, going = len(pool.attached), pool.nbytes + nbytes, pool.idle, []
        while number >= self._most or total > limit:
            if not idle:
                return None
            going.append(idle.pop(0))
            number, total = number - 1, total - going[-1].nbytes
        return going

    def let_go(self) -> None:
        """Put those out that are `leaving` and that no answer needs any more."""
        for served in self.leaving[:]:
            attached = served.attached if served.resident else None
            if attached is None or attached.users == 0:
                self.leaving.remove(served)
                self._on_leave(served)
                if attached is not None:
                    self.model.pool.remove(attached.name)

    def close(self, seconds: float) -> None:
        """Wait so long for what is being read: threads that compute while Python ends would bring the process down."""
        deadline = time.monotonic() + seconds
        for reader in list(self._readers):
            reader.join(max(deadline - time.monotonic(), 0))
