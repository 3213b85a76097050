"""One GPU kernel that adds a low-rank update to a base product of few tokens, for one adapter or one for each token.

Two small products one after the other cost a GPU more in waiting than in work. Here every block of threads computes
z = a x for itself, from the cache, and then its columns of y · gain + shift + b z: no block waits for another.
Sums are in float32 and rounded once. One text serves CUDA and Metal; `WORDS` holds what they spell differently.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import Language, build, language, spelled
from mlx_adapters.system.machine import on_gpu

MOST_TOKENS, MOST_RANKS = 16, 64  # beyond them products are faster; registers hold the sums of so many ranks
THREADS = 512  # of a block: 256 took 1.04, 128 took 1.12 of its time (H200, the layers of a 4B model, rank 8)

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
SOURCE = """
constexpr int N = 16 / sizeof(T);
const int me = THREAD, token = TOKEN, slot = slots[token];
int block = BLOCK, part = 0, start = 0, end = 0;
PARTS
GLOBAL T* row = x + (size_t) token * IN;
GLOBAL T* low = a + ((size_t) slot * COUNT + part) * R * IN;
float sums[R];
#pragma unroll
for (int j = 0; j < R; ++j) sums[j] = 0.0f;
for (int k = me * N; k < IN; k += THREADS * N) {
  Packed<T> xs = *(GLOBAL Packed<T>*) (row + k);
  #pragma unroll
  for (int j = 0; j < R; ++j) {
    Packed<T> as = *(GLOBAL Packed<T>*) (low + (size_t) j * IN + k);
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
const int column = start + block * THREADS + me;
if (column < end) {
  float v = (float) y[(size_t) token * OUT + column];
  const size_t at = (size_t) slot * OUT + column;
  GAIN
  for (int j = 0; j < R; ++j) v += (float) b[at * R + j] * z[j];
  out[(size_t) token * OUT + column] = (T) v;
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
        slots: (tokens,) uint32.
        gain: (slots, Σ widths), as `shift`.

    Returns: (..., Σ widths), in y's type.
    """
    given = {"x": x, "y": y, "a": a, "b": b, "slots": slots, "gain": gain, "shift": shift}
    given = {name: array for name, array in given.items() if array is not None}
    kernel = _kernel(language(), tuple(widths), tuple(given))
    blocks = sum(-(-width // THREADS) for width in widths)
    options: dict[str, Any] = {
        "T": y.dtype,
        "IN": x.shape[-1],
        "OUT": y.shape[-1],
        "R": a.shape[2],
        "COUNT": a.shape[1],
    }
    (out,) = kernel(
        inputs=list(given.values()),
        template=list((options | {"THREADS": THREADS}).items()),
        grid=(blocks * THREADS, slots.size, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[y.shape],
        output_dtypes=[y.dtype],
    )
    return out


@cache
def _kernel(own: Language, widths: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """The kernel for layers of these widths that is given these arrays."""
    name = "_".join(["add_update", *map(str, widths), *names[5:]])
    return build(name, names, ["out"], source(own, widths, names), HEADERS[own] + HEADER)


def source(own: Language, widths: Sequence[int], names: Sequence[str]) -> str:
    """The kernel's text: which block works for which layer is written out."""
    parts, blocks, start = [], 0, 0
    for part, width in enumerate(widths):
        first, blocks = blocks, blocks - (-width // THREADS)
        here = f"part = {part}; block -= {first}; start = {start}; end = {start + width};"
        parts.append(f"if (block < {blocks}) {{ {here} }}")
        start += width
    scaled = " ".join(line for name, line in (("gain", GAIN), ("shift", SHIFT)) if name in names)
    words = WORDS[own] | {"PARTS": "\nelse ".join(parts), "GAIN": scaled}
    return spelled(SOURCE, words)


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
    """Whether this device computes with the kernel what it computes with products; tried once, on small factors."""
    return on_gpu() and _tried(dtype)


def first(x: mx.array) -> mx.array:
    """(tokens,) the first slot for each token of x."""
    return _zeros(x.size // x.shape[-1])


@cache
def _zeros(count: int) -> mx.array:
    return mx.array([0] * count, mx.uint32)


@cache
def _tried(dtype: mx.Dtype) -> bool:
    keys = mx.random.split(mx.random.key(0), 6)
    widths, tokens, slots, inputs, rank = (40, 600), 3, 2, 72, 5
    shapes = [(tokens, sum(widths)), (tokens, inputs), (slots, 2, rank, inputs), (slots, sum(widths), rank)]
    y, x, a, b = (mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=False))
    gain, shift = (mx.random.normal((slots, sum(widths)), key=key).astype(dtype) for key in keys[4:])
    at = mx.array([1, 0, 1], mx.uint32)
    try:
        added = add_update(y, x, a, b, widths, at, gain, shift).astype(mx.float32)
        mx.eval(added)
    except (RuntimeError, ValueError):
        return False
    y, x, a, b, gain, shift = (array.astype(mx.float32) for array in (y, x, a, b, gain, shift))
    z = (a[at] @ x[:, None, :, None]).squeeze(-1)  # (tokens, layers, r)
    z = mx.concatenate([mx.repeat(z[:, i : i + 1], width, axis=1) for i, width in enumerate(widths)], axis=1)
    expected = y * gain[at] + shift[at] + (b[at] * z).sum(axis=-1)
    return bool(mx.allclose(added, expected, rtol=1e-2, atol=1e-2 * mx.abs(expected).max().item()).item())
