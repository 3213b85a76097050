"""Scales and biases tuned by gradient once every layer is rounded; the codes stay as they are.

Each layer was rounded as if it were the only one. What all their errors together do to the predictions is
KL(adapter ‖ rounded), and its gradient reaches every scale and bias through the whole model. Adam (arXiv 1412.6980)
moves them, in units of their group's step so that one rate suits all layers. The model stores them in few bits:
the loss sees what is stored, the gradient takes that rounding for the identity (arXiv 1308.3432). So a number changes
only where most batches push it the same way, and the rate must be small: a few steps of a group spoil what
rounding has found.

One scale for 32 to 128 weights leaves little room to learn the calibration rows by heart, but with few rows enough:
some are kept aside, and say how long to go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mlx import optimizers

from mlx_adapters.assembly.spool import Spool
from mlx_adapters.assembly.tensors import Assembly
from mlx_adapters.calibration.blockwise import BlockwiseModel, with_rounded
from mlx_adapters.calibration.fidelity import last_states
from mlx_adapters.calibration.texts import batches_of
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import TokenBatch, TokenRow
from mlx_adapters.data.datasets import spread
from mlx_adapters.errors import ModelError
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.rounding.grids import round_to
from mlx_adapters.rounding.packed import Packed, dequantize
from mlx_adapters.surgery.blocks import Call
from mlx_adapters.surgery.taps import divergence, log_probabilities
from mlx_adapters.system.door import mx
from mlx_adapters.system.limits import out_of_memory
from mlx_adapters.system.machine import usable_memory_bytes

TUNING_PASSES, RATE, TOKENS = 4, 0.001, 512  # over the rows; of a group's step, falling to 0 along a cosine; at a time
ASIDE = 8  # of so many rows one is kept aside
COPIES = 4  # of the dense model: weights, their gradients, codes, activations
MOMENTA = (0.9, 0.95)


def room(parameters: int) -> float:
    """The share of the memory that tuning a model of so many parameters takes."""
    return COPIES * 4 * parameters / usable_memory_bytes()


def tunable(packed: Packed) -> bool:
    """Whether its grid can be moved by a little. (In the float modes scales are bytes, or powers of two.)"""
    return packed.biases is not None and packed.weight.ndim == 2


def codes_of(packed: Packed) -> mx.array:
    """The codes of an affine weight, uint8 (out, groups, group)."""
    q, shape = packed.quantization, packed.scales.shape
    plain = Packed(packed.weight, mx.ones(shape), mx.zeros(shape), q)
    return dequantize(plain).reshape(*shape, q.group_size).astype(mx.uint8)


class Grids:
    """The scales and biases of affine weights, all in one row each: a step of Adam is then a few operations.

    How they are moved is an array (2, groups of all weights): a scale moved by 1 moves the value of the highest code by
    a step, a bias moved by 1 all values.
    """

    def __init__(self, packed: Mapping[str, Packed]) -> None:
        self.packed = dict(packed)
        parts = list(self.packed.values())
        self.steps = mx.concatenate([part.scales.reshape(-1) for part in parts]).astype(mx.float32)
        self.biases = mx.concatenate([part.tensors["biases"].reshape(-1) for part in parts]).astype(mx.float32)
        highest = [mx.full((part.scales.size,), 2.0**part.quantization.bits - 1) for part in parts]
        self.highest, self.dtype = mx.concatenate(highest), parts[0].scales.dtype
        self.cuts = np.cumsum([part.scales.size for part in parts])[:-1].tolist()

    def moved(self, moves: mx.array) -> dict[str, tuple[mx.array, mx.array]]:
        """By path (scales, biases) as they would be stored, float32 (out, groups)."""
        scales = _stored(self.steps * (1 + moves[0] / self.highest), self.dtype)
        biases = _stored(self.biases + self.steps * moves[1], self.dtype)
        each = zip(self.packed.items(), mx.split(scales, self.cuts), mx.split(biases, self.cuts), strict=True)
        return {path: (s.reshape(part.scales.shape), b.reshape(part.scales.shape)) for (path, part), s, b in each}

    def repacked(self, moves: mx.array) -> dict[str, Packed]:
        """The same codes on the moved grids."""
        return {
            path: Packed(part.weight, scales.astype(self.dtype), biases.astype(self.dtype), part.quantization)
            for (path, (scales, biases)), part in zip(self.moved(moves).items(), self.packed.values(), strict=True)
        }


def _stored(values: mx.array, dtype: mx.Dtype) -> mx.array:
    return values + mx.stop_gradient(round_to(values, dtype) - values)


def on_grid(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """The weight (out, in) that codes (out, groups, group) stand for on grids (out, groups)."""
    values = scales[..., None] * codes.astype(mx.float32) + biases[..., None]
    return values.reshape(values.shape[0], -1)


@dataclass(frozen=True)
class Lesson:
    """A batch, the teacher's last state on it, and what the student's first block with a grid to move gets."""

    batch: TokenBatch
    taught: list[mx.array]
    state: list[mx.array]
    calls: list[Call]


class Student:
    """The rounded model, whole, as a function of how its grids are moved. It learns from the `teacher`, the adapter
    model, on some batches, and is judged on others that are kept `aside`."""

    def __init__(
        self,
        teacher: BlockwiseModel,
        model: BlockwiseModel,
        packed: Mapping[str, Packed],
        batches: Sequence[TokenBatch],
        aside: Sequence[TokenBatch],
    ) -> None:
        self.teacher, self.model, self.grids = teacher, model, Grids(packed)
        (states,) = last_states([teacher], [*batches, *aside], lambda _: None)
        for index in range(len(model.blocks) + 1):
            model.prepare(index)
        modules = dict(
            model.source.module.train().named_modules()
        )  # some kernels have no gradient, and are left out so
        self._layers = {path: (modules[path], codes_of(part)) for path, part in packed.items()}
        moving = [any(path in packed for path in model.layer_paths(i)) for i in range(len(model.blocks) + 1)]
        self.enters_anew = moving[-1]  # the embedding is moved
        self.first = 0 if self.enters_anew else moving.index(True)
        lessons = [self._lesson(*pair) for pair in zip([*batches, *aside], states, strict=True)]
        self.lessons, self.aside = lessons[: len(batches)], lessons[len(batches) :]

    def _lesson(self, batch: TokenBatch, taught: list[mx.array]) -> Lesson:
        state, calls = self.model.blocks.enter(batch.tokens)
        for index in range(self.first):
            state = self.model.blocks.step(index, state, calls[index])
            mx.eval(state)
        return Lesson(batch, taught, state, calls)

    def kl(self, moves: mx.array, lesson: Lesson) -> mx.array:
        """KL(adapter ‖ rounded) summed over the judged tokens of a batch, in nats."""
        for path, grid in self.grids.moved(moves).items():
            layer, codes = self._layers[path]
            layer.weight = on_grid(codes, *grid)
        blocks, batch = self.model.blocks, lesson.batch
        state, calls = blocks.enter(batch.tokens) if self.enters_anew else (lesson.state, lesson.calls)
        for index in range(self.first, len(calls)):
            state = blocks.step(index, state, calls[index])
        own = log_probabilities(blocks.finish(state, batch.judged))  # (judged, vocabulary)
        wanted = log_probabilities(self.teacher.blocks.finish(lesson.taught, batch.judged))
        return divergence(wanted, own).sum()

    def judged(self, moves: mx.array) -> float:
        """Mean KL over the judged tokens of the rows kept aside."""
        total = sum(self.kl(moves, lesson).item() for lesson in self.aside)
        return total / max(1, sum(lesson.batch.judged.size for lesson in self.aside))


def polish(
    student: Student, passes: int = TUNING_PASSES, rate: float = RATE, on_event: OnEvent = log_warnings
) -> tuple[dict[str, Packed], float, float]:
    """The layers with their grids tuned, and KL on the rows kept aside before and after, nats per judged token.

    What counts is the pass after which that was least; if it was never less than before, nothing is changed.
    """
    best = moves = mx.zeros((2, student.grids.steps.size))
    before = least = student.judged(moves)
    tokens = sum(lesson.batch.judged.size for lesson in student.lessons) / len(student.lessons)  # of a typical batch
    slope = mx.grad(lambda moves, lesson: student.kl(moves, lesson) / max(tokens, 1))
    steps = passes * len(student.lessons)
    schedule = optimizers.cosine_decay(rate, steps)
    adam = optimizers.Adam(schedule, betas=list(MOMENTA), bias_correction=True)
    for number in range(passes):
        for step, lesson in enumerate(student.lessons, 1 + number * len(student.lessons)):
            moves = adam.apply_gradients({"moves": slope(moves, lesson)}, {"moves": moves})["moves"]
            mx.eval(moves, adam.state)
            on_event(Progress("calibrate: polish", step, steps, "batch"))
        if (kl := student.judged(moves)) < least:  # (NaN is not)
            least, best = kl, moves
    return student.grids.repacked(best), before, least


def polished(
    assembly: Assembly,
    spool: Spool,
    targets: Mapping[str, Quantization | None],
    rows: list[TokenRow],
    on_event: OnEvent = log_warnings,
    passes: int = TUNING_PASSES,
    rate: float = RATE,
) -> str:
    """Exchange the layers of `spool` at these precisions for tuned ones. Returns what that brought on one in ASIDE of
    the `rows`, from which they do not learn, in words. Raises ModelError where memory is too
    small for the whole model in float32 and its gradients."""
    rounded = {path: spool.get(path, target) for path, target in targets.items()}
    packed = {path: part for path, part in rounded.items() if part is not None and tunable(part)}
    if not packed:
        return "No scales to tune: those of experts and of the float modes stay as they are"
    aside = spread(rows, -(-len(rows) // ASIDE))
    rest = [row for row in rows if not any(row is one for one in aside)] or aside
    assembly.close()
    fits = room(assembly.parameters) < 1
    try:
        if fits:
            exact = BlockwiseModel(assembly.base, assembly.updates)
            model = with_rounded(assembly, spool, targets, exact)
            batches = (batches_of(some, assembly.base, TOKENS) for some in (rest, aside))
            packed, before, after = polish(Student(exact, model, packed, *batches), passes, rate, on_event)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    if not fits:
        raise ModelError("The whole model unpacked does not fit into memory.", "leave --thorough away.")
    for path, part in packed.items():
        spool.exchange(path, part)
    return f"Scales tuned by gradient: KL on rows kept aside {before:.2g} before, {after:.2g} after"
