"""The way back: a checkpoint's tensors from those of the model that mlx-lm makes of it.

What loading does to them is known piece by piece (see `probing`), and so is its inverse, if nothing of a tensor is
lost on the way. Tensors that are cut up or joined with each other go together, in groups as small as can be.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import mlx.core as mx

from mlx_adapters.checkpoints.probing import Layout, Piece, Shapes
from mlx_adapters.errors import FormatError


@dataclass(frozen=True)
class Group:
    """Tensors of the checkpoint and those of the model that are made of each other, with the pieces of both."""

    sources: Shapes
    targets: tuple[str, ...]
    pieces: tuple[Piece, ...]

    def target_of(self, source: str) -> str:
        """One that a source is made of."""
        return next(piece.target for piece in self.pieces if piece.source == source)

    def sources_of(self, arrays: Mapping[str, mx.array]) -> list[mx.array]:
        """The checkpoint's tensors, in order, from the model's; each of its target's type."""
        made = []
        for name, shape in self.sources.items():
            source = None
            for piece in (piece for piece in self.pieces if piece.source == name):
                part = arrays[piece.target]
                part = part if piece.index is None else part[piece.index]
                source = piece.back(part, mx.zeros(shape, part.dtype) if source is None else source)
            assert source is not None
            made.append(mx.contiguous(source))
        return made


def groups_of(layout: Layout, targets: Iterable[str]) -> list[Group]:
    """The groups that all `targets` make, in order of the first of each.

    Raises FormatError for a tensor of which loading keeps too little, or that is not understood.
    """
    groups, seen = [], set[str]()
    for target in targets:
        if target in seen:
            continue
        members, sources = _together(layout, target)
        seen |= set(members)
        pieces = [piece for name in members for piece in layout.into(name)]
        kept = [piece for name in sources for piece in _covering(name, layout.shapes[name], pieces)]
        groups.append(Group({name: layout.shapes[name] for name in sources}, tuple(members), tuple(kept)))
    return groups


def _together(layout: Layout, target: str) -> tuple[list[str], list[str]]:
    """All targets and sources that hang together with `target`."""
    targets, sources, new = {target: None}, dict[str, None](), [target]
    while new:
        name = new.pop()
        pieces = layout.into(name)
        if not pieces:
            why = layout.problems.get(name, "the original checkpoint has no such tensor")
            raise FormatError(f"The original form of '{name}' is not known: {why}.", "fuse it in another --format.")
        for piece in pieces:
            sources[piece.source] = None
            for other in layout.of(piece.source):
                if other.target not in targets:
                    targets[other.target] = None
                    new.append(other.target)
    return list(targets), list(sources)


def _covering(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> list[Piece]:
    """Pieces of a source that do not overlap and leave nothing of it out."""
    kept: list[Piece] = []
    for piece in (piece for piece in pieces if piece.source == name):
        if all((piece.split, piece.select) != (other.split, other.select) for other in kept):
            kept.append(piece)
    apart = all(_disjoint(one, other, shape) for one, other in combinations(kept, 2))
    if not apart or sum(math.prod(piece.shape(shape)) for piece in kept) != math.prod(shape):
        raise FormatError(
            f"mlx-lm keeps only a part of '{name}' of the original checkpoint.", "fuse it in another --format."
        )
    return kept


def _disjoint(one: Piece, other: Piece, shape: tuple[int, ...]) -> bool:
    if one.split != other.split:
        return False
    axes = zip(one.viewed(shape), one.select, other.select, strict=True)
    return any(set(range(n)[a]).isdisjoint(range(n)[b]) for n, a, b in axes)
