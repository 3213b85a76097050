"""Two GPU kernels that add a low-rank update to a base product of few tokens, for one adapter or one for each token.

z = a x does not wait for the product, so that a GPU computes both beside each other; then y · gain + shift + b z. Sums
are in float32 and rounded once. One text serves CUDA and Metal; `WORDS` holds what they spell differently.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

from mlx_adapters.models.quantized_check import largest_error, tried
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import Language, build, language, spelled
from mlx_adapters.system.machine import on_gpu

MOST_TOKENS, MOST_RANKS = 16, 64  # beyond them products are faster
MOST_ERROR = 1e-2  # of the largest number
LOW_THREADS, HIGH_THREADS = 128, 256  # of a block

WORDS = {
    "metal": {
        "THREAD": "thread_position_in_threadgroup.x",
        "BLOCK": "threadgroup_position_in_grid.x",
        "TOKEN": "threadgroup_position_in_grid.y",
        "GLOBAL": "const device",
        "SHARED": "threadgroup",
        "WAIT": "threadgroup_barrier(mem_flags::mem_threadgroup)",
        "SUM_OF_LANES": "simd_sum",
    },
    "cuda": {
        "THREAD": "threadIdx.x",
        "BLOCK": "blockIdx.x",
        "TOKEN": "blockIdx.y",
        "GLOBAL": "const",
        "SHARED": "__shared__",
        "WAIT": "__syncthreads()",
        "SUM_OF_LANES": "sum_of_lanes",
    },
}
HEADERS = {
    "metal": "",
    "cuda": """
__device__ inline float sum_of_lanes(float v) {
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffff, v, d);
  return v;
}
""",
}
HEADER = """
template <typename T> struct alignas(16) Packed { T v[16 / sizeof(T)]; };
"""
LOW = """
constexpr int N = 16 / sizeof(T);
const int in = x_shape[x_ndim - 1], rows = a_shape[1] * a_shape[2];
const int me = THREAD, row = BLOCK, token = TOKEN;
GLOBAL T* own = x + (size_t) token * in;
GLOBAL T* low = a + ((size_t) slots[token] * rows + row) * in;
float sum = 0.0f;
for (int k = me * N; k < in; k += THREADS * N) {
  Packed<T> xs = *(GLOBAL Packed<T>*) (own + k);
  Packed<T> as = *(GLOBAL Packed<T>*) (low + k);
  #pragma unroll
  for (int i = 0; i < N; ++i) sum += (float) xs.v[i] * (float) as.v[i];
}
SHARED float of_lanes[THREADS / 32];
sum = SUM_OF_LANES(sum);
if (me % 32 == 0) of_lanes[me / 32] = sum;
WAIT;
if (me == 0) {
  for (int i = 1; i < THREADS / 32; ++i) sum += of_lanes[i];
  z[(size_t) token * rows + row] = sum;
}
"""
HIGH = """
const int width = y_shape[y_ndim - 1], count = z_shape[1];
const int column = BLOCK * THREADS + THREAD, token = TOKEN;
if (column < width) {
  int part = 0;
  while (part < count - 1 && column >= bounds[part + 1]) ++part;
  const size_t at = (size_t) slots[token] * width + column;
  GLOBAL float* own = z + ((size_t) token * count + part) * R;
  float v = (float) y[(size_t) token * width + column];
  GAIN
  #pragma unroll
  for (int j = 0; j < R; ++j) v += (float) b[at * R + j] * own[j];
  out[(size_t) token * width + column] = (T) v;
}
"""
GAIN, SHIFT = "v *= (float) gain[at];", "v += (float) shift[at];"


def add_update(
    y: mx.array,
    x: mx.array,
    a: mx.array,
    b: mx.array,
    widths: Sequence[int],
    slots: mx.array,
    gain: mx.array | None = None,
    shift: mx.array | None = None,
) -> mx.array:
    """y · gain + shift + b (a x) of few tokens, each with the factors of its slot.

    Args:
        y: (..., Σ widths), what the layers on x computed, one after the other.
        x: (..., in), of y's type, as a and b are.
        a: (slots, layers, r, in).
        b: (slots, Σ widths, r).
        slots: (tokens or more,) uint32.
        gain: (slots, Σ widths), as `shift`.

    Returns: (..., Σ widths), in y's type.
    """
    _, layers, rank, inputs = a.shape
    tokens, way = x.size // inputs, _built.get(y.dtype, build)
    (z,) = _low(language(), way)(
        inputs=[x, a, slots],
        template=[("T", y.dtype), ("THREADS", LOW_THREADS)],
        grid=(layers * rank * LOW_THREADS, tokens, 1),
        threadgroup=(LOW_THREADS, 1, 1),
        output_shapes=[(tokens, layers, rank)],
        output_dtypes=[mx.float32],
    )
    scaled = {name: array for name, array in (("gain", gain), ("shift", shift)) if array is not None}
    (out,) = _high(language(), tuple(scaled), way)(
        inputs=[y, z, b, slots, _bounds(tuple(widths)), *scaled.values()],
        template=[("T", y.dtype), ("R", rank), ("THREADS", HIGH_THREADS)],
        grid=(-(-b.shape[1] // HIGH_THREADS) * HIGH_THREADS, tokens, 1),
        threadgroup=(HIGH_THREADS, 1, 1),
        output_shapes=[y.shape],
        output_dtypes=[y.dtype],
    )
    return out


# Arrays of up to 8 bytes lie in pages that MLX's CUDA build moves when the host writes to one of them; these do not.
@cache
def _bounds(widths: tuple[int, ...]) -> mx.array:
    """Where each layer's columns begin and the last one's end."""
    return mx.array([0, *accumulate(widths), 0], mx.int32)


def first(x: mx.array) -> mx.array:
    """The first slot for each token of x, and some more."""
    return _zeros(max(x.size // x.shape[-1], 4))


@cache
def _zeros(count: int) -> mx.array:
    return mx.array([0] * count, mx.uint32)


_built: dict[mx.Dtype, Callable[..., Any]] = {}  # how the kernel is built for each type


@cache
def _low(own: Language, way: Callable[..., Any]) -> Any:
    """z = a x; compiled once for each type."""
    return way("low", ["x", "a", "slots"], ["z"], spelled(LOW, WORDS[own]), HEADERS[own] + HEADER)


@cache
def _high(own: Language, scaled: tuple[str, ...], way: Callable[..., Any]) -> Any:
    """y · gain + shift + b z; compiled once for each type and rank."""
    names = ["y", "z", "b", "slots", "bounds", *scaled]
    return way("_".join(["high", *scaled]), names, ["out"], high_source(own, scaled), HEADERS[own] + HEADER)


def high_source(own: Language, scaled: Sequence[str]) -> str:
    """The second kernel's text, with `gain` and `shift` if there are such."""
    lines = " ".join(line for name, line in (("gain", GAIN), ("shift", SHIFT)) if name in scaled)
    return spelled(HIGH, WORDS[own] | {"GAIN": lines})


def serves(y: mx.array, x: mx.array, b: mx.array) -> bool:
    """Whether the kernel is there, right, and made for an update by b (..., r) of this size and type."""
    tokens, width, rank = x.size // x.shape[-1], x.shape[-1], b.shape[-1]
    fits = (
        tokens <= MOST_TOKENS
        and rank <= MOST_RANKS
        and width % (16 // x.dtype.size) == 0
        and x.dtype == y.dtype == b.dtype
    )
    return fits and is_right(x.dtype)


def is_right(dtype: mx.Dtype) -> bool:
    """Whether this device computes with the kernel what it computes with products; tried once, on small factors, and
    remembered."""
    return on_gpu() and _tried(dtype)


@cache
def _tried(dtype: mx.Dtype) -> bool:
    own = language()
    text = spelled(LOW, WORDS[own]) + high_source(own, ["gain", "shift"]) + HEADERS[own] + HEADER
    text = hashlib.sha256(text.encode()).hexdigest()
    return tried(f"add_update {text[:16]}, {dtype}", _built, dtype, partial(_error, dtype), MOST_ERROR)


def _error(dtype: mx.Dtype) -> float:
    """How far the kernel is off on small factors, relative to the largest number; infinite where it is refused."""
    keys = mx.random.split(mx.random.key(0), 6)
    widths, tokens, slots, inputs, rank = (40, 600), 3, 2, 72, 8
    shapes = [(tokens, sum(widths)), (tokens, inputs), (slots, 2, rank, inputs), (slots, sum(widths), rank)]
    y, x, a, b = (mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=False))
    gain, shift = (mx.random.normal((slots, sum(widths)), key=key).astype(dtype) for key in keys[4:])
    at = mx.array([1, 0, 1], mx.uint32)
    try:
        added = add_update(y, x, a, b, widths, at, gain, shift).astype(mx.float32)
        mx.eval(added)
    except (RuntimeError, ValueError, OSError, KeyError):
        return math.inf
    y, x, a, b, gain, shift = (array.astype(mx.float32) for array in (y, x, a, b, gain, shift))
    z = (a[at] @ x[:, None, :, None]).squeeze(-1)  # (tokens, layers, r)
    z = mx.concatenate([mx.repeat(z[:, i : i + 1], width, axis=1) for i, width in enumerate(widths)], axis=1)
    expected = y * gain[at] + shift[at] + (b[at] * z).sum(axis=-1)
    return largest_error(added, expected)
