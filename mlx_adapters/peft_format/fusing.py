"""Fuse a PEFT adapter with all that MLX's adapter layers cannot hold.

Whole modules (modules_to_save), biases and rows of single tokens are not low-rank updates, so they have no
place in an MLX adapter; in a fused model they are simply the model's weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters import paths, replacing, tensor_names
from mlx_adapters.adapter import Adapter
from mlx_adapters.bases import Base, resolve_base
from mlx_adapters.config import Quantization
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.events import Note, OnEvent, ignore
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.fusion.options import DEFAULTS, FuseOptions
from mlx_adapters.fusion.result import FuseResult
from mlx_adapters.layers import EMBEDDING, LINEAR, adaptable_layers, dense_weight, nn, tied, weight_shape
from mlx_adapters.model import load_module
from mlx_adapters.peft_format.importing import convert, peft_folder
from mlx_adapters.peft_format.reading import PeftAdapter, read_peft, refuse_unsaved
from mlx_adapters.peft_format.tying import is_head, needs_untying
from mlx_adapters.tensor_names import FAN_IN_FAN_OUT, WEIGHT

Arrays = dict[str, mx.array]


def fuse_peft(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | Base,
    quantization: Quantization | int | str = "keep",
    dtype: str = "auto",
    options: FuseOptions = DEFAULTS,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> FuseResult:
    """Write `base` with the whole PEFT adapter in it to `out`: LoRA or DoRA, biases, modules_to_save, tokens.

    source: a folder or a Hub repository. The other arguments and the result are those of `fuse`. Raises
    FormatError or IncompatibleError with the reason if PEFT's model cannot be written as one for mlx-lm.
    """
    peft = read_peft(peft_folder(source)[0])
    replacing.refuse_reading_inside(paths.expanded(out), [peft])
    refuse_unsaved(peft)
    found = resolve_base(base)
    module, _ = load_module(found)
    if needs_untying(peft, adaptable_layers(module)):
        if peft.token_rows:
            raise FormatError("The PEFT adapter has single tokens at both ends of a tied embedding, the rest at one.")
        found = replace(found, untied=True)
        module, _ = load_module(found)
        on_event(Note("The fused model has an output layer of its own: the adapter changes one end of the embedding."))
    replaced, parameters = whole_tensors(peft, module, found)
    adapters: list[Adapter] = []
    if peft.modules:
        name = {"name": peft.folder.name, "base": found.record()}
        adapters.append(replace(convert(peft, module, found.name).adapter, metadata=name))
    return fuse(
        replace(found, parameters=parameters), adapters, out, quantization=quantization, dtype=dtype,
        options=options, overwrite=overwrite, replaced=replaced, on_event=on_event,
    )  # fmt: skip


def whole_tensors(peft: PeftAdapter, module: nn.Module, base: Base) -> tuple[Arrays, Arrays]:
    """What replaces weights of layers (by layer path), and what replaces other parameters (by name)."""
    layers = adaptable_layers(module)
    shapes = {name: tuple(value.shape) for name, value in tree_flatten(module.parameters())}
    replaced: Arrays = {}
    parameters: Arrays = {}
    for name, array in peft.dense.items():
        path, leaf = tensor_names.split(name)
        if leaf == WEIGHT and is_head(path) and tied(layers):
            continue  # it is the embedding's; where it is not, the base was untied
        for place, _ in tensor_names.mlx_paths(path):
            target = tensor_names.join(place, leaf)
            if leaf == WEIGHT and place in layers:
                replaced[place] = _fitting(name, _turned(array, layers[place], base), weight_shape(layers[place]))
                break
            if target in shapes:
                parameters[target] = _fitting(name, array, shapes[target])
                break
        else:
            raise IncompatibleError(f"The base model has no place for '{name}' of the PEFT adapter.")
    for path, rows in peft.token_rows.items():
        place, array = _with_token_rows(peft, path, rows, layers)
        replaced[place] = array
    return replaced, parameters


def _fitting(name: str, array: mx.array, shape: tuple[int, ...]) -> mx.array:
    if tuple(array.shape) != shape:
        raise IncompatibleError(
            f"'{name}' of the PEFT adapter is {tuple(array.shape)}, the base's is {shape}.",
            "a resized vocabulary needs a base that was resized the same way.",
        )
    return array


def _turned(array: mx.array, layer: nn.Module, base: Base) -> mx.array:
    """transformers stores gpt2's linear weights as (in, out)."""
    conv1d = base.config.get("model_type") in FAN_IN_FAN_OUT and isinstance(layer, LINEAR)
    return array.T if conv1d else array


def _with_token_rows(peft: PeftAdapter, path: str, rows: mx.array, layers: Mapping[str, Any]) -> tuple[str, mx.array]:
    """The embedding with the rows of some tokens replaced. A tied output sees them too, as in PEFT."""
    place = next((place for place, _ in tensor_names.mlx_paths(path) if place in layers), None)
    if place is None or not isinstance(layers[place], EMBEDDING):
        raise IncompatibleError(f"The base model has no embedding '{path}' for the PEFT adapter's tokens.")
    indices = peft.settings.raw.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((found for name, found in indices.items() if f".{path}".endswith(f".{name}")), None)
    vocabulary, width = weight_shape(layers[place])
    sound = isinstance(indices, list) and all(type(i) is int and 0 <= i < vocabulary for i in indices)
    if not sound or tuple(rows.shape) != (len(indices or ()), width):
        raise FormatError(f"The rows for '{path}' do not fit trainable_token_indices in the PEFT config.")
    weight = dense_weight(layers[place], mx.float32)
    weight[mx.array(indices)] = rows.astype(mx.float32)
    return place, weight
