"""Round the columns of one matrix one after the other, each feeding its error on to those still to come.

Matrices are transposed, (in, out), float32; H is the inputs' second moments, R its Cholesky factor (see `rounding`).
"""

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.rounding.grids import Array, Grid, make_grid, pack_codes, to_numpy
from mlx_adapters.rounding.packed import Packed


class Rounder:
    """The rounding of one matrix (in, out) under one damped H (in, in); state that the steps share."""

    def __init__(
        self,
        weight: Array,
        hessian: Array,
        factor: tuple[Array, Array],
        quantization: Quantization,
        dtype: mx.Dtype,
        start: Packed | None,
    ) -> None:
        self.weight, self.hessian = weight, hessian
        self.factor, self.variances = factor
        self.grid: Grid = make_grid(quantization, dtype)
        self.group = quantization.group_size
        shape = (len(weight) // self.group, weight.shape[1])  # (groups, out)
        self.scales, self.biases = np.ones(shape, np.float32), np.zeros(shape, np.float32)
        self.codes = np.zeros(weight.shape, np.uint8)
        self.errors = np.zeros_like(weight)
        self.start = None
        if start is not None and start.quantization == quantization:
            biases = start.biases if start.biases is not None else mx.zeros(start.scales.shape)
            self.start = (self.grid.decode_scales(start.scales).T, to_numpy(biases).T)

    def _choose_grid(self, g: int, target: Array, weights: Array) -> tuple[Array, Array]:
        """The grid (out,) of group `g` with the least error Σ weights · (target - rounded)²."""
        best, scale, bias = np.full(target.shape[1], np.inf, np.float32), self.scales[g], self.biases[g]

        def offer(s: Array, b: Array) -> Array:
            nonlocal best, scale, bias
            codes = self.grid.codes(target, s, b)
            error = weights @ np.square(target - self.grid.values(codes, s, b))  # (out,)
            better = error < best
            best, scale, bias = (np.where(better, x, y) for x, y in ((error, best), (s, scale), (b, bias)))
            return codes

        for s, b in self.grid.candidates(target):
            codes = offer(s, b)
            offer(*self.grid.refit(target, codes, weights))
        offer(*self.grid.refit(target, self.grid.codes(target, scale, bias), weights))
        if self.start is not None:
            offer(self.start[0][g], self.start[1][g])
        return scale, bias

    def feed_forward(self) -> None:
        """One pass over the columns with error feedback (GPTQ), choosing each group's grid on the way."""
        for g in range(len(self.scales)):
            a, b = g * self.group, (g + 1) * self.group
            target = self.weight[a:b] + self.factor[:a, a:b].T @ self.errors[:a]  # (group, out)
            self.scales[g], self.biases[g] = self._choose_grid(g, target, self.variances[a:b])
            block = np.ascontiguousarray(self.factor[a:b, a:b].T)
            self._round_columns(g, target, self.errors[a:b], block)

    def sweep(self) -> None:
        """Improve each group's grid, then each of its columns, given everything else."""
        for g in range(len(self.scales)):
            a, b = g * self.group, (g + 1) * self.group
            block = np.ascontiguousarray(self.hessian[a:b, a:b])  # (group, group)
            slope = self._refit_group(g, self.hessian[a:b] @ self.errors, block)  # (group, out)
            diagonal = np.diag(block)[:, None]  # (group, 1)
            target = self.weight[a:b] - self.errors[a:b] + slope / diagonal
            self._round_columns(g, target, -self.errors[a:b], block / diagonal, moved=True)

    def _round_columns(self, g: int, target: Array, feeding: Array, block: Array, moved: bool = False) -> None:
        """Round group `g` column by column to `target` plus what earlier columns feed on through `block`.

        What column i feeds on is its error, or (`moved`) how far its error moved; `feeding` starts as the
        negative of what is not to count.
        """
        a = g * self.group
        round_to, weight, errors = self.grid.rounder(self.scales[g], self.biases[g]), self.weight, self.errors
        wanted = np.empty_like(target[0])  # (out,)
        for j in range(self.group):
            if j:
                np.dot(block[j, :j], feeding[:j], out=wanted)
                np.add(wanted, target[j], out=wanted)
            else:
                wanted[:] = target[0]
            value = round_to(wanted, self.codes[a + j])
            np.subtract(weight[a + j], value, out=errors[a + j])
            if moved:
                np.add(feeding[j], errors[a + j], out=feeding[j])

    def _refit_group(self, g: int, slope: Array, block: Array) -> Array:
        """Move scale and bias of group `g` to their best under H, where storage lets it help.

        `slope` (group, out) is the group's rows of H·E; the new one is returned. With codes as they are the
        error is a quadratic in (scale, bias): its minimum is a 2 by 2 system for each output.
        """
        a, b = g * self.group, (g + 1) * self.group
        old_scale, old_bias = self.scales[g], self.biases[g]
        ones = np.ones_like(old_scale)
        codes = self.codes[a:b].astype(np.float32)  # (group, out)
        levels = self.grid.values(codes, ones, 0 * ones)
        curved = block @ levels
        ss, gs = (levels * curved).sum(0), (levels * slope).sum(0)  # (out,)
        if self.grid.has_bias:
            sb, bb, gb = curved.sum(0), block.sum(), slope.sum(0)
            determinant = np.maximum(ss * bb - sb * sb, 1e-6 * ss * bb + 1e-20)
            step_s, step_b = (bb * gs - sb * gb) / determinant, (ss * gb - sb * gs) / determinant
        else:
            sb, bb, gb = 0 * ss, 0.0, 0 * gs
            step_s, step_b = gs / np.maximum(ss, 1e-20), 0 * gs
        scale, bias = self.grid.stored(old_scale + step_s, old_bias + step_b)
        ds, db = scale - old_scale, bias - old_bias
        gain = 2 * (ds * gs + db * gb) - (ds * ds * ss + 2 * ds * db * sb + db * db * bb)
        scale, bias = np.where(gain > 0, scale, old_scale), np.where(gain > 0, bias, old_bias)
        self.scales[g], self.biases[g] = scale, bias
        errors = self.weight[a:b] - self.grid.values(codes, scale, bias)
        slope = slope + block @ (errors - self.errors[a:b])
        self.errors[a:b] = errors
        return slope

    def packed(self) -> Packed:
        """The result in the file's form."""
        q = self.grid.quantization
        dtype = self.grid.dtype
        scales = mx.array(np.ascontiguousarray(self.grid.encode_scales(self.scales).T)).astype(dtype)
        biases = mx.array(np.ascontiguousarray(self.biases.T)).astype(dtype) if self.grid.has_bias else None
        return Packed(mx.array(pack_codes(np.ascontiguousarray(self.codes.T), q.bits)), scales, biases, q)
