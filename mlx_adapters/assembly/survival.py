"""How much of an adapter's update is still there in a fused layer.

The true update is D = W' - W. What the fused file holds is D̂ = Ŵ - W. Two numbers compare them: their cosine
(1: the same direction) and the ratio of their norms (1: the same strength). Rounding adds to D̂ an error that
has nothing to do with D, so for a light adapter the cosine falls and the ratio grows.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import FormatError
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu

EVERY = slice(None)
AT_ONCE = 1 << 15  # numbers: NumPy's new arrays of more are fresh memory each time, slower than the sums


def not_finite(path: str, dtype: mx.Dtype = mx.float32) -> FormatError:
    """The error for a layer that cannot be fused into numbers of `dtype`."""
    wider = " What is too large for float16 (65504), --dtype bfloat16 holds." if dtype == mx.float16 else ""
    return FormatError(
        f"The weight of '{path}' holds NaN, Inf or numbers that are too large, with the update in it.",
        f"is the base whole, and the adapter's update not far too large?{wider}",
    )


def all_finite(*arrays: mx.array) -> mx.array:
    """Whether no floating array has NaN or Inf in it."""
    floating = [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    return mx.stack([mx.array(True), *(mx.isfinite(array).all() for array in floating)]).all()


def require_representable(path: str, least: float, most: float, dtype: mx.Dtype) -> None:
    """Raise FormatError if a float32 weight of these extremes holds NaN, or what `dtype` stores as Inf."""
    about = mx.finfo(dtype)
    limit = about.max * (1 + about.eps / 4)  # half a step above the largest; what lies there is rounded up
    if not (-limit < least and most < limit):  # NaN is neither
        raise not_finite(path, dtype)


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


def sums_of(base: mx.array, fused: mx.array, stored: mx.array, some: slice = EVERY) -> list[Any]:
    """Of `some` rows of W and W', and of those of Ŵ, float32: D·D̂, D·D, D̂·D̂ and W·W. Numbers; on a GPU arrays that are
    yet to be computed."""
    if on_gpu():
        return _dots(base[some], fused[some], stored, lambda x, y: (x * y).sum())
    rows, sums = (as_numpy(base)[some], as_numpy(fused)[some], as_numpy(stored)), np.zeros(4)
    step = max(1, AT_ONCE // math.prod(rows[0].shape[1:]))
    with np.errstate(over="ignore", invalid="ignore"):  # `SurvivalSum.result` refuses what comes of it
        for start in range(0, len(rows[0]), step):
            w, changed, kept = (part[start : start + step].reshape(-1) for part in rows)
            sums += _dots(w, changed, kept, lambda x, y: np.einsum("i,i->", x, y))  # (np.dot wakes BLAS threads)
    return sums.tolist()


def _dots(base: Any, fused: Any, stored: Any, dot: Callable[[Any, Any], Any]) -> list[Any]:
    wanted, kept = fused - base, stored - base
    return [dot(wanted, kept), dot(wanted, wanted), dot(kept, kept), dot(base, base)]


Compared = tuple[mx.array, mx.array, mx.array, slice]  # what `sums_of` takes


class RowsTold:
    """What rows tell of themselves; `arrays` have to be evaluated for it, with the rows.

    `fused`: W' in float32; `parts`: what the file holds of it; `compared`: what four sums each are wanted of. On a GPU
    it is one small array: what is asked for later waits for all that was begun meanwhile. On a CPU, where each
    operation of MLX's waits for another thread, NumPy looks at what is there anyway.
    """

    def __init__(self, fused: mx.array, parts: Sequence[mx.array], compared: Sequence[Compared] = ()) -> None:
        if on_gpu():
            told = [all_finite(*parts).astype(mx.float32), fused.min(), fused.max()]
            self.arrays = [mx.stack(sum(map(list, itertools.starmap(sums_of, compared)), told))]
            return
        self._fused, self._compared = fused, compared
        self._stored = [part for part in parts if mx.issubdtype(part.dtype, mx.floating)]
        self.arrays = [fused, *self._stored, *(array for one in compared for array in one[:3])]

    def read(self) -> tuple[bool, float, float, list[list[float]]]:
        """Whether what the file holds is finite, the least and the greatest number of W', and `sums_of` each."""
        if on_gpu():
            finite, least, most, *sums = self.arrays[0].tolist()
            return bool(finite), least, most, [sums[i : i + 4] for i in range(0, len(sums), 4)]
        numbers, finite = as_numpy(self._fused), all(map(_finite, self._stored))
        return finite, float(numbers.min()), float(numbers.max()), list(itertools.starmap(sums_of, self._compared))


def _finite(stored: mx.array) -> bool:
    """The same as `all_finite`, without an operation of MLX's."""
    numbers, infinity = as_numpy(stored), 0x7F80  # of bfloat16, which NumPy sees as its bits
    if stored.dtype == mx.bfloat16:
        return bool(((numbers & infinity) != infinity).all())
    return bool(np.isfinite(numbers).all())


class SurvivalSum:
    """Adds up a layer's rows as they come by."""

    def __init__(self) -> None:
        self._sums = np.zeros(4)

    def add(self, base: mx.array, fused: mx.array, stored: mx.array) -> None:
        """Rows of W, W' and Ŵ, float32."""
        sums = sums_of(base, fused, stored)
        self.add_sums(mx.stack(sums).tolist() if on_gpu() else sums)

    def add_sums(self, sums: Sequence[float]) -> None:
        """The `sums_of` some rows, as numbers."""
        self._sums += sums

    def result(self, path: str) -> Survival:
        """The layer's two numbers; a layer with no update keeps all of it. Raises FormatError for NaN or Inf."""
        dot, wanted, kept, base = self._sums.tolist()
        if not np.isfinite(self._sums).all():
            raise not_finite(path)
        if wanted == 0:
            return Survival(path, 1.0, 1.0, 0.0)
        cosine = dot / math.sqrt(wanted * kept) if kept > 0 else 0.0
        return Survival(path, min(cosine, 1.0), math.sqrt(kept / wanted), math.sqrt(wanted / max(base, 1e-30)))
