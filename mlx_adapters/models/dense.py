"""The weight of a layer, packed or not: its shape, its numbers, and the same layer unquantized."""

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import ModelError
from mlx_adapters.storage.tensor_names import BIAS, QUANTIZED_LEAVES, SCALES, WEIGHT
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.machine import on_cuda


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is packed, whatever its class is."""
    return SCALES in layer and hasattr(layer, "bits") and hasattr(layer, "group_size")


def takes_modes(layer: nn.Module) -> bool:
    """Whether mlx-lm can load the layer quantized: it says how many bits, and in which mode."""
    return hasattr(layer, "to_quantized") and "mode" in inspect.signature(layer.to_quantized).parameters


def quantization_of(layer: nn.Module) -> Quantization | None:
    """How a layer's weight is quantized, or None."""
    if not is_quantized(layer):
        return None
    return Quantization(layer.bits, layer.group_size, getattr(layer, "mode", "affine"))


def dense_weight(layer: nn.Module, dtype: mx.Dtype | None = None) -> mx.array:
    """The layer's weight, dequantized: (out, in), experts (experts, out, in), embeddings (vocab, dim).

    float32 is exact for every mode; without `dtype` an unquantized weight keeps its own.
    """
    if not is_quantized(layer):
        return layer.weight if dtype is None else layer.weight.astype(dtype)
    dtype = dtype or mx.float32
    scales, biases = layer.scales, layer.get("biases")
    if layer.mode == "affine":
        scales = scales.astype(mx.float32)
        biases = biases.astype(mx.float32)
    extra = {} if layer.get("global_scale") is None else {"global_scale": layer.global_scale}
    options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if extra and layer.weight.ndim == 3:  # one nvfp4 tensor scale for each expert
        parts = [
            mx.dequantize(layer.weight[e], scales[e], **options, global_scale=layer.global_scale[e], dtype=mx.float32)
            for e in range(layer.weight.shape[0])
        ]
        return mx.stack(parts).astype(dtype)
    return mx.dequantize(layer.weight, scales, biases, **options, **extra, dtype=mx.float32).astype(dtype)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the layer's dense weight."""
    if is_quantized(layer):
        return (*layer.weight.shape[:-1], layer.weight.shape[-1] * 32 // layer.bits)
    return tuple(layer.weight.shape)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers hold the same numbers, packed alike if they are."""
    first, second = dict(tree_flatten(one.parameters())), dict(tree_flatten(other.parameters()))
    return (
        quantization_of(one) == quantization_of(other)
        and set(first) == set(second)
        and all(mx.array_equal(first[name], second[name]).item() for name in first)
    )


def resize_rows(layer: nn.Module, count: int, more: mx.array) -> None:
    """Cut the layer's rows to `count`, or append `more` (count - rows, in), in place; packed rows keep their codes."""
    rows = weight_shape(layer)[0]
    if count <= rows:
        parts = {name: value[:count] for name, value in layer.parameters().items() if value.shape[:1] == (rows,)}
    else:
        new = {WEIGHT: more}
        if is_quantized(layer):
            scale = {} if layer.get("global_scale") is None else {"global_scale": layer.global_scale}
            options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
            new = dict(zip(QUANTIZED_LEAVES, mx.quantize(more, **options, **scale), strict=False))
        if BIAS in layer:
            new[BIAS] = mx.zeros((count - rows,))
        parts = {name: mx.concatenate([layer[name], part.astype(layer[name].dtype)]) for name, part in new.items()}
    for name, array in parts.items():
        layer[name] = array
    if hasattr(layer, "num_embeddings"):
        layer.num_embeddings = count


def dense_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class of the same layer unquantized: `Linear` for `QuantizedLinear`, from the same module; or None."""
    if not is_quantized(layer):
        return type(layer)
    name = type(layer).__name__.replace("Quantized", "")
    plain = getattr(sys.modules[type(layer).__module__], name, None) or getattr(nn, name, None)
    return plain if hasattr(plain, "to_quantized") else None


def dense_layer(layer: nn.Module, weight: mx.array) -> nn.Module:
    """An unquantized layer of the same kind with that weight and the layer's bias, in the weight's type.

    The weight is laid out: MLX's CUDA build takes experts that are a part of another array for those beside them.
    """
    kind: Any = dense_class(layer)
    if kind is None:
        raise ModelError(
            f"mlx-lm's '{type(layer).__name__}' cannot be computed unquantized.",
            "fuse it with its own bits: --bits keep.",
        )
    dense = kind.__new__(kind)
    nn.Module.__init__(dense)
    dict.update(dense, {name: value for name, value in layer.items() if not isinstance(value, mx.array)})
    dense.weight = mx.contiguous(weight)
    if "bias" in layer:
        dense.bias = layer.bias.astype(weight.dtype)
    return dense


def own_parameters(module: nn.Module) -> dict[str, mx.array]:
    """The floating-point parameters of a module, without those of the modules in it."""
    own = ((name, value) for name, value in module.items() if isinstance(value, mx.array) and name[:1] != "_")
    return {name: value for name, value in own if mx.issubdtype(value.dtype, mx.floating)}


def unpack(module: nn.Module, keys: Collection[str]) -> None:
    """Put dense layers in place of the packed ones at `keys`, in the type that the model computes in."""
    packed = {key: layer for key, layer in module.named_modules() if key in keys and is_quantized(layer)}
    dtype = compute_dtype(module)
    dense = [(key, dense_layer(layer, dense_weight(layer, dtype))) for key, layer in packed.items()]
    module.update_modules(tree_unflatten(dense))


def compute_dtype(module: nn.Module) -> mx.Dtype:
    """The type a model computes in: that of its first floating-point weight that is no packed one's scale."""
    return next((a.dtype for a in _weights(module) if mx.issubdtype(a.dtype, mx.floating)), mx.float32)


def finer_types(module: nn.Module) -> list[str]:
    """The options that a hint may offer for a module whose numbers are none: none if it computes in float32."""
    return [] if compute_dtype(module) == mx.float32 else ["--dtype float32"]


def _weights(tree: Any) -> Iterator[mx.array]:
    """Arrays called "weight" in modules, in their order, one after the other: the first is found soon."""
    for name, value in tree.items() if isinstance(tree, dict) else ((str(i), part) for i, part in enumerate(tree)):
        if isinstance(value, mx.array) and name.endswith(WEIGHT):
            yield value
        elif isinstance(value, dict | list | tuple) and not name.startswith("_"):
            yield from _weights(value)


# The bits of +Inf. NaN and Inf are what lies there or above, as a signed number (if positive) or without the sign
# bit (if negative): two maxima tell, twenty times faster than isfinite.
Limits = Mapping[mx.Dtype, tuple[mx.Dtype, int]]
INFINITY: Limits = {mx.float32: (mx.int32, 0x7F800000), mx.bfloat16: (mx.int16, 0x7F80), mx.float16: (mx.int16, 0x7C00)}
LARGE: Limits = {
    mx.float32: (mx.int32, 0x44800000),
    mx.bfloat16: (mx.int16, 0x4480),
    mx.float16: (mx.int16, 0x6400),
}  # of 1024
UNSIGNED = {mx.int32: mx.uint32, mx.int16: mx.uint16}
AT_A_TIME = 64  # arrays that lie in memory once more


def first_not_finite(weights: Mapping[str, mx.array], limits: Limits = INFINITY) -> str | None:
    """The name of the first floating-point array that holds NaN or Inf, or what else is not below `limits`; or None."""
    floats = {name: array for name, array in weights.items() if array.dtype in limits and array.size}
    if on_cuda() and _are_below(floats, limits):
        return None
    bits = {name: array.view(limits[array.dtype][0]) for name, array in floats.items()}
    mx.eval(bits)  # all at once: a tenth of a millisecond for each would add up
    for name, array in bits.items():
        limit, signed = limits[weights[name].dtype][1], np.array(array, copy=False)
        unsigned = signed.view(f"u{signed.itemsize}")
        if signed.max() >= limit or unsigned.max() >= limit + (1 << (8 * signed.itemsize - 1)):
            return name
    return None


def _are_below(weights: Mapping[str, mx.array], limits: Limits) -> bool:
    """Whether all numbers are, asked of a GPU: a look from the host would move each array there, and back when it is
    used."""
    for dtype, (kind, limit) in limits.items():
        flat = [a.view(kind).reshape(-1) for a in weights.values() if a.dtype == dtype]
        for start in range(0, len(flat), AT_A_TIME):
            signed = mx.concatenate(flat[start : start + AT_A_TIME])
            tops = signed.max(), signed.view(UNSIGNED[kind]).max()
            mx.eval(tops)
            if tops[0].item() >= limit or tops[1].item() >= limit + (1 << (8 * kind.size - 1)):
                return False
    return True
