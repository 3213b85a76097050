"""Whole tensors of a PEFT adapter (modules_to_save, biases, rows of single tokens) as the model's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters.checkpoints.places import MERGE_THERE, OWN_BASE, Places
from mlx_adapters.checkpoints.probing import Layout, Piece
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.models.dense import dense_weight, weight_shape
from mlx_adapters.models.layers import (
    EMBEDDING,
    LINEAR,
    adaptable_layers,
    nn,
    tied,
    updated_weight,
    weight_layers,
)
from mlx_adapters.peft_format.reading import PeftAdapter, PeftModule
from mlx_adapters.peft_format.settings import MEND
from mlx_adapters.peft_format.updates import strength
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.hf_names import EMBEDDINGS, FUSED_DOWN, FUSED_GATE_UP, is_head
from mlx_adapters.storage.tensor_names import WEIGHT


@dataclass(frozen=True)
class WholeTensors:
    """What replaces weights of layers, by layer path, and what replaces other parameters, by name.

    `updated`: what LoRA adds, by module and parameter, to weights that are no layers in mlx-lm; they are among the two.
    """

    replaced: dict[str, mx.array] = field(default_factory=dict)
    parameters: dict[str, mx.array] = field(default_factory=dict)
    updated: dict[str, dict[str, mx.array]] = field(default_factory=dict)


def whole_tensors(
    peft: PeftAdapter, module: nn.Module, layout: Layout, untied: bool, one_for_both: bool
) -> WholeTensors:
    """The whole tensors of `peft`, taken through what mlx-lm does when it loads them.

    untied: the module's output layer was made of its embedding. one_for_both: to transformers the two are one, so that
    tokens of the embedding are the output layer's, too. Raises IncompatibleError or FormatError.
    """
    layers, whole = adaptable_layers(module), WholeTensors()
    shapes = {name: tuple(value.shape) for name, value in tree_flatten(module.parameters())}
    places = Places(layers, layout)
    if untied:
        _untie(layers, layout, whole)
    for name, array in peft.dense.items():
        path, leaf = tensor_names.split(name)
        if leaf == WEIGHT and is_head(path) and tied(layers):
            continue  # it is the embedding's; where it is not, the base was untied
        pieces = places.tensor(name)
        if not pieces and leaf in (FUSED_GATE_UP, FUSED_DOWN) and array.ndim == 3:
            whole.replaced.update(_experts(name, array, places))
            continue
        if not pieces:
            known = hf_names.mlx_paths(path)
            if any(tensor_names.join(place, leaf) in layout.shapes for place, _ in known):
                raise FormatError(
                    f"mlx-lm makes other tensors of '{name}', so that it cannot be put in as a whole.", MERGE_THERE
                )
            raise IncompatibleError(f"The base model has no place for '{name}' of the PEFT adapter.", OWN_BASE)
        array = _as_stored(array, layout.shapes[pieces[0].source])
        for piece in pieces:
            _put(piece, name, array, layout.shapes[piece.source], weight_layers(module), shapes, whole)
    for path, rows in peft.token_rows.items():
        for onto in (path, *(_own_heads(path, peft, layers) if one_for_both else ())):
            key, array = _with_token_rows(peft, path, rows, places, onto, whole)
            whole.replaced[key] = array
    for path, lora in peft.modules.items():
        if pieces := places.without_layer(path):
            _update(lora, strength(peft, lora, lora.a.shape[0]), pieces, module, layout, whole)
    return whole


def _own_heads(path: str, peft: PeftAdapter, layers: Mapping[str, nn.Module]) -> list[str]:
    """The output layer beside the embedding at `path`, unless the adapter has other tokens for it."""
    others = any(is_head(other) for other in peft.token_rows)
    return [] if others or not hf_names.is_embedding(path) else [key for key in layers if is_head(key)]


def _update(
    lora: PeftModule, scale: float, pieces: list[Piece], module: nn.Module, layout: Layout, whole: WholeTensors
) -> None:
    """Put the update of a weight into the parameters that it becomes."""
    layers, parameters = weight_layers(module), dict(tree_flatten(module.parameters()))
    paths = {piece.target: tensor_names.split(piece.target)[0] for piece in pieces}
    shape, made = layout.shapes[pieces[0].source], (lora.b.shape[0], lora.a.shape[1])
    if shape != made or lora.embedding:
        raise IncompatibleError(
            f"'{lora.path}' of the PEFT adapter is made for {made}, the base's is {shape}.", OWN_BASE
        )
    weight = mx.zeros(shape)
    for piece in pieces:
        layer = layers.get(paths[piece.target])
        part = parameters[piece.target] if layer is None else dense_weight(layer, mx.float32)
        weight = piece.back(part.astype(mx.float32), weight)
    change = updated_weight(mx.zeros(shape), lora.a.T, lora.b.T, None, scale)
    whole.updated[lora.path] = {piece.target: piece.linear(change) for piece in pieces}
    updated = updated_weight(weight, lora.a.T, lora.b.T, lora.m, scale)
    for piece in pieces:
        if paths[piece.target] in layers:
            whole.replaced[paths[piece.target]] = piece.apply(updated)
        else:
            whole.parameters[piece.target] = piece.apply(updated)


def _experts(name: str, array: mx.array, places: Places) -> dict[str, mx.array]:
    """The stacked layers that a parameter of fused experts becomes, where the checkpoint has experts one by one."""
    path, parameter = tensor_names.split(name)
    parts, shape = places.fused((hf_names.split_fused(path) or (path, False))[0], parameter, name)
    experts = weight_shape(places.layers[parts[0].key])[0]
    if tuple(array.shape) != (experts, *shape):
        raise IncompatibleError(
            f"'{name}' of the PEFT adapter is {tuple(array.shape)}, the base's {(experts, *shape)}.", OWN_BASE
        )
    return {part.key: array[:, part.rows].astype(mx.float32) for part in parts}


def _as_stored(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Experts as the checkpoint has them: some (Qwen3-VL's) lie there turned, and transformers turns them back."""
    turned = array.ndim == 3 and tuple(array.shape) != shape == tuple(array.swapaxes(1, 2).shape)
    return array.swapaxes(1, 2) if turned else array


def _put(
    piece: Piece,
    name: str,
    array: mx.array,
    source: tuple[int, ...],
    layers: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    whole: WholeTensors,
) -> None:
    path, leaf = tensor_names.split(piece.target)
    layer = layers.get(path) if leaf == WEIGHT else None
    wanted = shapes[piece.target] if layer is None else weight_shape(layer)
    wanted = wanted if piece.index is None else wanted[1:]
    given = tuple(array.shape)
    cut = piece.split is not None and given != source
    if array.ndim != len(source) or cut or piece.shape(given) != wanted:
        raise IncompatibleError(
            f"'{name}' of the PEFT adapter is {given}, the base's is {source if piece.split else wanted}.",
            OWN_BASE,
        )
    changed = piece.offset or not (isinstance(piece.scale, float) and piece.scale == 1)
    made = piece.apply(array.astype(mx.float32) if changed else array)  # 1 + w would lose bits of a w of 16
    if piece.index is not None and layer is not None:
        stack = whole.replaced.get(path)
        stack = dense_weight(layer, mx.float32) if stack is None else stack
        stack[piece.index] = made.astype(mx.float32)
        made = stack
    if layer is None:
        whole.parameters[piece.target] = made
    else:
        whole.replaced[path] = made


def _untie(layers: Mapping[str, nn.Module], layout: Layout, whole: WholeTensors) -> None:
    """Where loading multiplies the two ends by different numbers, the new head is not the embedding as it is."""
    embedding = next((path for path in layers if path.rpartition(".")[2] in EMBEDDINGS), None)
    head = next((path for path in layers if is_head(path)), None)
    if embedding is None or head is None:
        return
    one, other = (layout.into(tensor_names.join(path, WEIGHT)) for path in (embedding, head))
    if one and other and one[0].scale != other[0].scale:
        ratio = float(other[0].scale) / float(one[0].scale)
        whole.replaced[head] = dense_weight(layers[embedding], mx.float32) * ratio


def _with_token_rows(
    peft: PeftAdapter, path: str, rows: mx.array, places: Places, onto: str, whole: WholeTensors
) -> tuple[str, mx.array]:
    """The layer of the module `onto` with some of its rows replaced by those that `peft` has for `path`.

    A tied output sees them too, as in PEFT.
    """
    pieces, _ = places.look_up(onto)
    place = tensor_names.split(pieces[0].target)[0] if pieces else ""
    if not isinstance(places.layers.get(place), EMBEDDING + LINEAR):
        raise IncompatibleError(f"The base model has no '{onto}' for the PEFT adapter's tokens.", OWN_BASE)
    if "bias" in places.layers[place]:
        raise FormatError(
            f"With single tokens of '{onto}' PEFT computes without its bias, as no model does.", MERGE_THERE
        )
    indices: Any = peft.settings.raw.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((own for name, own in indices.items() if f".{path}".endswith(f".{name}")), None)
    vocabulary, width = weight_shape(places.layers[place])
    sound = isinstance(indices, list) and all(type(i) is int and 0 <= i < vocabulary for i in indices)
    sound = sound and len(set(indices)) == len(indices)
    if not sound or tuple(rows.shape) != (len(indices or ()), width):
        raise FormatError(f"The rows for '{path}' do not fit trainable_token_indices in the PEFT config.", MEND)
    weight = whole.replaced.get(place)
    weight = dense_weight(places.layers[place], mx.float32) if weight is None else weight
    weight[mx.array(indices)] = pieces[0].apply(rows.astype(mx.float32))
    return place, weight
