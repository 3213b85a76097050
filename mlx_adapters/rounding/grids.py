"""The values that MLX's quantized weights can take, and how their codes are packed.

A row of a weight matrix is cut into groups; the values of a group share a grid. In mode `affine` the grid is
`scale · code + bias` with codes 0 … 2^bits - 1. The other modes are `scale · level`: `mxfp4` and `nvfp4` have
the 16 levels of a 4-bit float, `mxfp8` the 254 of an 8-bit float, and scales are a power of two or an 8-bit
float. Codes lie in a stream of `bits` bits each, lowest bit first, cut into 32-bit words.

Arrays here are NumPy float32, and a weight matrix is transposed, (in, out): a column of the layer's input is
then one contiguous vector.
"""

import functools
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.storage.tensor_files import as_numpy

Array = np.ndarray

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_numpy(array: mx.array) -> Array:
    """Any MLX float array as NumPy float32."""
    return as_numpy(array.astype(mx.float32)).copy()


def round_to(values: Array, dtype: mx.Dtype) -> Array:
    """`values` (float32) rounded to what `dtype` can store, ties to even, as float32."""
    if dtype == mx.float16:
        return values.astype(np.float16).astype(np.float32)
    if dtype == mx.bfloat16:  # the upper half of a float32; a carry goes on into the exponent, as it should
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def pack_codes(codes: Array, bits: int) -> Array:
    """Codes (..., n) as 32-bit words (..., n · bits / 32), as `mx.quantize` packs them."""
    shape = codes.shape[:-1]
    if bits == 8:
        stream = codes.astype(np.uint8)
    elif bits in (2, 4):
        per_byte = 8 // bits
        parts = codes.astype(np.uint8).reshape(*shape, -1, per_byte)  # (..., n / per_byte, per_byte)
        stream = parts[..., 0].copy()
        for i in range(1, per_byte):
            stream |= parts[..., i] << (bits * i)
    else:
        planes = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
        stream = np.packbits(planes.reshape(*shape, -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(stream).view(np.uint32)


class AffineGrid:
    """scale · code + bias. Scales and biases are kept in the type that the model stores (`dtype`)."""

    has_bias = True

    def __init__(self, quantization: Quantization, dtype: mx.Dtype) -> None:
        self.quantization = quantization
        self.dtype = dtype
        self.top = float(2**quantization.bits - 1)

    def codes(self, target: Array, scale: Array, bias: Array) -> Array:
        """The nearest codes, as float32, of `target` (..., out) on the grids (out,)."""
        codes = (target - bias) / scale
        np.rint(codes, out=codes)
        return np.clip(codes, 0.0, self.top, out=codes)

    def values(self, codes: Array, scale: Array, bias: Array) -> Array:
        """What the codes stand for."""
        return scale * codes + bias

    def rounder(self, scale: Array, bias: Array) -> Callable[[Array, Array], Array]:
        """A function that rounds one column (out,): it puts codes into its second argument, returns values."""
        inverse, buffer, top = 1 / scale, np.empty_like(scale), self.top

        def round_column(wanted: Array, codes: Array) -> Array:
            np.subtract(wanted, bias, out=buffer)
            np.multiply(buffer, inverse, out=buffer)
            np.rint(buffer, out=buffer)
            np.maximum(buffer, 0.0, out=buffer)
            np.minimum(buffer, top, out=buffer)
            codes[:] = buffer
            np.multiply(buffer, scale, out=buffer)
            np.add(buffer, bias, out=buffer)
            return buffer

        return round_column

    def stored(self, scale: Array, bias: Array) -> tuple[Array, Array]:
        """`scale` and `bias` as the model file will hold them; a scale is never 0."""
        scale = round_to(scale, self.dtype)
        return np.where(np.abs(scale) < 1e-30, np.float32(1e-8), scale), round_to(bias, self.dtype)

    def candidates(self, target: Array) -> list[tuple[Array, Array]]:
        """Grids (out,) worth trying for a group (group, out): the full range, and narrower ones."""
        low, high = target.min(axis=0), target.max(axis=0)  # (out,)
        shrinks = (1.0, 0.9, 0.8, 0.7) if self.quantization.bits < 8 else (1.0,)
        middle, half = (low + high) / 2, (high - low) / 2
        return [
            self.stored(2 * half * shrink / self.top, middle - half * shrink)
            for shrink in np.array(shrinks, np.float32)
        ]

    def refit(self, target: Array, codes: Array, weights: Array) -> tuple[Array, Array]:
        """The grid that is best for given codes: least squares with `weights` (group,) on the columns."""
        total = weights.sum()
        mean_code, mean = weights @ codes / total, weights @ target / total  # (out,)
        centered = codes - mean_code
        spread = weights @ np.square(centered)
        scale = (weights @ (centered * target)) / np.maximum(spread, 1e-12)
        return self.stored(scale, mean - scale * mean_code)

    def encode_scales(self, scales: Array) -> Array:
        """Scales as the file holds them."""
        return scales

    def decode_scales(self, scales: mx.array) -> Array:
        """Scales of a file as float32 factors."""
        return to_numpy(scales)


@functools.cache
def _float8_values() -> Array:
    return to_numpy(mx.from_fp8(mx.arange(256).astype(mx.uint8), dtype=mx.float32))


class FloatGrid:
    """scale · level, for the modes mxfp4, mxfp8 and nvfp4."""

    has_bias = False
    dtype = mx.uint8

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        if quantization.bits == 8:
            levels = _float8_values()
        else:
            levels = np.array(E2M1 + tuple(-v for v in E2M1), np.float32)
        usable = np.flatnonzero(np.isfinite(levels))
        self._levels = levels
        self._order = usable[np.argsort(levels[usable], kind="stable")]
        ordered = levels[self._order]
        self._middles = (ordered[1:] + ordered[:-1]) / 2
        self._largest = float(ordered[-1])

    def codes(self, target: Array, scale: Array, bias: Array) -> Array:
        """The nearest codes, as float32, of `target` (..., out) on the grids (out,)."""
        return self._order[np.searchsorted(self._middles, target / scale)].astype(np.float32)

    def values(self, codes: Array, scale: Array, bias: Array) -> Array:
        """What the codes stand for."""
        return scale * self._levels[codes.astype(np.intp)]

    def rounder(self, scale: Array, bias: Array) -> Callable[[Array, Array], Array]:
        """A function that rounds one column (out,): it puts codes into its second argument, returns values."""

        def round_column(wanted: Array, codes: Array) -> Array:
            codes[:] = self._order[np.searchsorted(self._middles, wanted / scale)]
            return scale * self._levels[codes]

        return round_column

    def stored(self, scale: Array, bias: Array) -> tuple[Array, Array]:
        """`scale` as the model file will hold it: a power of two, or (nvfp4) an 8-bit float."""
        return self._decode(self._encode(scale)), np.zeros_like(scale)

    def candidates(self, target: Array) -> list[tuple[Array, Array]]:
        """Grids (out,) worth trying for a group (group, out)."""
        full = np.abs(target).max(axis=0) / self._largest  # (out,)
        shrinks = (0.5, 1.0, 2.0) if self._power_of_two else (0.7, 0.8, 0.9, 1.0, 1.15)
        return [self.stored(full * np.float32(s), full) for s in shrinks]

    def refit(self, target: Array, codes: Array, weights: Array) -> tuple[Array, Array]:
        """The scale that is best for given codes: least squares with `weights` (group,) on the columns."""
        levels = self._levels[codes.astype(np.intp)]
        top, bottom = weights @ (levels * target), weights @ np.square(levels)  # (out,)
        return self.stored(np.maximum(top, 0) / np.maximum(bottom, 1e-12), bottom)

    @property
    def _power_of_two(self) -> bool:
        return self.quantization.mode != "nvfp4"

    def _encode(self, scale: Array) -> Array:
        if self._power_of_two:
            exponent = np.rint(np.log2(np.maximum(scale, 1e-37)))
            return np.clip(exponent + 127, 1, 254).astype(np.uint8)
        codes = np.array(mx.to_fp8(mx.array(np.clip(scale, 0.0, 448.0))))
        return np.maximum(codes, 1)

    def _decode(self, codes: Array) -> Array:
        if self._power_of_two:
            return np.exp2(codes.astype(np.float32) - 127)
        return _float8_values()[codes]

    def encode_scales(self, scales: Array) -> Array:
        """Scales as the file holds them, uint8."""
        return self._encode(scales)

    def decode_scales(self, scales: mx.array) -> Array:
        """Scales of a file as float32 factors."""
        return self._decode(np.array(scales))


Grid = AffineGrid | FloatGrid


def make_grid(quantization: Quantization, dtype: mx.Dtype) -> Grid:
    """The grid of a quantization; `dtype` is the type of the scales in mode affine."""
    return AffineGrid(quantization, dtype) if quantization.mode == "affine" else FloatGrid(quantization)
