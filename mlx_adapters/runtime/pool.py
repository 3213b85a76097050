"""Many adapters on one base: all in memory, one of them (or a mixture, or one for each row) at work.

The base is in memory once. Attaching prepares an adapter's factors (see `factors`); switching then only points
each site at other arrays, which takes microseconds to two milliseconds. Nothing is changed before everything is
checked, and when the last adapter is gone the base's own layers are back where they were.
"""

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeVar

from mlx_adapters.config.mapping import require, shown
from mlx_adapters.errors import ConfigError, IncompatibleError, NotFoundError, did_you_mean
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import compute_dtype, is_quantized
from mlx_adapters.models.layers import SWITCH, adaptable_layers, check_fits
from mlx_adapters.models.quantized_check import are_right
from mlx_adapters.runtime import kernel
from mlx_adapters.runtime.additions import ForAll
from mlx_adapters.runtime.attached import Attached, Selection, Stacks, combined, is_mixture, part, same
from mlx_adapters.runtime.factors import Factors, prepare
from mlx_adapters.runtime.sites import (
    Group,
    Site,
    at_path,
    fused_layers,
    joined,
    remember_indices,
    replace_layers,
    wrap,
)
from mlx_adapters.storage.tensor_names import ADAPTER_LEAVES, join
from mlx_adapters.surgery.groups import Arrays, find_groups
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.machine import on_gpu

Step = TypeVar("Step")


@dataclass(frozen=True)
class Plan:
    """What a selection puts where, kept so that switching back costs nothing."""

    selection: Selection
    updates: dict[Site, ForAll]


MAX_MIXTURES = 2  # kept for switching back
AT_A_TIME = 16  # sites: each evaluation takes its time


class AdapterPool:
    """The adapters of one model.

    `group`: linear layers on one input become one product. That saves operations, which a GPU's decode speed
    hangs on and a CPU's does not, so by default it is on on a GPU only. `together`: groups that were laid together when
    the model was loaded.
    """

    def __init__(
        self, module: nn.Module, group: bool | None = None, together: Mapping[tuple[str, ...], Arrays] | None = None
    ) -> None:
        self.module = module
        self.layers = adaptable_layers(module)
        self.dtype = compute_dtype(module)
        self.lock = threading.RLock()
        self.attached: dict[str, Attached] = {}
        self.selection: Selection = ()
        self.fused: Selection | None = None
        self._group = on_gpu() if group is None else group
        self._together = dict(together or {})
        self._plans: dict[tuple, Plan] = {}
        self._groups: list[tuple[str, ...]] | None = None
        self._sites: dict[str, Site] = {}
        self._undo: dict[Site, Callable[[], None]] = {}
        self._unfused: dict[str, nn.Module] = {}
        self._stacks: Stacks | None = None
        self._clock = itertools.count(1)
        self.gone: Callable[[], None] = lambda: None  # called when the arrays of an adapter are let go of

    # -- coming and going ------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter, spent: bool = False) -> Attached:
        """Take an adapter in under `name`, in place of one of that name. When this raises, nothing changed here.

        spent: it was read for this alone, and its weights may go as they are taken.
        """
        with self.lock:
            check_fits(adapter, self.layers)
            kernel.is_right(self.dtype)  # here, not in the first answer: building it takes a moment
            before = set(self._sites)
            try:
                factors = self._factors(adapter, self._install(adapter.config.keys), spent)
            except BaseException:
                self._uninstall(self._sites.keys() - before)
                raise
            entry = Attached(name, replace(adapter, weights={}), factors)
            if name in self.attached:
                self._forget(self.attached[name])
            self.attached[name] = entry
            self._stacks = None
            self.touch(entry)
            return entry

    def _factors(self, adapter: Adapter, sites: Sequence[Site], spent: bool) -> dict[Site, Factors]:
        """What the adapter adds to each site, evaluated: some at a time, since that takes memory for a moment."""
        made: dict[Site, Factors] = {}
        keys = set(adapter.config.keys)
        for start in range(0, len(sites), AT_A_TIME):
            some = sites[start : start + AT_A_TIME]
            for site in some:
                own = keys.intersection(site.paths)
                prepared = {key: prepare(self.layers[key], adapter, key, self.dtype) for key in own}
                if factors := site.assemble(prepared):
                    made[site] = factors
            mx.eval([made[site].arrays for site in some if site in made])
            for path in (path for site in some for path in site.paths if spent):
                for leaf in ADAPTER_LEAVES:
                    adapter.weights.pop(join(path, leaf), None)
        return made

    def remove(self, name: str) -> None:
        """Let an adapter go; with the last one the base's own layers come back."""
        with self.lock:
            self._forget(self.get(name))
            del self.attached[name]
            if not self.attached:
                self.unfuse()
                self._uninstall(set(self._sites))
                self._stacks, self._plans = None, {}

    def get(self, name: str) -> Attached:
        """The adapter of that name. Raises NotFoundError that suggests the nearest."""
        if name not in self.attached:
            known = ", ".join(self.attached) or "none"
            raise NotFoundError(
                f"No adapter '{name}' is attached.", did_you_mean(name, self.attached, f"attached: {known}.")
            )
        return self.attached[name]

    def touch(self, entry: Attached) -> None:
        """Note that the adapter was used now."""
        entry.last_used = next(self._clock)

    @property
    def idle(self) -> list[Attached]:
        """The adapters that nobody uses, the least recently used one first: in this order they may be evicted."""
        return sorted((e for e in self.attached.values() if e.users == 0), key=lambda entry: entry.last_used)

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters."""
        return sum(entry.nbytes for entry in list(self.attached.values()))  # other threads may ask

    def _forget(self, entry: Attached) -> None:
        """Let go of its arrays, wherever they are: whoever still holds the entry holds no memory with it."""
        entry.alive = False
        if any(used is entry for used, _ in self.selection):
            self.select(())
        entry.factors = {}
        self._stacks, self._plans = None, {}
        self.gone()
        if part(self.attached.values()):
            self.select(self.selection)

    # -- the sites -------------------------------------------------------------------------------------

    def _install(self, keys: Sequence[str]) -> list[Site]:
        """The sites of these layers, new ones put into the model."""
        if self._groups is None:
            self._groups = self._find_groups() if self._group else []
        of_group = {path: paths for paths in self._groups for path in paths}
        sites: dict[Site, None] = {}
        for key in keys:
            if key not in self._sites:
                self._install_site(of_group.get(key, (key,)))
            sites[self._sites[key]] = None
        return list(sites)

    def _find_groups(self) -> list[tuple[str, ...]]:
        """The groups, but for those whose one product this device computes wrong, though not its parts."""
        groups = list(self._together) or find_groups(self.module, self.layers)
        packed = [paths for paths in groups if is_quantized(self.layers[paths[0]])] if on_gpu() else []
        rights = are_right([joined([self.layers[path] for path in paths]) for paths in packed], self.dtype)
        wrong = {paths for paths, right in zip(packed, rights, strict=True) if not right}
        return [paths for paths in groups if paths not in wrong]

    def _install_site(self, paths: tuple[str, ...]) -> None:
        layers = [self.layers[path] for path in paths]
        site = Group(paths, layers, self._together.get(paths)) if len(paths) > 1 else Site(paths, layers)
        self._sites |= dict.fromkeys(paths, site)
        if isinstance(layers[0], SWITCH):
            block = at_path(self.module, paths[0].rpartition(".")[0])
            self._undo[site] = remember_indices(block, site)
        replace_layers(self.module, wrap(site))

    def _uninstall(self, paths: Set[str]) -> None:
        """Put the base's own layers back at these paths, which are whole sites."""
        replace_layers(self.module, {path: self.layers[path] for path in paths})
        for site in {self._sites.pop(path) for path in paths}:
            if site in self._undo:
                self._undo.pop(site)()

    # -- at work ---------------------------------------------------------------------------------------

    def choose(self, wanted: str | Mapping[str, float] | None, scale: float = 1.0) -> Selection:
        """The selection that a name, {name: weight} or None means."""
        if wanted is None:
            return ()
        if not isinstance(wanted, str | Mapping):
            hint = "`attach` gives the name of what it attached; `using` takes an adapter itself."
            raise ConfigError(f"{shown(wanted)} is no name of an attached adapter.", hint)
        weights = {wanted: scale} if isinstance(wanted, str) else wanted
        for name, weight in weights.items():
            require(abs(weight) < math.inf, f"The weight of '{name}' must be finite, not {weight}.")
        return tuple((self.get(name), float(weight)) for name, weight in weights.items())

    def select(self, selection: Selection) -> None:
        """Put these adapters to work in all layers, for all rows."""
        with self.lock:
            for entry, _ in selection:
                if not entry.alive:
                    raise IncompatibleError(f"Adapter '{entry.name}' was detached meanwhile.", "attach it again.")
                self.touch(entry)
            if self.fused is not None:
                if same(self.fused, selection):
                    return
                self.unfuse()
            plan = self._plan(selection)
            for site in set(self._sites.values()):
                site.update = plan.updates.get(site)
            self.selection = selection

    def _plan(self, selection: Selection) -> Plan:
        key = tuple((id(entry), weight) for entry, weight in selection)
        if key not in self._plans:
            factors_at = {site: combined(selection, site) for site in set(self._sites.values())}
            updates = {site: ForAll(factors) for site, factors in factors_at.items() if factors is not None}
            mx.eval([update.arrays for update in updates.values()])  # at once: each eval takes its time
            if is_mixture(selection):
                mixtures = [old for old, plan in self._plans.items() if is_mixture(plan.selection)]
                for old in mixtures[: len(mixtures) + 1 - MAX_MIXTURES]:
                    del self._plans[old]
            self._plans[key] = Plan(selection, updates)
        return self._plans[key]

    @contextlib.contextmanager
    def applied(self, selection: Selection) -> Iterator[None]:
        """Put these adapters to work inside the block; other threads wait, and find what was there before."""
        with self.lock:
            before = self.selection
            if not same(before, selection):
                self.select(selection)
            try:
                yield
            finally:
                if not same(self.selection, before):
                    self.select(before if all(entry.alive for entry, _ in before) else ())

    def steps(self, selection: Selection, inner: Generator[Step]) -> Generator[Step]:
        """What `inner` gives, each step of it computed while these adapters are at work."""
        with contextlib.closing(inner):
            while True:
                with self.applied(selection):
                    step = next(inner, None)
                if step is None:
                    return
                yield step

    @contextlib.contextmanager
    def routed(self, entries: Sequence[Attached | None]) -> Iterator[None]:
        """Inside the block, row i of every batch is computed with adapter `entries[i]` (None: the base)."""
        first = entries[0]
        if all(entry is first for entry in entries):
            with self.applied(((first, 1.0),) if first is not None else ()):
                yield
            return
        with self.lock:
            self.unfuse()
            if self._stacks is None:
                self._stacks = Stacks(self.attached.values(), set(self._sites.values()))
                self._plans = {}  # they hold the factors from before
                self.select(self.selection)
            updates = self._stacks.updates(entries)
            before = {site: site.update for site in set(self._sites.values())}
            for site in before:
                site.update = updates.get(site)
            try:
                yield
            finally:
                for site, earlier in before.items():
                    site.update = earlier

    # -- fused in place --------------------------------------------------------------------------------

    def fuse(self, selection: Selection) -> None:
        """Put dense layers with these adapters in them in place of the base's, until `unfuse`."""
        with self.lock:
            self.select(selection)
            made: dict[str, nn.Module] = {}
            for site in set(self._sites.values()):
                factors = combined(selection, site)
                if factors is not None:
                    made |= fused_layers(site, factors, self.dtype)
            self._unfused = {path: at_path(self.module, path) for path in made}
            replace_layers(self.module, made)
            self.fused = selection

    def unfuse(self) -> None:
        """Put the base's own layers back."""
        if self.fused is not None:
            replace_layers(self.module, self._unfused)
            self._unfused, self.fused = {}, None
