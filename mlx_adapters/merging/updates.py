"""The update of one layer as a pair of factors, and what they tell without the full matrix."""

import dataclasses
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_adapters.adapter import Adapter
from mlx_adapters.merging.arithmetic import Matrix
from mlx_adapters.tensor_names import LORA_A, LORA_B, join


@dataclasses.dataclass(frozen=True)
class Update:
    """ΔW = scale · a · b, float32: a (..., in, r), b (..., r, out).

    The leading axis, where there is one, counts the experts of a mixture-of-experts layer.
    """

    a: Matrix
    b: Matrix
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def matrix(self) -> Matrix:
        return np.float32(self.scale) * (self.a @ self.b)

    def norm(self) -> float:
        """‖ΔW‖ in the Frobenius norm, from the factors: √ tr((aᵀa)(bbᵀ))."""
        return math.sqrt(max(0.0, inner(self, self)))

    def trimmed(self) -> "Update":
        """Without the components that are zero in both factors: padding that an adapter of one rank needs."""
        batch = tuple(range(self.a.ndim - 2))
        used = np.any(self.a != 0, axis=(*batch, -2)) | np.any(self.b != 0, axis=(*batch, -1))
        if used.all():
            return self
        used[0] = True
        return Update(self.a[..., used], self.b[..., used, :], self.scale)


def inner(x: Update, y: Update) -> float:
    """⟨ΔX, ΔY⟩ = Σ entries of ΔX ∘ ΔY, in O((in + out) · r²), float64 accumulated over small matrices."""
    left = (np.swapaxes(x.a, -1, -2) @ y.a).astype(np.float64)
    right = (x.b @ np.swapaxes(y.b, -1, -2)).astype(np.float64)
    return x.scale * y.scale * float(np.sum(left * right))


def stack(updates: Sequence[Update], weights: Sequence[float], scale: float = 1.0) -> Update:
    """The exact weighted sum Σ wᵢ ΔWᵢ, as factors side by side, to be multiplied by `scale`."""
    parts = [
        np.float32(weight * update.scale / scale) * update.a for weight, update in zip(weights, updates, strict=True)
    ]
    return Update(np.concatenate(parts, axis=-1), np.concatenate([update.b for update in updates], axis=-2), scale)


def update_of(adapter: Adapter, key: str) -> Update:
    """The update of the module at `key`, in float32. A DoRA magnitude is left aside."""
    a, b, _ = (x if x is None else np.array(x.astype(mx.float32), copy=False) for x in adapter.factors(key))
    if a.ndim == 3:  # experts are stored transposed: (experts, rank, in), (experts, out, rank)
        a, b = np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
    return Update(a, b, adapter.config.scale)


def tensors_of(key: str, update: Update, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The update as an adapter's tensors; its scale is the adapter's to keep."""
    a, b = update.a, update.b
    if a.ndim == 3:
        a, b = np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
    return {join(key, LORA_A): mx.array(a).astype(dtype), join(key, LORA_B): mx.array(b).astype(dtype)}
