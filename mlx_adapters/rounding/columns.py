"""Round the columns of a matrix one after the other, each feeding its error on to those still to come.

Matrices are transposed, (in, out), float32; axes before those are a batch. H is the inputs' second moments, R its
Cholesky factor (see `feedback`). The steps between the columns are array operations, the same for NumPy and MLX; what
an `Engine` does its own way is what a group takes, the loop over its columns, and products that are kept up to date.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_adapters.rounding.grids import Array, Grid, pack_codes, weighted
from mlx_adapters.rounding.packed import Packed

if TYPE_CHECKING:
    from mlx_adapters.rounding.engines import Engine


@dataclass
class Rounded:
    """Each group's scales and biases (..., out), codes and the values that they stand for (..., group, out)."""

    scales: list[Array]
    biases: list[Array]
    codes: list[Array]
    values: list[Array]

    def group(self, g: int) -> tuple[Array, Array, Array, Array]:
        """Those of one group."""
        return self.scales[g], self.biases[g], self.codes[g], self.values[g]

    def append(self, scale: Array, bias: Array, codes: Array, values: Array) -> None:
        """Add a group."""
        for parts, new in zip(vars(self).values(), (scale, bias, codes, values), strict=True):
            parts.append(new)

    def chosen(self, choose: Callable[[Array, Array], Array], other: "Rounded") -> "Rounded":
        """`choose(mine, other's)` of every array."""
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Rounded(*([choose(a, b) for a, b in zip(mine, theirs, strict=True)] for mine, theirs in both))


class Rounder:
    """The rounding of one block of rows under one damped H (..., in, in) = R Rᵀ.

    `ahead` is R with each column divided by its diagonal entry, and `variances` (..., in) are the squares of those;
    `blocks` are what `diagonal_blocks` gives of H and of that factor, (groups, ..., group, group) each; `start` is the
    grid of the base, (scales, biases), each (..., out) for each group.
    """

    def __init__(
        self,
        hessian: Array,
        factor: tuple[Array, Array],
        blocks: tuple[Array, Array],
        grid: Grid,
        engine: "Engine",
        start: tuple[list[Array], list[Array]] | None = None,
    ) -> None:
        self.hessian, (self.ahead, self.variances), (self.own, self.feeding) = hessian, factor, blocks
        self.grid, self.engine, self.start = grid, engine, start
        self.group = grid.quantization.group_size

    def feed_forward(self, weight: Array) -> Rounded:
        """One pass over the columns of `weight` with error feedback (GPTQ), choosing each group's grid on the way."""
        done = Rounded([], [], [], [])
        fed = self.engine.product(self.ahead.swapaxes(-1, -2), self.engine.xp.zeros_like(weight), lower=True)
        for g, a in enumerate(range(0, weight.shape[-2], self.group)):
            b = a + self.group
            start = () if self.start is None else (self.start[0][g], self.start[1][g])
            own, block, variances = weight[..., a:b, :], self.feeding[g], self.variances[..., a:b]
            *made, error = self.engine.forward(self.grid, own + fed.rows(a, b), own, block, variances, *start)
            fed.add(a, b, error)
            done.append(*made)
        return done

    def sweep(self, weight: Array, rounded: Rounded) -> Rounded:
        """Improve each group's grid, then each of its columns, given everything else."""
        errors = weight - self.engine.xp.concatenate(rounded.values, axis=-2)
        done = Rounded([], [], [], [])
        slopes = self.engine.product(self.hessian, errors)
        for g, a in enumerate(range(0, weight.shape[-2], self.group)):
            b = a + self.group
            *made, moved = self.engine.again(self.grid, slopes.rows(a, b), self.own[g], *rounded.group(g))
            slopes.add(a, b, moved)
            done.append(*made)
        return done

    def packed(self, rounded: Rounded) -> Packed:
        """The result in the file's form: (..., out, in) in words, (..., out, groups) scales."""
        xp, grid = self.engine.xp, self.grid
        codes = xp.concatenate(rounded.codes, axis=-2).swapaxes(-1, -2)
        words = pack_codes(codes, grid.quantization.bits, xp)
        scales = mx.array(grid.encode_scales(xp.stack(rounded.scales, axis=-1))).astype(grid.dtype)
        biases = mx.array(xp.stack(rounded.biases, axis=-1)).astype(grid.dtype) if grid.has_bias else None
        return Packed(mx.array(words), scales, biases, grid.quantization)


def choose_grid(grid: Grid, target: Array, weights: Array, *start: Array) -> tuple[Array, Array]:
    """The grid (..., out) of a group with the least error Σ weights · (target - rounded)², `start` among those tried.

    `target` (..., group, out), `weights` (..., group).
    """
    xp = grid.xp

    def judged(scales: Array, biases: Array) -> tuple[Array, Array]:
        codes = grid.codes(target, scales, biases)
        return codes, weighted(weights, xp.square(target - grid.values(codes, scales, biases)))

    def best(*offers: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        scales, biases, errors = (xp.concatenate(parts) for parts in zip(*offers, strict=True))  # (k, ..., out)
        first = errors.argmin(axis=0)[None]
        scale, bias, error = (xp.take_along_axis(all_, first, axis=0) for all_ in (scales, biases, errors))
        return scale, bias, error

    ranges = grid.candidates(target)
    codes, errors = judged(*ranges)
    fitted = grid.refit(target, codes, weights)
    chosen = best((*ranges, errors), (*fitted, judged(*fitted)[1]))
    again = grid.refit(target, grid.codes(target, *chosen[:2]), weights)
    offers = [(*again, judged(*again)[1])]
    if start:
        own = start[0][None], start[1][None]
        offers.append((*own, judged(*own)[1]))
    scale, bias, _ = best(chosen, *offers)
    return scale[0], bias[0]


def refit(
    grid: Grid, slope: Array, block: Array, codes: Array, scale: Array, bias: Array
) -> tuple[Array, Array, Array]:
    """Move scale and bias of a group to their best under H, where storage lets it help: scale, bias and the values.

    With codes as they are the error is a quadratic in (scale, bias): its minimum is a 2 by 2 system for each output.
    """
    xp, codes = grid.xp, codes.astype(grid.xp.float32)
    levels = grid.values(codes, xp.ones_like(scale), xp.zeros_like(bias))  # (..., group, out)
    curved = block @ levels
    ss, gs = (levels * curved).sum(axis=-2), (levels * slope).sum(axis=-2)  # (..., out)
    if grid.has_bias:
        sb, bb, gb = curved.sum(axis=-2), block.sum(axis=(-2, -1))[..., None], slope.sum(axis=-2)
        determinant = xp.maximum(ss * bb - sb * sb, 1e-6 * ss * bb + 1e-20)
        step_s, step_b = (bb * gs - sb * gb) / determinant, (ss * gb - sb * gs) / determinant
    else:
        sb, bb, gb = xp.zeros_like(ss), 0.0, xp.zeros_like(gs)
        step_s, step_b = gs / xp.maximum(ss, 1e-20), sb
    new_scale, new_bias = grid.stored(scale + step_s, bias + step_b)
    ds, db = new_scale - scale, new_bias - bias
    gain = 2 * (ds * gs + db * gb) - (ds * ds * ss + 2 * ds * db * sb + db * db * bb)
    scale, bias = xp.where(gain > 0, new_scale, scale), xp.where(gain > 0, new_bias, bias)
    return scale, bias, grid.values(codes, scale, bias)


def forward(
    engine: "Engine", grid: Grid, target: Array, weight: Array, block: Array, variances: Array, *start: Array
) -> tuple[Array, ...]:
    """One group's first rounding: scale, bias, codes, values, and the error that others are to cancel.

    `target` is `weight` (..., group, out) and what earlier groups feed on; of `block` (..., group, group) row i says
    what column i feeds on to those after it; `start` is a grid that is tried too.
    """
    scale, bias = choose_grid(grid, target, variances, *start)
    codes, values = engine.columns(grid, target, weight, block.swapaxes(-1, -2), scale, bias)
    return scale, bias, codes, values, weight - values


def again(
    engine: "Engine", grid: Grid, slope: Array, block: Array, scale: Array, bias: Array, codes: Array, values: Array
) -> tuple[Array, ...]:
    """One group's rounding once more, given all others: scale, bias, codes, values, and by how much those fell.

    `slope` (..., group, out) is the group's rows of H·E, `block` its block of H.
    """
    scale, bias, refitted = refit(grid, slope, block, codes, scale, bias)
    slope = slope + block @ (values - refitted)
    diagonal = engine.xp.diagonal(block, axis1=-2, axis2=-1)[..., None]  # (..., group, 1)
    codes, new = engine.columns(grid, refitted + slope / diagonal, refitted, block / diagonal, scale, bias)
    return scale, bias, codes, new, values - new


def diagonal_blocks(matrix: Array, size: int, xp: ModuleType) -> Array:
    """The blocks (n / size, ..., size, size) along the diagonal of `matrix` (..., n, n)."""
    *lead, n, _ = matrix.shape
    parts = matrix.reshape(*lead, n // size, size, n // size, size)
    blocks = xp.moveaxis(xp.diagonal(parts, axis1=-4, axis2=-2), -1, 0)
    return xp.ascontiguousarray(blocks) if hasattr(xp, "ascontiguousarray") else xp.contiguous(blocks)
