"""What is done for each output row of a step's groups on MLX: kernels for Metal and CUDA, plain operations anywhere.

The plain operations are those of `columns` and `plain_columns` here; the kernels' texts stand in `kernel_texts`. Before
kernels are used they are held against the plain operations on a small step; that of the float modes, which have one
for the columns alone, to the bit, with numbers such that both are exact.
"""

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.rounding.columns import again as plain_again
from mlx_adapters.rounding.columns import forward as plain_forward
from mlx_adapters.rounding.grids import SHRINKS, AffineGrid, FloatGrid, Grid, make_grid
from mlx_adapters.rounding.kernel_texts import HEADER, TEXTS, source
from mlx_adapters.system.gpu_kernels import build_best, language

LANES, ROWS = 32, 8  # of a threadgroup: rows lie beside each other in memory, and are read together
STEP = 512  # columns whose groups one call rounds: a call costs as much as their arithmetic
UNLIKE = "the GPU's kernels do not give what plain operations give; those are used, slowly"
STORED = {mx.float32: 0, mx.bfloat16: 1, mx.float16: 2}


@cache
def _built(name: str) -> Callable[..., list[mx.array]]:
    text, own = TEXTS[name], language()
    return build_best(f"round_{name}", text.inputs, text.outputs, source(own, text.body), source(own, HEADER))


def _call(name: str, group: int, most: int, inputs: list[mx.array], **constants: int) -> list[mx.array]:
    """Run a kernel on groups of `group` columns, at most `most` columns; of its inputs those with a batch have it as
    leading axes, kept for the outputs."""
    *lead, columns, out = inputs[0].shape
    flat = inputs[0].reshape(-1, columns, out)
    small = dict.fromkeys(("scale", "bias"), (len(flat), columns // group, out))
    shapes = [small.get(output, flat.shape) for output in TEXTS[name].outputs]
    kinds = [mx.uint8 if output == "codes" else mx.float32 for output in TEXTS[name].outputs]
    results = _built(name)(
        inputs=[flat, *inputs[1:]],
        template=[
            ("OWN", -(-group // LANES)),
            ("WIDTH", min(group, LANES)),
            ("COLUMNS", -(-most // LANES)),
            *constants.items(),
        ],
        grid=(-(-out // ROWS) * ROWS * LANES, len(flat), 1),
        threadgroup=(ROWS * LANES, 1, 1),
        output_shapes=shapes,
        output_dtypes=kinds,
    )
    return [result.reshape(*lead, *result.shape[1:]) for result in results]


def columns(
    grid: FloatGrid, target: mx.array, weight: mx.array, block: mx.array, scale: mx.array, bias: mx.array
) -> tuple[mx.array, mx.array]:
    """See `Engine.columns`; of the modes other than affine, on a GPU."""
    inputs = [target, weight, block.swapaxes(-1, -2), scale, grid.middles, grid.order, grid.levels]
    group = grid.quantization.group_size
    codes, values = _call("columns", group, group, inputs, TOP=len(grid.middles))
    return codes, values


@cache
def _shrinks(bits: int) -> mx.array:
    return mx.array(SHRINKS if bits < 8 else SHRINKS[:1], dtype=mx.float32)


def forward(
    grid: AffineGrid, target: mx.array, weight: mx.array, block: mx.array, variances: mx.array, *start: mx.array
) -> tuple[mx.array, ...]:
    """`columns.forward` on a GPU."""
    quantization = grid.quantization
    inputs = [
        target,
        weight,
        block,
        variances,
        _shrinks(quantization.bits),
        _settings(grid.top, grid.dtype, bool(start)),
    ]
    return tuple(_call("forward", quantization.group_size, STEP, [*inputs, *(start or (variances, variances))]))


@cache
def _settings(top: float, dtype: mx.Dtype, started: bool) -> mx.array:
    return mx.array([int(top), STORED[dtype], int(started)])


def again(
    grid: AffineGrid,
    slope: mx.array,
    block: mx.array,
    scale: mx.array,
    bias: mx.array,
    codes: mx.array,
    values: mx.array,
) -> tuple[mx.array, ...]:
    """`columns.again` on a GPU."""
    inputs = [slope, block, scale, bias, codes, _settings(grid.top, grid.dtype, False)]
    return tuple(_call("again", grid.quantization.group_size, STEP, inputs))


def plain_columns(
    grid: Grid, target: mx.array, weight: mx.array, block: mx.array, scale: mx.array, bias: mx.array
) -> tuple[mx.array, mx.array]:
    """See `Engine.columns`."""
    ahead, codes, values = target, [], []
    for j in range(target.shape[-2]):
        column = slice(j, j + 1)
        codes.append(grid.codes(ahead[..., :1, :], scale, bias))  # (..., 1, out)
        values.append(grid.values(codes[-1], scale, bias))
        ahead = ahead[..., 1:, :] + block[..., j + 1 :, column] * (weight[..., column, :] - values[-1])
    return mx.concatenate(codes, axis=-2).astype(mx.uint8), mx.concatenate(values, axis=-2)


@cache
def problem_with(quantization: Quantization, dtype: mx.Dtype) -> str | None:
    """Why the kernels for this quantization are not to be used on this device; None if they are."""
    return problem(partial(_rounds_right, make_grid(quantization, dtype, mx)))


def problem(right: Callable[[], bool]) -> str | None:
    """Why kernels that should be `right` are not to be used; None if they are."""
    try:
        return None if right() else UNLIKE
    except (RuntimeError, ValueError) as error:
        return f"the GPU's kernels cannot be used ({str(error).splitlines()[0]}); plain operations are, slowly"


def _rounds_right(grid: Grid) -> bool:
    if isinstance(grid, FloatGrid):
        case = exact_group(grid.quantization)
        pairs = zip(columns(grid, *case), plain_columns(grid, *case), strict=True)
        return all(mx.array_equal(mine, theirs).item() for mine, theirs in pairs)
    plain = SimpleNamespace(xp=mx, columns=plain_columns)
    target, block, feeding, variances, *rounded = usual_step(grid)
    starts = ((), tuple(rounded[:2]))
    forwards = [(target + 0.001, target, feeding, variances, *start) for start in starts]
    return all(_alike(forward(grid, *case), plain_forward(plain, grid, *case)) for case in forwards) and _alike(
        again(grid, target, block, *rounded), plain_again(plain, grid, target, block, *rounded)
    )


def _alike(mine: tuple[mx.array, ...], theirs: tuple[mx.array, ...]) -> bool:
    """Whether nearly all numbers are: where two grids are nearly as good, the last bit of a sum chooses."""
    near = [mx.abs(a - b) <= 0.01 * mx.abs(b) + 1e-6 for a, b in zip(mine, theirs, strict=True)]
    return all(part.mean().item() > 0.95 for part in near)


def usual_step(grid: AffineGrid) -> tuple[mx.array, ...]:
    """Three groups of two matrices with 200 rows, as in a layer: target, H, its factor with each column divided by its
    diagonal entry, the squares of those, scale, bias, codes and values."""
    random, group, out = np.random.default_rng(0), grid.quantization.group_size, 200
    columns = 3 * group
    x = random.standard_normal((2, 2 * columns, columns)) * np.exp(random.standard_normal(columns))
    block = x.swapaxes(-1, -2) @ x / columns + 0.1 * np.eye(columns)
    factor = np.linalg.cholesky(block[..., ::-1, ::-1])[..., ::-1, ::-1]
    diagonal = np.diagonal(factor, axis1=-2, axis2=-1)
    moments = (block, factor / diagonal[..., None, :], diagonal**2)
    target = mx.array((0.02 * random.standard_normal((2, columns, out))).astype(np.float32))
    split = mx.unflatten(target, -2, (3, group))  # (2, 3, group, out)
    scale, bias = (part[0] for part in grid.candidates(split))  # (2, 3, out)
    codes = grid.codes(split, scale, bias)
    values = grid.values(codes, scale, bias).reshape(target.shape)
    codes = codes.astype(mx.uint8).reshape(target.shape)
    return target, *(mx.array(part.astype(np.float32)) for part in moments), scale, bias, codes, values


def exact_group(quantization: Quantization) -> tuple[mx.array, ...]:
    """Arguments of `Engine.columns` after the grid, of two matrices with 40 rows, that need no rounding in float32.

    Everything is a multiple of 1/16 and small; an error is fed on whole or not at all.
    """
    random, group, out = np.random.default_rng(0), quantization.group_size, 40

    def sixteenths(*shape: int, most: int = 64) -> mx.array:
        return mx.array(random.integers(-most, most, shape).astype(np.float32) / 16)

    target, weight = (sixteenths(2, group, out) for _ in range(2))
    block = mx.array(random.choice([-1, 0, 0, 0, 0, 0, 1], (2, group, group)).astype(np.float32))
    scale = mx.array(random.choice([0.25, 0.5, 1, 2], (2, out)).astype(np.float32))
    return target, weight, block, scale, sixteenths(2, out)
