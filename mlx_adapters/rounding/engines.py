"""What rounding does differently on NumPy and on MLX: the loop over a group's columns, running products, factors.

The algorithm stands once, in `columns` and `feedback`. NumPy is the fastest on a CPU (see `workers`): its loop works
in place on one matrix. MLX works on a batch of matrices; on a GPU it has one kernel for all that a group takes, since
there each operation costs more than its arithmetic, and another for a factor's panels, so that the CPU need not be
asked (see `kernels`); plain operations anywhere else, or where a kernel does not give what they give.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import ModelError
from mlx_adapters.rounding import cholesky, kernels
from mlx_adapters.rounding.columns import again, forward
from mlx_adapters.rounding.grids import AffineGrid, Array, FloatGrid, Grid, identity_of, make_grid, to_numpy
from mlx_adapters.system.machine import on_gpu

MORE_DAMPING, MOST_DAMPING = 0.01, 1e4  # of a matrix whose mean diagonal is 1
UNSOLVED = "This device does not factor a matrix.", "mlx-adapters env --check tells what it computes right."
EVERY = 4  # steps to a graph: the CPU builds the next ones while the GPU computes


class Product(Protocol):
    """matrix · errors, (..., n, n) · (..., n, out), while the errors change step by step: the rows from there on."""

    def rows(self, some: slice) -> Array:
        """Some of its rows now."""

    def add(self, some: slice, moved: Array) -> None:
        """Add `moved` to some of the errors; only rows after those are asked for then."""


class Engine(Protocol):
    """Arrays of `xp`, and how to do on them what is not the same everywhere.

    Matrices of more than `large` weights are not worth two passes.
    """

    @property
    def xp(self) -> ModuleType: ...

    @property
    def large(self) -> float: ...

    def step(self, grid: Grid) -> int:
        """How many columns, some groups, are rounded at once."""

    def product(self, matrix: Array, errors: Array, lower: bool = False) -> Product:
        """Their product, to be kept. `lower`: of the matrix only what is below the diagonal blocks counts, and the
        errors are zeros."""

    def array(self, array: mx.array | np.ndarray) -> Array:
        """The float32 array."""

    def forward(
        self, grid: Grid, target: Array, weight: Array, block: Array, variances: Array, *start: Array
    ) -> tuple[Array, ...]:
        """See `columns.forward`."""

    def again(
        self, grid: Grid, slope: Array, block: Array, scale: Array, bias: Array, codes: Array, values: Array
    ) -> tuple[Array, ...]:
        """See `columns.again`."""

    def columns(
        self, grid: Grid, target: Array, weight: Array, block: Array, scale: Array, bias: Array
    ) -> tuple[Array, Array]:
        """Round a group (..., group, out) column by column to `target` plus what earlier columns feed on.

        Column j gets Σ_{i<j} block[j, i] · (weight - value)_i. Returns codes (uint8) and values.
        """

    def factor(self, hessian: Array) -> Array:
        """Upper triangular R with H = R Rᵀ. More damping is added until H is positive definite.

        Raises ModelError if it never is: then the device computes wrong.
        """

    def inverse_upper(self, upper: Array) -> Array:
        """The inverse of an upper triangular matrix."""

    def each(self, function: Callable[[Array], Array], matrices: Sequence[Array]) -> list[Array]:
        """`function` of every matrix."""

    def select(self, mask: Array, new: Array, old: Array) -> Array:
        """`new` for the matrices where `mask` (...) holds, else `old`."""


class _Lazy:
    """A product that is computed where it is asked for."""

    def __init__(self, matrix: np.ndarray, errors: np.ndarray, lower: bool = False) -> None:
        self.matrix, self.errors, self.lower = matrix, errors, lower

    def rows(self, some: slice) -> np.ndarray:
        end = some.start if self.lower else len(self.errors)
        return self.matrix[some, :end] @ self.errors[:end]

    def add(self, some: slice, moved: np.ndarray) -> None:
        self.errors[some] += moved


class _Running:
    """A product whose rows from `first` on are kept up to date: a GPU multiplies tall matrices faster than flat."""

    def __init__(self, matrix: mx.array, errors: mx.array, lower: bool = False) -> None:
        self.matrix, self.total = matrix, errors if lower else matrix @ errors
        self.first, self.steps, self.before = 0, 0, self.total

    def rows(self, some: slice) -> mx.array:
        return self.total[..., some.start - self.first : some.stop - self.first, :]

    def add(self, some: slice, moved: mx.array) -> None:
        if some.stop == self.matrix.shape[-1]:
            return
        ahead, self.first = self.total[..., some.stop - self.first :, :], some.stop
        self.total = mx.addmm(ahead, self.matrix[..., self.first :, some], moved)
        self.steps += 1
        if self.steps % EVERY == 0:
            mx.async_eval(self.total)
            mx.eval(self.before)  # what is ahead of the GPU holds a product for each step
            self.before = self.total


class NumpyEngine:
    """One matrix (in, out) at a time, on one core."""

    xp, large = np, float(1 << 23)  # two passes over a larger matrix, worth some percent of the error, take minutes

    def step(self, grid: Grid) -> int:
        return grid.quantization.group_size

    def product(self, matrix: np.ndarray, errors: np.ndarray, lower: bool = False) -> Product:
        return _Lazy(matrix, errors, lower)

    def array(self, array: mx.array | np.ndarray) -> np.ndarray:
        return to_numpy(array) if isinstance(array, mx.array) else array.astype(np.float32, copy=False)

    def forward(self, grid: Grid, *group: np.ndarray) -> tuple[np.ndarray, ...]:
        return forward(self, grid, *group)

    def again(self, grid: Grid, *group: np.ndarray) -> tuple[np.ndarray, ...]:
        return again(self, grid, *group)

    def columns(
        self,
        grid: Grid,
        target: np.ndarray,
        weight: np.ndarray,
        block: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        # In steps of each row's grid, so that a column takes few operations: its rows are few, and calls cost most.
        inverse, block = 1 / scale, np.ascontiguousarray(block)
        bias = bias if grid.has_bias else np.zeros_like(scale)
        targets, aims = (target - bias) * inverse, (weight - bias) * inverse
        taken, fed, nearest = np.empty_like(targets), np.empty_like(targets), _nearest(grid, targets.shape[-1])
        for j, (wanted, aim, level, error, feeding) in enumerate(zip(targets, aims, taken, fed, block, strict=True)):
            if j:
                wanted += np.dot(feeding[:j], fed[:j])
            nearest(wanted, level)
            np.subtract(aim, level, out=error)
        codes = grid.order[np.searchsorted(grid.middles, taken)] if isinstance(grid, FloatGrid) else taken
        return codes.astype(np.uint8), taken * scale + bias

    def factor(self, hessian: np.ndarray) -> np.ndarray:
        flipped = np.ascontiguousarray(hessian[::-1, ::-1])
        flipped = flipped.astype(np.float64) if len(hessian) <= 4096 else flipped.copy()
        for extra in _more_damping():
            flipped[np.diag_indices(len(flipped))] += extra
            with contextlib.suppress(np.linalg.LinAlgError):
                return np.ascontiguousarray(np.linalg.cholesky(flipped)[::-1, ::-1]).astype(np.float32)
        raise ModelError(*UNSOLVED)

    def inverse_upper(self, upper: np.ndarray) -> np.ndarray:
        return np.linalg.inv(upper)

    def each(self, function: Callable[[np.ndarray], np.ndarray], matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [function(matrix) for matrix in matrices]

    def select(self, mask: Any, new: np.ndarray, old: np.ndarray) -> np.ndarray:
        return new if mask else old


def _more_damping() -> Iterator[float]:
    """Nothing, then what is added to a matrix until it is positive definite."""
    yield 0.0
    extra = MORE_DAMPING
    while extra < MOST_DAMPING:
        yield extra
        extra *= 4


def _nearest(grid: Grid, rows: int) -> Callable[[np.ndarray, np.ndarray], None]:
    """A function that puts the levels nearest to a column (out,) into its other argument, both in steps of the grid."""
    if isinstance(grid, FloatGrid):
        levels = grid.levels[grid.order]

        def nearest_level(wanted: np.ndarray, taken: np.ndarray) -> None:
            taken[:] = levels[np.searchsorted(grid.middles, wanted)]

        return nearest_level
    lowest, highest = np.zeros(rows, np.float32), np.full(rows, grid.top, np.float32)  # (a number takes longer)

    def nearest_code(wanted: np.ndarray, taken: np.ndarray) -> None:
        np.rint(wanted, out=taken)
        np.maximum(taken, lowest, out=taken)
        np.minimum(taken, highest, out=taken)

    return nearest_code


class MlxEngine:
    """A batch of matrices (..., in, out) on MLX's default device. `note`: why kernels are not used on a GPU."""

    xp, large = mx, float("inf")

    def __init__(self) -> None:
        self.note: str | None = None

    def try_kernels(self, quantizations: Iterable[Quantization], dtype: mx.Dtype) -> None:
        """Compile and try what rounding to these needs on a GPU: seconds, in which another thread has work for it."""
        for grid in (None, *(make_grid(quantization, dtype, mx) for quantization in quantizations)):
            self._has_kernels(grid)

    def step(self, grid: Grid) -> int:
        group = grid.quantization.group_size
        return kernels.STEP if isinstance(grid, AffineGrid) and self._has_kernels(grid) else group

    def product(self, matrix: mx.array, errors: mx.array, lower: bool = False) -> Product:
        return _Running(matrix, errors, lower)

    def array(self, array: mx.array | np.ndarray) -> mx.array:
        return mx.array(array).astype(mx.float32)

    def _has_kernels(self, grid: Grid | None = None) -> bool:
        """Whether the GPU's kernels for this grid (None: for factors) are right."""
        if not on_gpu():
            return False
        problem = kernels.problem_with(grid.quantization, grid.dtype) if grid else cholesky.problem_with_panels()
        self.note = self.note or problem
        return problem is None

    def forward(self, grid: Grid, *group: mx.array) -> tuple[mx.array, ...]:
        if isinstance(grid, AffineGrid) and self._has_kernels(grid):
            return kernels.forward(grid, *group)
        return forward(self, grid, *group)

    def again(self, grid: Grid, *group: mx.array) -> tuple[mx.array, ...]:
        if isinstance(grid, AffineGrid) and self._has_kernels(grid):
            return kernels.again(grid, *group)
        return again(self, grid, *group)

    def columns(self, grid: Grid, *group: mx.array) -> tuple[mx.array, mx.array]:
        if isinstance(grid, FloatGrid) and self._has_kernels(grid):
            return kernels.columns(grid, *group)
        return kernels.plain_columns(grid, *group)

    def factor(self, hessian: mx.array) -> mx.array:
        panels = self._panels()
        for extra in _more_damping():
            hessian = hessian + extra * identity_of(hessian.shape[-1], mx) if extra else hessian
            factor = cholesky.upper_factor(hessian, panels)
            if mx.isfinite(mx.diagonal(factor, axis1=-2, axis2=-1)).all().item():
                return factor
        raise ModelError(*UNSOLVED)

    def _panels(self) -> cholesky.Panels:
        return cholesky.panels if self._has_kernels() else cholesky.plain_panels

    def inverse_upper(self, upper: mx.array) -> mx.array:
        return cholesky.inverse_upper(upper, self._panels())

    def each(self, function: Callable[[mx.array], mx.array], matrices: Sequence[mx.array]) -> list[mx.array]:
        if len({matrix.shape for matrix in matrices}) == 1:  # at once
            return list(function(mx.stack(matrices)))
        return [function(matrix) for matrix in matrices]

    def select(self, mask: mx.array, new: mx.array, old: mx.array) -> mx.array:
        if mask.ndim == 0:
            return new if mask.item() else old
        return mx.where(mask.reshape(*mask.shape, *[1] * (new.ndim - mask.ndim)), new, old)


NUMPY = NumpyEngine()
