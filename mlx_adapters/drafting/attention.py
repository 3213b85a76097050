"""Attention of one token to what came before it, for a step that is compiled once for many tokens.

MLX's own is compiled for one number of tokens. Here that number is data: a kernel on CUDA, plain operations elsewhere.
The newest keys and values lie beside the cache, so that a step changes nothing large and its results are its own:

| where | shape | what counts |
| --- | --- | --- |
| `keys`, `values` of the cache | (1, groups, room, width) | the first `counts[0]` |
| `recent`, of all layers | (layers, groups, RECENT, width) | the first `counts[1]` |
| `new` | (1, groups, 1, width) | it |

What is beside is one array for all layers' keys and one for their values, so that a step makes few arrays anew.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from mlx_adapters.models.quantized_check import tried
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import ATTENTION, FEW, build, chosen, spelled
from mlx_adapters.system.machine import on_cuda

RECENT = 32  # tokens whose keys and values lie beside the cache
WIDTHS, LANES, WARPS = (32, 64, 128, 256), 32, 16  # more threads would have too few registers
MOST_ERROR = 1e-2  # of the largest number
INPUTS = ("q", "keys", "values", "recent_keys", "recent_values", "new_keys", "new_values", "counts", "scale", "layer")
# A block for each head; each of its warps takes every WARPSth token, AHEAD of them under way.
SOURCE = spelled(
    """
constexpr int NK = K / 32, NV = V / 32, HELD = (NK + NV) * sizeof(T), AHEAD = HELD > 32 ? 1 : HELD > 16 ? 2 : 4;
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, room = keys_shape[2];
const int shared = q_shape[1] / keys_shape[1], group = head / shared;
const int cached = counts[0], beside = counts[1], length = cached + beside + 1;
const size_t recent = ((size_t) layer[0] * keys_shape[1] + group) * RECENT;
const T* keys_of[3] = {keys + (size_t) group * room * K, recent_keys + recent * K, new_keys + group * K};
const T* values_of[3] = {values + (size_t) group * room * V, recent_values + recent * V, new_values + group * V};
float own[NK], sum[NV], most = -INFINITY, weight = 0.0f;
const Few<T, NK> mine = *reinterpret_cast<const Few<T, NK>*>(q + (size_t) head * K + lane * NK);
#pragma unroll
for (int i = 0; i < NK; ++i) own[i] = (float) mine.v[i] * scale[0];
#pragma unroll
for (int i = 0; i < NV; ++i) sum[i] = 0.0f;
for (int first = warp; first < length; first += WARPS * AHEAD) {
  Few<T, NK> ks[AHEAD];
  Few<T, NV> vs[AHEAD];
  #pragma unroll
  for (int j = 0; j < AHEAD; ++j) {
    const int token = first + WARPS * j;
    if (token < length) {
      const bool is_cached = token < cached, is_new = token == length - 1;
      const int at = is_cached ? token : is_new ? 0 : token - cached;
      const T* k = is_cached ? keys_of[0] : is_new ? keys_of[2] : keys_of[1];
      const T* v = is_cached ? values_of[0] : is_new ? values_of[2] : values_of[1];
      ks[j] = *reinterpret_cast<const Few<T, NK>*>(k + (size_t) at * K + lane * NK);
      vs[j] = *reinterpret_cast<const Few<T, NV>*>(v + (size_t) at * V + lane * NV);
    }
  }
  #pragma unroll
  for (int j = 0; j < AHEAD; ++j) {
    if (first + WARPS * j < length) {
      SEE_TOKEN
    }
  }
}
__shared__ float mosts[WARPS], weights[WARPS], sums[WARPS][V + 1];
if (lane == 0) {
  mosts[warp] = most;
  weights[warp] = weight;
}
#pragma unroll
for (int i = 0; i < NV; ++i) sums[warp][lane * NV + i] = sum[i];
__syncthreads();
const float reached = lane < WARPS ? mosts[lane] : -INFINITY;
float top = reached;
for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
const float share = reached == -INFINITY ? 0.0f : expf(reached - top);
float total = lane < WARPS ? weights[lane] * share : 0.0f;
for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(0xffffffff, total, d);
for (int column = warp; column < V; column += WARPS) {
  float x = lane < WARPS ? sums[lane][column] * share : 0.0f;
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(0xffffffff, x, d);
  if (lane == 0) out[(size_t) head * V + column] = (T) (x / total);
}
""",
    ATTENTION,
)
# A block for each layer and group.
KEEP = """
const int groups = recent_shape[1], layer = blockIdx.x / groups, group = blockIdx.x % groups, beside = counts[1];
const T* mine = NEW;
const size_t at = (size_t) blockIdx.x * RECENT * W;
for (int i = threadIdx.x; i < (beside + 1) * W; i += blockDim.x) {
  const bool last = i >= beside * W;
  following[at + i] = last ? mine[group * W + i - beside * W] : recent[at + i];
}
"""
Pair = tuple[mx.array, mx.array]  # keys and values


def attend(q: mx.array, cached: Pair, recent: Pair, layer: int, new: Pair, counts: mx.array, scale: float) -> mx.array:
    """softmax(scale · q Kᵀ) V over all that counts (above) for this layer.

    q: (1, heads, 1, width); counts: (2 or more,) int32. `scale` is a number.
    """
    if on_cuda():
        return _by_kernel(q, cached, recent, layer, new, counts, scale)
    beside = [_with_new(all_of[layer][None], each, counts) for all_of, each in zip(recent, new, strict=True)]
    keys, values = (mx.concatenate(parts, axis=2) for parts in zip(cached, beside, strict=True))
    seen = mx.concatenate([mx.arange(cached[0].shape[2]) < counts[0], mx.arange(RECENT) <= counts[1]])
    scores = scale * q.reshape(1, keys.shape[1], -1, q.shape[-1]) @ keys.swapaxes(-1, -2)  # (1, groups, shared, tokens)
    weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1, precise=True).astype(values.dtype)
    return (weights @ values).reshape(*q.shape[:3], -1)


def following(recent: Pair, new: Sequence[Pair], counts: mx.array) -> list[mx.array]:
    """`recent`, of all layers, with what is new of each behind what counts of it."""
    both = zip(recent, zip(*new, strict=True), strict=True)
    if not on_cuda():
        return [_with_new(mine, mx.concatenate(its), counts) for mine, its in both]
    way = _way(*recent)
    return [_kept(mine, its, counts, way) for mine, its in both]


def _kept(recent: mx.array, new: Sequence[mx.array], counts: mx.array, way: Callable[..., Any]) -> mx.array:
    layers, groups, _, width = recent.shape
    (out,) = _keep(layers, way)(
        inputs=[recent, counts, *new],
        template=[("T", recent.dtype), ("W", width), ("RECENT", RECENT)],
        grid=(layers * groups * 256, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[recent.shape],
        output_dtypes=[recent.dtype],
    )
    return out


def _with_new(recent: mx.array, new: mx.array, counts: mx.array) -> mx.array:
    return mx.where(mx.arange(RECENT)[:, None] == counts[1], new, recent)


def _by_kernel(
    q: mx.array, cached: Pair, recent: Pair, layer: int, new: Pair, counts: mx.array, scale: float
) -> mx.array:
    heads, shape = q.shape[1], (*q.shape[:3], cached[1].shape[-1])
    (out,) = _kernel(_way(*cached))(
        inputs=[q, *cached, *recent, *new, counts, mx.array([scale], mx.float32), mx.array([layer], mx.int32)],
        template=[("T", q.dtype), ("K", q.shape[-1]), ("V", shape[-1]), ("RECENT", RECENT), ("WARPS", WARPS)],
        grid=(heads * LANES * WARPS, 1, 1),
        threadgroup=(LANES * WARPS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[q.dtype],
    )
    return out


_built: dict[tuple[Any, ...], Callable[..., Any]] = {}  # how they are built for a type, and widths of keys and values


def _way(keys: mx.array, values: mx.array) -> Callable[..., Any]:
    return _built.get((keys.dtype, (keys.shape[-1], values.shape[-1])), build)


@cache
def _kernel(way: Callable[..., Any]) -> Any:
    return way("attend", INPUTS, ["out"], SOURCE, FEW)


@cache
def _keep(layers: int, way: Callable[..., Any]) -> Any:
    new = [f"new_{layer}" for layer in range(layers)]
    return way("keep", ["recent", "counts", *new], ["following"], spelled(KEEP, {"NEW": chosen("layer", new)}), "")


def serves(q: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether `attend` is made for arrays of these sizes and types, and right where a kernel computes it."""
    widths = (keys.shape[-1], values.shape[-1])
    alike = q.dtype == keys.dtype == values.dtype and q.shape[1] % keys.shape[1] == 0
    fits = alike and (not on_cuda() or set(widths) <= set(WIDTHS))
    return q.shape[0] == q.shape[2] == 1 and fits


@cache
def is_right(dtype: mx.Dtype, widths: tuple[int, int]) -> bool:
    """Whether this device's kernel computes what plain operations do, for keys and values of these widths; tried once,
    on small arrays, and remembered."""
    if not on_cuda():
        return True
    text = hashlib.sha256((SOURCE + KEEP + FEW).encode()).hexdigest()
    kind = f"attend {text[:16]}, {dtype}, {widths[0]} and {widths[1]} wide"
    return set(widths) <= set(WIDTHS) and tried(
        kind, _built, (dtype, widths), partial(_error, dtype, widths), MOST_ERROR
    )


def _error(dtype: mx.Dtype, widths: tuple[int, int]) -> float:
    """How far the kernel is off, relative to the largest number; infinite where it is refused."""
    groups, cached, beside, layer = 2, 170, 5, 1
    shapes = [(1, 4, 1, widths[0]), *[(n, groups, m, w) for n, m in ((1, 192), (3, RECENT), (3, 1)) for w in widths]]
    keys = mx.random.split(mx.random.key(0), len(shapes))
    q, *rest = (mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=True))
    before, recent, news = [(rest[i], rest[i + 1]) for i in (0, 2, 4)]
    new, counts = (news[0][layer][None], news[1][layer][None]), mx.array([cached, beside], mx.int32)
    try:
        out = _by_kernel(q, before, recent, layer, new, counts, 0.3)
        kept = following(recent, list(zip(*(mx.split(its, 3) for its in news), strict=True)), counts)
        mx.eval(out, kept)
    except (RuntimeError, ValueError, OSError, KeyError):
        return math.inf
    all_of = [[before[i][:, :, :cached], recent[i][layer][None, :, :beside], new[i]] for i in (0, 1)]
    k, v = (mx.repeat(mx.concatenate(parts, axis=2).astype(mx.float32), 2, axis=1) for parts in all_of)
    expected = mx.softmax(0.3 * q.astype(mx.float32) @ k.swapaxes(-1, -2), axis=-1) @ v
    error = mx.abs(out.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    for i in (0, 1):
        moved = mx.concatenate([recent[i][:, :, :beside], news[i]], axis=2)
        error = mx.maximum(error, mx.abs(kept[i][:, :, : beside + 1] - moved).max().astype(mx.float32))
    return error.item() if math.isfinite(error.item()) else math.inf
