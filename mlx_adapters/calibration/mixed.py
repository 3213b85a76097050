"""Mixed precision: more bits for the layers that hurt most, until a promise holds.

Each layer has steps (4, 5, 6, 8 bits, unquantized); a step costs bytes and takes away some error. Errors are
those that calibration expects: the Fisher-weighted tr(E H Eᵀ), proportional to the KL that the layer alone
would cost, and nearly additive. The greedy order, most error per byte first, is then the best there is; how far
to go along it is decided by the bytes allowed, or by measuring KL.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlx_adapters.assembly.plan import LayerPlan, packed_shapes
from mlx_adapters.assembly.writing import tensor_bytes
from mlx_adapters.config.quantization import QUANTIZATIONS, Quantization
from mlx_adapters.events import Note, OnEvent

MEASUREMENTS = 8

Point = tuple[int, float, Quantization | None]  # bytes, error, precision


@dataclass(frozen=True)
class Step:
    """Give the layer at `path` the precision `target` (None: unquantized) for `extra_bytes` more."""

    path: str
    target: Quantization | None
    extra_bytes: int
    gain: float


def finer(quantization: Quantization) -> list[Quantization]:
    """The next finer precisions, coarsest first."""
    if quantization.mode != "affine":
        fine = Quantization(8, 32, "mxfp8")
        return [] if quantization.bits == 8 else [fine]
    bits = [b for b in QUANTIZATIONS["affine"][0] if b > quantization.bits]
    return [Quantization(b, quantization.group_size) for b in bits]


def layer_bytes(plan: LayerPlan, target: Quantization | None, dtype: str) -> int:
    """Bytes of one layer's weight at a precision."""
    layout = packed_shapes(LayerPlan(plan.path, plan.shape, plan.source, target, plan.changed, False), dtype)
    return sum(tensor_bytes(kind, shape) for _, kind, shape in layout)


def order_of_steps(plans: Iterable[LayerPlan], losses: dict[tuple[str, Quantization], float], dtype: str) -> list[Step]:
    """All steps, most error taken away per byte first; a layer's steps come in order of precision.

    Only steps on the lower convex hull of (bytes, error) are kept, so that the gains per byte of each layer
    fall from step to step.
    """
    steps = []
    for plan in plans:
        if plan.target is None or (plan.path, plan.target) not in losses:
            continue
        known = [q for q in (plan.target, *finer(plan.target)) if (plan.path, q) in losses]
        points: list[Point] = [(layer_bytes(plan, q, dtype), losses[plan.path, q], q) for q in known]
        points.append((layer_bytes(plan, None, dtype), 0.0, None))
        for before, after in _hull(points):
            steps.append(Step(plan.path, after[2], after[0] - before[0], before[1] - after[1]))
    return sorted(steps, key=lambda step: (-step.gain / step.extra_bytes, step.path))


def _hull(points: list[Point]) -> list[tuple[Point, Point]]:
    """Consecutive pairs of the points on the lower convex hull, from the first point on."""
    pairs: list[tuple[Point, Point]] = []
    here = points[0]
    while True:
        further = [p for p in points if p[0] > here[0] and p[1] < here[1]]
        if not further:
            return pairs
        best = max(further, key=lambda p: (here[1] - p[1]) / (p[0] - here[0]))
        pairs.append((here, best))
        here = best


def targets_after(steps: list[Step]) -> dict[str, Quantization | None]:
    """Path -> precision of the layers that `steps` change."""
    return {step.path: step.target for step in steps}


def within_budget(steps: list[Step], spare_bytes: int) -> list[Step]:
    """The steps to take with `spare_bytes`: in order, but one that is too large does not stop smaller ones after it."""
    taken: list[Step] = []
    closed: set[str] = set()
    for step in steps:
        if step.path in closed or step.extra_bytes > spare_bytes:
            closed.add(step.path)
            continue
        spare_bytes -= step.extra_bytes
        taken.append(step)
    return taken


def until_promise(
    steps: list[Step],
    total_loss: float,
    limit: float,
    measure: Callable[[dict[str, Quantization | None]], float],
    on_event: OnEvent,
) -> int:
    """The fewest steps (as far as some measurements tell) with which `measure` gives at most `limit`.

    The expected error says where to measure first: measured KL is taken as proportional to it, and the
    factor is learned from each measurement.
    """
    left = [total_loss]
    for step in steps:
        left.append(left[-1] - step.gain)
    low, high = -1, len(steps)  # measured to be too few; believed to be enough
    guess, proven = 0, None
    for _ in range(MEASUREMENTS):
        kl = measure(targets_after(steps[:guess]))
        on_event(Note(f"{guess} of {len(steps)} steps to more bits: KL {kl:.5f}, promised at most {limit:g}."))
        if kl <= limit:
            high, proven = guess, guess
        else:
            low = guess
        if high - low <= 1:
            break
        factor = kl / max(left[guess], 1e-30)
        wanted = next((i for i, loss in enumerate(left) if loss * factor <= 0.95 * limit), len(steps))
        guess = min(max(wanted, low + 1), high - 1)
    return high if proven is None else proven
