"""The values that MLX's quantized weights can take, and how their codes are packed.

A row of a weight matrix is cut into groups; the values of a group share a grid. In mode `affine` the grid is
`scale · code + bias` with codes 0 … 2^bits - 1. The other modes are `scale · level`: `mxfp4` and `nvfp4` have
the 16 levels of a 4-bit float, `mxfp8` the 254 of an 8-bit float, and scales are a power of two or an 8-bit
float. Codes lie in a stream of `bits` bits each, lowest bit first, cut into 32-bit words.

Arrays here are float32, of NumPy or of MLX (`xp` is which), and a weight matrix is transposed, (in, out): a column
of the layer's input is then one contiguous vector. Axes before those are a batch of matrices.
"""

import functools
import math
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.storage.tensor_files import as_numpy

Array = Any  # np.ndarray or mx.array, float32 if nothing else is said

SHRINKS = (1.0, 0.9, 0.8, 0.7)  # of a group's full range, that are tried
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_numpy(array: mx.array) -> np.ndarray:
    """Any MLX float array as NumPy float32."""
    return as_numpy(array.astype(mx.float32)).copy()


def round_to(values: Array, dtype: mx.Dtype) -> Array:
    """`values` (float32) rounded to what `dtype` can store, ties to even, as float32."""
    if isinstance(values, mx.array):
        return values.astype(dtype).astype(mx.float32)
    if dtype == mx.float16:
        return values.astype(np.float16).astype(np.float32)
    if dtype == mx.bfloat16:  # the upper half of a float32; a carry goes on into the exponent, as it should
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def pack_codes(codes: Array, bits: int, xp: ModuleType = np) -> Array:
    """Codes (..., n) as 32-bit words (..., n · bits / 32), as `mx.quantize` packs them."""
    shared = math.gcd(bits, 32)
    together, words = 32 // shared, bits // shared  # so many codes fill so many words
    parts = codes.reshape(*codes.shape[:-1], -1, together).astype(xp.uint32)
    packed = []
    for word in range(words):
        shifts = {i: bits * i - 32 * word for i in range(together)}
        here = {i: shift for i, shift in shifts.items() if -bits < shift < 32}
        packed.append(reduce(or_, (parts[..., i] << s if s >= 0 else parts[..., i] >> -s for i, s in here.items())))
    return xp.stack(packed, axis=-1).reshape(*codes.shape[:-1], -1)


class AffineGrid:
    """scale · code + bias. Scales and biases (..., out) are kept in the type that the model stores (`dtype`)."""

    has_bias = True

    def __init__(self, quantization: Quantization, dtype: mx.Dtype, xp: ModuleType) -> None:
        self.quantization, self.dtype, self.xp = quantization, dtype, xp
        self.top = float(2**quantization.bits - 1)

    def codes(self, target: Array, scale: Array, bias: Array) -> Array:
        """The nearest codes, as float32, of `target` (..., group, out) on the grids (..., out)."""
        return self.xp.clip(self.xp.round((target - _row(bias)) / _row(scale)), 0.0, self.top)

    def values(self, codes: Array, scale: Array, bias: Array) -> Array:
        """What the codes (..., group, out) stand for."""
        return _row(scale) * codes + _row(bias)

    def stored(self, scale: Array, bias: Array) -> tuple[Array, Array]:
        """`scale` and `bias` as the model file will hold them; a scale is never 0."""
        scale = round_to(scale, self.dtype)
        tiny = self.xp.array(1e-8, dtype=self.xp.float32)
        return self.xp.where(self.xp.abs(scale) < 1e-30, tiny, scale), round_to(bias, self.dtype)

    def candidates(self, target: Array) -> tuple[Array, Array]:
        """Grids (k, ..., out) worth trying for a group (..., group, out): the full range, and narrower ones."""
        low, high = target.min(axis=-2), target.max(axis=-2)  # (..., out)
        shrinks = _first_axis(SHRINKS if self.quantization.bits < 8 else SHRINKS[:1], low.ndim, self.xp)
        middle, half = (low + high) / 2, (high - low) / 2
        return self.stored(2 * half * shrinks / self.top, middle - half * shrinks)

    def refit(self, target: Array, codes: Array, weights: Array) -> tuple[Array, Array]:
        """The grid that is best for given codes: least squares with `weights` (..., group) on the columns."""
        total = weights.sum(axis=-1)[..., None]
        mean_code, mean = weighted(weights, codes) / total, weighted(weights, target) / total  # (..., out)
        centered = codes - _row(mean_code)
        spread = weighted(weights, self.xp.square(centered))
        scale = weighted(weights, centered * target) / self.xp.maximum(spread, 1e-12)
        return self.stored(scale, mean - scale * mean_code)

    def encode_scales(self, scales: Array) -> Array:
        """Scales as the file holds them."""
        return scales

    def decode_scales(self, scales: mx.array) -> Array:
        """Scales of a file as float32 factors."""
        return scales.astype(mx.float32) if self.xp is mx else to_numpy(scales)


@functools.cache
def _float8_values() -> np.ndarray:
    return to_numpy(mx.from_fp8(mx.arange(256).astype(mx.uint8), dtype=mx.float32))


class FloatGrid:
    """scale · level, for the modes mxfp4, mxfp8 and nvfp4."""

    has_bias = False
    dtype = mx.uint8

    def __init__(self, quantization: Quantization, xp: ModuleType) -> None:
        self.quantization, self.xp = quantization, xp
        if quantization.bits == 8:
            levels = _float8_values()
        else:
            levels = np.array(E2M1 + tuple(-v for v in E2M1), np.float32)
        usable = np.flatnonzero(np.isfinite(levels))
        order = usable[np.argsort(levels[usable], kind="stable")]
        ordered = levels[order]
        self.levels, self.order = xp.array(levels), xp.array(order.astype(np.uint8))
        self.middles = xp.array((ordered[1:] + ordered[:-1]) / 2)
        self._float8 = xp.array(_float8_values())
        self._largest = float(ordered[-1])

    def codes(self, target: Array, scale: Array, bias: Array) -> Array:
        """The nearest codes, as float32, of `target` (..., group, out) on the grids (..., out)."""
        return self.order[self.xp.searchsorted(self.middles, target / _row(scale))].astype(self.xp.float32)

    def values(self, codes: Array, scale: Array, bias: Array) -> Array:
        """What the codes (..., group, out) stand for."""
        return _row(scale) * self.levels[codes.astype(self.xp.uint8)]

    def stored(self, scale: Array, bias: Array) -> tuple[Array, Array]:
        """`scale` as the model file will hold it: a power of two, or (nvfp4) an 8-bit float."""
        return self._decode(self._encode(scale)), self.xp.zeros_like(scale)

    def candidates(self, target: Array) -> tuple[Array, Array]:
        """Grids (k, ..., out) worth trying for a group (..., group, out)."""
        full = self.xp.abs(target).max(axis=-2) / self._largest  # (..., out)
        shrinks = (0.5, 1.0, 2.0) if self._power_of_two else (0.7, 0.8, 0.9, 1.0, 1.15)
        scale = full * _first_axis(shrinks, full.ndim, self.xp)
        return self.stored(scale, scale)

    def refit(self, target: Array, codes: Array, weights: Array) -> tuple[Array, Array]:
        """The scale that is best for given codes: least squares with `weights` (..., group) on the columns."""
        levels = self.levels[codes.astype(self.xp.uint8)]
        top, bottom = weighted(weights, levels * target), weighted(weights, self.xp.square(levels))  # (..., out)
        return self.stored(self.xp.maximum(top, 0) / self.xp.maximum(bottom, 1e-12), bottom)

    @property
    def _power_of_two(self) -> bool:
        return self.quantization.mode != "nvfp4"

    def _encode(self, scale: Array) -> Array:
        xp = self.xp
        if self._power_of_two:
            exponent = xp.round(xp.log2(xp.maximum(scale, 1e-37)))
            return xp.clip(exponent + 127, 1, 254).astype(xp.uint8)
        codes = mx.to_fp8(mx.array(xp.clip(scale, 0.0, 448.0)))
        return xp.maximum(xp.array(codes), xp.array(1, dtype=xp.uint8))

    def _decode(self, codes: Array) -> Array:
        if self._power_of_two:  # the byte is a float32's exponent
            return (codes.astype(self.xp.uint32) << 23).view(self.xp.float32)
        return self._float8[codes]

    def encode_scales(self, scales: Array) -> Array:
        """Scales as the file holds them, uint8."""
        return self._encode(scales)

    def decode_scales(self, scales: mx.array) -> Array:
        """Scales of a file as float32 factors."""
        return self._decode(scales if self.xp is mx else np.array(scales))


Grid = AffineGrid | FloatGrid


def make_grid(quantization: Quantization, dtype: mx.Dtype, xp: ModuleType = np) -> Grid:
    """The grid of a quantization; `dtype` is the type of the scales in mode affine."""
    return AffineGrid(quantization, dtype, xp) if quantization.mode == "affine" else FloatGrid(quantization, xp)


def identity_of(n: int, xp: ModuleType) -> Array:
    """The identity (n, n). (`mx.eye` is a scatter, which a GPU compiles for seconds.)"""
    return (xp.arange(n)[:, None] == xp.arange(n)).astype(xp.float32)


def weighted(weights: Array, values: Array) -> Array:
    """Σ weights (..., group) · values (..., group, out) over the group."""
    return (weights[..., None, :] @ values)[..., 0, :]


def _row(grid: Array) -> Array:
    return grid[..., None, :]


def _first_axis(numbers: tuple[float, ...], ndim: int, xp: ModuleType) -> Array:
    return xp.array(numbers, dtype=xp.float32).reshape(-1, *[1] * ndim)
