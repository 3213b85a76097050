"""The update of one layer as a pair of factors, and what they tell without the full matrix."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.models.adapter import Adapter
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.storage.tensor_names import LORA_A, LORA_B, join
from mlx_adapters.system.machine import on_cuda

EXACT, OVERSAMPLED, POWERS = 512, 16, 8  # of `principal`: up to this width all singular values are computed
Matrix = np.ndarray[Any, np.dtype[np.float32]]


@dataclasses.dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = scale · a · b, float32: a (..., in, r), b (..., r, out).

    The leading axis, where there is one, counts the experts of a mixture-of-experts layer.
    """

    a: Matrix
    b: Matrix
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    def matrix(self) -> Matrix:
        """ΔW itself, (..., in, out)."""
        return np.float32(self.scale) * (self.a @ self.b)

    def norm(self) -> float:
        """‖ΔW‖ in the Frobenius norm, from the factors: √ tr((aᵀa)(bbᵀ))."""
        return math.sqrt(max(0.0, inner(self, self)))


def inner(x: LowRankUpdate, y: LowRankUpdate) -> float:
    """⟨ΔX, ΔY⟩ = Σ entries of ΔX ∘ ΔY, in O((in + out) · r²), in float64, where no float32 factor overflows."""
    xa, xb, ya, yb = (factor.astype(np.float64) for factor in (x.a, x.b, y.a, y.b))
    left, right = np.swapaxes(xa, -1, -2) @ ya, xb @ np.swapaxes(yb, -1, -2)
    return x.scale * y.scale * float(np.sum(left * right))


def stack(updates: Sequence[LowRankUpdate], weights: Sequence[float], scale: float = 1.0) -> LowRankUpdate:
    """The exact weighted sum Σ wᵢ ΔWᵢ, as factors side by side, to be multiplied by `scale`."""
    parts = [
        np.float32(weight * update.scale / scale) * update.a for weight, update in zip(weights, updates, strict=True)
    ]
    return LowRankUpdate(
        np.concatenate(parts, axis=-1), np.concatenate([update.b for update in updates], axis=-2), scale
    )


def factors_of(adapter: Adapter, key: str) -> tuple[mx.array, mx.array]:
    """(lora_a, lora_b) as stored, without the components that are zero in both.

    Such components are padding, which a layer of lower rank than its adapter's has.
    """
    a, b, _ = adapter.factors(key)
    first = a[0] if a.ndim == 2 else a[0, :, 0]
    if as_numpy(first.astype(mx.float32)).all():  # no component can be all zero
        return a, b
    wide_a, wide_b = (as_numpy(x.astype(mx.float32)) for x in (a, b))
    in_b = wide_b.any(axis=1) if b.ndim == 2 else wide_b.any(axis=(0, 1))
    used = np.asarray(wide_a.any(axis=0 if a.ndim == 2 else (0, 2)) | in_b)
    used[0] |= not used.any()
    kept = mx.array(np.flatnonzero(used))
    return mx.take(a, kept, axis=1), mx.take(b, kept, axis=0 if b.ndim == 2 else 2)


def principal(weight: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """left (out, r) and right (r, in) whose product is the best approximation of a weight (out, in) of this rank.

    Both take half of each singular value, U √Σ and √Σ Vᵀ (Eckart and Young, 1936). A large matrix is projected on a few
    directions more than asked for, after eight rounds of power iteration (Halko et al., arXiv 0909.4061).
    """
    if min(weight.shape) > EXACT:
        rng = np.random.default_rng(0)
        basis = rng.standard_normal((weight.shape[1], rank + OVERSAMPLED), np.float32)
        for _ in range(POWERS):
            basis = np.linalg.qr(weight.T @ np.linalg.qr(weight @ basis)[0])[0]
        u, s, vt = np.linalg.svd(weight @ basis, full_matrices=False)
        vt = vt @ basis.T
    else:
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank])
    return np.ascontiguousarray(u[:, :rank] * root), np.ascontiguousarray(root[:, None] * vt[:rank])


def update_shape(a: mx.array, b: mx.array) -> tuple[int, ...]:
    """(in, out) of an update, or (experts, in, out)."""
    return (a.shape[0], b.shape[1]) if a.ndim == 2 else (a.shape[0], a.shape[2], b.shape[1])


def update_of(adapter: Adapter, key: str) -> LowRankUpdate:
    """The update of the module at `key`, in float32. A DoRA magnitude is left aside."""
    a, b = (as_numpy(x.astype(mx.float32)) for x in factors_of(adapter, key))
    if a.ndim == 3:  # experts are stored transposed: (experts, rank, in), (experts, out, rank)
        a, b = np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
    return LowRankUpdate(a, b, adapter.config.scale)


def stack_tensors(parts: Sequence[tuple[mx.array, mx.array, float]], rank: int) -> tuple[mx.array, mx.array]:
    """`stack` on tensors as stored: (lora_a, lora_b, factor) of each source, side by side, padded to `rank`.

    A factor of 1 leaves the numbers as they are.
    """
    scaled = [a if factor == 1 else a * factor for a, _, factor in parts]
    return _beside(scaled, 1, rank), _beside([b for _, b, _ in parts], 0 if parts[0][1].ndim == 2 else 2, rank)


def _beside(tensors: list[mx.array], axis: int, rank: int) -> mx.array:
    shape = list(tensors[0].shape)
    shape[axis] = rank - sum(tensor.shape[axis] for tensor in tensors)
    padding = [mx.zeros(shape, tensors[0].dtype)] if shape[axis] else []
    return mx.concatenate([*tensors, *padding], axis=axis) if len(tensors) + len(padding) > 1 else tensors[0]


def tensors_of(key: str, update: LowRankUpdate, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The update as an adapter's tensors; its scale is the adapter's to keep."""
    a, b = update.a, update.b
    if a.ndim == 3:
        a, b = np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
    return {join(key, LORA_A): mx.array(a).astype(dtype), join(key, LORA_B): mx.array(b).astype(dtype)}


def filled(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Factors of experts, A (experts, r, in) and B (experts, out, r), with zeros up to a rank that CUDA computes.

    MLX 0.32.4's kernel for them reads eight numbers at once, and the process loses the GPU ("misaligned address") where
    rows of r numbers begin between: of float32 at r = 2, 3 and 6, of bfloat16 at 4 and 12, too.
    """
    if more := -a.shape[-2] % 8 if on_cuda() else 0:
        a, b = mx.pad(a, [(0, 0), (0, more), (0, 0)]), mx.pad(b, [(0, 0), (0, 0), (0, more)])
    return a, b
