"""Round a weight matrix to few bits so that the layer's *output* hardly changes.

A layer computes y = W x. Rounding W to Q moves the output by E x with E = W - Q, and over calibration inputs
x the mean of |E x|² is tr(E H Eᵀ) with H = mean of x xᵀ. Rounding each weight to its nearest value ignores H;
GPTQ (arXiv 2210.17323) goes through the columns one by one and moves the columns still to come so that they
cancel the error made so far. With the Cholesky factor H = R Rᵀ (R upper triangular), tr(E H Eᵀ) = |E R|²,
and the best value for column j given the columns before it is

    w_j + Σ_{i<j} e_i R_ij / R_jj.

Beyond GPTQ: the grid of each group is searched, starting from several ranges (the base model's own grid among
them), and refitted by least squares; then sweeps of coordinate descent improve grids and codes together under
the whole of H. No sweep can make the error larger.

The best approximation of a matrix is a little shorter than the matrix, and an update that is not much larger than
the grid's steps loses most: in every layer the same share in the same direction, which no error elsewhere cancels.
So the first pass measures what it kept of the update D, r = <D', D> / <D, D> under H and G, and the later ones
aim at W + D / r.

Errors of different outputs are felt together: with G = Σ |x|² g gᵀ, g the gradient at the layer's output, the loss in
KL is about tr(G E H Eᵀ), a Kronecker product. So rows feed their errors on too: the rows are cut into blocks, and
each block aims at what best cancels the errors of the others (two-sided feedback, as in YAQA, arXiv 2505.22988).

Matrices are transposed, (in, out), float32; axes before those are a batch of matrices that are rounded together, by
an engine of MLX. The engine of NumPy takes one matrix.
"""

import functools
import itertools
from types import ModuleType

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.rounding.columns import Rounded, Rounder, diagonal_blocks
from mlx_adapters.rounding.engines import NUMPY, Engine
from mlx_adapters.rounding.grids import Array, identity_of, make_grid
from mlx_adapters.rounding.packed import Packed, dequantize, to_nearest

DAMPING, OUTPUT_DAMPING = 0.01, 0.3
ROW_BLOCKS, FEW_BLOCKS, MANY_ROWS = 8, 4, 2048  # a GPU is as long over a few rows as over many
ESTIMATED, PROBES = 1 << 23, 256  # weights from which on an error is estimated, and from how many samples
SWEEPS = 6  # row by row
PASSES, FEW_PASSES = 4, 2  # over the blocks of rows, after the first; FEW of MANY_ROWS
NOTABLE_LOSS, MOST_AIM = 0.01, 1.0  # of an update's length


def damped(hessian: Array, damping: Array | float = DAMPING, engine: Engine = NUMPY) -> Array:
    """A usable H (..., n, n): symmetric, positive definite, with mean diagonal 1.

    Columns that calibration never used ("dead") and a singular H get a little of the identity, which
    means: round those to nearest. An H with no finite positive trace becomes the identity.
    """
    xp, hessian = engine.xp, engine.array(hessian)
    identity = identity_of(hessian.shape[-1], xp)
    mean = _diagonal(hessian, xp).mean(axis=-1)  # (...)
    usable = xp.isfinite(mean) & (mean > 0) & xp.isfinite(hessian).all(axis=(-2, -1))
    scale, more = 0.5 / xp.where(usable, mean, xp.ones_like(mean)), xp.array(damping, dtype=xp.float32)
    result = (hessian + hessian.swapaxes(-1, -2)) * _matrix(scale) + _matrix(more) * identity
    return engine.select(usable, result, xp.broadcast_to(identity, hessian.shape))


def column_feedback(hessian: Array, engine: Engine = NUMPY) -> tuple[Array, Array]:
    """(R with each column divided by its diagonal entry, the squared diagonal) of H = R Rᵀ."""
    factor = engine.factor(hessian)
    diagonal = _diagonal(factor, engine.xp)
    return factor / diagonal[..., None, :], engine.xp.square(diagonal)


def calibrated(
    weight: mx.array,
    hessian: Array,
    quantization: Quantization,
    dtype: mx.Dtype,
    start: Packed | None = None,
    outputs: Array | None = None,
    sweeps: int = SWEEPS,
    together: bool = True,
    output_damping: Array | float = OUTPUT_DAMPING,
    update: mx.array | None = None,
    engine: Engine = NUMPY,
    factor: tuple[Array, Array] | None = None,
) -> tuple[Packed, Array]:
    """Round `weight` (..., out, in) for the least tr(G E H Eᵀ).

    H = `hessian` (..., in, in) are second moments of the inputs, G = `outputs` (..., out, out) of the gradients at the
    outputs (None: the identity). `start` is the same layer's quantized base, whose grids are tried too; `dtype`
    is the type of the scales; without `together` rows are rounded each by itself, which takes a quarter of the
    time, and G only judges. `update` (..., out, in) is the part of `weight` that is to keep its length; `factor` the
    `column_feedback` of the `damped` H, if it is known. Returns the packed weight and its error (...), tr(G E H Eᵀ) per
    weight with G and H scaled to mean diagonal 1 (with an `update`, the error against the weight aimed at).
    """
    matrix, damped_hessian = engine.array(weight), damped(hessian, engine=engine)
    rows = matrix.shape[-2]
    together = together and outputs is not None
    blocks = row_blocks(rows) if together else [np.arange(rows)]
    order = np.concatenate(blocks)
    felt = None
    if outputs is not None:
        felt = damped(outputs, output_damping, engine)[..., engine.xp.array(order), :][..., engine.xp.array(order)]
    factor = factor or column_feedback(damped_hessian, engine)
    rounder = _BlockedRounder(matrix, damped_hessian, factor, blocks, quantization, dtype, start, engine)
    change = None if update is None else rounder.transposed(engine.array(update))
    if felt is None or len(blocks) == 1:
        rounder.round_alone(sweeps, felt, change)
    else:
        rounder.round_together(felt, change)
    return rounder.packed(), rounder.best_loss


def nearest_if_better(
    packed: Packed,
    weight: mx.array,
    hessian: Array,
    dtype: mx.Dtype,
    outputs: Array | None = None,
    damping: Array | float = DAMPING,
    output_damping: float = OUTPUT_DAMPING,
    engine: Engine = NUMPY,
) -> tuple[Packed, Array, Array]:
    """`weight` (..., out, in) rounded to nearest, its error, and whether (...) it moves the layer's outputs less than
    `packed` does.

    What calibration found is best for its own tokens; a larger `damping` judges by more than they say. The error is in
    the units of `calibrated`. Of a large matrix some rows are compared, each by itself.
    """
    plain, matrix = to_nearest(weight, packed.quantization, dtype), engine.array(weight)
    size = _size(matrix)
    some = slice(None, None, -(-size // int(min(engine.large, size))))
    felt = None if outputs is None or size > engine.large else damped(outputs, output_damping, engine)
    judge = damped(hessian, damping, engine)

    def loss(rounded: Packed) -> Array:
        error = (matrix - engine.array(dequantize(rounded)))[..., some, :].swapaxes(-1, -2)  # (..., in, rows)
        return error_felt(error, judge, felt) / _size(error)

    losses = loss(plain), loss(packed)
    return plain, losses[0], ~(losses[1] <= losses[0])  # (also where a device computed NaN)


def row_blocks(rows: int) -> list[np.ndarray]:
    """Indices of the rows in each block: at most ROW_BLOCKS blocks (of many rows, FEW_BLOCKS) of at least 64,
    neighbors far apart.

    Rows near each other (one head's) are felt alike; apart, they can cancel each other's errors.
    """
    count = max(1, min(FEW_BLOCKS if rows >= MANY_ROWS else ROW_BLOCKS, rows // 64))
    return [np.arange(b, rows, count) for b in range(count)]


class _BlockedRounder:
    """Rounders of blocks of rows that feed each other. Arrays are (..., in, out) in the blocks' order."""

    def __init__(
        self,
        weight: Array,
        hessian: Array,
        factor: tuple[Array, Array],
        blocks: list[np.ndarray],
        quantization: Quantization,
        dtype: mx.Dtype,
        start: Packed | None,
        engine: Engine,
    ) -> None:
        self.engine, self.hessian, self.order = engine, hessian, np.concatenate(blocks)
        edges = np.cumsum([0, *(len(rows) for rows in blocks)]).tolist()
        self.spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
        self.weight, grid = self.transposed(weight), make_grid(quantization, dtype, engine.xp)
        scales = biases = None
        if start is not None and start.quantization == quantization:
            scales = self.transposed(grid.decode_scales(start.scales))  # (..., groups, out)
            biases = engine.xp.zeros_like(scales)
            if start.biases is not None:
                biases = self.transposed(engine.array(start.biases))
        step = engine.step(grid)
        along = diagonal_blocks(hessian, step, engine.xp), diagonal_blocks(factor[0], step, engine.xp)
        self.rounders = []
        for span in self.spans:
            own = None
            if scales is not None and biases is not None:
                own = scales[..., span], biases[..., span]
            self.rounders.append(Rounder(hessian, factor, along, grid, engine, own))
        self.states: list[Rounded | None] = [None] * len(blocks)
        self.errors = [engine.xp.zeros_like(self.weight[..., span]) for span in self.spans]
        # Of an update that is to keep its length: how much more of it is aimed at, and what the first pass kept.
        nothing = engine.xp.zeros(weight.shape[:-2], dtype=engine.xp.float32)
        self.aimed, self.aim, self.kept = self.weight, nothing, nothing + 1
        self.best_loss, self.best = nothing + np.inf, list[Rounded]()
        self.felt: Array | None = None

    def transposed(self, rows: Array) -> Array:
        """(..., out, n) as (..., n, out) in the blocks' order."""
        xp = self.engine.xp
        picked = rows[..., xp.array(self.order), :].swapaxes(-1, -2)
        return np.ascontiguousarray(picked) if xp is np else mx.contiguous(picked)

    def round_alone(self, sweeps: int, outputs: Array | None, update: Array | None = None) -> None:
        """Each row by itself; `outputs` only judges."""
        for number in range(len(self.rounders)):
            self._round(number, None, sweeps)
        if update is not None and bool((moved := self._correct_aim(update, None)).any()):
            for number in range(len(self.rounders)):
                self._round(number, None, min(sweeps, 2), anew=moved)
        self._keep_if_better(outputs)

    def round_together(self, outputs: Array, update: Array | None = None) -> None:
        """Each block against the errors of those before it, then several times (large: once) against those of all
        others; where that is few times, the last one takes two sweeps."""
        xp, engine = self.engine.xp, self.engine
        factor = engine.factor(outputs)
        inverses = engine.each(engine.inverse_upper, [factor[..., span, span] for span in self.spans])
        for number, span in enumerate(self.spans):
            shift = None
            if number:
                before = xp.concatenate(self.errors[:number], axis=-1)
                shift = before @ factor[..., : span.start, span] @ inverses[number]
            self._round(number, shift, 1)
        inverses = engine.each(self._inverse, [outputs[..., span, span] for span in self.spans])
        passes = FEW_PASSES if self.weight.shape[-1] >= MANY_ROWS else PASSES
        passes = passes if self.weight.size <= engine.large else 1
        for passed in range(passes):
            moved = None if update is None else self._correct_aim(update, outputs)
            if moved is not None:
                self.best_loss = xp.where(moved, np.float32(np.inf), self.best_loss)  # of another target
            for number, (span, inverse) in enumerate(zip(self.spans, inverses, strict=True)):
                shift = self._whole() @ outputs[..., span] @ inverse - self.errors[number]
                last = passed == passes - 1 and passes <= FEW_PASSES
                self._round(number, shift, 2 if last else 1, None if passed else moved)
            if passed in (0, passes - 1):  # telling the error takes a twelfth of the time
                self._keep_if_better(outputs, factor)

    def _inverse(self, matrix: Array) -> Array:
        """Of a positive definite matrix."""
        inverse = self.engine.inverse_upper(self.engine.factor(matrix))
        return inverse.swapaxes(-1, -2) @ inverse

    def _whole(self) -> Array:
        return self.engine.xp.concatenate(self.errors, axis=-1)

    def _correct_aim(self, update: Array, outputs: Array | None) -> Array:
        """Aim at so much more (or less) of the update D as rounding lost (or won) of it; where (...) the aim has moved.

        With errors W + aim · D - Q, what Q keeps of D is 1 + aim - <errors, D> / <D, D>.
        """
        xp = self.engine.xp
        if self.felt is None:
            self.felt = self.hessian @ update if outputs is None else self.hessian @ update @ outputs
        whole, seen = ((part * self.felt).sum(axis=(-2, -1)) for part in (update, self._whole()))
        lost = xp.where(whole > 0, seen / xp.where(whole > 0, whole, 1) - self.aim, 0)
        self.kept = xp.where(self.aim != 0, self.kept, 1 - lost)
        moved = (self.kept > 0) & (self.kept < 1 - NOTABLE_LOSS)
        more = xp.minimum(lost / xp.where(moved, self.kept, 1), MOST_AIM - self.aim)
        more = xp.where(moved, more, 0).astype(xp.float32)
        self.aim = self.aim + more
        self.aimed = self.aimed + _matrix(more) * update
        self.errors = [e + _matrix(more) * update[..., span] for e, span in zip(self.errors, self.spans, strict=True)]
        return moved

    def _round(self, number: int, shift: Array | None, sweeps: int, anew: Array | None = None) -> None:
        """Round a block (those matrices where `anew` holds from the start), moved by what it is to cancel."""
        rounder, state, aimed = self.rounders[number], self.states[number], self.aimed[..., self.spans[number]]
        target = aimed if shift is None else aimed + shift.astype(self.engine.xp.float32)
        if state is None:
            state = rounder.feed_forward(target)
        elif anew is not None and bool(anew.any()):
            state = self._chosen(anew, rounder.feed_forward(target), state)
        for _ in range(sweeps):
            state = rounder.sweep(target, state)
        self.states[number] = state
        self.errors[number] = aimed - self.engine.xp.concatenate(state.values, axis=-2)

    def _chosen(self, mask: Array, new: Rounded, old: Rounded) -> Rounded:
        return new.chosen(lambda mine, other: self.engine.select(mask, mine, other), old)

    def _keep_if_better(self, outputs: Array | None, factor: Array | None = None) -> None:
        loss = error_felt(self._whole(), self.hessian, outputs, factor) / _size(self.weight)
        better, states = loss < self.best_loss, [state for state in self.states if state is not None]
        pairs = zip(states, self.best or states, strict=True)
        self.best = [self._chosen(better, new, old) for new, old in pairs]
        self.best_loss = self.engine.xp.where(better, loss, self.best_loss)

    def packed(self) -> Packed:
        """The best result so far, its rows where they were."""
        parts = [rounder.packed(state) for rounder, state in zip(self.rounders, self.best, strict=True)]
        rows = mx.array(np.argsort(self.order).astype(np.int32))
        together = {n: mx.concatenate([p.tensors[n] for p in parts], axis=-2) for n in parts[0].tensors}
        return Packed.of({n: tensor[..., rows, :] for n, tensor in together.items()}, parts[0].quantization)


def error_felt(errors: Array, hessian: Array, outputs: Array | None = None, factor: Array | None = None) -> Array:
    """tr(G Eᵀ H E) of errors (..., in, out), H (..., in, in) and G (..., out, out; None: the identity).

    Of a large matrix it is estimated: with random u of covariance 1, the mean of (E u)ᵀ H E G u; better with the
    `factor` R of G = R Rᵀ, the mean of what H makes of E R u.
    """
    if outputs is None or _size(errors) <= ESTIMATED:
        felt = errors if outputs is None else errors @ outputs  # (..., in, out)
        return (felt * (hessian @ errors)).sum(axis=(-2, -1))
    noise = _noise(errors.shape[-1]) if isinstance(errors, np.ndarray) else mx.array(_noise(errors.shape[-1]))
    moved = errors @ (noise if factor is None else factor @ noise)  # (..., in, PROBES)
    felt = moved if factor is not None else errors @ (outputs @ noise)
    return (felt * (hessian @ moved)).sum(axis=(-2, -1)) / PROBES


@functools.cache
def _noise(rows: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, PROBES), np.float32)


def _size(matrix: Array) -> int:
    return matrix.shape[-2] * matrix.shape[-1]


def _matrix(numbers: Array) -> Array:
    return numbers[..., None, None]


def _diagonal(matrix: Array, xp: ModuleType) -> Array:
    return xp.diagonal(matrix, axis1=-2, axis2=-1)
