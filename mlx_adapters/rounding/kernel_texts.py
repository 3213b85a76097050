"""The texts of the kernels of `kernels`, for Metal and CUDA: one for both, with the few words that differ.

Three round a step's groups one after the other: the first time (its grid is chosen, then its columns one by one), once
more (its grid is moved to its best), and in float modes the columns of one group. There 32 lanes that run in step take
one output row, each lane every 32nd column. Loops that run long have no constant end: unrolled they take a minute to
compile.
"""

from typing import NamedTuple

from mlx_adapters.system.gpu_kernels import Language, spelled

WORDS = {
    "cuda": {
        "ROW": "blockIdx.x * blockDim.x + threadIdx.x",
        "MATRIX": "blockIdx.y",
        "PANEL": "blockIdx.x",
        "THREAD": "threadIdx.x",
        "SHARED": "__shared__",
        "BARRIER": "__syncthreads",
        "RINT": "rintf",
        "ROOT": "sqrtf",
        "BARRIER_OF": "",
        "SHUFFLE": "__shfl_sync",
        "SHUFFLE_XOR": "__shfl_xor_sync",
        "ALL": "0xffffffffu,",
        "FUNCTION": "__device__ inline",
        "TO_BITS": "__float_as_uint",
        "FROM_BITS": "__uint_as_float",
        "HALF_OF_X": '[](float y) { unsigned short h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(y)); '
        'asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(h)); return y; }(x)',  # (without CUDA's headers)
        "UNROLL": '_Pragma("unroll 16")',
    },
    "metal": {
        "ROW": "thread_position_in_grid.x",
        "MATRIX": "thread_position_in_grid.y",
        "PANEL": "threadgroup_position_in_grid.x",
        "THREAD": "thread_position_in_threadgroup.x",
        "SHARED": "threadgroup",
        "BARRIER": "metal::threadgroup_barrier",
        "BARRIER_OF": "metal::mem_flags::mem_threadgroup",
        "SHUFFLE": "metal::simd_shuffle",
        "SHUFFLE_XOR": "metal::simd_shuffle_xor",
        "ALL": "",
        "RINT": "metal::rint",
        "ROOT": "metal::sqrt",
        "FUNCTION": "inline",
        "TO_BITS": "as_type<uint>",
        "FROM_BITS": "as_type<float>",
        "HALF_OF_X": "float(half(x))",
        "UNROLL": '_Pragma("clang loop unroll_count(16)")',
    },
}
HEADER = """
FUNCTION float as_stored(float x, int stored) {
  if (stored == 2) return HALF_OF_X;
  if (stored == 0) return x;
  const unsigned int bits = TO_BITS(x);
  return FROM_BITS((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}
FUNCTION float as_scale(float x, int stored) {
  const float s = as_stored(x, stored);
  return (s < 0.0f ? -s : s) < 1e-30f ? 1e-8f : s;
}
FUNCTION float sum_of(float x) {
  for (int k = 16; k > 0; k /= 2) x += SHUFFLE_XOR(ALL x, k);
  return x;
}
FUNCTION float least_of(float x) {
  for (int k = 16; k > 0; k /= 2) {
    const float other = SHUFFLE_XOR(ALL x, k);
    x = other < x ? other : x;
  }
  return x;
}
FUNCTION float most_of(float x) {
  return -least_of(-x);
}
FUNCTION float code_of(float x, float inverse, float b, float top) {
  const float code = RINT((x - b) * inverse);
  return code < 0.0f ? 0.0f : code > top ? top : code;
}
"""
START = """
const int thread = ROW, lane = thread % 32, row = thread / 32, matrix = MATRIX;
const int columns = target_shape[1], out = target_shape[2], groups = columns / (OWN * WIDTH);
float later[COLUMNS];  // of this group and those after it: what earlier ones feed on to them
for (int p = 0; p < COLUMNS; ++p) later[p] = 0.0f;
for (int g = 0; g < groups && row < out; ++g) {
  const int begin = g * OWN * WIDTH, left = columns - begin, grid = (matrix * groups + g) * out + row;
  const int top_row = matrix * columns + begin, first = top_row * out + row;
  const int corner = top_row * columns + begin + lane;
"""
# Of affine grids: no constants, with which each precision would be compiled anew.
SETTINGS = "const float top = float(settings[0]);\nconst int stored = settings[1], started = settings[2];"
# Every lane rounds its own column, the one whose turn it is hands its error on.
LOOP = """
  float fed[OWN], found[OWN], taken[OWN];
  for (int p = 0; p < OWN; ++p) fed[p] = 0.0f;
  for (int q = 0; q < OWN; ++q) {
    for (int l = 0; l < WIDTH; ++l) {
      AIM
      ROUND
      if (lane == l) {
        found[q] = float(code);
        taken[q] = value;
      }
      const float error = SHUFFLE(ALL source - value, l);
      for (int p = 0; p < OWN; ++p) if (lane < WIDTH) fed[p] += block[corner + (32 * q + l) * columns + 32 * p] * error;
    }
  }
  for (int p = 0; p < OWN; ++p) if (lane < WIDTH) {
    const int at = first + (32 * p + lane) * out;
    codes[at] = (unsigned char) found[p];
    values[at] = taken[p];
    MOVED
  }
  FEED
}
"""
AFFINE = """
      const float code = code_of(wanted, inverse, b, top);
      const float value = s * code + b;"""
FLOAT = """
      int low = 0, high = TOP;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (middles[middle] < wanted / s) low = middle + 1; else high = middle;
      }
      const int code = order[low];
      const float value = s * levels[code];"""
# A group's errors move the groups after it; of memory many numbers are asked at once, or each is waited for.
FEED = """for (int p = OWN; p < COLUMNS && 32 * p < left; ++p) {
    float fed_on = later[p];
    for (int q = 0; q < OWN; ++q) {
      UNROLL
      for (int l = 0; l < WIDTH; ++l)
        fed_on += block[corner + (32 * q + l) * columns + 32 * p] * SHUFFLE(ALL taken[q], l);
    }
    later[p] = fed_on;
  }
  for (int p = 0; p < COLUMNS; ++p) later[p] = p + OWN < COLUMNS ? later[p + OWN] : 0.0f;"""
# What is rounded, and what it is to be near.
READ = """
  float w[OWN], t[OWN];
  for (int p = 0; p < OWN; ++p) {
    const int at = first + (32 * p + lane) * out;
    w[p] = lane < WIDTH ? weight[at] : 0.0f;
    t[p] = lane < WIDTH ? target[at] + later[p] : 0.0f;
  }
"""
AIMED = """
      const float source = w[q], wanted = t[q] + fed[q];"""
# Tries are ranges, each followed by its refit (odd), the refit of the best, and the base's own grid.
CHOOSE = """
  const int ranges = shrinks_shape[0];
  float v[OWN], low = t[0], high = t[0], total = 0.0f;
  for (int p = 0; p < OWN; ++p) {
    v[p] = variances[matrix * columns + begin + 32 * p + lane];
    low = t[p] < low ? t[p] : low;
    high = t[p] > high ? t[p] : high;
    total += v[p];
  }
  low = least_of(low);
  high = most_of(high);
  total = sum_of(total);
  const float half_range = (high - low) / 2.0f, center = (low + high) / 2.0f;
  float best = 0.0f, best_s = 1.0f, best_b = 0.0f, s = 1.0f, b = 0.0f, inverse = 1.0f;
  for (int k = 0; k <= 2 * ranges + started; ++k) {
    if (k > 2 * ranges) {
      s = start_scale[grid];
      b = start_bias[grid];
    } else if (k % 2 == 0 && k < 2 * ranges) {
      const float half_width = half_range * shrinks[k / 2];
      s = as_scale(2.0f * half_width / top, stored);
      b = as_stored(center - half_width, stored);
    } else {
      if (k == 2 * ranges) {
        s = best_s;
        b = best_b;
      }
      inverse = 1.0f / s;
      float mean_code = 0.0f, mean = 0.0f, spread = 0.0f, slope = 0.0f;
      for (int p = 0; p < OWN; ++p) {
        mean_code += v[p] * code_of(t[p], inverse, b, top);
        mean += v[p] * t[p];
      }
      mean_code = sum_of(mean_code) / total;
      mean = sum_of(mean) / total;
      for (int p = 0; p < OWN; ++p) {
        const float centered = code_of(t[p], inverse, b, top) - mean_code;
        spread += v[p] * centered * centered;
        slope += v[p] * centered * t[p];
      }
      spread = sum_of(spread);
      slope = sum_of(slope) / (spread > 1e-12f ? spread : 1e-12f);
      s = as_scale(slope, stored);
      b = as_stored(mean - slope * mean_code, stored);
    }
    inverse = 1.0f / s;
    float error = 0.0f;
    for (int p = 0; p < OWN; ++p) {
      const float off = t[p] - (s * code_of(t[p], inverse, b, top) + b);
      error += v[p] * off * off;
    }
    error = sum_of(error);
    if (k == 0 || error < best) {
      best = error;
      best_s = s;
      best_b = b;
    }
  }
  s = best_s;
  b = best_b;
  inverse = 1.0f / s;
"""
REFIT = """
  float c[OWN], t[OWN], h[OWN], sums[OWN];
  for (int p = 0; p < OWN; ++p) {
    const int at = first + (32 * p + lane) * out;
    c[p] = float(old_codes[at]);
    t[p] = target[at] + later[p];
    h[p] = 0.0f;
    sums[p] = 0.0f;
  }
  for (int q = 0; q < OWN; ++q) {
    for (int l = 0; l < WIDTH; ++l) {
      const float other = SHUFFLE(ALL c[q], l);
      for (int p = 0; p < OWN; ++p) {
        const float own = block[corner + (32 * q + l) * columns + 32 * p];
        h[p] += own * other;
        sums[p] += own;
      }
    }
  }
  float ss = 0.0f, gs = 0.0f, sb = 0.0f, bb = 0.0f, gb = 0.0f;
  for (int p = 0; p < OWN; ++p) {
    ss += c[p] * h[p];
    gs += c[p] * t[p];
    sb += h[p];
    bb += sums[p];
    gb += t[p];
  }
  ss = sum_of(ss);
  gs = sum_of(gs);
  sb = sum_of(sb);
  bb = sum_of(bb);
  gb = sum_of(gb);
  const float old_s = old_scale[grid], old_b = old_bias[grid];
  const float least = 1e-6f * ss * bb + 1e-20f, product = ss * bb - sb * sb;
  const float determinant = product > least ? product : least;
  const float new_s = as_scale(old_s + (bb * gs - sb * gb) / determinant, stored);
  const float new_b = as_stored(old_b + (ss * gb - sb * gs) / determinant, stored);
  const float ds = new_s - old_s, db = new_b - old_b;
  const bool better = 2.0f * (ds * gs + db * gb) - (ds * ds * ss + 2.0f * ds * db * sb + db * db * bb) > 0.0f;
  const float s = better ? new_s : old_s, b = better ? new_b : old_b, inverse = 1.0f / s;
  for (int p = 0; p < OWN; ++p) {
    t[p] += (old_s - s) * h[p] + (old_b - b) * sums[p];
    h[p] = 1.0f / block[corner + (32 * p + lane) * columns + 32 * p];
  }
"""
REAIMED = """
      const float source = s * c[q] + b, wanted = source + (t[q] + fed[q]) * h[q];"""
GRID = """
  if (lane == 0) {
    scale[grid] = s;
    bias[grid] = b;
  }
"""


def _loop(aim: str, rounding: str, moved: str = "") -> str:
    """The columns' loop; `moved` is by how much one fell, which is fed on to later groups."""
    parts = {"AIM": aim.strip(), "ROUND": rounding.strip(), "MOVED": "", "FEED": ""}
    if moved:
        parts |= {"MOVED": f"moved[at] = taken[p] = {moved};", "FEED": FEED}
    return spelled(LOOP, parts)


class Text(NamedTuple):
    """A kernel: its body, the names of its inputs (the first, "target": (batch, columns, out)) and of its outputs."""

    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


OUTPUTS = ("scale", "bias", "codes", "values", "moved")
TEXTS = {
    "columns": Text(
        START + READ + "  const float s = scale[grid];" + _loop(AIMED, FLOAT),
        ("target", "weight", "block", "scale", "middles", "order", "levels"),
        ("codes", "values"),
    ),
    "forward": Text(
        SETTINGS + START + READ + CHOOSE + GRID + _loop(AIMED, AFFINE, "w[p] - taken[p]"),
        ("target", "weight", "block", "variances", "shrinks", "settings", "start_scale", "start_bias"),
        OUTPUTS,
    ),
    "again": Text(
        SETTINGS + START + REFIT + GRID + _loop(REAIMED, AFFINE, "old_s * c[p] + old_b - taken[p]"),
        ("target", "block", "old_scale", "old_bias", "old_codes", "settings"),
        OUTPUTS,
    ),
}


def source(language: Language, text: str) -> str:
    """Some text of these in "cuda" or "metal"."""
    return spelled(text, WORDS[language])
