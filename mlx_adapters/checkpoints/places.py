"""Where the modules of a PEFT adapter lie in mlx-lm's model, and what loading does to their weights there.

A module's update is a product of two factors, left (rows, r) and right (r, columns). What loading does to a weight
that is cut, stacked, scaled by rows or turned around, it does to one of the two.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.checkpoints.probing import Layout, Piece, runs_of
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.models.layers import nn
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.hf_names import Renames
from mlx_adapters.storage.tensor_names import WEIGHT

MERGE_THERE = "merge it into its base in PEFT (merge_and_unload) and convert that model with 'mlx_lm.convert'."
OWN_BASE = "give the base that it was trained on."

Fold = float | list[Any]  # one factor of a weight's numbers, or [[rows, factor], ...]


@dataclass(frozen=True)
class WeightFactors:
    """left · right, (rows, r) and (r, columns), in the orientation of an MLX weight; m (rows,) or None."""

    left: mx.array
    right: mx.array
    m: mx.array | None = None


@dataclass(frozen=True)
class ExpertRows:
    """A stacked layer, and the rows of the parameter of fused experts, (experts, out, in), that are its own."""

    key: str
    rows: slice


class Places:
    """Finds the base's layer for each module path of transformers and remembers how it was found.

    `renames` are what the paths took; `paths` are those that the renames do not lead back to, by layer (`{}` stands
    for the expert); `folds` what loading multiplies the layers' weights by, if it does.
    """

    def __init__(self, layers: Mapping[str, nn.Module], layout: Layout) -> None:
        self.layers, self.layout = layers, layout
        self.renames: dict[tuple[str, str], None] = {}
        self.taken: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self.folds: dict[str, Fold] = {}

    def find(self, path: str, source: str) -> list[Piece]:
        """How the weight of `path` comes into the model; `source` is the PEFT module that adapts it.

        Raises IncompatibleError if the base has nothing of the kind, FormatError if no layer's weight is made of it.
        """
        pieces, renames = self.look_up(path)
        if pieces:
            self.renames |= dict.fromkeys(renames)
            for piece in pieces:
                self._take(tensor_names.split(piece.target)[0], piece, source)
            return pieces
        for candidate, _ in hf_names.mlx_paths(path):
            weight = tensor_names.join(candidate, WEIGHT)
            if weight in self.layout.shapes or weight in self.layout.problems:
                other = "it is no linear layer there" if self.layout.of(weight) else "it becomes parts of other tensors"
                if weight in self.layout.shapes and not self.layout.of(weight) and not self.layout.problems:
                    raise FormatError(
                        f"mlx-lm leaves '{source}' out of the model, so that no adapter can update it.", MERGE_THERE
                    )
                why = self.layout.problems.get(weight, other)
                raise FormatError(
                    f"mlx-lm holds '{source}' in another form, which no adapter layer can update: {why}.", MERGE_THERE
                )
        raise IncompatibleError(
            f"The base model has no layer for '{source}' of the PEFT adapter.", "is it the base it was trained on?"
        )

    def look_up(self, path: str) -> tuple[list[Piece], Renames]:
        """How the weight of `path` comes into the model's layers, and the renames for it; none if it does not."""
        candidates = ((self._pieces(candidate), renames) for candidate, renames in hf_names.mlx_paths(path))
        return next((pair for pair in candidates if pair[0]), ([], ()))

    def tensor(self, name: str) -> list[Piece]:
        """How any tensor comes into the model; nothing if it does not as a whole."""
        path, leaf = tensor_names.split(name)
        for place, _ in hf_names.mlx_paths(path):
            target = tensor_names.join(place, leaf)
            pieces = self.layout.of(target)
            into = [p for p in pieces if p.target == target] or pieces or self.layout.into(target)
            if into:
                return into
        return []

    def known(self, path: str) -> bool:
        """Whether the weight of `path` comes into the model, as a layer or otherwise."""
        return bool(self.look_up(path)[0] or self.without_layer(path))

    def without_layer(self, path: str) -> list[Piece]:
        """How all of the weight of `path` comes into the model, where that is no layer that an adapter takes (a router
        that is a bare matrix, the matrices of each head in MLA); nothing if it is, or if it does not."""
        pieces = [] if self.look_up(path)[0] else self.tensor(tensor_names.join(path, WEIGHT))
        shapes = {self.layout.shapes[piece.source] for piece in pieces}
        if len({piece.source for piece in pieces}) != 1 or any(len(shape) != 2 for shape in shapes):
            return []
        if any(piece.index is not None for piece in pieces):
            return []
        reached = mx.zeros(shapes.pop())
        for piece in pieces:
            reached = piece.back(mx.full(piece.shape(reached.shape), float("inf")), reached)
        return pieces if mx.all(reached != 0).item() else []

    def _pieces(self, path: str) -> list[Piece]:
        weight = tensor_names.join(path, WEIGHT)
        pieces = [p for p in self.layout.of(weight) if tensor_names.split(p.target)[0] in self.layers]
        own = [piece for piece in pieces if piece.target == weight]
        return own or pieces or (self.layout.into(weight) if path in self.layers else [])

    def _take(self, key: str, piece: Piece, source: str) -> None:
        if self.taken.setdefault(key, source) != source and piece.index is None:
            raise FormatError(
                f"Two PEFT modules, '{source}' and '{self.taken[key]}', are one layer.",
                "save it again in PEFT, with one of them.",
            )
        if (fold := fold_of(piece)) and self.folds.setdefault(key, fold) != fold:
            raise FormatError(f"mlx-lm multiplies the experts of '{key}' by different numbers.", MERGE_THERE)

    def expert(self, path: str) -> tuple[str, int] | None:
        """(stacked layer, expert) of a module path that is one of several experts, else None."""
        for candidate, renames in hf_names.mlx_paths(path):
            pieces = self.layout.of(tensor_names.join(candidate, WEIGHT))
            if len(pieces) == 1 and pieces[0].index is not None:
                self.renames |= dict.fromkeys(renames)
                key, expert = tensor_names.split(pieces[0].target)[0], pieces[0].index
                self._take(key, pieces[0], path)
                switch = hf_names.split_switch(hf_names.peft_path(key, None, tuple(self.renames)))
                if switch is None or hf_names.expert_path(*switch, expert) != path:
                    self.paths[key] = path.replace(f".{expert}.", ".{}.")
                return key, expert
        split = hf_names.split_expert(path)
        if split is None:
            return None
        pieces = self.find(split[0], path)
        return tensor_names.split(pieces[0].target)[0], split[1]

    def fused(self, block: str, parameter: str, source: str) -> tuple[list[ExpertRows], tuple[int, int]]:
        """The layers that a parameter of a block's fused experts becomes, and (out, in) of the whole parameter.

        Where the checkpoint has experts one by one, transformers puts gate above up. Raises IncompatibleError or
        FormatError if no layers are made of it.
        """
        for candidate in self._blocks(block):
            for name in hf_names.fused_names(candidate, parameter):
                pieces, shape = self.layout.of(name), self.layout.shapes.get(name)
                if pieces and shape is not None and len(shape) == 3:
                    parts = [ExpertRows(tensor_names.split(p.target)[0], p.select[p.axes[1]]) for p in pieces]
                    self._take_experts([part.key for part in parts], pieces, source)
                    return parts, (shape[pieces[0].axes[1]], shape[pieces[0].axes[2]])
            each = [self.layout.of(names) for names in hf_names.first_experts(candidate, parameter, self.layout.shapes)]
            keys = [tensor_names.split(pieces[0].target)[0] for pieces in each if pieces]
            if keys:
                self._take_experts(keys, [piece for pieces in each for piece in pieces], source)
                out, inputs = self.layout.shapes[each[0][0].source]
                parts = [ExpertRows(key, slice(i * out, (i + 1) * out)) for i, key in enumerate(keys)]
                return parts, (len(keys) * out, inputs)
        raise IncompatibleError(
            f"The base model has no experts '{block}' with a '{parameter}' for the PEFT adapter.",
            "is it the base it was trained on?",
        )

    def _blocks(self, block: str) -> Iterator[str]:
        """Where the checkpoint may have a block of transformers: by its names, or where mlx-lm's own comes from."""
        for inside, _ in hf_names.mlx_paths(hf_names.fused_path(block, inner=False)):
            candidate = inside.rpartition(".")[0]
            yield candidate
            inner = (
                self.layout.into(tensor_names.join(k, WEIGHT)) for k in self.layers if k.startswith(f"{candidate}.")
            )
            own = (hf_names.block_of_experts(pieces[0].source) for pieces in inner if pieces)
            yield from (place for place in dict.fromkeys(own) if place is not None)

    def _take_experts(self, keys: list[str], pieces: list[Piece], source: str) -> None:
        if any(fold_of(piece) for piece in pieces):
            raise FormatError(
                f"mlx-lm multiplies the weights of the experts '{keys[0]}', which is not followed here.", MERGE_THERE
            )
        for key in keys:
            if self.taken.setdefault(key, source) != source:
                raise FormatError(
                    f"Two PEFT modules, '{source}' and '{self.taken[key]}', are one layer.",
                    "save it again in PEFT, with one of them.",
                )

    def remember(self, key: str, path: str) -> None:
        """Note the path in transformers of a layer if the renames do not lead back to it."""
        if hf_names.peft_path(key, None, tuple(self.renames)) != path:
            self.paths[key] = path

    def path_of(self, key: str) -> str:
        """The path in transformers of a layer, as far as the modules found so far tell."""
        if key in self.paths:
            return self.paths[key]
        pieces = self.layout.into(tensor_names.join(key, WEIGHT))
        if len(pieces) == 1 and pieces[0].source != pieces[0].target and not self.renames:
            return tensor_names.split(pieces[0].source)[0]
        return hf_names.peft_path(key, None, tuple(self.renames))


def fold_of(piece: Piece) -> Fold | None:
    """What a weight's rows are multiplied by, None for 1. Raises FormatError if the numbers in a row differ."""
    if isinstance(piece.scale, float):
        return None if piece.scale == 1 else piece.scale
    if piece.scale.size != piece.scale.shape[0]:
        raise FormatError(
            f"mlx-lm multiplies the numbers of '{piece.source}' one by one; no adapter can follow.", MERGE_THERE
        )
    return [list(run) for run in runs_of(piece.scale.reshape(-1))]


def unfolded(fold: Fold | None, rows: int) -> tuple[float, mx.array | None]:
    """(factor of all, factor of each row (rows,) or None) of a fold."""
    if fold is None or isinstance(fold, float | int):
        return float(fold or 1.0), None
    vector = np.repeat([factor for _, factor in fold], [count for count, _ in fold]).astype(np.float32)
    if vector.shape != (rows,):
        raise FormatError(
            "The record of what mlx-lm multiplies a weight by does not fit the weight.",
            "import it again from PEFT's folder.",
        )
    return 1.0, mx.array(vector)


def through(piece: Piece, factors: WeightFactors) -> tuple[WeightFactors, float]:
    """The factors of the target's update, and what remains to be multiplied into its scale.

    A matrix that comes out turned around is one that transformers keeps as (in, out); PEFT's factors are those of
    the function, so nothing is turned here.
    """
    rows, columns = (piece.select[axis] for axis in piece.axes)
    left, right, m = factors.left[rows], factors.right[:, columns], factors.m
    m = None if m is None else m[rows]
    factor, vector = unfolded(fold_of(piece), left.shape[0])
    if vector is not None:
        left = left.astype(mx.float32) * vector[:, None]
        m = None if m is None else m.astype(mx.float32) * mx.abs(vector)
    elif factor != 1 and m is not None:
        m = m.astype(mx.float32) * abs(factor)
    return WeightFactors(left, right, m), factor


def back(factors: WeightFactors, fold: Fold | None) -> tuple[WeightFactors, float]:
    """The inverse of `through` for a whole weight: the factors before loading, and what its scale was divided by."""
    factor, vector = unfolded(fold, factors.left.shape[0])
    left, m = factors.left, factors.m
    if vector is not None:
        left = left.astype(mx.float32) / vector[:, None]
        m = None if m is None else m.astype(mx.float32) / mx.abs(vector)
    elif factor != 1 and m is not None:
        m = m.astype(mx.float32) / abs(factor)
    return WeightFactors(left, factors.right, m), factor
