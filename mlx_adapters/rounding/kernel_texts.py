"""The texts of the kernels of `kernels`, for Metal and CUDA: one for both, with the few words that differ.

Three round a group: the first time (its grid is chosen, then its columns one by one), once more (its grid is moved to
its best), and in float modes only its columns. There a thread takes one output row. One factors and inverts panels, a
thread for each row or column.
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
        "FUNCTION": "__device__ inline",
        "TO_BITS": "__float_as_uint",
        "FROM_BITS": "__uint_as_float",
        "HALF_OF_X": "__half2float(__float2half_rn(x))",
    },
    "metal": {
        "ROW": "thread_position_in_grid.x",
        "MATRIX": "thread_position_in_grid.y",
        "PANEL": "threadgroup_position_in_grid.x",
        "THREAD": "thread_position_in_threadgroup.x",
        "SHARED": "threadgroup",
        "BARRIER": "metal::threadgroup_barrier",
        "BARRIER_OF": "metal::mem_flags::mem_threadgroup",
        "RINT": "metal::rint",
        "ROOT": "metal::sqrt",
        "FUNCTION": "inline",
        "TO_BITS": "as_type<uint>",
        "FROM_BITS": "as_type<float>",
        "HALF_OF_X": "float(half(x))",
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
FUNCTION float code_of(float x, float inverse, float b, float top) {
  const float code = RINT((x - b) * inverse);
  return code < 0.0f ? 0.0f : code > top ? top : code;
}
"""
START = """
const int row = ROW, matrix = MATRIX, group = target_shape[1], out = target_shape[2];
if (row < out) {
  const int grid = matrix * out + row, first = matrix * group * out + row, corner = matrix * group * group;
"""
LOOP = """
  float fed[GROUP];
  for (int j = 0; j < group; ++j) {
    const int at = first + j * out;
    float even = 0.0f, odd = 0.0f;
    int i = 0;
    for (; i + 1 < j; i += 2) {
      even += block[corner + j * group + i] * fed[i];
      odd += block[corner + j * group + i + 1] * fed[i + 1];
    }
    if (i < j) even += block[corner + j * group + i] * fed[i];
    AIM
    ROUND
    codes[at] = (unsigned char) code;
    values[at] = value;
    fed[j] = source - value;
    MOVED
  }
}
"""
AIMED = """
    const float source = weight[at], wanted = target[at] + (even + odd);"""
AFFINE = """
    const float code = code_of(wanted, 1.0f / s, b, float(TOP));
    const float value = s * code + b;"""
FLOAT = """
    int low = 0, high = TOP;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (middles[middle] < wanted / s) low = middle + 1; else high = middle;
    }
    const int code = order[low];
    const float value = s * levels[code];"""
# Tries are ranges, each followed by its refit (odd), the refit of the best, and the base's own grid.
CHOOSE = """
  const int ranges = shrinks_shape[0];
  const float top = float(TOP);
  float t[GROUP], v[GROUP];
  float low = target[first], high = low, total = 0.0f;
  for (int j = 0; j < group; ++j) {
    t[j] = target[first + j * out];
    v[j] = variances[matrix * group + j];
    low = t[j] < low ? t[j] : low;
    high = t[j] > high ? t[j] : high;
    total += v[j];
  }
  const float half_range = (high - low) / 2.0f, center = (low + high) / 2.0f;
  float best = 0.0f, best_s = 1.0f, best_b = 0.0f, s = 1.0f, b = 0.0f;
  for (int k = 0; k <= 2 * ranges + STARTED; ++k) {
    if (k > 2 * ranges) {
      s = start_scale[grid];
      b = start_bias[grid];
    } else if (k % 2 == 0 && k < 2 * ranges) {
      const float half_width = half_range * shrinks[k / 2];
      s = as_scale(2.0f * half_width / top, STORED);
      b = as_stored(center - half_width, STORED);
    } else {
      if (k == 2 * ranges) {
        s = best_s;
        b = best_b;
      }
      const float inverse = 1.0f / s;
      float mean_code = 0.0f, mean = 0.0f, spread = 0.0f, slope = 0.0f;
      for (int j = 0; j < group; ++j) {
        mean_code += v[j] * code_of(t[j], inverse, b, top);
        mean += v[j] * t[j];
      }
      mean_code /= total;
      mean /= total;
      for (int j = 0; j < group; ++j) {
        const float centered = code_of(t[j], inverse, b, top) - mean_code;
        spread += v[j] * centered * centered;
        slope += v[j] * centered * t[j];
      }
      slope /= spread > 1e-12f ? spread : 1e-12f;
      s = as_scale(slope, STORED);
      b = as_stored(mean - slope * mean_code, STORED);
    }
    const float inverse = 1.0f / s;
    float error = 0.0f;
    for (int j = 0; j < group; ++j) {
      const float off = t[j] - (s * code_of(t[j], inverse, b, top) + b);
      error += v[j] * off * off;
    }
    if (k == 0 || error < best) {
      best = error;
      best_s = s;
      best_b = b;
    }
  }
  s = best_s;
  b = best_b;
  scale[grid] = s;
  bias[grid] = b;
"""
REFIT = """
  float c[GROUP], t[GROUP], h[GROUP], sums[GROUP];
  for (int j = 0; j < group; ++j) c[j] = float(old_codes[first + j * out]);
  float ss = 0.0f, gs = 0.0f, sb = 0.0f, bb = 0.0f, gb = 0.0f;
  for (int j = 0; j < group; ++j) {
    float curved = 0.0f, sum = 0.0f;
    for (int i = 0; i < group; ++i) {
      const float own = block[corner + j * group + i];
      curved += own * c[i];
      sum += own;
    }
    t[j] = target[first + j * out];
    h[j] = curved;
    sums[j] = sum;
    ss += c[j] * curved;
    gs += c[j] * t[j];
    sb += curved;
    bb += sum;
    gb += t[j];
  }
  const float old_s = old_scale[grid], old_b = old_bias[grid];
  const float least = 1e-6f * ss * bb + 1e-20f, product = ss * bb - sb * sb;
  const float determinant = product > least ? product : least;
  const float new_s = as_scale(old_s + (bb * gs - sb * gb) / determinant, STORED);
  const float new_b = as_stored(old_b + (ss * gb - sb * gs) / determinant, STORED);
  const float ds = new_s - old_s, db = new_b - old_b;
  const bool better = 2.0f * (ds * gs + db * gb) - (ds * ds * ss + 2.0f * ds * db * sb + db * db * bb) > 0.0f;
  const float s = better ? new_s : old_s, b = better ? new_b : old_b;
  scale[grid] = s;
  bias[grid] = b;
  for (int j = 0; j < group; ++j) t[j] += (old_s - s) * h[j] + (old_b - b) * sums[j];
"""
REAIMED = """
    const float source = s * c[j] + b;
    const float wanted = source + (t[j] + (even + odd)) / block[corner + j * group + j];"""
# R upper, from the last column to the first, then column by column its inverse.
PANELS = """
const int matrix = PANEL, row = THREAD, size = matrices_shape[1], corner = matrix * size * size;
SHARED float r[SIZE * (SIZE + 1)];
float x[SIZE];
for (int j = 0; j < size; ++j) {
  if (row < size) r[row * (size + 1) + j] = matrices[corner + row * size + j];
}
BARRIER(BARRIER_OF);
for (int j = size - 1; j >= 0 && !FACTORED; --j) {
  float mine = 0.0f, own = 0.0f;
  if (row <= j) {
    mine = r[row * (size + 1) + j];
    own = r[j * (size + 1) + j];
    for (int k = j + 1; k < size; ++k) {
      mine -= r[row * (size + 1) + k] * r[j * (size + 1) + k];
      own -= r[j * (size + 1) + k] * r[j * (size + 1) + k];
    }
    own = ROOT(own);
  }
  BARRIER(BARRIER_OF);
  if (row <= j) r[row * (size + 1) + j] = row < j ? mine / own : own;
  BARRIER(BARRIER_OF);
}
if (row < size) {
  for (int i = size - 1; i >= 0; --i) {
    float sum = i == row ? 1.0f : 0.0f;
    for (int k = i + 1; k <= row; ++k) sum -= r[i * (size + 1) + k] * x[k];
    x[i] = i <= row ? sum / r[i * (size + 1) + i] : 0.0f;
  }
  for (int i = 0; i < size; ++i) {
    factor[corner + i * size + row] = i <= row ? r[i * (size + 1) + row] : 0.0f;
    inverse[corner + i * size + row] = x[i];
  }
}
"""


def _loop(aim: str, rounding: str, moved: str = "") -> str:
    return LOOP.replace("AIM", aim.strip()).replace("ROUND", rounding.strip()).replace("MOVED", moved)


class Text(NamedTuple):
    """A kernel: its body, the names of its inputs (the first, "target", is (batch, group, out)) and of its outputs."""

    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


OUTPUTS = ("scale", "bias", "codes", "values", "moved")
TEXTS = {
    "columns": Text(
        START + "  const float s = scale[grid];" + _loop(AIMED, FLOAT),
        ("target", "weight", "block", "scale", "middles", "order", "levels"),
        ("codes", "values"),
    ),
    "forward": Text(
        START + CHOOSE + _loop(AIMED, AFFINE, "moved[at] = fed[j];"),
        ("target", "weight", "block", "variances", "shrinks", "start_scale", "start_bias"),
        OUTPUTS,
    ),
    "again": Text(
        START + REFIT + _loop(REAIMED, AFFINE, "moved[at] = old_s * c[j] + old_b - value;"),
        ("target", "block", "old_scale", "old_bias", "old_codes"),
        OUTPUTS,
    ),
    "panels": Text(PANELS, ("matrices",), ("factor", "inverse")),
}


def source(language: Language, text: str) -> str:
    """Some text of these in "cuda" or "metal"."""
    return spelled(text, WORDS[language])
