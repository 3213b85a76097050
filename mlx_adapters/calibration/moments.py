"""Second moments of a layer's inputs, and of the gradients at its outputs, over calibration tokens.

A layer is mostly called once for a whole batch, with a row for each token. Where it is called otherwise (mamba's
x_proj once for each token), rows count that have a gradient: padding has none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu

FISHER_SHARE = 0.7
OUTPUT_STRIDE = 2  # every second token is enough for the moments of the outputs
MOST_OUTPUTS = 16384  # a vocabulary's would not fit


def gram(rows: mx.array) -> mx.array:
    """rowsᵀ rows. On a CPU by NumPy, which computes half of it and mirrors that."""
    if on_gpu():
        return rows.T @ rows
    array = as_numpy(rows)
    return mx.array(array.T @ array)


@dataclass
class Moments:
    """Sums over calibration tokens for one layer. Shapes (in, in); experts (experts, in, in)."""

    plain: mx.array | None = None
    fisher: mx.array | None = None
    outputs: mx.array | None = None  # (out, out): second moments of the gradients at the output
    tokens: int | np.ndarray = 0  # for experts: how many each one saw
    output_tokens: int = 0

    def add(self, plain: mx.array, fisher: mx.array, tokens: int | np.ndarray) -> None:
        """Add one batch's sums."""
        self.plain = plain if self.plain is None else self.plain + plain
        self.fisher = fisher if self.fisher is None else self.fisher + fisher
        self.tokens = self.tokens + tokens
        mx.eval(self.plain, self.fisher)

    def add_outputs(self, g: mx.array) -> None:
        """Add gradients (tokens, out) at the output."""
        product = gram(g)
        self.outputs = product if self.outputs is None else self.outputs + product
        self.output_tokens += g.shape[0]
        mx.eval(self.outputs)


def mix(plain: np.ndarray, fisher: np.ndarray, share: float = FISHER_SHARE) -> np.ndarray:
    """(1 - share) · plain + share · fisher, each divided by its trace; a zero matrix leaves it to the other."""
    traces = [float(np.trace(m)) for m in (plain, fisher)]
    parts = [w * m / t for w, m, t in zip((1 - share, share), (plain, fisher), traces, strict=True) if t > 0]
    return np.asarray(sum(parts)) if parts else np.zeros_like(plain)


@dataclass(frozen=True)
class Seen:
    """One call of a layer: inputs `x` (..., in), the experts' `indices`, gradients `g` (..., out) at its output."""

    x: mx.array
    indices: mx.array | None
    g: mx.array


def fits(seen: Seen, shape: tuple[int, ...]) -> bool:
    """Whether the call is one of a layer with a weight (out, in) or (experts, out, in), row by row."""
    x, g, indices = seen.x.shape, seen.g.shape, seen.indices
    if x[-1] != shape[-1] or g[-1] != shape[-2] or (indices is None) != (len(shape) == 2):
        return False
    if indices is None:
        return x[:-1] == g[:-1]
    broadcasts = all(n in (1, m) for n, m in zip(x[-3::-1], indices.shape[::-1], strict=False))
    return x[-2] == 1 and len(x) - 2 <= indices.ndim and broadcasts and math.prod(g[:-1]) == indices.size


def add_calls(
    moments: Moments,
    calls: Sequence[Seen],
    shape: tuple[int, ...],
    tokens: tuple[int, int],
    real: mx.array | None,
    products: dict[int, mx.array],
) -> None:
    """Add the calls that one batch of `tokens` (rows, length) made of a layer; all must fit its weight's `shape`.

    `real`: indices of the flattened tokens that are no padding; None if every row counts. `products` keeps x xᵀ sums
    by input, which q, k and v (or gate and up) share.
    """
    others = []
    for seen in calls:
        if seen.indices is not None:
            _add_experts(moments, seen.x, seen.indices, seen.g, shape[0])
        elif real is None or _one_row_per_token(seen.x.shape[:-1], tokens):
            _add_linear(moments, seen.x, seen.g, real, products)
        else:
            others.append(seen)
    if others:
        x = mx.concatenate([seen.x.reshape(-1, shape[-1]) for seen in others])
        g = mx.concatenate([seen.g.reshape(-1, shape[-2]) for seen in others])
        felt = np.flatnonzero(as_numpy(mx.abs(g).max(axis=-1)))
        _add_linear(moments, x, g, mx.array(felt.astype(np.int32)), {})


def _one_row_per_token(leading: tuple[int, ...], tokens: tuple[int, int]) -> bool:
    own, whole = (tuple(n for n in sizes if n > 1) for sizes in (leading, tokens))
    return own in (whole, (math.prod(whole),)) or (not whole and not own)


def _add_linear(
    moments: Moments, x: mx.array, g: mx.array, real: mx.array | None, products: dict[int, mx.array]
) -> None:
    """Rows of `x` and `g`, all or those at `real`."""
    shared = id(x)
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])  # (tokens, in), (tokens, out)
    if real is not None:
        x, g = x[real], g[real]  # (real, in), (real, out)
    weighted = x * mx.sqrt(g.square().mean(axis=-1, keepdims=True))  # (real, in)
    if shared not in products:
        products[shared] = gram(x)
    moments.add(products[shared], gram(weighted), x.shape[0])
    if g.shape[-1] <= MOST_OUTPUTS:
        moments.add_outputs(g[::OUTPUT_STRIDE])


def _add_experts(moments: Moments, x: mx.array, indices: mx.array, g: mx.array, experts: int) -> None:
    """Each expert's own moments. `x` (..., 1, in) broadcasts to `indices` (...), `g` is (..., 1, out)."""
    x = mx.broadcast_to(x, (*indices.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])  # (pairs, in)
    weights = g.reshape(-1, g.shape[-1]).square().mean(axis=-1, keepdims=True)  # (pairs, 1)
    weighted = x * mx.sqrt(weights)
    # Padding reaches experts too; nothing depends on it, so its gradient is exactly zero.
    chosen = np.where(as_numpy(weights)[:, 0] > 0, as_numpy(indices).reshape(-1), experts)
    plain, fisher = [], []
    for expert in range(experts):
        rows = mx.array(np.flatnonzero(chosen == expert).astype(np.int32))
        a, b = x[rows], weighted[rows]
        plain.append(gram(a))
        fisher.append(gram(b))
    moments.add(mx.stack(plain), mx.stack(fisher), np.bincount(chosen, minlength=experts)[:experts])
