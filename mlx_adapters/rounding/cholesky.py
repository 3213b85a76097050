"""Cholesky factors on MLX, and the inverses of theirs, by panels: a GPU has neither.

A panel's own block is factored and inverted by a kernel, a thread for each row or column, so that the CPU need not be
asked; by LAPACK where there is none. All else is products of matrices.
"""

from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_adapters.rounding.grids import identity_of, to_numpy
from mlx_adapters.rounding.kernel_texts import source
from mlx_adapters.rounding.kernels import problem
from mlx_adapters.system.gpu_kernels import build_best, language

Panels = Callable[[mx.array, bool], tuple[mx.array, mx.array]]  # see `panels`
PANEL, BLOCK = 64, 512  # columns that are made at once: in a kernel, and before what is left of a large matrix is
# R upper, from the last column to the first, then column by column its inverse.
TEXT = """
const int matrix = PANEL, row = THREAD, size = matrices_shape[1], corner = matrix * size * size;
SHARED float r[SIZE * (SIZE + 1)];
float x[SIZE];
const bool whole = factored[0] == 0;
for (int j = 0; j < size; ++j) {
  if (row < size) r[row * (size + 1) + j] = matrices[corner + row * size + j];
}
BARRIER(BARRIER_OF);
for (int j = size - 1; j >= 0 && whole; --j) {
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


@cache
def _kernel() -> Callable[..., list[mx.array]]:
    return build_best("panels", ["matrices", "factored"], ["factor", "inverse"], source(language(), TEXT), "")


def panels(matrices: mx.array, factored: bool) -> tuple[mx.array, mx.array]:
    """(R, R⁻¹) of each positive definite matrix R Rᵀ (..., n, n), n at most PANEL, R upper triangular; if they are
    `factored`, the matrices are R. On a GPU; NaN where there is none."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    factor, inverse = _kernel()(
        inputs=[flat, mx.array([int(factored)])],  # (a constant would be compiled anew)
        template=[("SIZE", PANEL)],
        grid=(len(flat) * PANEL, 1, 1),
        threadgroup=(PANEL, 1, 1),
        output_shapes=[flat.shape] * 2,
        output_dtypes=[mx.float32] * 2,
    )
    return factor.reshape(matrices.shape), inverse.reshape(matrices.shape)


def plain_panels(matrices: mx.array, factored: bool) -> tuple[mx.array, mx.array]:
    """See `panels`; by LAPACK."""
    factor: np.ndarray = to_numpy(matrices).astype(np.float64)
    if not factored:
        try:
            factor = np.linalg.cholesky(factor[..., ::-1, ::-1])[..., ::-1, ::-1]
        except np.linalg.LinAlgError:
            factor = np.full_like(factor, np.nan)
    with np.errstate(invalid="ignore"):
        return mx.array(factor.astype(np.float32)), mx.array(np.linalg.inv(factor).astype(np.float32))


@cache
def problem_with_panels() -> str | None:
    """Why the kernel for a factor's panels is not to be used on this device; None if it is."""
    return problem(_panels_right)


def _panels_right() -> bool:
    random = np.random.default_rng(0)
    for size in (PANEL, 5):
        x = random.standard_normal((3, 2 * size, size)).astype(np.float32)
        case = mx.array(x.swapaxes(-1, -2) @ x / size + 0.1 * np.eye(size, dtype=np.float32))
        for factored in (False, True):
            pairs = zip(panels(case, factored), plain_panels(case, factored), strict=True)
            if not all(mx.allclose(mine, theirs, rtol=1e-3, atol=1e-4).item() for mine, theirs in pairs):
                return False
            case = plain_panels(case, False)[0]
    return True


def upper_factor(hessian: mx.array, panels: Panels) -> mx.array:
    """R with H = R Rᵀ, by blocks from the last columns to the first; NaN where H is not positive definite."""
    if hessian.shape[-1] <= BLOCK:
        return _by_columns(hessian, PANEL, panels)

    def blocks(matrices: mx.array, _: bool) -> tuple[mx.array, mx.array]:
        factor = _by_columns(matrices, PANEL, panels)
        return factor, inverse_upper(factor, panels)

    return _by_columns(hessian, BLOCK, blocks)


def _by_columns(hessian: mx.array, size: int, panels: Panels) -> mx.array:
    """The factor, `size` columns at once, whose own block `panels` factors."""
    n, rest, before, made = hessian.shape[-1], hessian, hessian, list[mx.array]()
    for a in range((n - 1) // size * size, -1, -size):
        corner, inverse = panels(rest[..., a:, a:], False)  # (..., size, size)
        below = mx.zeros((*hessian.shape[:-2], n - a - corner.shape[-1], corner.shape[-1]))
        if a == 0:  # (CUDA's products of nothing divide by zero)
            made.append(mx.concatenate([corner, below], axis=-2))
            break
        above = rest[..., :a, a:] @ inverse.swapaxes(-1, -2)  # (..., a, size)
        rest = mx.addmm(rest[..., :a, :a], above, above.swapaxes(-1, -2), alpha=-1.0)
        made.append(mx.concatenate([above, corner, below], axis=-2))
        if size == BLOCK:
            mx.async_eval(rest)
            mx.eval(before)  # what is ahead of the GPU holds what is left of H for each block
            before = rest
    return mx.concatenate(made[::-1], axis=-1)


def inverses(upper: mx.array, panels: Panels) -> list[mx.array]:
    """The inverses (..., panel, panel) of the blocks along the diagonal of an upper triangular matrix."""
    whole = upper.shape[-1] // PANEL * PANEL
    parts = list[mx.array]()
    if whole:
        shape = *upper.shape[:-2], whole // PANEL, PANEL, whole // PANEL, PANEL
        blocks = mx.diagonal(upper[..., :whole, :whole].reshape(shape), axis1=-4, axis2=-2)
        parts += list(panels(mx.contiguous(mx.moveaxis(blocks, -1, 0)), True)[1])
    if whole < upper.shape[-1]:
        parts.append(panels(upper[..., whole:, whole:], True)[1])
    return parts


def inverse_upper(upper: mx.array, panels: Panels) -> mx.array:
    """R⁻¹ of an upper triangular matrix, by panels of its rows from the last to the first."""
    parts, n = list[mx.array](), upper.shape[-1]
    rest = mx.broadcast_to(identity_of(n, mx), upper.shape)
    for a, inverse in reversed([*zip(range(0, n, PANEL), inverses(upper, panels), strict=True)]):
        parts.append(inverse @ rest[..., a:, :])
        if a:
            rest = mx.addmm(rest[..., :a, :], upper[..., :a, a : a + PANEL], parts[-1], alpha=-1.0)
    return mx.concatenate(parts[::-1], axis=-2)
