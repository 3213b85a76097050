"""The tensors of a model's original checkpoint: names and shapes as Hugging Face has them.

If the base is such a checkpoint, its files say. Mostly it was converted, and nothing on the disk tells what it was
converted from. Then names are tried: each rule below rewrites the model's own tensors into a form that checkpoints
have (torch's order of a convolution's axes, experts one by one, ...), and counts if mlx-lm's `sanitize` makes of it
exactly this model. A rule that `sanitize` does not know changes nothing, so a wrong guess does no harm.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import CodeType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters.checkpoints import forms
from mlx_adapters.checkpoints.forms import CHECKPOINT_RENAMES, EXPERT_FORMS, SPELLINGS
from mlx_adapters.checkpoints.probing import Layout, Shapes, Tensors, trace
from mlx_adapters.models.base import Base
from mlx_adapters.models.layers import SWITCH, nn
from mlx_adapters.storage import hf_names, tensor_files, tensor_names
from mlx_adapters.storage.hf_names import Renames
from mlx_adapters.storage.tensor_names import WEIGHT
from mlx_adapters.system.door import make_module, sanitize_of

FLOATS = ("F32", "F16", "BF16")
Rule = Callable[[Shapes], Shapes]


def layout_of(base: Base, module: nn.Module) -> Layout:
    """What mlx-lm makes of the original checkpoint of `module`, which was loaded from `base`.

    Raises IncompatibleError if no form of the checkpoint is found of which mlx-lm makes this model.
    """
    blank, kind = make_module(base.config, base.folder), base.config.get("model_type")
    own = {name for name, _ in tree_flatten(module.parameters())}
    wanted = {name: tuple(value.shape) for name, value in tree_flatten(blank.parameters()) if name in own}
    sanitize = sanitize_of(blank)
    stored = _stored(base)
    if stored and stored != wanted:
        with contextlib.suppress(Exception):
            layout = trace(sanitize, stored, wanted)
            if layout.fits(wanted):
                return replace(layout, model_type=kind)
    return replace(_unpacked(trace(sanitize, original_shapes(blank, wanted), wanted)), model_type=kind)


def _unpacked(layout: Layout) -> Layout:
    """The layout of a checkpoint whose experts are not packed, where mlx-lm reads them packed only: turned around."""
    names = forms.unpacked(layout.shapes)
    if not names:
        return layout
    turn = {0: 0, 1: 2, 2: 1}
    shapes = {
        names.get(name, name): (shape[0], shape[2], shape[1]) if name in names else shape
        for name, shape in layout.shapes.items()
    }
    pieces = {
        target: [
            replace(
                piece,
                source=names[piece.source],
                select=tuple(piece.select[turn[axis]] for axis in range(3)),
                axes=tuple(turn[axis] for axis in piece.axes),
            )
            if piece.source in names
            else piece
            for piece in pieces
        ]
        for target, pieces in layout.pieces.items()
    }
    return replace(layout, shapes=shapes, pieces=pieces, unpacked={new: old for old, new in names.items()})


def _stored(base: Base) -> Shapes | None:
    """Names and shapes in the base's files; None if they are packed in some way, or an MLX program wrote them."""
    shapes: Shapes = {}
    for path in base.weight_files:
        header, metadata = tensor_files.read_safetensors_header(path)
        if metadata.get("format") == "mlx" or any(entry["dtype"] not in FLOATS for entry in header.values()):
            return None
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return {name: _resized(name, shape, base) for name, shape in shapes.items()}


def _resized(name: str, shape: tuple[int, ...], base: Base) -> tuple[int, ...]:
    """The shape of a tensor of the folder's where the vocabulary is to be of another size."""
    end = tensor_names.split(name)[0].rpartition(".")[2] in hf_names.EMBEDDINGS + hf_names.HEADS
    return (base.rows, *shape[1:]) if base.rows and end else shape


def original_shapes(blank: nn.Module, wanted: Shapes) -> Shapes:
    """The form that is furthest from the model's own, `wanted`, of those that loading turns into the model."""
    sanitize = sanitize_of(blank)
    shapes, rules = wanted, list(_rules(blank))
    while True:
        for i, rule in enumerate(rules):
            rewritten = _turned(rule(shapes), wanted, sanitize)
            if rewritten is not None and rewritten != shapes:
                shapes = rewritten
                del rules[i]
                break
        else:
            return _hinted(blank, shapes, wanted, sanitize)


def _made(sanitize: Callable[[Tensors], Tensors], shapes: Shapes) -> Shapes:
    """The shapes that come out; nothing is computed for it. Empty if `sanitize` cannot take these."""
    blanks = {shape: mx.zeros(shape) for shape in set(shapes.values())}
    try:
        made = sanitize({name: blanks[shape] for name, shape in shapes.items()})
        return {name: tuple(array.shape) for name, array in made.items()}
    except Exception:  # another model's code, given what it may not expect
        return {}


def _turned(shapes: Shapes, wanted: Shapes, sanitize: Callable[[Tensors], Tensors]) -> Shapes | None:
    """`shapes`, with matrices that come out transposed turned around; None if they do not make the model."""
    made = _made(sanitize, shapes)
    if made == wanted:
        return shapes
    if set(made) != set(wanted):
        return None
    wrong = {name for name in wanted if made[name] != wanted[name]}
    turned = {
        name: shape[::-1] if len(shape) == 2 and any(_same_place(name, target) for target in wrong) else shape
        for name, shape in shapes.items()
    }
    return turned if _made(sanitize, turned) == wanted else None


def _same_place(source: str, target: str) -> bool:
    return target == source or target.endswith(f".{source}")


# -- rules ------------------------------------------------------------------------------------------------


def _rules(blank: nn.Module) -> Iterator[Rule]:
    yield partial(_torch_convolutions, blank=blank)
    switches = [path for path, layer in blank.named_modules() if isinstance(layer, SWITCH)]
    counts = any(re.search(r"experts\.(\d|$)", text) for text in _texts(blank))  # code that goes through experts
    for form in EXPERT_FORMS:
        if not counts and form[2] == "each":
            continue
        yield partial(forms.checkpoint_experts, switches=switches, form=form)
    for renames in SPELLINGS.get(str(getattr(blank, "model_type", "")), CHECKPOINT_RENAMES):
        yield partial(_renamed, renames=renames)
    yield partial(_scalars, sanitize=sanitize_of(blank))
    yield forms.checkpoint_convolutions
    yield forms.checkpoint_joined
    yield forms.checkpoint_latent
    yield forms.checkpoint_rows


def _torch_convolutions(shapes: Shapes, blank: nn.Module) -> Shapes:
    """torch keeps (out, in / groups, width), MLX (out, width, in / groups)."""
    paths = [path for path, layer in blank.named_modules() if nn.Conv1d.__name__ in type(layer).__name__]
    names = {tensor_names.join(path, WEIGHT) for path in paths}
    ends = tuple(f".{name}" for name in names)
    return {
        name: (shape[0], shape[2], shape[1])
        if len(shape) == 3 and (name in names or f".{name}".endswith(ends))
        else shape
        for name, shape in shapes.items()
    }


def _scalars(shapes: Shapes, sanitize: Callable[[Tensors], Tensors]) -> Shapes:
    """Single numbers are vectors there, where the code takes their axis away."""
    made = _made(sanitize, {name: shape or (1,) for name, shape in shapes.items()})
    return {name: (1,) if shape == () == made.get(name) else shape for name, shape in shapes.items()}


def _renamed(shapes: Shapes, renames: Renames) -> Shapes:
    renamed = {}
    for name, shape in shapes.items():
        for old, new in renames:
            if old in name if old.startswith(".") else name.startswith(old):
                name = name.replace(old, new, 1)
                break
        renamed[name] = shape
    return renamed


def _hinted(blank: nn.Module, shapes: Shapes, wanted: Shapes, sanitize: Callable[[Tensors], Tensors]) -> Shapes:
    """`shapes` with names that the code looks for. Any text in it may be one, in place of another text in it.

    Those count of which the code makes this model. Some code shifts or scales other tensors where it sees a name that
    only original checkpoints have; that is looked for first.
    """
    plain: dict[str, list[float]] = {}
    renamings = list(_renamings(sorted(set(_texts(blank))), shapes, wanted, sanitize))
    for renamed in renamings:
        plain = plain or _effects(sanitize, shapes)
        if _effects(sanitize, renamed) != plain:
            return renamed
    own = (renamed for renamed in renamings if not set(wanted) & (set(renamed) - set(shapes)))
    better = next((one for one in own if set(shapes) - set(one) <= set(wanted)), None)
    return shapes if better is None else _hinted(blank, better, wanted, sanitize)


def _renamings(
    texts: list[str], shapes: Shapes, wanted: Shapes, sanitize: Callable[[Tensors], Tensors]
) -> Iterator[Shapes]:
    for own in texts:
        if len(own) < 4 or not any(own in name for name in shapes):
            continue
        for other in texts:
            if len(other) < 4 or own in other or other in own:
                continue
            renamed = {name.replace(own, other): shape for name, shape in shapes.items()}
            if len(renamed) == len(shapes) and _made(sanitize, renamed) == wanted:
                yield renamed


def _effects(sanitize: Callable[[Tensors], Tensors], shapes: Shapes) -> dict[str, list[float]]:
    """By target, what its first number becomes of zeros and of ones; tensors that repeat one number take no memory."""
    made = [
        sanitize({name: mx.broadcast_to(mx.array(number), shape) for name, shape in shapes.items()})
        for number in (0.0, 1.0)
    ]
    first = {target: [run[target][(0,) * run[target].ndim] for run in made] for target in made[0]}
    return {target: [number.item() for number in numbers] for target, numbers in first.items()}


def _texts(blank: nn.Module) -> Iterator[str]:
    for _, layer in blank.named_modules():
        code = getattr(getattr(type(layer), "sanitize", None), "__code__", None)
        if code is not None:
            yield from _constants(code)


def _constants(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, CodeType):
        yield from (text for constant in value.co_consts for text in _constants(constant))
    elif isinstance(value, tuple | frozenset):
        yield from (text for item in value for text in _constants(item))
