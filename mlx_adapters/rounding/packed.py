"""A layer's weight as the model file holds it, quantized, and how to get there by rounding to nearest."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_adapters.config.quantization import Quantization


@dataclass(frozen=True)
class Packed:
    """One layer's quantized weight as the model file holds it.

    `weight` uint32 (out, in·bits/32); `scales` and, in mode affine only, `biases` (out, in/group_size).
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    quantization: Quantization

    @classmethod
    def of(cls, parts: Mapping[str, mx.array], quantization: Quantization) -> "Packed":
        """The weight whose `tensors` these are."""
        return cls(parts["weight"], parts["scales"], parts.get("biases"), quantization)

    @property
    def tensors(self) -> dict[str, mx.array]:
        """The parts by the names that MLX gives them."""
        parts = {"weight": self.weight, "scales": self.scales, "biases": self.biases}
        return {name: part for name, part in parts.items() if part is not None}

    def __getitem__(self, some: slice | mx.array) -> "Packed":
        """Some of the rows (or experts)."""
        biases = None if self.biases is None else self.biases[some]
        return Packed(self.weight[some], self.scales[some], biases, self.quantization)


def dequantize(packed: Packed) -> mx.array:
    """The float32 weight (..., out, in) that `packed` stands for, with no rounding on the way."""
    q = packed.quantization
    scales, biases = packed.scales, packed.biases
    if q.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)  # type: ignore[union-attr]
        return mx.dequantize(packed.weight, scales, biases, group_size=q.group_size, bits=q.bits)
    return mx.dequantize(packed.weight, scales, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32)


def nearest(weight: mx.array, quantization: Quantization, dtype: mx.Dtype) -> Packed:
    """Round to nearest as `mx.quantize` does. `weight` (..., out, in); `dtype` of the scales."""
    q = quantization
    parts = mx.quantize(weight.astype(dtype), group_size=q.group_size, bits=q.bits, mode=q.mode)
    return Packed(parts[0], parts[1], parts[2] if len(parts) > 2 else None, q)


def to_nearest(weight: mx.array, quantization: Quantization, dtype: mx.Dtype) -> Packed:
    """`nearest`, and at 8 bits so that a light update survives 16-bit scales.

    `mx.quantize` finds codes by scales and biases that it then rounds to the model's type. In bfloat16 that moves
    values by up to half a percent, more than the update of a light adapter, and shrinks it. Here scale and bias are
    rounded first, so that they still cover the group, and codes are found by what is stored.
    """
    if quantization.bits != 8 or quantization.mode != "affine" or dtype == mx.float32:
        return nearest(weight, quantization, dtype)
    groups = mx.unflatten(weight.astype(mx.float32), -1, (-1, quantization.group_size))  # (..., out, groups, group)
    low, high, step = groups.min(axis=-1), groups.max(axis=-1), mx.finfo(dtype).eps
    rounded = low.astype(dtype)  # (..., out, groups)
    biases = mx.where(rounded.astype(mx.float32) > low, (low - step * mx.abs(low)).astype(dtype), rounded)
    span = high - biases.astype(mx.float32)
    scales = mx.maximum(span / 255 * (1 + step / 2), 1e-7).astype(dtype)  # float16 holds 6e-8 and above
    codes = mx.round((groups - biases[..., None].astype(mx.float32)) / scales[..., None].astype(mx.float32))
    packed = mx.clip(codes, 0, 255).astype(mx.uint8).reshape(weight.shape).view(mx.uint32)  # (..., out, in / 4)
    return Packed(packed, scales, biases, quantization)
