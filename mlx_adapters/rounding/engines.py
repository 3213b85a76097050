"""What rounding does differently on NumPy and on MLX: the loop over a group's columns, running products, factors.

The algorithm stands once, in `columns` and `feedback`. NumPy is the fastest on a CPU (see `workers`): its loop works
in place on one matrix. MLX works on a batch of matrices; on a GPU it has one kernel for all that a group takes, since
there each operation costs more than its arithmetic, and another for a factor's panels, so that the CPU need not be
asked (see `kernels`); plain operations anywhere else, or where a kernel does not give what they give.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_adapters.rounding import kernels
from mlx_adapters.rounding.columns import again, diagonal_blocks, forward
from mlx_adapters.rounding.grids import AffineGrid, Array, FloatGrid, Grid, to_numpy
from mlx_adapters.rounding.kernels import PANEL
from mlx_adapters.system.machine import on_gpu

MORE_DAMPING = 0.01
Panels = Callable[[mx.array, bool], tuple[mx.array, mx.array]]  # see `kernels.panels`
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

    def _has_kernels(self, grid: Grid | None = None) -> bool:
        """Whether the GPU's kernels for this grid (None: for factors) are right."""
        if not on_gpu():
            return False
        problem = kernels.problem_with(grid.quantization, grid.dtype) if grid else kernels.problem_with_panels()
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
        extra, panels = MORE_DAMPING, self._panels()
        while True:
            factor = _upper_factor(hessian, panels)
            if mx.isfinite(mx.diagonal(factor, axis1=-2, axis2=-1)).all().item():
                return factor
            hessian, extra = hessian + extra * mx.eye(hessian.shape[-1]), 4 * extra

    def _panels(self) -> Panels:
        return kernels.panels if self._has_kernels() else kernels.plain_panels

    def solve(self, matrix: mx.array, other: mx.array) -> mx.array:
        factor = self.factor(matrix)
        inverses = _inverses(factor, self._panels())
        return _solve_lower(factor.swapaxes(-1, -2), inverses, _solve_upper(factor, inverses, other))

    def solve_lower(self, lower: mx.array, other: mx.array) -> mx.array:
        return _solve_lower(lower, _inverses(lower.swapaxes(-1, -2), self._panels()), other)

    def select(self, mask: mx.array, new: mx.array, old: mx.array) -> mx.array:
        if mask.ndim == 0:
            return new if mask.item() else old
        return mx.where(mask.reshape(*mask.shape, *[1] * (new.ndim - mask.ndim)), new, old)


def _upper_factor(hessian: mx.array, panels: Panels) -> mx.array:
    """R with H = R Rᵀ, by panels from the last columns to the first; NaN where H is not positive definite."""
    n, rest, made = hessian.shape[-1], hessian, list[mx.array]()
    for a in range((n - 1) // PANEL * PANEL, -1, -PANEL):
        corner, inverse = panels(rest[..., a:, a:], False)  # (..., panel, panel)
        below = mx.zeros((*hessian.shape[:-2], n - a - corner.shape[-1], corner.shape[-1]))
        if a == 0:  # (CUDA's products of nothing divide by zero)
            made.append(mx.concatenate([corner, below], axis=-2))
            break
        above = rest[..., :a, a:] @ inverse.swapaxes(-1, -2)  # (..., a, panel)
        rest = mx.addmm(rest[..., :a, :a], above, above.swapaxes(-1, -2), alpha=-1.0)
        made.append(mx.concatenate([above, corner, below], axis=-2))
        if len(made) % EVERY == 0:
            mx.eval(rest)  # what is ahead of the GPU holds what is left of H for each panel
    return mx.concatenate(made[::-1], axis=-1)


def _inverses(upper: mx.array, panels: Panels) -> list[mx.array]:
    """The inverses (..., panel, panel) of the blocks along the diagonal of an upper triangular matrix."""
    whole = upper.shape[-1] // PANEL * PANEL
    parts = list[mx.array]()
    if whole:
        parts += list(panels(diagonal_blocks(upper[..., :whole, :whole], PANEL, mx), True)[1])
    if whole < upper.shape[-1]:
        parts.append(panels(upper[..., whole:, whole:], True)[1])
    return parts


def _solve_upper(upper: mx.array, inverses: list[mx.array], other: mx.array) -> mx.array:
    """upper⁻¹ · other by panels, from the last rows to the first."""
    parts, rest = list[mx.array](), other
    for a, inverse in reversed([*zip(range(0, upper.shape[-1], PANEL), inverses, strict=True)]):
        parts.append(inverse @ rest[..., a:, :])
        if a:
            rest = mx.addmm(rest[..., :a, :], upper[..., :a, a : a + PANEL], parts[-1], alpha=-1.0)
    return mx.concatenate(parts[::-1], axis=-2)


def _solve_lower(lower: mx.array, inverses: list[mx.array], other: mx.array) -> mx.array:
    """lower⁻¹ · other by panels, from the first rows to the last; `inverses` are those of its transpose."""
    parts, rest = list[mx.array](), other
    for a, inverse in zip(range(0, lower.shape[-1], PANEL), inverses, strict=True):
        parts.append(inverse.swapaxes(-1, -2) @ rest[..., : inverse.shape[-1], :])
        if a + PANEL < lower.shape[-1]:
            below = lower[..., a + PANEL :, a : a + PANEL]
            rest = mx.addmm(rest[..., PANEL:, :], below, parts[-1], alpha=-1.0)
    return mx.concatenate(parts, axis=-2)


NUMPY = NumpyEngine()
