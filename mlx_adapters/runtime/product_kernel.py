"""One token's product with a matrix packed in 4 bits, and an adapter's update of it, in one CUDA kernel.

Decoding waits for the host, which launches kernels: here a layer, or a group of them on one input, takes one. A block's
warps share out the columns of some rows, in groups of those that have one scale, and those of a; b z is added where
their sums meet. Tensor cores multiply (16 rows by 8 columns at a time, all of which are x): two codes become two
numbers in 16 bits, 128 + c or 1024 + c, by a mask, and what was added is taken off a group's sum. Sums are in float32
and rounded once.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from mlx_adapters.models.quantized_check import largest_error, tried
from mlx_adapters.runtime.kernel import MOST_ERROR, MOST_RANKS, bounds_of, by_products
from mlx_adapters.storage.tensor_names import BIAS, QUANTIZED_LEAVES, SCALES
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import FEW, build, chosen, spelled
from mlx_adapters.system.machine import on_cuda

ROWS = 16  # that a tensor core takes
FEW_BLOCKS, MANY_ROWS = 256, 8192
SHARES = ((1, 16), (1, 8), (2, 8))  # a block's rows, in ROWS, and its warps: of few blocks, of more, of many rows
WORDS = {  # one, twice; what turns two codes into numbers; what they are too large then
    mx.bfloat16: {"KIND": "bf16", "ONES": "0x3F803F80", "MAGIC": "0x43004300", "OFFSET": "128.0f"},
    mx.float16: {"KIND": "f16", "ONES": "0x3C003C00", "MAGIC": "0x64006400", "OFFSET": "1024.0f"},
}
HEADER = (
    FEW
    + """
__device__ inline unsigned two(unsigned codes) { return (codes & 0x000F000F) | MAGIC; }
using Word = unsigned;
__device__ inline void mma(float (&c)[4], Word a0, Word a1, Word a2, Word a3, Word b0, Word b1) {
  asm volatile(
    "mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""
)
# In a quad of four lanes each has a quarter of a group's columns, of two rows; a word's eight codes are those of four
# pairs, x's numbers are put in pairs alike.
SOURCE = """
constexpr int WORDS = GROUP / 32, TILE = 16 * M, RANKS = (R + 7) / 8, HELD = (TILE * R + 32 * WARPS - 1) / (32 * WARPS);
const int in = x_shape[x_ndim - 1], me = threadIdx.x, lane = me % 32, warp = me / 32, quad = lane / 4, place = lane % 4;
int block = blockIdx.x, part = 0;
for (; part < PARTS - 1; ++part) {
  const int blocks = (bounds[part + 1] - bounds[part] + TILE - 1) / TILE;
  if (block < blocks) break;
  block -= blocks;
}
const int first = bounds[part] + block * TILE, end = bounds[part + 1];
__shared__ float lows[WARPS][8 * RANKS];
__shared__ float totals[WARPS][TILE];
__shared__ float highs[TILE * R];
float high[HELD];
#pragma unroll
for (int h = 0; h < HELD; ++h) {
  const int at = me + 32 * WARPS * h;
  high[h] = at < TILE * R && first + at / R < end ? (float) b[(size_t) first * R + at] : 0.0f;
}
float sums[M][2];
#pragma unroll
for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = 0.0f;
#pragma unroll 2 / M
for (int g = warp; g < in / GROUP; g += WARPS) {
  const int k = g * GROUP + place * 8 * WORDS;
  Few<unsigned, WORDS> words[M][2];
  float scale[M][2], least[M][2];
  #pragma unroll
  for (int m = 0; m < M; ++m) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const size_t row = min(first + 16 * m + 8 * i + quad, end - 1), at = row * (in / GROUP) + g;
      words[m][i] = *reinterpret_cast<const Few<unsigned, WORDS>*>(w + row * (in / 8) + k / 8);
      scale[m][i] = (float) scales[at];
      least[m][i] = (float) biases[at];
    }
  }
  float dots[M][4], all[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    all[i] = 0.0f;
    #pragma unroll
    for (int m = 0; m < M; ++m) dots[m][i] = 0.0f;
  }
  #pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const Few<unsigned, 4> xs = *reinterpret_cast<const Few<unsigned, 4>*>(x + k + 8 * i);
    const unsigned x0 = __byte_perm(xs.v[0], xs.v[2], 0x5410), x1 = __byte_perm(xs.v[0], xs.v[2], 0x7632);
    const unsigned x2 = __byte_perm(xs.v[1], xs.v[3], 0x5410), x3 = __byte_perm(xs.v[1], xs.v[3], 0x7632);
    mma(all, ONES, ONES, ONES, ONES, x0, x1);
    mma(all, ONES, ONES, ONES, ONES, x2, x3);
    #pragma unroll
    for (int m = 0; m < M; ++m) {
      const unsigned u = words[m][0].v[i], v = words[m][1].v[i];
      mma(dots[m], two(u), two(v), two(u >> 4), two(v >> 4), x0, x1);
      mma(dots[m], two(u >> 8), two(v >> 8), two(u >> 12), two(v >> 12), x2, x3);
    }
  }
  #pragma unroll
  for (int m = 0; m < M; ++m) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) sums[m][i] += scale[m][i] * (dots[m][2 * i] - OFFSET * all[0]) + least[m][i] * all[0];
  }
}
#pragma unroll
for (int t = 0; t < RANKS; ++t) {
  float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const T* low = a + ((size_t) part * R + min(8 * t + quad, R - 1)) * in;
  #pragma unroll 8
  for (int k = 32 * warp + 8 * place; k < in; k += 32 * WARPS) {
    const Few<unsigned, 4> xs = *reinterpret_cast<const Few<unsigned, 4>*>(x + k);
    const Few<unsigned, 4> as = *reinterpret_cast<const Few<unsigned, 4>*>(low + k);
    mma(z, xs.v[0], xs.v[0], xs.v[1], xs.v[1], as.v[0], as.v[1]);
    mma(z, xs.v[2], xs.v[2], xs.v[3], xs.v[3], as.v[2], as.v[3]);
  }
  if (quad == 0) {
    lows[warp][8 * t + 2 * place] = z[0];
    lows[warp][8 * t + 2 * place + 1] = z[1];
  }
}
if (place == 0) {
  #pragma unroll
  for (int m = 0; m < M; ++m) {
    totals[warp][16 * m + quad] = sums[m][0];
    totals[warp][16 * m + 8 + quad] = sums[m][1];
  }
}
__syncthreads();
#pragma unroll
for (int h = 0; h < HELD; ++h) {
  const int at = me + 32 * WARPS * h;
  float z = 0.0f;
  #pragma unroll
  for (int i = 0; i < WARPS; ++i) z += lows[i][at % R];
  if (at < TILE * R) highs[at] = high[h] * z;
}
__syncthreads();
const int row = first + me;
if (me < TILE && row < end) {
  float v = 0.0f;
  #pragma unroll
  for (int i = 0; i < WARPS; ++i) v += totals[i][me];
  BIAS
  GAIN
  #pragma unroll
  for (int j = 0; j < R; ++j) v += highs[me * R + j];
  SHIFT
  T* out = OUT;
  out[row - bounds[part]] = (T) v;
}
"""
ALWAYS = ("x", "w", "scales", "biases", "a", "b", "bounds")
TERMS = {
    "bias": "v += (float) bias[row];",
    "gain": "v *= (float) gain[row];",
    "shift": "v += (float) shift[row];",
}
Parts = list[mx.array]


def product_and_update(
    x: mx.array,
    packed: Mapping[str, mx.array],
    options: Mapping[str, Any],
    a: mx.array,
    b: mx.array,
    widths: Sequence[int],
    gain: mx.array | None = None,
    shift: mx.array | None = None,
    share: tuple[int, int] | None = None,
) -> Parts:
    """(W x + bias) · gain + shift + b (a x) of one token, an array (..., width) for each of the layers on x.

    Args:
        x: (..., in), one token.
        packed: the weight (Σ widths, in) of the layers, one below the other, its scales and biases, and a bias, if
            there is one, all of x's type.
        options: its "group_size".
        a: (1, layers, r, in), as in `kernel.add_update`.
        b: (1, Σ widths, r).
        gain: (Σ widths,), as `shift`.
        share: one of SHARES.
    """
    terms = {"bias": packed.get(BIAS), "gain": gain, "shift": shift}
    extra = {name: array for name, array in terms.items() if array is not None}
    tiles, warps = share or share_of(tuple(widths))
    bounds, blocks = _blocks(tuple(widths), tiles * ROWS)
    constants = {"GROUP": options["group_size"], "R": a.shape[-2], "PARTS": len(widths), "M": tiles, "WARPS": warps}
    way = _built.get((x.dtype, options["group_size"]), build)
    return _kernel(x.dtype, len(widths), tuple(extra), way)(
        inputs=[x, *(packed[name] for name in QUANTIZED_LEAVES), a, b, bounds, *extra.values()],
        template=[("T", x.dtype), *constants.items()],
        grid=(blocks * warps * 32, 1, 1),
        threadgroup=(warps * 32, 1, 1),
        output_shapes=[(*x.shape[:-1], width) for width in widths],
        output_dtypes=[x.dtype] * len(widths),
    )


@cache
def share_of(widths: tuple[int, ...]) -> tuple[int, int]:
    """How a block is made for layers of these widths: few blocks have more warps, so that they end sooner; of many rows
    a block takes twice as many, so that a is read half as often."""
    few, more, many = SHARES
    return many if sum(widths) >= MANY_ROWS else few if _blocks(widths, ROWS)[1] <= FEW_BLOCKS else more


@cache
def _blocks(widths: tuple[int, ...], rows: int) -> tuple[mx.array, int]:
    """(where each layer's rows begin and the last one's end, how many blocks there are)."""
    return bounds_of(widths), sum(-(-width // rows) for width in widths)


_built: dict[tuple[mx.Dtype, int], Callable[..., Any]] = {}  # how it is built for a type and size of groups


@cache
def _kernel(dtype: mx.Dtype, parts: int, extra: tuple[str, ...], way: Callable[..., Any]) -> Any:
    outputs, header = [f"out_{part}" for part in range(parts)], spelled(HEADER, WORDS[dtype])
    name = "_".join(["product_and_update", WORDS[dtype]["KIND"], *extra])
    return way(name, [*ALWAYS, *extra], outputs, source(dtype, parts, extra), header)


def source(dtype: mx.Dtype, parts: int, extra: Sequence[str]) -> str:
    """The kernel's text, for so many layers."""
    out = chosen("part", [f"out_{part}" for part in range(parts)])
    terms = {name.upper(): TERMS[name] if name in extra else "" for name in TERMS}
    return spelled(SOURCE, WORDS[dtype] | terms | {"OUT": out})


def serves(x: mx.array, packed: Mapping[str, mx.array], options: Mapping[str, Any] | None, b: mx.array) -> bool:
    """Whether the kernel is there, right, and made for an update by b (..., r) of such a matrix."""
    if options is None or not on_cuda() or options["mode"] != "affine" or options["bits"] != 4 or not _has_cores():
        return False
    fits = x.size == x.shape[-1] and b.shape[-1] <= MOST_RANKS and x.dtype in WORDS
    alike = x.dtype == packed[SCALES].dtype == packed.get(BIAS, b).dtype == b.dtype
    return fits and alike and is_right(x.dtype, options["group_size"])


@cache
def _has_cores() -> bool:
    """Whether the chip's tensor cores multiply 16 columns at a time: from sm_80 on. For others nothing is compiled."""
    return int(mx.device_info().get("compute_capability_major", 0)) >= 8


@cache
def is_right(dtype: mx.Dtype, group_size: int) -> bool:
    """Whether this device computes with the kernel what it computes with products; tried once, on small arrays, and
    remembered."""
    text = hashlib.sha256((source(dtype, 2, list(TERMS)) + HEADER).encode()).hexdigest()
    kind = f"product_and_update {text[:16]}, groups of {group_size}"
    return tried(kind, _built, (dtype, group_size), partial(_error, dtype, group_size), MOST_ERROR)


def _error(dtype: mx.Dtype, group_size: int) -> float:
    """How far the kernel is off, relative to the largest number; infinite where it is refused."""
    keys = mx.random.split(mx.random.key(0), 6)
    widths, inputs, rank, out = (40, 21), 17 * 128, 12, 61  # more groups than warps, and no multiple of eight ranks
    shapes = [(1, inputs), (out, inputs), (1, 2, rank, inputs), (1, out, rank), (out,), (out,)]
    arrays = [mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=True)]
    x, weight, a, b, gain, shift = arrays
    options = {"bits": 4, "group_size": group_size}
    packed = dict(zip(QUANTIZED_LEAVES, mx.quantize(weight, **options), strict=True))
    given = x, {**packed, BIAS: shift}, options, a, b, widths, gain, shift
    try:
        all_ways = mx.stack([mx.concatenate(product_and_update(*given, share), axis=-1)[0] for share in SHARES])
        mx.eval(all_ways)
    except (RuntimeError, ValueError, OSError, KeyError):
        return math.inf
    update = by_products(x, a, b, widths)[0]
    x, gain, shift, scales, biases = (
        array.astype(mx.float32) for array in (x, gain, shift, packed[SCALES], packed["biases"])
    )
    whole = mx.dequantize(packed["weight"], scales, biases, **options)
    return largest_error(all_ways, ((x @ whole.T)[0] + shift) * gain + shift + update)
