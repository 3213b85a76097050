"""What is done for each output row of one group on MLX: kernels for Metal and CUDA, and plain operations anywhere.

There are three: choosing the group's grid, moving it to its best, and the loop over the columns. Each kernel is one
text for both languages with the few words that differ; a thread takes one output row, its numbers in registers. The
plain operations are those of `columns` and `plain_columns` here. Before kernels are used they are held against those,
on a small group; the columns' to the bit, with numbers such that both are exact.

Kernels exist for mode affine; of the other modes only the columns have one.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.rounding.columns import choose_grid
from mlx_adapters.rounding.columns import refit as plain_refit
from mlx_adapters.rounding.grids import SHRINKS, AffineGrid, FloatGrid, Grid, make_grid

THREADS = 32  # in a threadgroup: rows of one matrix are few, and the GPU has many cores
UNLIKE = "the GPU's kernels do not give what plain operations give; those are used, slowly"
STORED = {mx.float32: 0, mx.bfloat16: 1, mx.float16: 2}
WORDS = {
    "cuda": {
        "ROW": "blockIdx.x * blockDim.x + threadIdx.x",
        "MATRIX": "blockIdx.y",
        "RINT": "rintf",
        "FUNCTION": "__device__ inline",
        "TO_BITS": "__float_as_uint",
        "FROM_BITS": "__uint_as_float",
        "AS_HALF(x)": "__half2float(__float2half_rn(x))",
    },
    "metal": {
        "ROW": "thread_position_in_grid.x",
        "MATRIX": "thread_position_in_grid.y",
        "RINT": "metal::rint",
        "FUNCTION": "inline",
        "TO_BITS": "as_type<uint>",
        "FROM_BITS": "as_type<float>",
        "AS_HALF(x)": "float(half(x))",
    },
}
HEADER = """
FUNCTION float as_stored(float x, int stored) {
  if (stored == 2) return AS_HALF(x);
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
    float wanted = target[at];
    for (int i = 0; i < j; ++i) wanted += block[corner + j * GROUP + i] * fed[i];
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


def source(language: str, text: str) -> str:
    """Some text of these in "cuda" or "metal"."""
    for word, theirs in WORDS[language].items():
        text = text.replace(word, theirs)
    return text


@cache
def _built(name: str) -> Callable[..., list[mx.array]]:
    language = "metal" if mx.metal.is_available() else "cuda"
    make = mx.fast.metal_kernel if language == "metal" else mx.fast.cuda_kernel
    body, inputs, outputs = TEXTS[name]
    return make(
        name=f"round_{name}",
        input_names=inputs,
        output_names=outputs,
        source=source(language, START + body),
        header=source(language, HEADER),
    )


def _call(name: str, inputs: list[mx.array], **constants: int | bool) -> list[mx.array]:
    """Run a kernel; of its inputs those with a batch have it as leading axes, kept for the outputs."""
    *lead, group, out = inputs[0].shape
    flat = inputs[0].reshape(-1, group, out)
    made = {"codes": (flat.shape, mx.uint8), "values": (flat.shape, mx.float32)}
    kinds = [made.get(output, ((len(flat), out), mx.float32)) for output in TEXTS[name].outputs]
    results = _built(name)(
        inputs=[flat, *inputs[1:]],
        template=[("GROUP", group), *constants.items()],
        grid=(-(-out // THREADS) * THREADS, len(flat), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape for shape, _ in kinds],
        output_dtypes=[kind for _, kind in kinds],
    )
    return [result.reshape(*lead, *result.shape[1:]) for result in results]


def columns(
    grid: Grid,
    target: mx.array,
    weight: mx.array,
    start: mx.array | None,
    block: mx.array,
    scale: mx.array,
    bias: mx.array,
) -> tuple[mx.array, mx.array]:
    """See `Engine.columns`; on a GPU."""
    inputs = [target, weight, weight if start is None else start, block, scale, bias]
    if isinstance(grid, FloatGrid):
        inputs += [grid.middles, grid.order, grid.levels]
        codes, values = _call("float_columns", inputs, TOP=len(grid.middles), MOVED=start is not None)
    else:
        codes, values = _call("columns", inputs, TOP=int(grid.top), MOVED=start is not None)
    return codes, values


def choose(grid: AffineGrid, target: mx.array, weights: mx.array, *start: mx.array) -> tuple[mx.array, mx.array]:
    """`columns.choose_grid` on a GPU."""
    shrinks = SHRINKS if grid.quantization.bits < 8 else SHRINKS[:1]
    own = start or (weights, weights)
    constants = {"TOP": int(grid.top), "STORED": STORED[grid.dtype], "RANGES": len(shrinks), "STARTED": bool(start)}
    scale, bias = _call("choose", [target, weights, mx.array(shrinks, dtype=mx.float32), *own], **constants)
    return scale, bias


def refit(
    grid: AffineGrid, slope: mx.array, block: mx.array, codes: mx.array, scale: mx.array, bias: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """`columns.refit` on a GPU."""
    scale, bias, values = _call("refit", [slope, block, codes, scale, bias], STORED=STORED[grid.dtype])
    return scale, bias, values


def plain_columns(
    grid: Grid,
    target: mx.array,
    weight: mx.array,
    start: mx.array | None,
    block: mx.array,
    scale: mx.array,
    bias: mx.array,
) -> tuple[mx.array, mx.array]:
    """See `Engine.columns`."""
    ahead, codes, values = target, [], []
    for j in range(target.shape[-2]):
        column = slice(j, j + 1)
        codes.append(grid.codes(ahead[..., :1, :], scale, bias))  # (..., 1, out)
        values.append(grid.values(codes[-1], scale, bias))
        fed = weight[..., column, :] - values[-1]
        if start is not None:
            fed = fed + start[..., column, :]
        ahead = ahead[..., 1:, :] + block[..., j + 1 :, column] * fed
    return mx.concatenate(codes, axis=-2).astype(mx.uint8), mx.concatenate(values, axis=-2)


def has_kernels() -> bool:
    """Whether the default device takes kernels."""
    return mx.default_device().type == mx.DeviceType.gpu


@cache
def problem_with(quantization: Quantization, dtype: mx.Dtype) -> str | None:
    """Why the kernels for this quantization are not to be used on this device; None if they are."""
    grid = make_grid(quantization, dtype, mx)
    try:
        for moved in (False, True):
            case = exact_group(quantization, moved)
            for mine, theirs in zip(columns(grid, *case), plain_columns(grid, *case), strict=True):
                if not mx.array_equal(mine, theirs).item():
                    return UNLIKE
        if isinstance(grid, AffineGrid):
            target, weights, block, codes, scale, bias = usual_group(grid)
            for start in ((), (scale, bias)):
                if not _alike(choose(grid, target, weights, *start), choose_grid(grid, target, weights, *start)):
                    return UNLIKE
            levels = codes.astype(mx.float32)
            if not _alike(
                refit(grid, target, block, codes, scale, bias), plain_refit(grid, target, block, levels, scale, bias)
            ):
                return UNLIKE
    except (RuntimeError, ValueError) as error:
        return f"the GPU's kernels cannot be used ({str(error).splitlines()[0]}); plain operations are, slowly"
    return None


def _alike(mine: tuple[mx.array, ...], theirs: tuple[mx.array, ...]) -> bool:
    """Whether nearly all numbers are: where two grids are nearly as good, the last bit of a sum chooses."""
    near = [mx.abs(a - b) <= 0.01 * mx.abs(b) + 1e-6 for a, b in zip(mine, theirs, strict=True)]
    return all(part.mean().item() > 0.95 for part in near)


def usual_group(grid: AffineGrid) -> tuple[mx.array, ...]:
    """Target, weights, H, codes, scale and bias of a group of two matrices with 200 rows, as they are in a layer."""
    random, group, out = np.random.default_rng(0), grid.quantization.group_size, 200
    x = random.standard_normal((2, 2 * group, group)) * np.exp(random.standard_normal(group))
    block = mx.array((x.swapaxes(-1, -2) @ x / group).astype(np.float32))
    target = mx.array((0.02 * random.standard_normal((2, group, out))).astype(np.float32))
    scale, bias = (part[0] for part in grid.candidates(target))
    codes = grid.codes(target, scale, bias).astype(mx.uint8)
    return target, mx.diagonal(block, axis1=-2, axis2=-1), block, codes, scale, bias


def exact_group(quantization: Quantization, moved: bool) -> tuple:
    """Arguments of `Engine.columns` after the grid, of two matrices with 40 rows, that need no rounding in float32.

    Everything is a multiple of 1/16 and small; an error is fed on whole or not at all.
    """
    random, group, out = np.random.default_rng(0), quantization.group_size, 40

    def sixteenths(*shape: int, most: int = 64) -> mx.array:
        return mx.array(random.integers(-most, most, shape).astype(np.float32) / 16)

    target, weight, start = (sixteenths(2, group, out) for _ in range(3))
    block = mx.array(random.choice([-1, 0, 0, 0, 0, 0, 1], (2, group, group)).astype(np.float32))
    scale = mx.array(random.choice([0.25, 0.5, 1, 2], (2, out)).astype(np.float32))
    return target, weight, start if moved else None, block, scale, sixteenths(2, out)
