"""What rounding does differently on NumPy and on MLX: the loop over a group's columns, running products, factors.

The algorithm stands once, in `columns` and `feedback`. NumPy is the fastest on a CPU (see `workers`): its loop works
in place on one matrix. MLX works on a batch of matrices; on a GPU it has kernels for what each group takes (see
`kernels`), and plain operations anywhere else, or where a kernel does not give what they give.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_adapters.rounding import kernels
from mlx_adapters.rounding.columns import choose_grid, refit
from mlx_adapters.rounding.grids import AffineGrid, Array, FloatGrid, Grid, to_numpy
from mlx_adapters.system.machine import on_gpu

MORE_DAMPING = 0.01
PANEL = 128  # columns of a Cholesky factor that are made at once
EVERY = 4  # groups to a graph: the CPU builds the next ones while the GPU computes


class Product(Protocol):
    """matrix · errors, (..., n, n) · (..., n, out), while the errors change group by group."""

    def rows(self, a: int, b: int) -> Array:
        """Its rows a…b now."""

    def add(self, a: int, b: int, moved: Array) -> None:
        """Add `moved` to the errors a…b."""


class Engine(Protocol):
    """Arrays of `xp`, and how to do on them what is not the same everywhere.

    Matrices of more than `large` weights are not worth two passes.
    """

    @property
    def xp(self) -> ModuleType: ...

    @property
    def large(self) -> float: ...

    def product(self, matrix: Array, errors: Array, lower: bool = False) -> Product:
        """Their product, to be kept. `lower`: of the matrix only what is below the diagonal blocks counts, and the
        errors are zeros."""

    def array(self, array: mx.array | np.ndarray) -> Array:
        """The float32 array."""

    def choose(self, grid: Grid, target: Array, weights: Array, *start: Array) -> tuple[Array, Array]:
        """See `columns.choose_grid`."""

    def refit(
        self, grid: Grid, slope: Array, block: Array, codes: Array, scale: Array, bias: Array
    ) -> tuple[Array, Array, Array]:
        """See `columns.refit`."""

    def columns(
        self, grid: Grid, target: Array, weight: Array, start: Array | None, block: Array, scale: Array, bias: Array
    ) -> tuple[Array, Array]:
        """Round a group (..., group, out) column by column to `target` plus what earlier columns feed on.

        Column j gets Σ_{i<j} block[j, i] · fed[i]: fed is the error weight - value, with `start` added if there is
        one. Returns codes (uint8) and values.
        """

    def factor(self, hessian: Array) -> Array:
        """Upper triangular R with H = R Rᵀ. More damping is added until H is positive definite."""

    def solve(self, matrix: Array, other: Array) -> Array:
        """matrix⁻¹ · other, for a positive definite matrix."""

    def solve_lower(self, lower: Array, other: Array) -> Array:
        """lower⁻¹ · other, for a lower triangular matrix."""

    def select(self, mask: Array, new: Array, old: Array) -> Array:
        """`new` for the matrices where `mask` (...) holds, else `old`."""


class _Lazy:
    """A product that is computed where it is asked for."""

    def __init__(self, matrix: np.ndarray, errors: np.ndarray, lower: bool = False) -> None:
        self.matrix, self.errors, self.lower = matrix, errors, lower

    def rows(self, a: int, b: int) -> np.ndarray:
        end = a if self.lower else len(self.errors)
        return self.matrix[a:b, :end] @ self.errors[:end]

    def add(self, a: int, b: int, moved: np.ndarray) -> None:
        self.errors[a:b] += moved


class _Running:
    """A product that is kept up to date: a GPU multiplies tall matrices faster than flat ones."""

    def __init__(self, matrix: mx.array, errors: mx.array, lower: bool = False) -> None:
        self.matrix, self.total = matrix, errors if lower else matrix @ errors
        self.groups, self.before = 0, self.total

    def rows(self, a: int, b: int) -> mx.array:
        return self.total[..., a:b, :]

    def add(self, a: int, b: int, moved: mx.array) -> None:
        self.total = mx.addmm(self.total, self.matrix[..., :, a:b], moved)
        self.groups += 1
        if self.groups % EVERY == 0:
            mx.async_eval(self.total)
            mx.eval(self.before)  # what is ahead of the GPU holds a product for each group
            self.before = self.total


class NumpyEngine:
    """One matrix (in, out) at a time, on one core."""

    xp, large = np, float(1 << 23)  # two passes over a larger matrix, worth some percent of the error, take minutes

    def product(self, matrix: np.ndarray, errors: np.ndarray, lower: bool = False) -> Product:
        return _Lazy(matrix, errors, lower)

    def array(self, array: mx.array | np.ndarray) -> np.ndarray:
        return to_numpy(array) if isinstance(array, mx.array) else array.astype(np.float32, copy=False)

    def choose(self, grid: Grid, target: np.ndarray, weights: np.ndarray, *start: np.ndarray) -> tuple:
        return choose_grid(grid, target, weights, *start)

    def refit(self, grid: Grid, *group: np.ndarray) -> tuple:
        return refit(grid, *group)

    def columns(
        self,
        grid: Grid,
        target: np.ndarray,
        weight: np.ndarray,
        start: np.ndarray | None,
        block: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        # In steps of each row's grid, so that a column takes few operations: its rows are few, and calls cost most.
        inverse, block = 1 / scale, np.ascontiguousarray(block)
        bias = bias if grid.has_bias else np.zeros_like(scale)
        targets, aims = (target - bias) * inverse, (weight - bias) * inverse
        if start is not None:
            aims += start * inverse
        taken, fed, nearest = np.empty_like(targets), np.empty_like(targets), _nearest(grid)
        for j in range(len(targets)):
            if j:
                targets[j] += block[j, :j] @ fed[:j]
            nearest(targets[j], taken[j])
            np.subtract(aims[j], taken[j], out=fed[j])
        codes = grid.order[np.searchsorted(grid.middles, taken)] if isinstance(grid, FloatGrid) else taken
        return codes.astype(np.uint8), taken * scale + bias

    def factor(self, hessian: np.ndarray) -> np.ndarray:
        flipped = np.ascontiguousarray(hessian[::-1, ::-1])
        flipped = flipped.astype(np.float64) if len(hessian) <= 4096 else flipped.copy()
        extra = MORE_DAMPING
        while True:
            try:
                return np.ascontiguousarray(np.linalg.cholesky(flipped)[::-1, ::-1]).astype(np.float32)
            except np.linalg.LinAlgError:
                flipped[np.diag_indices(len(flipped))] += extra
                extra *= 4

    def solve(self, matrix: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.linalg.solve(matrix, other)

    def solve_lower(self, lower: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.linalg.solve(lower, other)

    def select(self, mask: Any, new: np.ndarray, old: np.ndarray) -> np.ndarray:
        return new if mask else old


def _nearest(grid: Grid) -> Callable[[np.ndarray, np.ndarray], None]:
    """A function that puts the levels nearest to a column (out,) into its other argument, both in steps of the grid."""
    if isinstance(grid, FloatGrid):
        levels = grid.levels[grid.order]

        def nearest_level(wanted: np.ndarray, taken: np.ndarray) -> None:
            taken[:] = levels[np.searchsorted(grid.middles, wanted)]

        return nearest_level
    top = np.float32(grid.top)

    def nearest_code(wanted: np.ndarray, taken: np.ndarray) -> None:
        np.rint(wanted, out=taken)
        np.maximum(taken, 0, out=taken)
        np.minimum(taken, top, out=taken)

    return nearest_code


class MlxEngine:
    """A batch of matrices (..., in, out) on MLX's default device. `note`: why kernels are not used on a GPU."""

    xp, large = mx, float("inf")

    def __init__(self) -> None:
        self.note: str | None = None

    def product(self, matrix: mx.array, errors: mx.array, lower: bool = False) -> Product:
        return _Running(matrix, errors, lower)

    def array(self, array: mx.array | np.ndarray) -> mx.array:
        return mx.array(array).astype(mx.float32)

    def _has_kernels(self, grid: Grid) -> bool:
        if not on_gpu():
            return False
        problem = kernels.problem_with(grid.quantization, grid.dtype)
        self.note = self.note or problem
        return problem is None

    def choose(self, grid: Grid, target: mx.array, weights: mx.array, *start: mx.array) -> tuple:
        if isinstance(grid, AffineGrid) and self._has_kernels(grid):
            return kernels.choose(grid, target, weights, *start)
        return choose_grid(grid, target, weights, *start)

    def refit(self, grid: Grid, *group: mx.array) -> tuple:
        if isinstance(grid, AffineGrid) and self._has_kernels(grid):
            return kernels.refit(grid, *group)
        return refit(grid, *group)

    def columns(self, grid: Grid, *group: Any) -> tuple[mx.array, mx.array]:
        loop = kernels.columns if self._has_kernels(grid) else kernels.plain_columns
        return loop(grid, *group)

    def factor(self, hessian: mx.array) -> mx.array:
        extra = MORE_DAMPING
        while True:
            try:
                return _upper_factor(hessian)
            except np.linalg.LinAlgError:
                hessian, extra = hessian + extra * mx.eye(hessian.shape[-1]), 4 * extra

    def solve(self, matrix: mx.array, other: mx.array) -> mx.array:
        factor = self.factor(matrix)
        return _solve_lower(factor.swapaxes(-1, -2), _solve_upper(factor, other))

    def solve_lower(self, lower: mx.array, other: mx.array) -> mx.array:
        return _solve_lower(lower, other)

    def select(self, mask: mx.array, new: mx.array, old: mx.array) -> mx.array:
        return mx.where(mask.reshape(*mask.shape, *[1] * (new.ndim - mask.ndim)), new, old)


def _upper_factor(hessian: mx.array) -> mx.array:
    """R with H = R Rᵀ, from the last columns to the first: LAPACK factors a panel's own block, MLX does the rest.

    Raises LinAlgError where H is not positive definite.
    """
    n, rest, panels = hessian.shape[-1], hessian, list[mx.array]()
    for a in range((n - 1) // PANEL * PANEL, -1, -PANEL):
        own = to_numpy(rest[..., a:, a:]).astype(np.float64)  # (..., panel, panel)
        corner = np.linalg.cholesky(own[..., ::-1, ::-1])[..., ::-1, ::-1]
        if not np.isfinite(corner).all():
            raise np.linalg.LinAlgError
        inverse = mx.array(np.linalg.inv(corner).astype(np.float32))
        above = rest[..., :a, a:] @ inverse.swapaxes(-1, -2)  # (..., a, panel)
        rest = mx.addmm(rest[..., :a, :a], above, above.swapaxes(-1, -2), alpha=-1.0)
        below = mx.zeros((*hessian.shape[:-2], n - a - corner.shape[-1], corner.shape[-1]))
        panels.append(mx.concatenate([above, mx.array(corner.astype(np.float32)), below], axis=-2))
    return mx.concatenate(panels[::-1], axis=-1)


def _solve_upper(upper: mx.array, other: mx.array) -> mx.array:
    """upper⁻¹ · other by panels, from the last rows to the first."""
    parts, rest = list[mx.array](), other
    for a in range((upper.shape[-1] - 1) // PANEL * PANEL, -1, -PANEL):
        parts.append(_inverse(upper[..., a:, a:][..., :PANEL, :PANEL]) @ rest[..., a:, :])
        rest = rest[..., :a, :] - upper[..., :a, a:][..., :PANEL] @ parts[-1]
    return mx.concatenate(parts[::-1], axis=-2)


def _solve_lower(lower: mx.array, other: mx.array) -> mx.array:
    """lower⁻¹ · other by panels, from the first rows to the last."""
    parts, rest = list[mx.array](), other
    for a in range(0, lower.shape[-1], PANEL):
        b = min(a + PANEL, lower.shape[-1])
        parts.append(_inverse(lower[..., a:b, a:b]) @ rest[..., : b - a, :])
        rest = rest[..., b - a :, :] - lower[..., b:, a:b] @ parts[-1]
    return mx.concatenate(parts, axis=-2)


def _inverse(panel: mx.array) -> mx.array:
    return mx.array(np.linalg.inv(to_numpy(panel).astype(np.float64)).astype(np.float32))


NUMPY = NumpyEngine()
