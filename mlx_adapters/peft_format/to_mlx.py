"""From PEFT's tensors to MLX's: each module's update becomes that of the layers which its weight becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters.checkpoints.places import OWN_BASE, Fold, Places, WeightFactors, through
from mlx_adapters.checkpoints.probing import Layout, Piece
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import dense_weight, is_quantized
from mlx_adapters.models.layers import EMBEDDING, SWITCH, adaptable_layers, nn, tied
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.peft_format.reading import AGAIN, WHOLE, PeftAdapter, PeftModule
from mlx_adapters.peft_format.settings import FUSE_HINT
from mlx_adapters.peft_format.updates import LayerFactors, check_shape, expert_updates, fused_updates, strength, unified
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.hf_names import (
    DOWN,
    EMBEDDINGS,
    FUSED_DOWN,
    FUSED_GATE_UP,
    HEADS,
    PEFT_UNCALLED,
    PEFT_UNHEEDED,
    POSITIONS,
    Renames,
    is_head,
)
from mlx_adapters.storage.tensor_names import LORA_A, LORA_B, MAGNITUDE, WEIGHT, split

FUSED, PER_EXPERT = "fused", "per-expert"
UNRELATED = 0.9  # how far, relatively, no training and no rounding takes a weight
TIE_HINT = (
    "'mlx-adapters fuse --from-peft' writes a model with two matrices, exactly; 'import-peft --tie' takes the update "
    "at both ends, as PEFT does after merge_and_unload."
)


@dataclass(frozen=True)
class Converted:
    """The adapter, the renames its paths took, the layout of its experts (`fused`: see `fused_updates`; `lost`: see
    `lost_bits`, by layer).

    `tied`: an update that PEFT has at one end of a tied embedding only was taken at both; `repeated`: PEFT has it at
    both. `paths` and `folds` as in `Places`.
    """

    adapter: Adapter
    renames: Renames
    experts: str | None
    tied: bool
    repeated: bool
    paths: dict[str, str]
    folds: dict[str, Fold]
    fused: dict[str, Any]
    lost: dict[str, str]


def to_mlx(peft: PeftAdapter, layers: Mapping[str, nn.Module], layout: Layout, tie: bool = False) -> Converted:
    """Convert the LoRA part of `peft` for a base with these adaptable `layers`, loaded from such a checkpoint.

    tie: where PEFT adapts one end of a tied embedding, adapt both. Raises FormatError or IncompatibleError with
    the reason.
    """
    places = Places(layers, layout)
    repeated, ends = repeated_head(peft, layers), one_ended(peft, layers)
    if ends and not tie:
        raise FormatError(
            f"The PEFT adapter updates '{ends[0].path}', one end of the base's tied embedding; in MLX both ends are "
            "one layer.",
            TIE_HINT,
        )
    apart = {m.path for m in (repeated, *ends) if m is not None}
    modules = {path: module for path, module in peft.modules.items() if path not in apart}
    experts = {path: place for path in modules if (place := places.expert(path))}
    fused = {path: m for path, m in modules.items() if hf_names.split_fused(path)}
    plain = [m for path, m in modules.items() if path not in experts and path not in fused]
    updates = [update for module in plain for update in _plain_updates(module, peft, places)]
    updates += expert_updates(experts, peft, places)
    from_fused, record = fused_updates(fused, peft, places)
    updates += from_fused
    updates += _both_ends(ends, peft, places)
    _refuse_missing(peft, places, {update.key for update in updates})
    adapter, lost = _assemble(updates, peft)
    form = FUSED if fused else PER_EXPERT if experts else None
    both = repeated is not None
    return Converted(adapter, tuple(places.renames), form, bool(ends), both, places.paths, places.folds, record, lost)


def _plain_updates(module: PeftModule, peft: PeftAdapter, places: Places) -> list[LayerFactors]:
    """The updates of the layers that a module's weight becomes: one, but for a weight that loading cuts up."""
    if module.a.shape[0] != module.b.shape[1]:
        raise FormatError(
            f"The factors of '{module.path}' have ranks {module.a.shape[0]} and {module.b.shape[1]}.", AGAIN
        )
    _refuse_uncalled(module, places.layout.model_type)
    try:
        pieces = places.find(module.path, module.path)
    except FormatError as error:
        raise FormatError(error.message, FUSE_HINT if places.without_layer(module.path) else error.hint) from None
    updates, scale = [], strength(peft, module, module.a.shape[0])
    for piece in pieces:
        key = tensor_names.split(piece.target)[0]
        layer = places.layers[key]
        if isinstance(layer, EMBEDDING) != module.embedding or isinstance(layer, SWITCH):
            raise IncompatibleError(
                f"'{module.path}' of the PEFT adapter is another kind of layer in the base model.", OWN_BASE
            )
        if len(pieces) == 1:
            check_shape(_update(key, module, scale), layer, module.path)
            places.remember(key, module.path)
        update = _update(key, module, scale, piece)
        check_shape(update, layer, module.path)
        updates.append(update)
    return updates


def _refuse_uncalled(module: PeftModule, model_type: str | None) -> None:
    """Raise FormatError for an update that PEFT's own model computes without. What was trained there is still zero."""
    layer = split(module.path)[1]
    uncalled = layer in PEFT_UNCALLED and layer in PEFT_UNHEEDED.get(model_type or "", ())
    if uncalled and mx.any(module.b != 0).item():
        raise FormatError(
            f"transformers reads the weight of '{module.path}' itself, so that the update there does nothing in PEFT.",
            f"save it in PEFT without '{layer}' (exclude_modules).",
        )


def _update(key: str, module: PeftModule, scale: float, piece: Piece | None = None) -> LayerFactors:
    """The update of a linear or embedding layer, before loading or, with `piece`, after it."""
    left, right = (module.a.T, module.b.T) if module.embedding else (module.b, module.a)
    factors, factor = WeightFactors(left, right, module.m), 1.0
    if piece is not None:
        factors, factor = through(piece, factors)
    a, b = (factors.left, factors.right) if module.embedding else (factors.right.T, factors.left.T)
    return LayerFactors(key, a, b, factors.m, scale * factor)


def _both_ends(ends: list[PeftModule], peft: PeftAdapter, places: Places) -> list[LayerFactors]:
    """The sum of one-ended updates as one of the tied embedding: an output's factors are an embedding's, swapped."""
    layers, parts = places.layers, []
    for end in ends:
        if end.embedding:
            parts += _plain_updates(end, peft, places)
            continue
        if end.m is not None:
            raise FormatError(f"DoRA of '{end.path}' cannot be taken at both ends of a tied embedding.", FUSE_HINT)
        key = next(path for path in layers if path.rpartition(".")[2] in EMBEDDINGS)
        piece = places.find(key, end.path if len(ends) == 1 else key)[0]
        factors, factor = through(piece, WeightFactors(end.b, end.a))
        part = LayerFactors(key, factors.left, factors.right, None, factor * strength(peft, end, end.a.shape[0]))
        check_shape(part, layers[key], end.path)
        parts.append(part)
    if len(parts) < 2:
        return parts
    parts = unified(parts)
    a, b = mx.concatenate([part.a for part in parts], axis=1), mx.concatenate([part.b for part in parts], axis=0)
    return [replace(parts[0], a=a, b=b)]


def _refuse_missing(peft: PeftAdapter, places: Places, keys: set[str]) -> None:
    """Raise FormatError if the config names a layer of the base that the file has nothing for."""
    for key, layer in places.layers.items():
        if key in keys:
            continue
        path = places.path_of(key)
        if isinstance(layer, SWITCH):  # in PEFT a parameter, which no target module names
            pieces = places.layout.into(tensor_names.join(key, WEIGHT))
            inside = hf_names.block_of_experts(pieces[0].source) if pieces else None
            fused = FUSED_DOWN if key.endswith(DOWN) else FUSED_GATE_UP
            blocks = (inside or "", path.rpartition(".")[0].rpartition(".")[0])
            named = any(peft.settings.names_parameter(f"{block}.experts.{fused}") for block in blocks)
        else:
            named = peft.settings.targets(path) or peft.settings.names_parameter(f"{path}.{tensor_names.WEIGHT}")
        if named and not isinstance(layer, EMBEDDING):
            raise FormatError(f"The PEFT config targets '{path}', but the file has no tensors for it.", WHOLE)


def _assemble(updates: list[LayerFactors], peft: PeftAdapter) -> tuple[Adapter, dict[str, str]]:
    if not updates:
        raise FormatError("The PEFT adapter has no LoRA layers.", WHOLE)
    made = unified(updates)
    if peft.settings.dora and any(update.m is None for update in made):
        raise FormatError("The PEFT adapter mixes DoRA layers with LoRA ones.", "MLX has one type for an adapter.")
    keys = tuple(sorted((update.key for update in made), key=tensor_names.natural_order))
    weights: dict[str, mx.array] = {}
    for update in made:
        leaves = {LORA_A: update.a, LORA_B: update.b, MAGNITUDE: update.m}
        weights |= {tensor_names.join(update.key, leaf): w for leaf, w in leaves.items() if w is not None}
    kind = "dora" if peft.settings.dora else "lora"
    config = AdapterConfig(made[0].rank, made[0].scale, keys, kind, peft.settings.dropout)
    return Adapter(config, weights), {update.key: update.lost for update in made if update.lost}


# -- a base whose output layer is its input embedding ----------------------------------------------
# PEFT adapts each end by itself, unless `ensure_weight_tying` makes the head repeat the embedding's update. In
# mlx-lm a tied embedding is one layer, and its adapter acts at both ends.


def repeated_head(peft: PeftAdapter, layers: Mapping[str, nn.Module]) -> PeftModule | None:
    """The lm_head update that only repeats the tied embedding's (PEFT's ensure_weight_tying), if there is one."""
    strength = peft.settings.strength
    heads = [module for path, module in peft.modules.items() if is_head(path)] if tied(layers) else []
    for head in heads:
        for other in peft.modules.values():
            same = other.embedding and mx.array_equal(head.a, other.b.T) and mx.array_equal(head.b, other.a.T)
            if same and strength(head.path) == strength(other.path):
                return head
    return None


def one_ended(peft: PeftAdapter, layers: Mapping[str, nn.Module]) -> list[PeftModule]:
    """Updates of only the input or only the output of a base that has one matrix for both."""
    if not tied(layers) or repeated_head(peft, layers) is not None:
        return []
    modules = peft.modules.items()
    if peft.settings.tying and not any(map(is_head, peft.modules)):
        return []  # PEFT ties the two when it loads it, whether or not the file repeats them
    return [m for path, m in modules if is_head(path) or (m.embedding and path.rpartition(".")[2] not in POSITIONS)]


def replaced_ends(peft: PeftAdapter) -> list[str]:
    """Names of whole weights of embeddings and output layers (modules_to_save)."""
    paths = {name: path for name in peft.dense for path, leaf in [split(name)] if leaf == WEIGHT}
    return [name for name, path in paths.items() if path.rpartition(".")[2] in EMBEDDINGS + HEADS]


def needs_untying(peft: PeftAdapter, layers: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT's model has two different ends where the base has one matrix."""
    ends = replaced_ends(peft) if tied(layers) else []
    alike = len(ends) == 2 and mx.array_equal(*(peft.dense[name] for name in ends)).item()
    alike = alike or (peft.settings.tying and not any(is_head(split(name)[0]) for name in ends))
    rows = tied(layers) and any(is_head(path) for path in peft.token_rows)
    return bool(one_ended(peft, layers)) or (bool(ends) and not alike) or rows


# -- weights that were saved along ------------------------------------------------------------------


def without_copies(peft: PeftAdapter, module: Any, layout: Layout) -> PeftAdapter:
    """The adapter without whole tensors that its config does not name and that are the base's own, to the last bit that
    both have: a state that was saved whole, the ends of a resized vocabulary.

    Raises IncompatibleError where one has nothing to do with the base's: it is of another base.
    """
    layers, parameters = adaptable_layers(module), dict(tree_flatten(module.parameters()))
    places, both = Places(layers, layout), tied(layers)

    def own(name: str, array: mx.array) -> bool:
        path, leaf = split(name)
        if leaf == WEIGHT and is_head(path) and both:
            name = next((tensor_names.join(key, leaf) for key in layers if hf_names.is_embedding(key)), name)
        pieces = places.tensor(name)
        keys = [split(piece.target)[0] for piece in pieces]
        packed = any(is_quantized(layers[key]) for key in keys if key in layers)
        same = bool(pieces) and not packed
        for piece, key in zip(pieces, keys, strict=True):
            weight = dense_weight(layers[key], mx.float32) if packed else parameters[piece.target]
            weight, copy = weight if piece.index is None else weight[piece.index], piece.apply(array)
            rows = min(copy.shape[0], weight.shape[0]) if copy.shape[1:] == weight.shape[1:] else 0
            same = same and copy.shape[0] == rows and bool(_equal(copy, weight[:rows]))
            matrix = rows > 0 and copy.ndim > 1  # vectors may be trained from nothing
            if matrix and not same and _distance(copy[:rows], weight[:rows]) > UNRELATED:
                raise IncompatibleError(
                    f"'{path}', saved with the PEFT adapter, is of another base than this.", OWN_BASE
                )
        return same

    same = {name for name, array in peft.unnamed.items() if own(name, array)}
    return replace(peft, dense={name: array for name, array in peft.dense.items() if name not in same})


def _equal(copy: mx.array, weight: mx.array) -> mx.array:
    narrow = copy.dtype if copy.dtype.size < weight.dtype.size else weight.dtype
    return mx.array_equal(copy.astype(narrow), weight.astype(narrow))


def _distance(copy: mx.array, weight: mx.array) -> float:
    """How far two matrices lie from each other, relative to the first: about 1.4 for two that are unrelated."""
    copy = copy.astype(mx.float32)
    return mx.sqrt(mx.square(weight.astype(mx.float32) - copy).sum() / mx.square(copy).sum()).item()
