"""A PEFT adapter becomes MLX's, for a base at hand; what the way back needs is recorded."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_adapters.checkpoints.originals import layout_of
from mlx_adapters.checkpoints.places import Places
from mlx_adapters.checkpoints.probing import Layout
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import dense_weight, is_quantized, weight_shape
from mlx_adapters.models.layers import adaptable_layers, check_fits, loads_in_mlx_lm
from mlx_adapters.models.loading import load_module
from mlx_adapters.peft_format.reading import PeftAdapter
from mlx_adapters.peft_format.to_mlx import Converted, to_mlx
from mlx_adapters.storage import tensor_names

# How far a base's embedding may lie from the copy in the adapter (relative): rounding to 16 bits, to 4 bits.
DENSE_TOLERANCE, QUANTIZED_TOLERANCE = 0.01, 0.5


def as_mlx(peft: PeftAdapter, base: Base, source: str, tie: bool = False, on_event: OnEvent = log_warnings) -> Adapter:
    """The MLX adapter that a PEFT adapter is on `base`; `source` is what its metadata says of it.

    Raises FormatError or IncompatibleError.
    """
    module, _ = load_module(base)
    converted = convert(peft, module, layout_of(base, module), base.name, tie)
    layers, config = adaptable_layers(module), converted.adapter.config
    bad = [key for key in config.keys if not loads_in_mlx_lm(layers[key], config)]
    elsewhere = [f"Plain mlx-lm could not load it on '{bad[0]}' of this base."] if bad else []
    for note in notes_on(peft, base) + elsewhere:
        on_event(Note(note, "warning"))
    metadata = {"source": "peft", "peft": record(peft, converted, source), "base": base.record()}
    return replace(converted.adapter, metadata=metadata)


def convert(
    peft: PeftAdapter,
    module: Any,
    layout: Layout,
    base_name: str,
    tie: bool = False,
    replaced: Mapping[str, mx.array] | None = None,
) -> Converted:
    """The MLX adapter for a loaded base module, checked against it; `replaced`: weights that are not the module's."""
    layers = adaptable_layers(module)
    _check_base_copies(peft, Places(layers, layout), base_name, replaced or {})
    converted = to_mlx(peft, layers, layout, tie)
    check_fits(converted.adapter, module, f"'{base_name}'")
    return converted


def record(peft: PeftAdapter, converted: Converted, source: str) -> dict[str, Any]:
    """What export needs for the way back: the config as it was, how paths and experts were written, and what loading
    multiplied the weights by."""
    extra = {"tied": converted.tied, "paths": converted.paths, "folds": converted.folds}
    return {
        "from": source,
        "config": peft.settings.raw,
        "renames": [list(pair) for pair in converted.renames],
        "experts": converted.experts,
    } | {name: value for name, value in extra.items() if value}


def notes_on(peft: PeftAdapter, base: Base) -> list[str]:
    """What the user should know about a conversion that worked."""
    notes = []
    trained_on, given = peft.settings.base_class, base.config.get("architectures") or []
    if trained_on and given and trained_on not in given:
        notes.append(f"The adapter was trained on a {trained_on}; '{base.name}' is a {given[0]} of the same shapes.")
    if peft.settings.unknown:
        notes.append(f"Settings that this version does not know were ignored: {', '.join(peft.settings.unknown)}.")
    return notes


def _check_base_copies(peft: PeftAdapter, places: Places, base_name: str, replaced: Mapping[str, mx.array]) -> None:
    """PEFT stores the base's matrix beside an adapted embedding; it must be this base's."""
    for path, copy in peft.base_copies.items():
        pieces, _ = places.look_up(path)
        if not pieces:
            continue
        key = tensor_names.split(pieces[0].target)[0]
        layer = places.layers[key]
        if tuple(copy.shape) != weight_shape(layer):
            raise IncompatibleError(
                f"The PEFT adapter's base has a '{path}' of {tuple(copy.shape)}, '{base_name}' one of "
                f"{weight_shape(layer)} (a resized vocabulary).",
                "give the base it was trained on.",
            )
        own, copy = replaced.get(key, dense_weight(layer, mx.float32)), pieces[0].apply(copy.astype(mx.float32))
        distance = mx.sqrt(mx.square(own - copy).sum() / mx.square(copy).sum()).item()
        if not distance <= (QUANTIZED_TOLERANCE if is_quantized(layer) else DENSE_TOLERANCE):
            raise IncompatibleError(
                f"'{path}' of '{base_name}' differs from the copy in the PEFT adapter (by {distance:.0%}).",
                "give the base it was trained on.",
            )
