"""Element-wise arithmetic of model merging, on lists of equally shaped float32 matrices.

Each function takes `tensors` (n matrices of one shape) and `weights` (n numbers) and returns one matrix.
The definitions are those of PEFT's `add_weighted_adapter` (0.21.2), which follow the papers named below
except where a docstring says so. Magnitude pruning and sign election look at the unweighted matrices.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mlx_adapters.models.low_rank import Matrix

SignMethod = Literal["total", "frequency"]


def weighted_sum(tensors: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Σ wᵢ Tᵢ: task arithmetic (arXiv 2212.04089)."""
    total = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += np.float32(weight) * tensor
    return total


def keep_largest(tensor: Matrix, density: float) -> Matrix:
    """Zero all but the ⌊density · size⌋ entries of largest magnitude, counted over the whole matrix."""
    kept = int(density * tensor.size)
    if kept >= tensor.size:
        return tensor
    flat = np.zeros(tensor.size, tensor.dtype)
    if kept:
        largest = np.argpartition(np.abs(tensor).ravel(), tensor.size - kept)[tensor.size - kept :]
        flat[largest] = tensor.ravel()[largest]
    return flat.reshape(tensor.shape)


def drop_at_random(tensor: Matrix, density: float, rng: np.random.Generator) -> Matrix:
    """Keep each entry with probability `density` and divide the kept ones by it (DARE, arXiv 2311.03099)."""
    if density >= 1:
        return tensor
    return np.where(rng.random(tensor.shape) < density, tensor / np.float32(density), np.float32(0))


def elected_sign(tensors: Sequence[Matrix], method: SignMethod) -> Matrix:
    """The sign (+1 or -1) that wins at each entry: of the sum ("total") or of the count ("frequency").

    A draw is +1. Weights have no vote, so a subtracted adapter votes as if it were added.
    """
    votes = sum(tensors) if method == "total" else sum(np.sign(tensor) for tensor in tensors)
    return np.where(np.asarray(votes) >= 0, np.float32(1), np.float32(-1))


def disjoint_mean(tensors: Sequence[Matrix], weights: Sequence[float], method: SignMethod) -> Matrix:
    """Weighted sum of the entries that have the elected sign, over their number (TIES, arXiv 2306.01708)."""
    sign = elected_sign(tensors, method)
    total = np.zeros_like(tensors[0])
    count = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = np.sign(tensor) == sign
        total += np.float32(weight) * np.where(agrees, tensor, np.float32(0))
        count += agrees
    return np.divide(total, np.maximum(count, np.float32(1)), dtype=np.float32)
