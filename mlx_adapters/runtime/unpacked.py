"""A packed matrix unpacked with an adapter's update in it, for products of many tokens on CUDA.

There a prompt is read with unpacked matrices. An update beside them costs two more products and a pass over all
outputs (5 of 46 ms for 2,048 tokens of a 4B model on an H200). In the pass that unpacks it costs a few multiplications:
W + b a is added up in float32 and rounded once, as W is without an adapter.
"""

import hashlib
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from mlx_adapters.models.quantized_check import largest_error, tried
from mlx_adapters.storage.tensor_names import QUANTIZED_LEAVES
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.gpu_kernels import FEW, build, language

THREADS, ROWS = 128, 16  # a block's threads have a word of each row of so many
MOST_RANKS, BITS = 16, (2, 4, 8)  # more factors would have too few registers; words hold a whole number of these
MOST_ERROR = 2e-2  # of the largest number, in 16 bits
INPUTS = ("w", "scales", "biases", "a", "b")
SOURCE = """
constexpr int V = 32 / BITS;
const int words = w_shape[1], outputs = w_shape[0], groups = scales_shape[1];
const int word = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * ROWS;
if (word < words) {
  const int width = words * V, column = word * V, group = column / GROUP;
  float own[R][V];
  #pragma unroll
  for (int k = 0; k < R; ++k) {
    const Few<T, V> few = *reinterpret_cast<const Few<T, V>*>(a + (size_t) k * width + column);
    #pragma unroll
    for (int j = 0; j < V; ++j) own[k][j] = (float) few.v[j];
  }
  for (int row = first; row < min(first + ROWS, outputs); ++row) {
    const unsigned packed = w[(size_t) row * words + word];
    const float scale = (float) scales[(size_t) row * groups + group];
    const float bias = (float) biases[(size_t) row * groups + group];
    float sum[V];
    #pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = scale * (float) ((packed >> (j * BITS)) & ((1u << BITS) - 1)) + bias;
    #pragma unroll
    for (int k = 0; k < R; ++k) {
      const float share = (float) b[(size_t) row * R + k];
      #pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += share * own[k][j];
    }
    Few<T, V> few;
    #pragma unroll
    for (int j = 0; j < V; ++j) few.v[j] = (T) sum[j];
    *reinterpret_cast<Few<T, V>*>(out + (size_t) row * width + column) = few;
  }
}
"""


def unpacked(layer: nn.Module, a: mx.array, b: mx.array) -> mx.array:
    """W + b a of a layer whose W (out, in) is packed, in the type of a (r, in) and b (out, r)."""
    w, scales, biases = (layer[name] for name in QUANTIZED_LEAVES)
    (outputs, words), rank = w.shape, a.shape[0]
    way = _built.get((a.dtype, layer.bits, layer.group_size, rank), build)
    (out,) = _kernel(way)(
        inputs=[w, scales, biases, a, b],
        template=[
            ("T", a.dtype),
            ("R", rank),
            ("BITS", layer.bits),
            ("GROUP", layer.group_size),
            ("THREADS", THREADS),
            ("ROWS", ROWS),
        ],
        grid=(-(-words // THREADS) * THREADS, -(-outputs // ROWS), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(outputs, a.shape[1])],
        output_dtypes=[a.dtype],
    )
    return out


_built: dict[tuple[Any, ...], Callable[..., Any]] = {}  # how it is built for a type, bits, size of groups and rank


@cache
def _kernel(way: Callable[..., Any]) -> Any:
    return way("unpacked", INPUTS, ["out"], SOURCE, FEW)


def serves(layer: nn.Module, dtype: mx.Dtype, rank: int) -> bool:
    """Whether the kernel is there, right, and made for a layer's matrix and an update of this rank and type."""
    types = {array.dtype for array in (layer.scales, layer.get("biases")) if array is not None}
    fits = layer.mode == "affine" and types == {dtype} and rank <= MOST_RANKS and layer.bits in BITS
    return fits and language() == "cuda" and is_right(dtype, layer.bits, layer.group_size, rank)


@cache
def is_right(dtype: mx.Dtype, bits: int, group_size: int, rank: int) -> bool:
    """Whether this device computes with the kernel what it computes with products; tried once, and remembered."""
    text = hashlib.sha256((SOURCE + FEW).encode()).hexdigest()
    kind = f"unpacked {text[:16]}, {dtype}, {bits} bits, groups of {group_size}, rank {rank}"
    return tried(
        kind, _built, (dtype, bits, group_size, rank), partial(_error, dtype, bits, group_size, rank), MOST_ERROR
    )


def _error(dtype: mx.Dtype, bits: int, group_size: int, rank: int) -> float:
    """How far the kernel is off, relative to the largest number; infinite where it is refused."""
    shapes = [(37, 1280), (rank, 1280), (37, rank)]
    keys = mx.random.split(mx.random.key(0), 3)
    dense, a, b = (mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=True))
    layer = nn.QuantizedLinear.from_linear(_linear(dense), group_size, bits)
    try:
        made = unpacked(layer, a, b).astype(mx.float32)
        mx.eval(made)
    except (RuntimeError, ValueError, OSError, KeyError):
        return math.inf
    packed = (layer[name] for name in QUANTIZED_LEAVES)
    expected = mx.dequantize(*packed, group_size=group_size, bits=bits, dtype=dtype).astype(mx.float32)
    expected = expected + b.astype(mx.float32) @ a.astype(mx.float32)
    return largest_error(made, expected)


def _linear(weight: mx.array) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = weight
    return linear
