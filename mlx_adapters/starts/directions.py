"""The principal directions of a stream of vectors, of which only a few are remembered.

What came so far is kept as a mean and as the few largest singular vectors of the rest; a new part is stacked below
and decomposed with it (Ross et al., 2008, which EVA and scikit-learn's IncrementalPCA use). All in float64.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def _nothing() -> Array:
    return np.zeros((0, 0))


@dataclass
class Directions:
    """Up to `most` directions. `scaled` (k, width): each times its singular value, the largest first."""

    most: int
    count: int = 0
    mean: Array = field(default_factory=_nothing)
    scaled: Array = field(default_factory=_nothing)
    squares: float = 0.0  # Σ |x - mean|²

    def add(self, vectors: Array) -> None:
        """Take in some more, (n, width)."""
        x = np.asarray(vectors, np.float64)
        number, mean = len(x), x.mean(axis=0)
        x = x - mean
        self.squares += float((x * x).sum())
        if not self.count:
            self.count, self.mean, rows = number, mean, x
        else:
            apart, share = self.mean - mean, self.count * number / (self.count + number)
            rows = np.concatenate([self.scaled, x, np.sqrt(share) * apart[None]])
            self.squares += share * float(apart @ apart)
            self.count += number
            self.mean = mean + apart * (self.count - number) / self.count
        self.scaled = _largest(rows, self.most)

    @property
    def explained(self) -> Array:
        """The share of all variance that lies in each direction, (k,)."""
        variance = np.square(self.scaled).sum(axis=1)
        return variance / max(self.squares, 1e-300)

    @property
    def vectors(self) -> Array:
        """The directions as unit vectors, (k, width)."""
        return self.scaled / np.maximum(np.linalg.norm(self.scaled, axis=1, keepdims=True), 1e-300)


def _largest(rows: Array, most: int) -> Array:
    """Σ Vᵀ of the matrix, of its `most` largest singular values that are not nothing."""
    if rows.shape[0] < rows.shape[1]:
        squares, u = np.linalg.eigh(rows @ rows.T)
        scaled = u.T[::-1][:most] @ rows
        squares = squares[::-1][:most]
    else:
        squares, v = np.linalg.eigh(rows.T @ rows)
        squares, v = squares[::-1][:most], v.T[::-1][:most]
        scaled = np.sqrt(np.maximum(squares, 0))[:, None] * v
    return scaled[squares > 1e-10 * max(float(squares[0]), 1e-300)]


def shared_out(explained: dict[str, Array], budget: int, most: dict[str, int]) -> dict[str, int]:
    """How many directions each gets of a `budget` for all: those that explain most come first, wherever they lie.

    Each gets one at least and `most` of it at most.
    """
    ranks = {path: min(1, len(shares)) for path, shares in explained.items()}
    candidates = [
        (-float(share), path, number)
        for path, shares in explained.items()
        for number, share in enumerate(shares[: most[path]])
        if number
    ]
    for _, path, _ in sorted(candidates)[: max(budget - sum(ranks.values()), 0)]:
        ranks[path] += 1
    return ranks
