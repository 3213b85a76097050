"""How much of an adapter's update is still there in a fused layer.

The true update is D = W' - W. What the fused file holds is D̂ = Ŵ - W. Two numbers compare them: their cosine
(1: the same direction) and the ratio of their norms (1: the same strength). Rounding adds to D̂ an error that
has nothing to do with D, so for a light adapter the cosine falls and the ratio grows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import FormatError
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu


def not_finite(path: str) -> FormatError:
    """The error for a layer that cannot be fused."""
    return FormatError(
        f"The weight of '{path}' holds NaN, Inf or numbers that are too large, with the update in it.",
        "is the base whole? What is too large for float16 (65504), --dtype bfloat16 holds.",
    )


def all_finite(*arrays: mx.array) -> mx.array:
    """Whether no floating array has NaN or Inf in it."""
    floating = [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    return mx.stack([mx.array(True), *(mx.isfinite(array).all() for array in floating)]).all()


def require_finite(path: str, *stored: mx.array) -> None:
    """Raise FormatError if a floating array that a file is to hold for the layer at `path` has NaN or Inf in it."""
    if not all_finite(*stored).item():
        raise not_finite(path)


def require_representable(path: str, weight: mx.array, dtype: mx.Dtype) -> None:
    """Raise FormatError if a number of a float32 `weight` is NaN, or Inf once it is stored as `dtype`."""
    if on_gpu():
        least, most = mx.stack([weight.min(), weight.max()]).tolist()
    else:  # NumPy's reductions are ten times MLX's on a CPU
        numbers = as_numpy(weight)
        least, most = float(numbers.min()), float(numbers.max())
    about = mx.finfo(dtype)
    limit = about.max * (1 + about.eps / 4)  # half a step above the largest; what lies there is rounded up
    if not (-limit < least and most < limit):  # NaN is neither
        raise not_finite(path)


def sample(rows: int) -> slice:
    """Which rows are looked at: up to every fourth tells as much as all."""
    return slice(None, None, max(1, min(4, rows // 64)))


@dataclass(frozen=True)
class Survival:
    """One layer. `update_ratio` is |D| / |W|: how strong the adapter is there."""

    path: str
    cosine: float
    norm_ratio: float
    update_ratio: float


def mean_cosine(survival: Sequence[Survival]) -> float:
    """The mean over the layers of the cosine between the update wanted and the one stored; 1 where nothing was."""
    return sum(layer.cosine for layer in survival) / len(survival) if survival else 1.0


HELD = 0.9  # cosine between a weight and what is stored of it; 4 bits hold 0.99


def ends_early(target: Quantization | None) -> bool:
    """Whether there are weights that the scales cannot follow: nvfp4's are floats of 8 bits, from 2⁻⁹ to 448."""
    return target is not None and target.mode == "nvfp4"


class SurvivalSum:
    """Adds up a layer's rows as they come by."""

    def __init__(self) -> None:
        self._sums = np.zeros(4)

    def add(self, base: mx.array, fused: mx.array, stored: mx.array) -> None:
        """Rows of W, W' and Ŵ, float32."""
        rows = (base, fused, stored) if on_gpu() else (as_numpy(part).reshape(-1) for part in (base, fused, stored))
        base_, fused_, stored_ = rows
        with np.errstate(over="ignore", invalid="ignore"):  # `result` refuses what comes of it
            wanted, kept = fused_ - base_, stored_ - base_
            pairs = [(wanted, kept), (wanted, wanted), (kept, kept), (base_, base_)]
            if on_gpu():
                self._sums += mx.stack([(x * y).sum() for x, y in pairs]).tolist()
            else:
                self._sums += [float(np.einsum("i,i->", x, y)) for x, y in pairs]  # (np.dot wakes BLAS threads)

    def result(self, path: str) -> Survival:
        """The layer's two numbers; a layer with no update keeps all of it. Raises FormatError for NaN or Inf."""
        dot, wanted, kept, base = self._sums.tolist()
        if not np.isfinite(self._sums).all():
            raise not_finite(path)
        if wanted == 0:
            return Survival(path, 1.0, 1.0, 0.0)
        cosine = dot / math.sqrt(wanted * kept) if kept > 0 else 0.0
        return Survival(path, min(cosine, 1.0), math.sqrt(kept / wanted), math.sqrt(wanted / max(base, 1e-30)))
