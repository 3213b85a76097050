"""GPU kernels that add a low-rank update to a base product of few tokens, for one adapter or one for each token.

Of several tokens by two: z = a x, which does not wait for the product, so that a GPU computes both beside each other;
then y · gain + shift + b z. Of one token by one, since decoding waits for the host, which launches the kernels: every
block of threads computes z for itself, from the cache. Sums are in float32 and rounded once. One text serves CUDA and
Metal; `WORDS` holds what they spell differently.
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

Shape = tuple[int, ...]
MOST_TOKENS, MOST_RANKS = 16, 64  # beyond them products are faster
MOST_ERROR = 1e-2  # of the largest number
MANY_RANKS = 48  # more of them leave a thread too few registers for a block of ONE_THREADS
ONE_THREADS = 512  # of a block: 256 took 1.04, 128 took 1.12 of its time (H200, the layers of a 4B model, rank 8)
LOW_THREADS, HIGH_THREADS = 128, 256

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
ONE = """
constexpr int N = 16 / sizeof(T);
const int in = x_shape[x_ndim - 1], out_width = y_shape[y_ndim - 1], count = a_shape[1];
const int me = THREAD, token = TOKEN, slot = slots[token];
int block = BLOCK, part = 0;
for (; part < count - 1; ++part) {
  const int blocks = (bounds[part + 1] - bounds[part] + THREADS - 1) / THREADS;
  if (block < blocks) break;
  block -= blocks;
}
GLOBAL T* row = x + (size_t) token * in;
GLOBAL T* low = a + ((size_t) slot * count + part) * R * in;
float sums[R];
#pragma unroll
for (int j = 0; j < R; ++j) sums[j] = 0.0f;
for (int k = me * N; k < in; k += THREADS * N) {
  Packed<T> xs = *(GLOBAL Packed<T>*) (row + k);
  #pragma unroll
  for (int j = 0; j < R; ++j) {
    Packed<T> as = *(GLOBAL Packed<T>*) (low + (size_t) j * in + k);
    for (int i = 0; i < N; ++i) sums[j] += (float) xs.v[i] * (float) as.v[i];
  }
}
SHARED float of_lanes[THREADS / 32][R];
SHARED float z[R];
#pragma unroll
for (int j = 0; j < R; ++j) {
  float v = SUM_OF_LANES(sums[j]);
  if (me % 32 == 0) of_lanes[me / 32][j] = v;
}
WAIT;
if (me < R) {
  float v = 0.0f;
  for (int lane = 0; lane < THREADS / 32; ++lane) v += of_lanes[lane][me];
  z[me] = v;
}
WAIT;
const int column = bounds[part] + block * THREADS + me;
if (column < bounds[part + 1]) {
  float v = (float) y[(size_t) token * out_width + column];
  const size_t at = (size_t) slot * out_width + column;
  GAIN
  for (int j = 0; j < R; ++j) v += (float) b[at * R + j] * z[j];
  out[(size_t) token * out_width + column] = (T) v;
}
"""
LOW = """
constexpr int N = 16 / sizeof(T);
const int in = x_shape[x_ndim - 1], rows = a_shape[1] * R;
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
KERNELS = {  # text, inputs but gain and shift, output
    "one": (ONE, ("x", "y", "a", "b", "slots", "bounds"), "out"),
    "low": (LOW, ("x", "a", "slots"), "z"),
    "high": (HIGH, ("y", "z", "b", "slots", "bounds"), "out"),
}


def add_update(
    y: mx.array,
    x: mx.array,
    a: mx.array,
    b: mx.array,
    widths: Sequence[int],
    slots: mx.array,
    gain: mx.array | None = None,
    shift: mx.array | None = None,
    apart: bool | None = None,
) -> mx.array:
    """y · gain + shift + b (a x) of few tokens, each with the factors of its slot.

    Args:
        y: (..., Σ widths), what the layers on x computed, one after the other.
        x: (..., in), of y's type, as a and b are.
        a: (slots, layers, r, in).
        b: (slots, Σ widths, r).
        slots: (tokens or more,) uint32.
        gain: (slots, Σ widths), as `shift`.
        apart: whether a x has a kernel of its own; by default of several tokens.

    Returns: (..., Σ widths), in y's type.
    """
    scaled = {name: array for name, array in (("gain", gain), ("shift", shift)) if array is not None}
    _, layers, rank, inputs = a.shape
    tokens, bounds, way = x.size // inputs, bounds_of(tuple(widths)), _built.get(y.dtype, build)

    def run(
        name: str, arrays: list[mx.array], blocks: int, threads: int, shape: Shape, dtype: mx.Dtype, **scaled: mx.array
    ) -> mx.array:
        (out,) = _kernel(language(), name, tuple(scaled), way)(
            inputs=[*arrays, *scaled.values()],
            template=[("T", y.dtype), ("R", rank), ("THREADS", threads)],
            grid=(blocks * threads, tokens, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )
        return out

    if not (tokens > 1 if apart is None else apart):
        threads = ONE_THREADS if rank <= MANY_RANKS else ONE_THREADS // 2
        blocks = sum(-(-width // threads) for width in widths)
        return run("one", [x, y, a, b, slots, bounds], blocks, threads, y.shape, y.dtype, **scaled)
    z = run("low", [x, a, slots], layers * rank, LOW_THREADS, (tokens, layers, rank), mx.float32)
    blocks = -(-b.shape[1] // HIGH_THREADS)
    return run("high", [y, z, b, slots, bounds], blocks, HIGH_THREADS, y.shape, y.dtype, **scaled)


# Arrays of up to 8 bytes lie in pages that MLX's CUDA build moves when the host writes to one of them; these do not.
@cache
def bounds_of(widths: tuple[int, ...]) -> mx.array:
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
def _kernel(own: Language, name: str, scaled: tuple[str, ...], way: Callable[..., Any]) -> Any:
    """One of KERNELS, compiled once for each type and rank."""
    _, inputs, output = KERNELS[name]
    text, header = source(own, name, scaled), HEADERS[own] + HEADER
    return way("_".join([name, *scaled]), [*inputs, *scaled], [output], text, header)


def source(own: Language, name: str, scaled: Sequence[str]) -> str:
    """The text of one of KERNELS, with `gain` and `shift` if there are such."""
    lines = " ".join(line for each, line in (("gain", GAIN), ("shift", SHIFT)) if each in scaled)
    return spelled(KERNELS[name][0], WORDS[own] | {"GAIN": lines})


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
    text = "".join(source(own, name, ["gain", "shift"]) for name in KERNELS) + HEADERS[own] + HEADER
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
        ways = [add_update(y, x, a, b, widths, at, gain, shift, apart) for apart in (False, True)]
        added = mx.stack(ways).astype(mx.float32)
        mx.eval(added)
    except (RuntimeError, ValueError, OSError, KeyError):
        return math.inf
    y, gain, shift = (array.astype(mx.float32) for array in (y, gain, shift))
    return largest_error(added, y * gain[at] + shift[at] + by_products(x, a[at], b[at], widths))


def by_products(x: mx.array, a: mx.array, b: mx.array, widths: Sequence[int]) -> mx.array:
    """b (a x) in float32, (tokens, Σ widths): what the kernels' is held against.

    x: (tokens, in); a: (tokens, layers, r, in) and b: (tokens, Σ widths, r), of each token's slot.
    """
    x, a, b = (array.astype(mx.float32) for array in (x, a, b))
    z = (a @ x[:, None, :, None]).squeeze(-1)  # (tokens, layers, r)
    z = mx.concatenate([mx.repeat(z[:, i : i + 1], width, axis=1) for i, width in enumerate(widths)], axis=1)
    return (b * z).sum(axis=-1)
