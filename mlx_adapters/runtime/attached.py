"""An adapter in memory, and which of them are at work."""

import hashlib
from dataclasses import dataclass, field

from mlx_adapters.models.adapter import Adapter
from mlx_adapters.runtime.factors import Factors, combine
from mlx_adapters.runtime.sites import Site
from mlx_adapters.storage.tensor_files import raw_bytes


@dataclass(eq=False)
class Attached:
    """An adapter in the pool. `adapter` has no weights any more: its factors are what is kept.

    `stacked`: they are views into a stack (see `stacks`). `users`: how many requests hold it. `weights`: stands for the
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
