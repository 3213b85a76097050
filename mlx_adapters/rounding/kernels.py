"""The loop over one group's columns on MLX: a kernel for Metal, one for CUDA, and plain operations for any device.

The kernels are one text with the few words that differ: a thread goes through the columns of one output row, with the
group's errors in registers. Before a kernel is used it is held against the plain operations, on a small group whose
numbers are such that both are exact.
"""

from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.rounding.grids import AffineGrid, FloatGrid, Grid, make_grid

THREADS = 32  # in a threadgroup: rows of one matrix are few, and the GPU has many cores
WORDS = {
    "cuda": {"ROW": "blockIdx.x * blockDim.x + threadIdx.x", "MATRIX": "blockIdx.y", "RINT": "rintf"},
    "metal": {"ROW": "thread_position_in_grid.x", "MATRIX": "thread_position_in_grid.y", "RINT": "metal::rint"},
}
LOOP = """
const int row = ROW, matrix = MATRIX, out = target_shape[2];
if (row < out) {
  const int grid = matrix * out + row, corner = matrix * GROUP * GROUP;
  const float s = scale[grid];
  float fed[GROUP];
  for (int j = 0; j < GROUP; ++j) {
    const int at = (matrix * GROUP + j) * out + row;
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
    float code = RINT((wanted - b) * (1.0f / s));
    code = code < 0.0f ? 0.0f : code > float(TOP) ? float(TOP) : code;
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
INPUTS = ("target", "weight", "start", "block", "scale", "bias")
Kernel = Callable[..., tuple[mx.array, mx.array]]


def source(language: str, affine: bool) -> str:
    """The text of the kernel's body in "cuda" or "metal", for grids of mode affine or of the others."""
    text = LOOP.replace("ROUND", (AFFINE if affine else FLOAT).strip())
    for word, theirs in WORDS[language].items():
        text = text.replace(word, theirs)
    return text


def plain(
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


@cache
def _built(language: str, affine: bool) -> Callable[..., list[mx.array]]:
    make = mx.fast.cuda_kernel if language == "cuda" else mx.fast.metal_kernel
    names = INPUTS if affine else (*INPUTS, "middles", "order", "levels")
    name = f"round_columns_{'affine' if affine else 'float'}"
    return make(name=name, input_names=names, output_names=["codes", "values"], source=source(language, affine))


def _kernel(
    grid: Grid,
    target: mx.array,
    weight: mx.array,
    start: mx.array | None,
    block: mx.array,
    scale: mx.array,
    bias: mx.array,
) -> tuple[mx.array, mx.array]:
    """See `Engine.columns`; on a GPU."""
    affine = isinstance(grid, AffineGrid)
    *lead, group, out = target.shape
    matrices = [target, weight, weight if start is None else start, block]  # (batch, group, ...)
    inputs = [array.reshape(-1, *array.shape[-2:]) for array in matrices]
    inputs += [array.reshape(-1, out) for array in (scale, bias)]
    if isinstance(grid, FloatGrid):
        inputs += [grid.middles, grid.order, grid.levels]
    codes, values = _built("metal" if mx.metal.is_available() else "cuda", affine)(
        inputs=inputs,
        template=[
            ("GROUP", group),
            ("TOP", int(grid.top) if isinstance(grid, AffineGrid) else len(grid.middles)),
            ("MOVED", start is not None),
        ],
        grid=(-(-out // THREADS) * THREADS, len(inputs[0]), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[inputs[0].shape] * 2,
        output_dtypes=[mx.uint8, mx.float32],
    )
    return codes.reshape(*lead, group, out), values.reshape(*lead, group, out)


def has_kernels() -> bool:
    """Whether the default device takes kernels."""
    return mx.default_device().type == mx.DeviceType.gpu


@cache
def kernel_of(quantization: Quantization) -> tuple[Kernel | None, str | None]:
    """The kernel for a quantization, if this device has one that gives what `plain` gives; else None, and why not."""
    if not has_kernels():
        return None, None
    grid = make_grid(quantization, mx.float32, mx)
    try:
        for moved in (False, True):
            case = exact_group(quantization, moved)
            for mine, theirs in zip(_kernel(grid, *case), plain(grid, *case), strict=True):
                if not mx.array_equal(mine, theirs).item():
                    return None, "the GPU's kernel does not give what plain operations give; those are used, slowly"
    except (RuntimeError, ValueError) as error:
        return None, f"the GPU's kernel cannot be used ({str(error).splitlines()[0]}); plain operations are, slowly"
    return _kernel, None


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
