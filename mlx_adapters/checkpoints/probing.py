"""What mlx-lm does to a checkpoint's tensors when it loads them, found out by trying.

A model's `sanitize` renames, stacks, splits and moves the axes of tensors; some multiply (Falcon-H1 folds its
multipliers into the weights) or add (Qwen3-Next stores norm weights less one). All of that is affine, number by
number: target[j] = scale[j] · source[i(j)] + offset. So it is run on probes: zeros give the offset, ones the
scale, each tensor's number the source, coordinates the place in it, and random numbers say whether that is all.
What is not of this kind is a `Piece` of nothing, with the reason.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlx_adapters.storage.tensor_files import as_numpy

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, mx.array]
Sanitize = Callable[[Tensors], Tensors]
LARGE = 1 << 25  # numbers in a checkpoint that is not probed whole for the sake of a tensor that is not understood
CORNERS, SEVERAL = ((4, 3), (1 << 30, 3)), 2  # of a matrix, of stacked experts


@dataclass(frozen=True)
class Piece:
    """How one source tensor is laid into a target: target[index] = scale · source[select].transpose(axes) + offset.

    `index` counts along the target's first axis (experts), None for all of the target. `scale` is one number, or
    an array that broadcasts against the target's part. `split`: (axis, inner) of the source that becomes two before it
    is cut, the second of length `inner` (the rows of all heads: heads, rows of each); 0 for one of length 1 that goes
    away.
    """

    source: str
    target: str
    index: int | None
    select: tuple[slice, ...]
    axes: tuple[int, ...]
    scale: float | np.ndarray
    offset: float
    split: tuple[int, int] | None = None

    @property
    def whole(self) -> bool:
        """Whether all of the source goes here, as it is but for the order of its axes."""
        return self.split is None and all(part == slice(None) for part in self.select)

    def apply(self, array: mx.array) -> mx.array:
        """What the target holds where the source holds `array`."""
        return self.linear(array) + self.offset if self.offset else self.linear(array)

    def linear(self, array: mx.array) -> mx.array:
        """The same for a change of the source."""
        moved = array.reshape(self.viewed(array.shape))[self.select].transpose(self.axes)
        return moved if isinstance(self.scale, float) and self.scale == 1 else moved * mx.array(self.scale)

    def back(self, part: mx.array, source: mx.array) -> mx.array:
        """`source` with the part of it that the target holds; of a whole source that part alone."""
        if self.offset or not (isinstance(self.scale, float) and self.scale == 1):
            part = ((part.astype(mx.float32) - self.offset) / mx.array(self.scale)).astype(part.dtype)
        moved = part.transpose([self.axes.index(axis) for axis in range(len(self.axes))])
        if all(some == slice(None) for some in self.select):
            return moved.reshape(source.shape)
        viewed = source.reshape(self.viewed(source.shape))
        viewed[self.select] = moved
        return viewed.reshape(source.shape)

    def viewed(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the source before it is cut."""
        if self.split is None:
            return source
        axis, inner = self.split
        return *source[:axis], *((source[axis] // inner, inner) if inner else ()), *source[axis + 1 :]

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part that a source of this shape fills."""
        lengths = [len(range(size)[part]) for part, size in zip(self.select, self.viewed(source), strict=True)]
        return tuple(lengths[axis] for axis in self.axes)


@dataclass(frozen=True)
class Layout:
    """The tensors that a checkpoint holds, and what becomes of them: by target the pieces, or why there are none.

    unpacked: names of tensors that are as transformers has them where checkpoints pack them, a form that mlx-lm does
    not read, and what they are called packed. model_type: as the base's config says.
    """

    shapes: Shapes
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    unpacked: Mapping[str, str] = field(default_factory=dict)
    model_type: str | None = None

    def into(self, target: str) -> list[Piece]:
        """The pieces of a target. Empty if it has none that are known."""
        return self.pieces.get(target, [])

    def of(self, source: str) -> list[Piece]:
        """Where a source goes."""
        return self._by_source.get(source, [])

    @cached_property
    def _by_source(self) -> dict[str, list[Piece]]:
        by_source: dict[str, list[Piece]] = {}
        for piece in (piece for pieces in self.pieces.values() for piece in pieces):
            by_source.setdefault(piece.source, []).append(piece)
        return by_source

    def packed(self, tensors: Tensors) -> Tensors:
        """A checkpoint's tensors in a form that mlx-lm reads, though not in few bits."""
        return {self.unpacked.get(n, n): a.swapaxes(1, 2) if n in self.unpacked else a for n, a in tensors.items()}

    def fits(self, wanted: Shapes) -> bool:
        """Whether these tensors make exactly a model of tensors of the `wanted` shapes, as far as can be told."""
        if set(self.pieces) | set(self.problems) != set(wanted):
            return False
        return all(
            (pieces[0].index is None or len(pieces) == wanted[target][0])
            and all(piece.shape(self.shapes[piece.source]) == _part(wanted[target], piece) for piece in pieces)
            for target, pieces in self.pieces.items()
        )


def _part(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    return shape if piece.index is None else shape[1:]


def trace(sanitize: Sanitize, shapes: Shapes, wanted: Shapes) -> Layout:
    """Run `sanitize` on probes of these `shapes`; `wanted` are the model's. Raises whatever `sanitize` raises.

    Most weights are moved as wholes, and a corner tells as much as all of them; if the pieces of corners do not fit
    the model, whole rows are tried, then everything.
    """
    for corner in CORNERS:
        with contextlib.suppress(Exception):  # code that looks at sizes may raise anything
            layout = replace(_trace(sanitize, {n: _cut(s, corner) for n, s in shapes.items()}), shapes=shapes)
            if layout.fits(wanted) and (not layout.problems or sum(map(math.prod, shapes.values())) > LARGE):
                return layout
    return _trace(sanitize, shapes)


def _cut(shape: tuple[int, ...], corner: tuple[int, int]) -> tuple[int, ...]:
    if len(shape) == 2:
        return min(shape[0], corner[0]), min(shape[1], corner[1])
    if len(shape) == 3 and min(shape) > 16:
        return SEVERAL, *shape[1:]
    return shape


def _trace(sanitize: Sanitize, shapes: Shapes) -> Layout:
    def run(probe: Callable[[int, tuple[int, ...]], mx.array]) -> Tensors:
        return sanitize({name: probe(i, shape) for i, (name, shape) in enumerate(shapes.items())})

    def coordinate(axis: int) -> Tensors:
        return run(lambda _, shape: _coordinates(shape, axis))

    deepest = max(map(len, shapes.values()), default=0)
    runs = [run(lambda _, shape: mx.zeros(shape)), run(lambda _, shape: mx.ones(shape))]
    runs += [run(lambda i, shape: mx.full(shape, float(i + 1))), run(_noise)]
    runs += [coordinate(axis) for axis in range(deepest)]
    names, layout = list(shapes), Layout(shapes)
    for target in list(runs[0]):
        try:
            arrays = [as_numpy(outputs.pop(target).astype(mx.float32)) for outputs in runs]
            layout.pieces[target] = _pieces(target, arrays, names, shapes)
        except _NotUnderstood as reason:
            layout.problems[target] = str(reason)
    return layout


class _NotUnderstood(Exception):
    """Why a target is not made of pieces."""


def _coordinates(shape: tuple[int, ...], axis: int) -> mx.array:
    if axis >= len(shape):
        return mx.zeros(shape)
    line = [1] * len(shape)
    line[axis] = shape[axis]
    return mx.broadcast_to(mx.arange(shape[axis], dtype=mx.float32).reshape(line), shape)


def _noise(i: int, shape: tuple[int, ...]) -> mx.array:
    return mx.random.uniform(0.5, 1.5, shape, key=mx.random.key(i))


def _pieces(target: str, arrays: list[np.ndarray], names: list[str], shapes: Shapes) -> list[Piece]:
    offset, one, ids, noise, *places = arrays
    scale = one - offset
    if offset.size == 0 or not all(np.isfinite(array).all() for array in arrays):
        raise _NotUnderstood("its numbers are not finite")
    if (offset != offset.flat[0]).any() or (scale == 0).any():
        raise _NotUnderstood("it does not depend on the checkpoint number by number")
    ids, places = _whole((ids - offset) / scale), [_whole((place - offset) / scale) for place in places]
    if ids.min() < 1 or ids.max() > len(names):
        raise _NotUnderstood("it mixes several tensors of the checkpoint")
    parts: list[tuple[int | None, tuple]] = [(None, ())]
    if (ids != ids.flat[0]).any():
        parts = [(i, (i,)) for i in range(ids.shape[0])]
    pieces = []
    for index, at in parts:
        source = ids[at]
        if (source != source.flat[0]).any():
            raise _NotUnderstood("it joins several tensors of the checkpoint")
        name = names[source.flat[0] - 1]
        depth = len(shapes[name])
        if index is not None and depth != source.ndim:
            raise _NotUnderstood("it joins several tensors of the checkpoint")
        coordinates = [place[at] for place in places[:depth]]
        expected = np.array(_noise(int(source.flat[0]) - 1, shapes[name]))[tuple(coordinates)] * scale[at] + offset[at]
        if not np.allclose(expected, noise[at], rtol=1e-5, atol=1e-6):
            raise _NotUnderstood("its numbers are not the checkpoint's, multiplied or shifted")
        split, coordinates, shape = _split(coordinates, shapes[name])
        select, axes = _axes(coordinates, shape)
        pieces.append(Piece(name, target, index, select, axes, _scale(scale[at]), float(offset.flat[0]), split))
    return pieces


def _whole(numbers: np.ndarray) -> np.ndarray:
    rounded = np.rint(numbers)
    if (np.abs(numbers - rounded) > 0.01 + 1e-5 * np.abs(rounded)).any():
        raise _NotUnderstood("its numbers are not the checkpoint's, multiplied or shifted")
    return rounded.astype(np.int64)


def _split(
    coordinates: list[np.ndarray], source: tuple[int, ...]
) -> tuple[tuple[int, int] | None, list[np.ndarray], tuple[int, ...]]:
    """(axis, inner), coordinates and shape of the source where one of its axes becomes two, or one of them goes."""
    depth = coordinates[0].ndim if coordinates else 0
    for axis, places in enumerate(coordinates):
        if len(source) == depth + 1 and source[axis] == 1:
            return (axis, 0), coordinates[:axis] + coordinates[axis + 1 :], source[:axis] + source[axis + 1 :]
        steps = (np.diff(places, axis=t) for t in range(depth))
        inner = max((int(step.flat[0]) for step in steps if step.size), default=0)
        if len(source) == depth - 1 and 1 < inner < source[axis] and source[axis] % inner == 0:
            parts = [places // inner, places % inner]
            return (
                (axis, inner),
                [*coordinates[:axis], *parts, *coordinates[axis + 1 :]],
                (*source[:axis], source[axis] // inner, inner, *source[axis + 1 :]),
            )
    return None, coordinates, source


def _axes(coordinates: list[np.ndarray], source: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """Which part of the source it is, and the source's axis for each of the part's axes."""
    shape = coordinates[0].shape if coordinates else ()
    along: dict[int, int] = {}
    select = []
    for axis, places in enumerate(coordinates):
        steps = {t: np.diff(places, axis=t) for t in range(len(shape)) if shape[t] > 1}
        moving = {t: step for t, step in steps.items() if step.any()}
        if len(moving) > 1 or any((step != step.flat[0]).any() or step.flat[0] < 0 for step in moving.values()):
            raise _NotUnderstood("it is cut into other axes")
        start = int(places.flat[0])
        if not moving:
            select.append(slice(None) if source[axis] == 1 else slice(start, start + 1))
            continue
        t, step = next((t, int(step.flat[0])) for t, step in moving.items())
        whole = start == 0 and step == 1 and shape[t] == source[axis]
        select.append(slice(None) if whole else slice(start, start + (shape[t] - 1) * step + 1, step))
        if t in along:
            raise _NotUnderstood("it is cut into other axes")
        along[t] = axis
    free = [axis for axis in range(len(source)) if axis not in along.values()]
    still = [t for t in range(len(shape)) if t not in along]
    if len(free) != len(still) or any(shape[t] > 1 for t in still):
        raise _NotUnderstood("it repeats parts of the checkpoint")
    along |= dict(zip(still, free, strict=True))
    return tuple(select), tuple(along[t] for t in range(len(shape)))


def _scale(scale: np.ndarray) -> float | np.ndarray:
    """One number, or an array with the axes along which the scale does not change cut to one."""
    for axis in range(scale.ndim):
        first = np.take(scale, [0], axis=axis)
        if (scale == first).all():
            scale = first
    return float(scale.flat[0]) if scale.size == 1 else scale


def runs_of(numbers: np.ndarray) -> list[tuple[int, float]]:
    """(how many, number) of equal neighbors."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(stop - start, float(numbers[start])) for start, stop in pairwise(edges)]
