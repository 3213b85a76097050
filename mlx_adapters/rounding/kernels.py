"""What is done for each output row of one group on MLX: kernels for Metal and CUDA, and plain operations anywhere.

The plain operations are those of `columns` and `plain_columns` here; the kernels' texts stand in `kernel_texts`. Before
kernels are used they are held against the plain operations on a small group, those of the columns to the bit, with
numbers such that both are exact. Of modes other than affine only the columns have a kernel.
"""

from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.rounding.columns import choose_grid
from mlx_adapters.rounding.columns import refit as plain_refit
from mlx_adapters.rounding.grids import SHRINKS, AffineGrid, FloatGrid, Grid, make_grid
from mlx_adapters.rounding.kernel_texts import HEADER, START, TEXTS, source
from mlx_adapters.system.gpu_kernels import build, language

THREADS = 32  # in a threadgroup: rows of one matrix are few, and the GPU has many cores
UNLIKE = "the GPU's kernels do not give what plain operations give; those are used, slowly"
STORED = {mx.float32: 0, mx.bfloat16: 1, mx.float16: 2}


@cache
def _built(name: str) -> Callable[..., list[mx.array]]:
    body, inputs, outputs = TEXTS[name]
    own = language()
    return build(f"round_{name}", inputs, outputs, source(own, START + body), source(own, HEADER))


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
