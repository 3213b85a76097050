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

Errors of different outputs are felt together: with G = Σ g gᵀ, g the gradient at the layer's output, the loss in
KL is about tr(G E H Eᵀ), a Kronecker product. So rows feed their errors on too: the rows are cut into blocks, and
each block aims at what best cancels the errors of the others (two-sided feedback, as in YAQA, arXiv 2505.22988).

Matrices are transposed, (in, out), float32.
"""

import itertools
import math

import mlx.core as mx
import numpy as np

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.rounding.columns import Rounder
from mlx_adapters.rounding.grids import Array, to_numpy
from mlx_adapters.rounding.packed import Packed, dequantize, to_nearest

DAMPING, OUTPUT_DAMPING = 0.01, 0.1
ROW_BLOCKS = 8
LARGE = 1 << 23  # weights; for larger matrices two passes, worth some percent of the error, would take minutes
PROBES = 256
NOTABLE_LOSS, MOST_AIM = 0.01, 1.0  # of an update's length


def damped(hessian: Array, damping: float = DAMPING) -> Array:
    """A usable H: symmetric, positive definite, with mean diagonal 1.

    Columns that calibration never used ("dead") and a singular H get a little of the identity, which
    means: round those to nearest. An H with no finite positive trace becomes the identity.
    """
    n = len(hessian)
    mean = float(np.trace(hessian)) / n
    if not np.isfinite(mean) or mean <= 0 or not np.isfinite(hessian).all():
        return np.eye(n, dtype=np.float32)
    result = (hessian + hessian.T) * np.float32(0.5 / mean)
    result[np.diag_indices(n)] += np.float32(damping)
    return result


def feedback_factor(hessian: Array) -> Array:
    """Upper triangular R with H = R Rᵀ, float32. More damping is added until H is positive definite."""
    flipped: np.ndarray = np.ascontiguousarray(hessian[::-1, ::-1]).astype(
        np.float64 if len(hessian) <= 4096 else np.float32
    )
    extra = DAMPING
    while True:
        try:
            return np.ascontiguousarray(np.linalg.cholesky(flipped)[::-1, ::-1]).astype(np.float32)
        except np.linalg.LinAlgError:
            flipped[np.diag_indices(len(flipped))] += extra
            extra *= 4


def column_feedback(hessian: Array) -> tuple[Array, Array]:
    """(R with each column divided by its diagonal entry, the squared diagonal) of H = R Rᵀ."""
    factor = feedback_factor(hessian)
    diagonal = np.diag(factor).copy()
    return factor / diagonal, np.square(diagonal)


def calibrated(
    weight: mx.array,
    hessian: Array,
    quantization: Quantization,
    dtype: mx.Dtype,
    start: Packed | None = None,
    outputs: Array | None = None,
    sweeps: int = 6,
    together: bool = True,
    output_damping: float = OUTPUT_DAMPING,
    update: mx.array | None = None,
) -> tuple[Packed, float]:
    """Round `weight` (out, in) for the least tr(G E H Eᵀ).

    H = `hessian` (in, in) are second moments of the inputs, G = `outputs` (out, out) of the gradients at the
    outputs (None: the identity). `start` is the same layer's quantized base, whose grids are tried too; `dtype`
    is the type of the scales; without `together` rows are rounded each by itself, which takes a quarter of the
    time, and G only judges. `update` (out, in) is the part of `weight` that is to keep its length. Returns the
    packed weight and its error, tr(G E H Eᵀ) per weight with G and H scaled to mean diagonal 1 (with an `update`,
    the error against the weight aimed at).
    """
    matrix, damped_hessian = to_numpy(weight), damped(hessian)
    together = together and outputs is not None
    blocks = row_blocks(len(matrix)) if together else [np.arange(len(matrix))]
    order = np.concatenate(blocks)
    felt = None if outputs is None else damped(outputs, output_damping)[np.ix_(order, order)]
    rounder = _BlockedRounder(matrix, damped_hessian, blocks, quantization, dtype, start)
    change = None if update is None else np.ascontiguousarray(to_numpy(update)[order].T)
    if felt is None or len(blocks) == 1:
        rounder.round_alone(sweeps, felt, change)
    else:
        rounder.round_together(felt, change)
    return rounder.packed(np.argsort(order)), rounder.best_loss


def nearest_if_better(
    packed: Packed,
    weight: mx.array,
    hessian: Array,
    dtype: mx.Dtype,
    outputs: Array | None = None,
    damping: float = DAMPING,
    output_damping: float = OUTPUT_DAMPING,
) -> tuple[Packed, float] | None:
    """`weight` rounded to nearest and its error, if it moves the layer's outputs less than `packed` does; else None.

    What calibration found is best for its own tokens; a larger `damping` judges by more than they say. The error is in
    the units of `calibrated`. Of a large matrix some rows are compared, each by itself.
    """
    plain, matrix = to_nearest(weight, packed.quantization, dtype), to_numpy(weight)
    some = slice(None, None, -(-matrix.size // LARGE))
    felt = None if outputs is None or matrix.size > LARGE else damped(outputs, output_damping)
    judge = damped(hessian, damping)
    errors = [matrix[some].T - to_numpy(dequantize(each[some])).T for each in (plain, packed)]  # (in, rows)
    losses = [error_felt(error, judge, felt) / error.size for error in errors]
    return (plain, losses[0]) if losses[0] < losses[1] else None


def row_blocks(rows: int) -> list[Array]:
    """Indices of the rows in each block: at most ROW_BLOCKS blocks of at least 64, neighbors far apart.

    Rows near each other (one head's) are felt alike; apart, they can cancel each other's errors.
    """
    count = max(1, min(ROW_BLOCKS, rows // 64))
    return [np.arange(b, rows, count) for b in range(count)]


class _BlockedRounder:
    """Rounders of blocks of rows that feed each other. Errors are (in, out) in the blocks' order."""

    def __init__(
        self,
        weight: Array,
        hessian: Array,
        blocks: list[Array],
        quantization: Quantization,
        dtype: mx.Dtype,
        start: Packed | None,
    ) -> None:
        self.hessian, factor = hessian, column_feedback(hessian)
        self.weights = [np.ascontiguousarray(weight[rows].T) for rows in blocks]  # each (in, rows)
        starts = [None if start is None else start[mx.array(rows.astype(np.int32))] for rows in blocks]
        self.rounders = [
            Rounder(part, hessian, factor, quantization, dtype, own)
            for part, own in zip(self.weights, starts, strict=True)
        ]
        edges = np.cumsum([0, *(len(rows) for rows in blocks)])
        self.spans = [slice(a, b) for a, b in itertools.pairwise(edges.tolist())]
        self.errors = np.zeros((weight.shape[1], len(weight)), np.float32)  # (in, out)
        self.best_loss = math.inf
        # Of an update that is to keep its length: how much more of it is aimed at, and what the first pass kept.
        self.aim, self.kept = 0.0, 1.0
        self.felt: Array | None = None

    def round_alone(self, sweeps: int, outputs: Array | None, update: Array | None = None) -> None:
        """Each row by itself; `outputs` only judges."""
        for number in range(len(self.rounders)):
            self._round(number, None, sweeps, first=True)
        if update is not None and self._correct_aim(update, None):
            for number in range(len(self.rounders)):
                self._round(number, None, min(sweeps, 2), first=True)
        self._keep_if_better(outputs)

    def round_together(self, outputs: Array, update: Array | None = None) -> None:
        """Each block against the errors of those before it, then twice (large: once) against those of all others."""
        factor = feedback_factor(outputs)
        for number, span in enumerate(self.spans):
            fed = np.linalg.solve(factor[span, span].T, factor[: span.start, span].T).T
            self._round(number, self.errors[:, : span.start] @ fed, 1, first=True)
        feeds = [np.linalg.solve(outputs[span, span], outputs[span]).T for span in self.spans]
        for passed in range(2 if self.errors.size <= LARGE else 1):
            moved = update is not None and self._correct_aim(update, outputs)
            if moved:
                self.best_loss = math.inf  # of another target
            for number, (span, fed) in enumerate(zip(self.spans, feeds, strict=True)):
                self._round(number, self.errors @ fed - self.errors[:, span], 1, first=moved and not passed)
            self._keep_if_better(outputs, factor)

    def _correct_aim(self, update: Array, outputs: Array | None) -> bool:
        """Aim at so much more (or less) of the update D as rounding lost (or won) of it; whether the aim has moved.

        With errors W + aim · D - Q, what Q keeps of D is 1 + aim - <errors, D> / <D, D>.
        """
        if self.felt is None:
            self.felt = self.hessian @ update if outputs is None else self.hessian @ update @ outputs
        whole = float(np.vdot(update, self.felt))
        lost = float(np.vdot(self.errors, self.felt)) / whole - self.aim if whole > 0 else 0.0
        self.kept = self.kept if self.aim else 1 - lost
        if not 0 < self.kept < 1 - NOTABLE_LOSS:
            return False
        more = min(lost / self.kept, MOST_AIM - self.aim)
        self.aim += more
        for number, span in enumerate(self.spans):
            added = np.float32(more) * update[:, span]
            self.weights[number] = self.weights[number] + added
            self.rounders[number].weight = self.rounders[number].weight + added
            self.rounders[number].errors = self.rounders[number].errors + added
            self.errors[:, span] += added
        return True

    def _round(self, number: int, shift: Array | None, sweeps: int, first: bool) -> None:
        rounder, weight = self.rounders[number], self.weights[number]
        values = rounder.weight - rounder.errors
        rounder.weight = weight if shift is None else weight + shift.astype(np.float32)
        if first:
            rounder.feed_forward()
        else:
            rounder.errors = rounder.weight - values
        for _ in range(sweeps):
            rounder.sweep()
        self.errors[:, self.spans[number]] = weight - (rounder.weight - rounder.errors)

    def _keep_if_better(self, outputs: Array | None, factor: Array | None = None) -> None:
        loss = error_felt(self.errors, self.hessian, outputs, factor) / self.errors.size
        if loss < self.best_loss:
            self.best_loss = loss
            self._best = [rounder.packed() for rounder in self.rounders]

    def packed(self, order: Array) -> Packed:
        """The best result so far, its rows in `order`."""
        rows = mx.array(order.astype(np.int32))
        names = self._best[0].tensors
        parts = {name: mx.concatenate([p.tensors[name] for p in self._best])[rows] for name in names}
        return Packed.of(parts, self._best[0].quantization)


def error_felt(errors: Array, hessian: Array, outputs: Array | None = None, factor: Array | None = None) -> float:
    """tr(G Eᵀ H E) of errors (in, out), H (in, in) and G (out, out; None: the identity).

    With a `factor` R of G = R Rᵀ it is estimated for a large matrix: it is the mean over random u of covariance G
    of what H makes of E u.
    """
    if factor is not None and errors.size > LARGE:
        noise = np.random.default_rng(0).standard_normal((len(factor), PROBES), np.float32)
        moved = errors @ (factor @ noise)  # (in, PROBES)
        return float(np.vdot(moved, hessian @ moved)) / PROBES
    felt = errors if outputs is None else errors @ outputs  # (in, out)
    return float(np.vdot(felt, hessian @ errors))
