"""Round to nearest at 8 bits so that a light update survives 16-bit scales.

`mx.quantize` finds codes by scales and biases that it then rounds to the model's type. In bfloat16 that moves values
by up to half a percent, more than the update of a light adapter, and shrinks it. Here scale and bias are
rounded first, so that they still cover the group, and codes are found by what is stored.
"""

from mlx_adapters.config import Quantization
from mlx_adapters.door import mx
from mlx_adapters.fusion.rounding import Packed, nearest


def to_nearest(weight: mx.array, quantization: Quantization, dtype: mx.Dtype) -> Packed:
    """Round `weight` (..., out, in) to nearest; `dtype` is that of the scales."""
    if quantization.bits != 8 or quantization.mode != "affine" or dtype == mx.float32:
        return nearest(weight, quantization, dtype)
    groups = mx.unflatten(weight.astype(mx.float32), -1, (-1, quantization.group_size))
    low, high, step = groups.min(axis=-1), groups.max(axis=-1), mx.finfo(dtype).eps
    rounded = low.astype(dtype)
    biases = mx.where(rounded.astype(mx.float32) > low, (low - step * mx.abs(low)).astype(dtype), rounded)
    span = high - biases.astype(mx.float32)
    scales = mx.maximum(span / 255 * (1 + step / 2), 1e-7).astype(dtype)  # float16 holds 6e-8 and above
    codes = mx.round((groups - biases[..., None].astype(mx.float32)) / scales[..., None].astype(mx.float32))
    packed = mx.clip(codes, 0, 255).astype(mx.uint8).reshape(weight.shape).view(mx.uint32)
    return Packed(packed, scales, biases, quantization)
