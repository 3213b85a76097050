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
    """By steps of some groups: scales and biases (..., groups, out), codes and their values (..., columns, out)."""

    scales: list[Array]
    biases: list[Array]
    codes: list[Array]
    values: list[Array]

    def step(self, number: int) -> tuple[Array, ...]:
        """Those of one step."""
        return tuple(parts[number] for parts in vars(self).values())

    def append(self, scale: Array, bias: Array, codes: Array, values: Array) -> None:
        """Add a step."""
        for parts, new in zip(vars(self).values(), (scale, bias, codes, values), strict=True):
            parts.append(new)

    def chosen(self, choose: Callable[[Array, Array], Array], other: "Rounded") -> "Rounded":
        """`choose(mine, other's)` of every array."""
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Rounded(*([choose(a, b) for a, b in zip(mine, theirs, strict=True)] for mine, theirs in both))


class Rounder:
    """The rounding of one block of rows under one damped H (..., in, in) = R Rᵀ.

    `ahead` is R with each column divided by its diagonal entry, and `variances` (..., in) are the squares of those;
    `blocks` are what `diagonal_blocks` gives of H and of that factor, for each step (..., columns, columns); `start` is
    the grid of the base, (scales, biases), each (..., groups, out).
    """

    def __init__(
        self,
        hessian: Array,
        factor: tuple[Array, Array],
        blocks: tuple[list[Array], list[Array]],
        grid: Grid,
        engine: "Engine",
        start: tuple[Array, Array] | None = None,
    ) -> None:
        self.hessian, (self.ahead, self.variances), (self.own, self.feeding) = hessian, factor, blocks
        self.grid, self.engine, self.start = grid, engine, start
        width, step = hessian.shape[-1], engine.step(grid)
        self.steps = [slice(a, min(a + step, width)) for a in range(0, width, step)]

    def feed_forward(self, weight: Array) -> Rounded:
        """One pass over the columns of `weight` with error feedback (GPTQ), choosing each group's grid on the way."""
        done, group = Rounded([], [], [], []), self.grid.quantization.group_size
        fed = self.engine.product(self.ahead.swapaxes(-1, -2), self.engine.xp.zeros_like(weight), lower=True)
        for columns, block in zip(self.steps, self.feeding, strict=True):
            groups = slice(columns.start // group, columns.stop // group)
            start = () if self.start is None else tuple(part[..., groups, :] for part in self.start)
            own, variances = weight[..., columns, :], self.variances[..., columns]
            *made, error = self.engine.forward(self.grid, own + fed.rows(columns), own, block, variances, *start)
            fed.add(columns, error)
            done.append(*made)
        return done

    def sweep(self, weight: Array, rounded: Rounded) -> Rounded:
        """Improve each group's grid, then each of its columns, given everything else."""
        errors = weight - self.engine.xp.concatenate(rounded.values, axis=-2)
        done = Rounded([], [], [], [])
        slopes = self.engine.product(self.hessian, errors)
        for number, (columns, block) in enumerate(zip(self.steps, self.own, strict=True)):
            *made, moved = self.engine.again(self.grid, slopes.rows(columns), block, *rounded.step(number))
            slopes.add(columns, moved)
            done.append(*made)
        return done

    def packed(self, rounded: Rounded) -> Packed:
        """The result in the file's form: (..., out, in) in words, (..., out, groups) scales."""
        xp, grid = self.engine.xp, self.grid
        codes = xp.concatenate(rounded.codes, axis=-2).swapaxes(-1, -2)
        words = pack_codes(codes, grid.quantization.bits, xp)
        scales, biases = (xp.concatenate(parts, axis=-2).swapaxes(-1, -2) for parts in (rounded.scales, rounded.biases))
        scales = mx.array(grid.encode_scales(scales)).astype(grid.dtype)
        biases = mx.array(biases).astype(grid.dtype) if grid.has_bias else None
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
    """The first rounding of a step's groups: scale, bias, codes, values, and the error that others are to cancel.

    `target` is `weight` (..., columns, out) and what earlier steps feed on; of `block` (..., columns, columns) row i
    says what column i feeds on to those after it; `start` is a grid (..., groups, out) that is tried too.
    """
    feeding, made = block.swapaxes(-1, -2), list[tuple[Array, ...]]()
    for number, own in enumerate(_groups(grid, target)):
        aim = target[..., own, :]
        if number:
            aim = aim + feeding[..., own, : own.start] @ grid.xp.concatenate([errors for *_, errors in made], axis=-2)
        scale, bias = choose_grid(grid, aim, variances[..., own], *(part[..., number, :] for part in start))
        codes, values = engine.columns(grid, aim, weight[..., own, :], feeding[..., own, own], scale, bias)
        made.append((scale[..., None, :], bias[..., None, :], codes, values, weight[..., own, :] - values))
    return _joined(grid, made)


def again(
    engine: "Engine", grid: Grid, slope: Array, block: Array, scale: Array, bias: Array, codes: Array, values: Array
) -> tuple[Array, ...]:
    """A step's rounding once more, given all others: scale, bias, codes, values, and by how much those fell.

    `slope` (..., columns, out) are the step's rows of H·E, `block` its block of H.
    """
    made = list[tuple[Array, ...]]()
    for number, own in enumerate(_groups(grid, slope)):
        here, square, old = slope[..., own, :], block[..., own, own], values[..., own, :]
        if number:
            here = here + block[..., own, : own.start] @ grid.xp.concatenate([moved for *_, moved in made], axis=-2)
        s, b, refitted = refit(grid, here, square, codes[..., own, :], scale[..., number, :], bias[..., number, :])
        here = here + square @ (old - refitted)
        diagonal = engine.xp.diagonal(square, axis1=-2, axis2=-1)[..., None]  # (..., group, 1)
        taken, new = engine.columns(grid, refitted + here / diagonal, refitted, square / diagonal, s, b)
        made.append((s[..., None, :], b[..., None, :], taken, new, old - new))
    return _joined(grid, made)


def _groups(grid: Grid, columns: Array) -> list[slice]:
    group = grid.quantization.group_size
    return [slice(a, a + group) for a in range(0, columns.shape[-2], group)]


def _joined(grid: Grid, made: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return made[0] if len(made) == 1 else tuple(grid.xp.concatenate(p, axis=-2) for p in zip(*made, strict=True))


def diagonal_blocks(matrix: Array, size: int, xp: ModuleType) -> list[Array]:
    """The blocks (..., size, size) along the diagonal of `matrix` (..., n, n); the last one may be smaller."""
    parts = [matrix[..., a : a + size, a : a + size] for a in range(0, matrix.shape[-1], size)]
    return [xp.ascontiguousarray(part) if hasattr(xp, "ascontiguousarray") else xp.contiguous(part) for part in parts]
