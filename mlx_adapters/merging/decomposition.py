"""Low-rank factors of a matrix, by the singular value decomposition (Eckart and Young: nothing of that rank
is nearer in the Frobenius norm).

A product of thin factors is decomposed through their QR factors, never formed: D = A·B with A = Qa·Ra and
Bᵀ = Qb·Rb has the singular values of the small matrix Ra·Rbᵀ. The cost is O((in + out) · R²).
A matrix that exists only in full is decomposed exactly when it is small, else by randomized subspace
iteration (Halko, Martinsson, Tropp, arXiv 0909.4061), at O(in · out · R).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.models.low_rank import Matrix

EXACT_UP_TO = 768
POWER_ITERATIONS = 4
OVERSAMPLING = 16


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """D ≈ u · diag(s) · vt, shapes (..., in, r), (..., r), (..., r, out); `total` is ‖D‖² per matrix, float64.

    The leading axis, where there is one, counts the experts of a mixture-of-experts layer.
    """

    u: Matrix
    s: Matrix
    vt: Matrix
    total: np.ndarray

    @property
    def rank(self) -> int:
        """How many singular values there are."""
        return self.s.shape[-1]

    def kept(self, rank: int) -> float:
        """Share of ‖D‖² that the first `rank` singular values hold (over all experts together)."""
        total = float(np.sum(self.total))
        return min(1.0, float(np.sum(self.s[..., :rank].astype(np.float64) ** 2)) / total) if total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps the share `energy` of ‖D‖², at least 1."""
        shares = np.cumsum(np.sum(np.atleast_2d(self.s.astype(np.float64) ** 2), axis=0))
        # Singular values below float32 rounding hold no information: 1 - 1e-9 counts as all.
        enough = shares >= min(energy, 1 - 1e-9) * float(np.sum(self.total))
        return int(np.argmax(enough)) + 1 if enough.any() else self.rank

    def cut(self, rank: int) -> "Decomposition":
        """Only the leading `rank` values."""
        return Decomposition(self.u[..., :rank], self.s[..., :rank], self.vt[..., :rank, :], self.total)

    def factors(self, rank: int) -> tuple[Matrix, Matrix]:
        """(a, b) with a · b ≈ D, shapes (..., in, rank) and (..., rank, out), padded with zeros if need be.

        The singular values are shared evenly, so that both factors have the same size.
        """
        root = np.sqrt(self.s[..., :rank])
        a = self.u[..., :rank] * root[..., None, :]
        b = self.vt[..., :rank, :] * root[..., :, None]
        return pad_rank(a, -1, rank), pad_rank(b, -2, rank)


def pad_rank(factor: Matrix, axis: int, rank: int) -> Matrix:
    """Append zeros along `axis` until it is `rank` long."""
    missing = rank - factor.shape[axis]
    if missing <= 0:
        return factor
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, missing)
    return np.pad(factor, widths)


def decompose_product(a: Matrix, b: Matrix) -> Decomposition:
    """The full SVD of a · b, from shapes (..., in, R) and (..., R, out) alone."""
    back_a, r_a = _thin_qr(a)
    back_b, r_b = _thin_qr(np.swapaxes(b, -1, -2))
    u, s, vt = np.linalg.svd(r_a @ np.swapaxes(r_b, -1, -2))
    # What is left where updates cancel is rounding of float32, not signal.
    floor = 4 * np.finfo(np.float32).eps * np.linalg.norm(r_a, axis=(-2, -1)) * np.linalg.norm(r_b, axis=(-2, -1))
    s = np.where(s > floor[..., None], s, 0.0)
    left = a @ (back_a @ u).astype(np.float32)
    right = (vt @ np.swapaxes(back_b, -1, -2)).astype(np.float32) @ b
    product = Decomposition(left, s.astype(np.float32), right, np.sum(s**2, axis=-1))
    return product.cut(min(a.shape[-2], a.shape[-1], b.shape[-1]))


def _thin_qr(a: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """(t, r) of shape (..., R, R), float64: the columns of q = a · t are orthonormal (or zero) and a = q · r.

    Both come from the small matrix aᵀa. Its condition is the square of a's, which float64 has room for with
    float32 inputs; LAPACK's own QR of such thin matrices takes forty times as long.
    """
    wide = a.astype(np.float64)
    values, vectors = np.linalg.eigh(np.swapaxes(wide, -1, -2) @ wide)
    root = np.sqrt(np.maximum(values, 0.0))
    known = values > 1e-15 * values[..., -1:]
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=known & (root > 0))
    return vectors * inverse[..., None, :], root[..., :, None] * np.swapaxes(vectors, -1, -2)


def _orthonormal(a: Matrix) -> Matrix:
    return a @ _thin_qr(a)[0].astype(np.float32)


def decompose_matrix(matrix: Matrix, rank: int | None = None, energy: float = 0.99, seed: int = 0) -> Decomposition:
    """The leading part of the SVD of a full matrix (in, out): `rank` values, or enough to keep `energy`."""
    total = np.asarray(np.vdot(matrix, matrix), np.float64)
    size = min(matrix.shape)
    guess = rank or 32
    while size > EXACT_UP_TO and guess <= size // 4:
        decomposition = _decompose_sketch(matrix, guess, np.random.default_rng(seed), total)
        if rank is not None or decomposition.kept(decomposition.rank) >= energy:
            return decomposition.cut(rank or decomposition.rank_for(energy))
        guess *= 2
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    decomposition = Decomposition(u, s, vt, total)
    return decomposition.cut(rank or decomposition.rank_for(energy))


def _decompose_sketch(matrix: Matrix, rank: int, rng: np.random.Generator, total: np.ndarray) -> Decomposition:
    width = min(rank + OVERSAMPLING, *matrix.shape)
    basis = _orthonormal(matrix @ rng.standard_normal((matrix.shape[1], width), dtype=np.float32))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    sketch = decompose_product(basis, basis.T @ matrix)
    return Decomposition(sketch.u[:, :rank], sketch.s[:rank], sketch.vt[:rank], total)


def join_decompositions(parts: Sequence[Decomposition], experts: bool) -> Decomposition:
    """One decomposition with a leading axis for the experts; without experts, the only one there is."""
    if not experts:
        return parts[0]
    rank = max(one.rank for one in parts)
    return Decomposition(
        np.stack([pad_rank(one.u, -1, rank) for one in parts]),
        np.stack([pad_rank(one.s, -1, rank) for one in parts]),
        np.stack([pad_rank(one.vt, -2, rank) for one in parts]),
        np.stack([one.total for one in parts]),
    )


def kept_energy(parts: Mapping[str, Decomposition], rank: int) -> dict[str, Any]:
    """What a recipe records of a cut to `rank`: the share of ‖ΔW‖² that is kept, over all layers and for each."""
    if not parts:
        return {}
    total = sum(float(np.sum(part.total)) for part in parts.values())
    by_layer = {key: part.kept(rank) for key, part in parts.items()}
    kept = sum(by_layer[key] * float(np.sum(part.total)) for key, part in parts.items())
    return {"energy_kept": kept / total if total else 1.0, "energy_by_layer": by_layer}


def check_rank(rank: int | str | None, energy: float | None) -> None:
    """Raise ConfigError unless `rank` is a number, "auto" or None, and `energy`, if given, a share beside "auto"."""
    require(rank in (None, "auto") or (isinstance(rank, int) and rank >= 1), f"rank cannot be {rank}.")
    require(energy is None or rank == "auto", "An energy goes with rank 'auto' only.")
    require(energy is None or 0 < energy <= 1, f"energy must be above 0 and at most 1, not {energy}.")
