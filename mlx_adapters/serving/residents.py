"""Which adapters are in memory: brought in when one is asked for, put out when others need the room.

There may be `max_adapters` of them and so many bytes. The least recently used one that no request holds goes first;
one that is served no more goes when its last answer is written.
"""

import itertools
import math
from dataclasses import dataclass, field

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.generation.live import LiveModel
from mlx_adapters.models.adapter import Adapter, template_of
from mlx_adapters.runtime.attached import Attached
from mlx_adapters.serving.metrics import Metrics
from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.sources.lookup import load_adapter


@dataclass(eq=False)
class Served:
    """An adapter that can be asked for. `attached` is None while it is out of memory.

    `fingerprint`: of the adapter that was first read, which is the one that is served: a name may come to mean another.
    `nbytes`: what its weights take, or once it was in memory what it took there; None until it was read.
    `template`: how it was trained to see conversations.
    """

    name: str
    reference: str
    attached: Attached | None = None
    nbytes: int | None = None
    fingerprint: str | None = None
    template: TemplateConfig = field(default=TemplateConfig())

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
        return adapter

    @property
    def resident(self) -> bool:
        """Whether it is in memory."""
        return self.attached is not None and self.attached.alive


class Residents:
    """The adapters of one model that are in memory. To be used from one thread."""

    def __init__(self, model: LiveModel, settings: ServeSettings, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        self._most, self._byte_limit = settings.max_adapters, settings.max_adapter_bytes or math.inf
        self._serial = itertools.count()
        self.leaving: list[Served] = []

    def bring_in(self, served: Served) -> Attached | None:
        """The adapter in memory, loaded if it is not; None if every other is in use and none can make room."""
        if served.resident:
            return served.attached
        pool, adapter = self.model.pool, None
        if served.nbytes is None:
            adapter = served.read()
            served.nbytes = sum(w.size for w in adapter.weights.values()) * pool.dtype.size
        if not self._make_room(served, served.nbytes):
            return None
        name = f"{served.name}#{next(self._serial)}"
        self.model.attach(adapter or served.read(), name=name, use=False)
        served.attached = pool.get(name)
        served.nbytes = served.attached.nbytes
        if pool.nbytes > self._byte_limit:  # in groups of layers it takes more than in its file
            pool.remove(name)
            return self.bring_in(served)
        self.metrics.add("adapter_loads_total", adapter=served.name)
        return served.attached

    def _make_room(self, served: Served, nbytes: int) -> bool:
        """Put adapters out until this one is within the limits too. False if those in use leave no room."""
        pool, limit = self.model.pool, self._byte_limit
        require(nbytes <= limit, f"'{served.name}' has {nbytes / 1e6:.1f} MB; all may have {limit / 1e6:.1f} MB.")
        while len(pool.attached) >= self._most or pool.nbytes + nbytes > limit:
            oldest = pool.least_recently_used()
            if oldest is None:
                return False
            pool.remove(oldest.name)
            self.metrics.add("adapter_evictions_total", adapter=oldest.name.rpartition("#")[0])
        return True

    def let_go(self) -> None:
        """Put those out that are `leaving` and that no answer needs any more."""
        for served in self.leaving[:]:
            attached = served.attached if served.resident else None
            if attached is None or attached.users == 0:
                self.leaving.remove(served)
                if attached is not None:
                    self.model.pool.remove(attached.name)
