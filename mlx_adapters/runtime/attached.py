"""An adapter in memory, which of them are at work, and their factors side by side, for batches whose rows differ.

Adapters of one rank lie in one stack for each site, whose slot 0 is all zero: the base. So nothing is padded to
another adapter's rank, and a batch computes with the stacks of its own adapters alone.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.layers import LINEAR
from mlx_adapters.runtime.additions import Addition, InTurn, PerRow, Rows
from mlx_adapters.runtime.factors import Factors, combine, own, slot_of, stack
from mlx_adapters.runtime.sites import Site
from mlx_adapters.storage.tensor_files import raw_bytes
from mlx_adapters.system.door import mx


@dataclass(eq=False)
class Attached:
    """An adapter in the pool. `adapter` has no weights any more: its factors are what is kept.

    `stacked`: they are views into a stack (see `Stacks`). `users`: how many requests hold it. `weights`: stands for the
    weights it has; what is computed with equal ones may be kept under it.
    """

    name: str
    adapter: Adapter
    factors: dict[Site, Factors] = field(default_factory=dict, repr=False)
    stacked: bool = False
    alive: bool = True
    users: int = 0
    last_used: int = 0
    weights: object = field(default_factory=object, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(f.nbytes for f in self.factors.values())

    def digest(self) -> str:
        """SHA-256 of its factors: equal for equal weights on one device and in one precision."""
        digest = hashlib.sha256()
        for site, factors in sorted(self.factors.items(), key=lambda item: item[0].paths):
            digest.update(" ".join(site.paths).encode())
            for array in factors.arrays:
                digest.update(raw_bytes(array))
        return digest.hexdigest()


# The adapters at work, each with its weight; () is the base.
Selection = tuple[tuple[Attached, float], ...]


def same(one: Selection, other: Selection) -> bool:
    """Whether two selections are the same adapters with the same weights."""
    return len(one) == len(other) and all(a is b and v == w for (a, v), (b, w) in zip(one, other, strict=True))


def is_mixture(selection: Selection) -> bool:
    """Whether it needs factors of its own, not just those of one adapter."""
    return len(selection) > 1 or any(weight != 1 for _, weight in selection)


def combined(selection: Selection, site: Site) -> Factors | None:
    """What the selection adds to a site; None where it does not touch it."""
    parts = [(entry.factors[site], weight) for entry, weight in selection if site in entry.factors]
    return combine(parts) if parts else None


class Stacks:
    """The stacks of these adapters. From now on each adapter's own factors are views into them."""

    def __init__(self, entries: Iterable[Attached], sites: Iterable[Site]) -> None:
        groups: dict[int, list[Attached]] = {}
        for entry in entries:
            groups.setdefault(entry.adapter.config.rank, []).append(entry)
        self._places = {e: (rank, slot) for rank, equal in groups.items() for slot, e in enumerate(equal, start=1)}
        self._stacks: dict[int, dict[Site, PerRow]] = {rank: {} for rank in groups}
        for site in sites:
            for rank, equal in groups.items():
                if any(site in entry.factors for entry in equal):
                    self._stacks[rank][site] = PerRow(_stacked(site, equal), Rows([]))
        self._latest: tuple[tuple[Attached | None, ...], dict[Site, Addition]] = ((), {})

    def updates(self, entries: Sequence[Attached | None]) -> dict[Site, Addition]:
        """What each site adds when row i of a batch has adapter `entries[i]` (None: the base)."""
        if self._latest[0] != tuple(entries):
            places = [(0, 0) if entry is None else self._places[entry] for entry in entries]
            parts_of: dict[Site, list[PerRow]] = {}
            for rank in sorted({rank for rank, slot in places if slot}):
                rows = Rows([slot if of == rank else 0 for of, slot in places])
                for site, update in self._stacks[rank].items():
                    update.rows = rows
                    parts_of.setdefault(site, []).append(update)
            made: dict[Site, Addition] = {
                site: parts[0] if len(parts) == 1 else InTurn(parts) for site, parts in parts_of.items()
            }
            self._latest = tuple(entries), made
        return self._latest[1]


def _stacked(site: Site, entries: Sequence[Attached]) -> Factors:
    made = stack([None, *(entry.factors.get(site) for entry in entries)], isinstance(site.layers[0], LINEAR))
    mx.eval(made.arrays)
    for slot, entry in enumerate(entries, start=1):
        if site in entry.factors:
            entry.factors[site], entry.stacked = slot_of(made, slot), True
            mx.eval(entry.factors[site].arrays)
    return made


def part(entries: Iterable[Attached]) -> bool:
    """Give adapters that lie in a stack arrays of their own, so that the stack can leave memory; whether any did."""
    stacked = [entry for entry in entries if entry.stacked]
    for site in dict.fromkeys(site for entry in stacked for site in entry.factors):
        for entry in stacked:
            if site in entry.factors:
                entry.factors[site] = own(entry.factors[site], isinstance(site.layers[0], LINEAR))
                mx.eval(entry.factors[site].arrays)
    for entry in stacked:
        entry.stacked = False
    return bool(stacked)
