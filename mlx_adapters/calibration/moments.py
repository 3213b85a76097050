"""Second moments of a layer's inputs, and of the gradients at its outputs, over calibration tokens.

A layer is mostly called once for a whole batch, with a row for each token. Where it is called otherwise (mamba's
x_proj once for each token), rows count that have a gradient: padding has none.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_adapters.rounding.grids import identity_of
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu

FISHER_SHARE, EXPERTS_SHARE = 0.9, 0.7
FISHER_POWER = 0.75  # of |g|²: under the whole of it a few tokens decide, and others' rows have other ones
CHANCE = 0.3  # of an input's mean square, times inputs per token
MOST_OUTPUTS = 16384  # a vocabulary's would not fit
SHRINKAGE = 0.125  # tokens of the whole layer for each input of an expert
SMALL = 1 << 27  # bytes
WIDE, STRIPS = 4096, 4  # columns from which a GPU computes half of a product in so many strips
MOST_ROWS = 8192  # pairs of token and expert that are multiplied at once


def gram(rows: mx.array) -> mx.array:
    """rowsᵀ rows (width, width) of rows (n, width): half of it is computed, and mirrored; on a CPU by NumPy."""
    if not on_gpu():
        array = as_numpy(rows)
        return mx.array(array.T @ array)
    width = rows.shape[-1]
    if width < WIDE:
        return rows.T @ rows
    edges = [width * i // STRIPS for i in range(STRIPS + 1)]
    strips = [rows[:, a:b].T @ rows[:, a:] for a, b in itertools.pairwise(edges)]  # (width / STRIPS, width - a)
    whole = list[mx.array]()
    for i, strip in enumerate(strips):
        mirrored = [strips[j][:, edges[i] - edges[j] : edges[i + 1] - edges[j]].T for j in range(i)]
        whole.append(mx.concatenate([*mirrored, strip], axis=1))
    return mx.concatenate(whole)


def _begin(*arrays: mx.array) -> None:
    """Compute arrays; a GPU does while Python goes on, if they are small: it would hold all that leads to them."""
    small = all(array.nbytes <= SMALL for array in arrays)
    (mx.async_eval if small and on_gpu() else mx.eval)(*arrays)


@dataclass
class Moments:
    """Sums over calibration tokens for one layer. Shapes (in, in); of some experts (experts, in, in)."""

    plain: mx.array | None = None
    fisher: mx.array | None = None
    outputs: mx.array | None = None  # (out, out): second moments of the gradients at the output, see `add_outputs`
    tokens: int | np.ndarray = 0  # for experts: how many each one saw
    felt: mx.array | None = None  # sum over tokens of the mean square of x times that of g, of a layer with such

    def add(self, plain: mx.array, fisher: mx.array, tokens: int) -> None:
        """Add one batch's sums."""
        self.plain = plain if self.plain is None else self.plain + plain
        self.fisher = fisher if self.fisher is None else self.fisher + fisher
        self.tokens = self.tokens + tokens
        _begin(self.plain, self.fisher)

    def add_outputs(self, x: mx.array, g: mx.array) -> None:
        """Add the gradients g (tokens, out) at the output, each as long as its input x (tokens, in) makes it.

        An error E costs (gᵀ E x)² at a token. The product of one factor for inputs, Σ |g|² x xᵀ, and one for outputs,
        Σ |x|² g gᵀ, stands for that: unweighted, tokens whose input is small would count like the others.
        """
        product = gram(g * mx.sqrt(_mean_square(x)))  # (out, out)
        self.outputs = product if self.outputs is None else self.outputs + product
        _begin(self.outputs)


def _mean_square(rows: mx.array) -> mx.array:
    """(n, 1) of rows (n, width)."""
    return rows.square().mean(axis=-1, keepdims=True)


def mix(plain: mx.array, fisher: mx.array, share: float = FISHER_SHARE) -> mx.array:
    """(1 - share) · plain + share · fisher, each (..., in, in) divided by its trace; zeros leave it to the other."""
    total = mx.zeros_like(plain)
    for weight, matrix in ((1 - share, plain), (share, fisher)):
        t = mx.diagonal(matrix, axis1=-2, axis2=-1).sum(axis=-1)[..., None, None]
        total = total + mx.where(t > 0, weight / mx.where(t > 0, t, 1), 0) * matrix
    return total


def doubted(hessian: mx.array, tokens: int) -> mx.array:
    """`hessian` (in, in) of so many tokens, its diagonal raised by the share CHANCE · in / tokens.

    What few tokens' inputs have to do with each other is chance in part, and rounding would rely on it; how large each
    of them is, is known sooner. (To raise all alike would drown those that are small in most trained models.)
    """
    share = CHANCE * hessian.shape[-1] / max(tokens, 1)
    return hessian * (1 + share * identity_of(hessian.shape[-1], mx))


@dataclass(frozen=True)
class Seen:
    """One call of a layer: inputs `x` (..., in), the experts' `indices`, gradients `g` (..., out) at its output.

    Of a lookup in an embedding `x` (...) are the rows that it gave, and `g` (..., dim) the gradients at these."""

    x: mx.array
    indices: mx.array | None
    g: mx.array

    @property
    def lookup(self) -> bool:
        return not mx.issubdtype(self.x.dtype, mx.floating)


class ExpertMoments:
    """What the experts of one layer saw, and from it the moments of a few at a time.

    The moments of all would be experts x in x in numbers, many times the layer itself; the tokens are few, and what
    calls them is what is kept (gate and up keep one copy of theirs).

    An expert sees few tokens, from which its `in` inputs' moments cannot be known. They are shrunk towards those of
    the whole layer: with n tokens of sum S and the mean M over the tokens of all experts, they are S + k M with
    k = `SHRINKAGE` · in, as if the expert had seen k tokens more of what all see. An expert that saw none has M's.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.tokens = np.zeros(experts, np.int64)
        self._calls: list[tuple[mx.array, np.ndarray, np.ndarray, mx.array]] = []
        self._pooled: tuple[mx.array, mx.array] | None = None

    def add(self, seen: Seen) -> None:
        """Add a call: `x` (..., 1, in) broadcasts to `indices` (...), `g` is (..., 1, out)."""
        assert seen.indices is not None
        x, chosen = seen.x, as_numpy(seen.indices).reshape(-1)  # (pairs,)
        rows = np.arange(math.prod(x.shape[:-1])).reshape(x.shape[:-2])
        rows = np.broadcast_to(rows, seen.indices.shape).reshape(-1)
        weights = seen.g.reshape(-1, seen.g.shape[-1]).square().mean(axis=-1, keepdims=True)  # (pairs, 1)
        # Padding reaches experts too; nothing depends on it, so its gradient is exactly zero.
        chosen = np.where(as_numpy(weights)[:, 0] != 0, chosen, self.experts)  # (NaN stays, and is refused)
        self.tokens += np.bincount(chosen, minlength=self.experts + 1)[: self.experts]
        self._calls.append((x.reshape(-1, x.shape[-1]), rows, chosen, mx.sqrt(weights)))
        mx.eval(self._calls[-1][0], self._calls[-1][3])

    def of(self, start: int, stop: int) -> Moments:
        """The moments of experts start…stop."""
        if self._pooled is None:
            plain, fisher = self._sums(0, self.experts)
            total = max(int(self.tokens.sum()), 1)
            self._pooled = plain / total, fisher / total
        width, sums = self._pooled[0].shape[-1], []
        for expert in range(start, stop):
            own = self._sums(expert, expert + 1)
            sums.append([part + SHRINKAGE * width * pooled for part, pooled in zip(own, self._pooled, strict=True)])
            mx.async_eval(sums[-1])
        plain, fisher = (mx.stack(parts) for parts in zip(*sums, strict=True))
        return Moments(plain, fisher, tokens=self.tokens[start:stop])

    def _sums(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Σ x xᵀ and Σ |g|² x xᵀ over what experts start…stop saw."""
        width = self._calls[0][0].shape[-1]
        plain, fisher = mx.zeros((width, width)), mx.zeros((width, width))
        for seen, weights in self._seen(start, stop):
            plain, fisher = plain + gram(seen), fisher + gram(seen * weights)
            if stop - start > 1:
                mx.eval(plain, fisher)
        return plain, fisher

    def _seen(self, start: int, stop: int) -> Iterator[tuple[mx.array, mx.array]]:
        """Inputs (pairs, in) of experts start…stop and their weights (pairs, 1): few at once, many in parts.

        What a call was given is not copied for it: gate and up share that.
        """
        parts: list[tuple[mx.array, mx.array]] = []
        for x, rows, chosen, weights in self._calls:
            some = np.flatnonzero((start <= chosen) & (chosen < stop))
            for a in range(0, len(some), MOST_ROWS):
                pairs = some[a : a + MOST_ROWS]
                at, own = mx.array(rows[pairs].astype(np.int32)), mx.array(pairs.astype(np.int32))
                if sum(len(seen) for seen, _ in parts) + len(pairs) > MOST_ROWS:
                    yield _joined(parts)
                    parts = []
                parts.append((x[at], weights[own]))
        if parts:
            yield _joined(parts)


def _joined(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    seen, weights = (mx.concatenate(some) for some in zip(*parts, strict=True))
    return seen, weights


def fits(seen: Seen, shape: tuple[int, ...]) -> bool:
    """Whether the call is one of a layer with a weight (out, in) or (experts, out, in), row by row."""
    x, g, indices = seen.x.shape, seen.g.shape, seen.indices
    if seen.lookup:
        return g == (*x, shape[-1])
    if x[-1] != shape[-1] or g[-1] != shape[-2] or (indices is None) != (len(shape) == 2):
        return False
    if indices is None:
        return x[:-1] == g[:-1]
    broadcasts = all(n in (1, m) for n, m in zip(x[-3::-1], indices.shape[::-1], strict=False))
    return x[-2] == 1 and len(x) - 2 <= indices.ndim and broadcasts and math.prod(g[:-1]) == indices.size


def moments_for(shape: tuple[int, ...]) -> "Moments | ExpertMoments":
    """None yet, of a layer with a weight of that shape."""
    return Moments() if len(shape) == 2 else ExpertMoments(shape[0])


def add_calls(
    moments: Moments | ExpertMoments,
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
    others, linear = [], [seen for seen in calls if not seen.lookup]
    if not linear:
        assert isinstance(moments, Moments)
        for seen in calls:
            _add_lookup(moments, seen.g)
    for seen in linear:  # (an embedding that is the head, too, is judged as the head)
        if seen.indices is not None:
            assert isinstance(moments, ExpertMoments)
            moments.add(seen)
            continue
        assert isinstance(moments, Moments)
        if real is None or _one_row_per_token(seen.x.shape[:-1], tokens):
            _add_linear(moments, seen.x, seen.g, real, products)
        else:
            others.append(seen)
    if others and isinstance(moments, Moments):
        x = mx.concatenate([seen.x.reshape(-1, shape[-1]) for seen in others])
        g = mx.concatenate([seen.g.reshape(-1, shape[-2]) for seen in others])
        felt = np.flatnonzero(as_numpy(mx.abs(g).max(axis=-1)))
        _add_linear(moments, x, g, mx.array(felt.astype(np.int32)), {})


def _add_lookup(moments: Moments, g: mx.array) -> None:
    """Gradients `g` (..., dim) at rows of an embedding: an error e in one of them costs (eᵀ g)². Padding has none."""
    g = g.reshape(-1, g.shape[-1])  # (tokens, dim)
    product, felt = gram(g), int((mx.abs(g).max(axis=-1) > 0).sum())
    moments.add(product, product, felt)


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
    felt = _mean_square(g)  # (real, 1)
    weighted = x * felt ** (FISHER_POWER / 2)  # (real, in)
    both = (felt * _mean_square(x)).sum()
    moments.felt = both if moments.felt is None else moments.felt + both
    _begin(moments.felt)
    if shared not in products:
        products[shared] = gram(x)
    moments.add(products[shared], gram(weighted), x.shape[0])
    if g.shape[-1] <= MOST_OUTPUTS:
        moments.add_outputs(x, g)
