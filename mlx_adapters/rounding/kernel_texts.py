"""The texts of the kernels of `kernels`, for Metal and CUDA: one for both, with the few words that differ.

There are four: choosing a group's grid, moving it to its best, and the loop over its columns, affine or float.
A thread takes one output row, with the group's numbers in registers.
"""

from typing import NamedTuple

from mlx_adapters.system.gpu_kernels import Language, spelled

WORDS = {
    "cuda": {
        "ROW": "blockIdx.x * blockDim.x + threadIdx.x",
        "MATRIX": "blockIdx.y",
        "RINT": "rintf",
        "FUNCTION": "__device__ inline",
        "TO_BITS": "__float_as_uint",
        "FROM_BITS": "__uint_as_float",
        "HALF_OF_X": "__half2float(__float2half_rn(x))",
    },
    "metal": {
        "ROW": "thread_position_in_grid.x",
        "MATRIX": "thread_position_in_grid.y",
        "RINT": "metal::rint",
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
FUNCTION float code_of(float x, float s, float b, float top) {
  const float code = RINT((x - b) / s);
  return code < 0.0f ? 0.0f : code > top ? top : code;
}
"""
START = """
const int row = ROW, matrix = MATRIX, out = target_shape[2];
if (row < out) {
  const int grid = matrix * out + row, first = matrix * GROUP * out + row, corner = matrix * GROUP * GROUP;
"""
COLUMNS = """
  const float s = scale[grid];
  float fed[GROUP];
  for (int j = 0; j < GROUP; ++j) {
    const int at = first + j * out;
    float wanted = target[at], odd = 0.0f;
    int i = 0;
    for (; i + 1 < j; i += 2) {
      wanted += block[corner + j * GROUP + i] * fed[i];
      odd += block[corner + j * GROUP + i + 1] * fed[i + 1];
    }
    if (i < j) wanted += block[corner + j * GROUP + i] * fed[i];
    wanted += odd;
    ROUND
    codes[at] = (unsigned char) code;
    values[at] = value;
    fed[j] = weight[at] - value;
    if (MOVED) fed[j] += start[at];
  }
}
"""
AFFINE = """
    const float b = bias[grid];
    const float code = code_of(wanted, s, b, float(TOP));
    const float value = s * code + b;
"""
FLOAT = """
    int low = 0, high = TOP;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (middles[middle] < wanted / s) low = middle + 1; else high = middle;
    }
    const int code = order[low];
    const float value = s * levels[code];
"""
# Tries are ranges, each followed by its refit (odd), the refit of the best, and the base's own grid.
CHOOSE = """
  const float top = float(TOP);
  float t[GROUP], v[GROUP];
  float low = target[first], high = low, total = 0.0f;
  for (int j = 0; j < GROUP; ++j) {
    t[j] = target[first + j * out];
    v[j] = weights[matrix * GROUP + j];
    low = t[j] < low ? t[j] : low;
    high = t[j] > high ? t[j] : high;
    total += v[j];
  }
  const float half_range = (high - low) / 2.0f, center = (low + high) / 2.0f;
  float best = 0.0f, best_s = 1.0f, best_b = 0.0f, s = 1.0f, b = 0.0f;
  for (int k = 0; k <= 2 * RANGES + STARTED; ++k) {
    if (k > 2 * RANGES) {
      s = start_scale[grid];
      b = start_bias[grid];
    } else if (k % 2 == 0 && k < 2 * RANGES) {
      const float half_width = half_range * shrinks[k / 2];
      s = as_scale(2.0f * half_width / top, STORED);
      b = as_stored(center - half_width, STORED);
    } else {
      if (k == 2 * RANGES) {
        s = best_s;
        b = best_b;
      }
      float mean_code = 0.0f, mean = 0.0f, spread = 0.0f, slope = 0.0f;
      for (int j = 0; j < GROUP; ++j) {
        mean_code += v[j] * code_of(t[j], s, b, top);
        mean += v[j] * t[j];
      }
      mean_code /= total;
      mean /= total;
      for (int j = 0; j < GROUP; ++j) {
        const float centered = code_of(t[j], s, b, top) - mean_code;
        spread += v[j] * centered * centered;
        slope += v[j] * centered * t[j];
      }
      slope /= spread > 1e-12f ? spread : 1e-12f;
      s = as_scale(slope, STORED);
      b = as_stored(mean - slope * mean_code, STORED);
    }
    float error = 0.0f;
    for (int j = 0; j < GROUP; ++j) {
      const float off = t[j] - (s * code_of(t[j], s, b, top) + b);
      error += v[j] * off * off;
    }
    if (k == 0 || error < best) {
      best = error;
      best_s = s;
      best_b = b;
    }
  }
  scale[grid] = best_s;
  bias[grid] = best_b;
}
"""
REFIT = """
  float c[GROUP];
  for (int j = 0; j < GROUP; ++j) c[j] = float(codes[first + j * out]);
  float ss = 0.0f, gs = 0.0f, sb = 0.0f, bb = 0.0f, gb = 0.0f;
  for (int j = 0; j < GROUP; ++j) {
    const float slope = target[first + j * out];
    float curved = 0.0f, sum = 0.0f;
    for (int i = 0; i < GROUP; ++i) {
      const float h = block[corner + j * GROUP + i];
      curved += h * c[i];
      sum += h;
    }
    ss += c[j] * curved;
    gs += c[j] * slope;
    sb += curved;
    bb += sum;
    gb += slope;
  }
  float s = old_scale[grid], b = old_bias[grid];
  const float least = 1e-6f * ss * bb + 1e-20f, product = ss * bb - sb * sb;
  const float determinant = product > least ? product : least;
  const float new_s = as_scale(s + (bb * gs - sb * gb) / determinant, STORED);
  const float new_b = as_stored(b + (ss * gb - sb * gs) / determinant, STORED);
  const float ds = new_s - s, db = new_b - b;
  if (2.0f * (ds * gs + db * gb) - (ds * ds * ss + 2.0f * ds * db * sb + db * db * bb) > 0.0f) {
    s = new_s;
    b = new_b;
  }
  scale[grid] = s;
  bias[grid] = b;
  for (int j = 0; j < GROUP; ++j) values[first + j * out] = s * c[j] + b;
}
"""


class Text(NamedTuple):
    """A kernel: its body, the names of its inputs (the first is (batch, group, out)) and of its outputs."""

    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


COLUMN_INPUTS = ("target", "weight", "start", "block", "scale", "bias")
TEXTS = {
    "columns": Text(COLUMNS.replace("ROUND", AFFINE.strip()), COLUMN_INPUTS, ("codes", "values")),
    "float_columns": Text(
        COLUMNS.replace("ROUND", FLOAT.strip()),
        (*COLUMN_INPUTS, "middles", "order", "levels"),
        ("codes", "values"),
    ),
    "choose": Text(CHOOSE, ("target", "weights", "shrinks", "start_scale", "start_bias"), ("scale", "bias")),
    "refit": Text(REFIT, ("target", "block", "codes", "old_scale", "old_bias"), ("scale", "bias", "values")),
}


def source(language: Language, text: str) -> str:
    """Some text of these in "cuda" or "metal"."""
    return spelled(text, WORDS[language])
