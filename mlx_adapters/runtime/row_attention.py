"""Attention of one new token in each row of a batch, on CUDA: a kernel that knows where each row begins.

MLX takes a handful of kernels for it as soon as there is a mask, which rows of several lengths need: 127 us for 16 rows
of 300 tokens on an H200. Here a block for each head of each row reads what the row holds.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from mlx_adapters.models.quantized_check import largest_error, tried
from mlx_adapters.surgery.calls import function_call_as
from mlx_adapters.surgery.padded import PaddedCache, fetched
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import ATTENTION, FEW, build, spelled
from mlx_adapters.system.machine import on_cuda

LANES, WARPS, WIDTHS = 32, 8, (32, 64, 128)
MOST_ERROR = 1e-2  # of the largest number
INPUTS = ("q", "keys", "values", "left", "held", "scale")
# Each warp takes every eighth token, AHEAD of them under way.
SOURCE = spelled(
    """
constexpr int NK = K / 32, NV = V / 32, AHEAD = 4;
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, row = blockIdx.y;
const int heads = q_shape[1], groups = keys_shape[1], room = keys_shape[2];
const int first = left[row], stop = first + held[row] + 1;
const size_t group = (size_t) row * groups + head / (heads / groups);
const T* key = keys + group * room * K + lane * NK;
const T* value = values + group * room * V + lane * NV;
const Few<T, NK> mine = *reinterpret_cast<const Few<T, NK>*>(q + ((size_t) row * heads + head) * K + lane * NK);
float own[NK], sum[NV], most = -INFINITY, weight = 0.0f;
#pragma unroll
for (int i = 0; i < NK; ++i) own[i] = (float) mine.v[i] * scale[0];
#pragma unroll
for (int i = 0; i < NV; ++i) sum[i] = 0.0f;
for (int token = first + warp; token < stop; token += WARPS * AHEAD) {
  Few<T, NK> ks[AHEAD];
  Few<T, NV> vs[AHEAD];
  #pragma unroll
  for (int j = 0; j < AHEAD; ++j) {
    const int at = token + WARPS * j;
    if (at < stop) {
      ks[j] = *reinterpret_cast<const Few<T, NK>*>(key + (size_t) at * K);
      vs[j] = *reinterpret_cast<const Few<T, NV>*>(value + (size_t) at * V);
    }
  }
  #pragma unroll
  for (int j = 0; j < AHEAD; ++j) {
    if (token + WARPS * j < stop) {
      SEE_TOKEN
    }
  }
}
__shared__ float mosts[WARPS], weights[WARPS], sums[WARPS][V];
if (lane == 0) {
  mosts[warp] = most;
  weights[warp] = weight;
}
#pragma unroll
for (int i = 0; i < NV; ++i) sums[warp][lane * NV + i] = sum[i];
__syncthreads();
float top = mosts[0];
for (int w = 1; w < WARPS; ++w) top = fmaxf(top, mosts[w]);
for (int column = threadIdx.x; column < V; column += blockDim.x) {
  float x = 0.0f, total = 0.0f;
  for (int w = 0; w < WARPS; ++w) {
    const float share = expf(mosts[w] - top);
    x += sums[w][column] * share;
    total += weights[w] * share;
  }
  out[((size_t) row * heads + head) * V + column] = (T) (x / total);
}
""",
    ATTENTION,
)


@contextlib.contextmanager
def attending(rows: int) -> Iterator[None]:
    """Within the block, in this thread, the new tokens of several rows attend by the kernel, where it serves."""
    if rows == 1 or not on_cuda():
        yield
        return
    with function_call_as(mx.fast, "scaled_dot_product_attention", by_rows):
        yield


def by_rows(
    original: Callable[..., mx.array],
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Any = None,
    **others: Any,
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, of q (rows, heads, 1, width) to what a `PaddedCache` gave just now."""
    layer = fetched(k, mask)
    if layer is None or not serves(q, layer) or any(other is not None for other in others.values()):
        return original(q, k, v, scale=scale, mask=mask, **others)
    return attend(q, layer.keys, layer.values, layer.left_padding, layer.held, scale)


def serves(q: mx.array, layer: PaddedCache) -> bool:
    """Whether the kernel is there, right, and made for arrays of these sizes and types."""
    k, v = layer.keys, layer.values
    widths = (k.shape[-1], v.shape[-1])
    fits = q.shape[2] == 1 and q.shape[1] % k.shape[1] == 0 and set(widths) <= set(WIDTHS)
    return fits and k.shape[1] == v.shape[1] and q.dtype == k.dtype == v.dtype and is_right(q.dtype, *widths)


def attend(q: mx.array, keys: mx.array, values: mx.array, left: mx.array, held: mx.array, scale: float) -> mx.array:
    """softmax(scale · q Kᵀ) V of each row's tokens, from place `left` on, `held` and the new one behind them.

    q: (rows, heads, 1, width); keys, values: (rows, groups, places, width); left, held: (rows,) int32.
    """
    rows, heads = q.shape[:2]
    (out,) = _kernel(_built.get((q.dtype, keys.shape[-1], values.shape[-1]), build))(
        inputs=[q, keys, values, left, held, _number(scale)],
        template=[("T", q.dtype), ("K", keys.shape[-1]), ("V", values.shape[-1]), ("WARPS", WARPS)],
        grid=(heads * LANES * WARPS, rows, 1),
        threadgroup=(LANES * WARPS, 1, 1),
        output_shapes=[(rows, heads, 1, values.shape[-1])],
        output_dtypes=[q.dtype],
    )
    return out


_built: dict[tuple[Any, ...], Callable[..., Any]] = {}  # how the kernel is built for a type and widths


@cache
def _kernel(way: Callable[..., Any]) -> Any:
    return way("attend_rows", INPUTS, ["out"], SOURCE, FEW)


@cache
def _number(value: float) -> mx.array:
    return mx.array([value], mx.float32)


@cache
def is_right(dtype: mx.Dtype, *widths: int) -> bool:
    """Whether this device computes with the kernel what it computes with products; tried once, and remembered."""
    text = hashlib.sha256((SOURCE + FEW).encode()).hexdigest()
    kind = f"attend_rows {text[:16]}, {dtype}, {widths[0]} and {widths[1]} wide"
    return tried(kind, _built, (dtype, *widths), partial(_error, dtype, *widths), MOST_ERROR)


def _error(dtype: mx.Dtype, width: int, out_width: int) -> float:
    """How far the kernel is off, relative to the largest number; infinite where it is refused."""
    left, places, end = [0, 5, 60], 96, 70
    shapes = [(3, 4, 1, width), (3, 2, places, width), (3, 2, places, out_width)]
    arrays = [mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i, shape in enumerate(shapes)]
    try:
        q, k, v = arrays
        out = attend(q, k, v, mx.array(left), mx.array([end - 1 - free for free in left]), 0.3)
        mx.eval(out)
    except (RuntimeError, ValueError, OSError, KeyError):
        return math.inf
    q, k, v = (array.astype(mx.float32) for array in arrays)
    k, v = (mx.repeat(array[:, :, :end], 2, axis=1) for array in (k, v))
    seen = mx.arange(end) >= mx.array(left)[:, None, None, None]
    expected = mx.softmax(mx.where(seen, 0.3 * q @ k.swapaxes(-1, -2), -mx.inf), axis=-1) @ v
    return largest_error(out, expected)
