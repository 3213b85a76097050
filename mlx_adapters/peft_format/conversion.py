"""A PEFT adapter becomes MLX's, for a base at hand; what the way back needs is recorded."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

import mlx.core as mx

from mlx_adapters.checkpoints.originals import layout_of
from mlx_adapters.checkpoints.places import OWN_BASE, Places
from mlx_adapters.checkpoints.probing import Layout, Piece
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import dense_weight, is_quantized, weight_shape
from mlx_adapters.models.layers import adaptable_layers, check_fits, loads_in_mlx_lm, nn, tied
from mlx_adapters.models.loading import load_module
from mlx_adapters.peft_format.reading import WHOLE, PeftAdapter, PeftModule, refuse_whole
from mlx_adapters.peft_format.to_mlx import Converted, to_mlx, without_copies
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.tensor_names import BIAS, WEIGHT
from mlx_adapters.system.templates import template_in
from mlx_adapters.units import count

TEXT_HINT = "'import-peft --text-only' takes the text part, and so does 'fuse --from-peft' with it."
RESIZE_HINT = (
    "'mlx-adapters fuse --from-peft SRC OUT --base BASE --resize' writes a model with the adapter's tokens; or give "
    "a base that has them."
)
# How far a base's embedding may lie from the copy in the adapter (relative): rounding to 16 bits, to 4 bits.
DENSE_TOLERANCE, QUANTIZED_TOLERANCE = 0.01, 0.5


def as_mlx(
    peft: PeftAdapter,
    base: Base,
    source: str,
    tie: bool = False,
    resize: bool = False,
    text_only: bool = False,
    on_event: OnEvent = log_warnings,
) -> Adapter:
    """The MLX adapter that a PEFT adapter is on `base`; `source` is what its metadata says of it.

    tie: an update of one end of a tied embedding is taken at both. resize: an adapter of fewer tokens leaves the base's
    others as they are. text_only: what is not of the text model is left out. Raises FormatError or IncompatibleError.
    """
    module, _ = load_module(base)
    layout = layout_of(base, module)
    peft, others = prepared(peft, module, layout, text_only)
    peft = _with_all_tokens(peft, adaptable_layers(module), base.name, resize)
    peft = without_copies(peft, module, layout)
    refuse_whole(peft)
    converted = convert(peft, module, layout, base.name, tie)
    layers, config = adaptable_layers(module), converted.adapter.config
    bad = [key for key in config.keys if not loads_in_mlx_lm(layers[key], config)]
    elsewhere = [f"Plain mlx-lm could not load it on '{bad[0]}' of this base."] if bad else []
    for note in notes_on(peft, base) + others + elsewhere:
        on_event(Note(note, "warning"))
    metadata = {"source": "peft", "peft": record(peft, converted, source), "base": base.record()}
    metadata |= own_template(peft, base, on_event)
    return replace(converted.adapter, metadata=metadata)


def own_template(peft: PeftAdapter, base: Base, on_event: OnEvent) -> dict[str, Any]:
    """What the metadata say of the chat template that lies beside the adapter, if it is another than the base's."""
    own = template_in(peft.folder)
    if own is None or "{" not in own or own.strip() == (template_in(base.folder) or "").strip():
        return {}
    on_event(Note("The chat template beside it, another than the base's, goes with it."))
    return {"template": {"chat_template": own}}


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


def prepared(peft: PeftAdapter, module: Any, layout: Layout, text_only: bool) -> tuple[PeftAdapter, list[str]]:
    """The adapter under the names of the base's checkpoint, and what is to be told of what was left out.

    A trainer that wraps the model, or trains its body alone, puts all of its names elsewhere. Raises FormatError for an
    adapter of more than the text model unless `text_only`.
    """
    places, notes = Places(adaptable_layers(module), layout), _untargeted(peft)
    known = [path for path in peft.modules if not (hf_names.is_end(path) or hf_names.is_of_experts(path))]
    names = {tensor_names.split(name)[0] for name in layout.shapes} | set(places.layers)
    names |= {hf_names.peft_path(name) for name in names}  # a body of text and pictures begins otherwise there
    beginnings = tensor_names.other_beginning(known, places.known, names)
    peft = peft if beginnings in (None, ("", "")) else peft.renamed(*beginnings)
    parts = _other_parts(peft, places)
    _refuse_unsaved_modules(peft, places)
    if not parts:
        return peft, notes + _unsaved_biases(peft, places)
    told = [f"'{part}' ({count(len(names), 'tensor')})" for part, names in parts.items()]
    if not text_only:
        raise FormatError(f"The PEFT adapter also changes {', '.join(told)}, which mlx-lm leaves out.", TEXT_HINT)
    peft = peft.without(lambda path: any(f"{path}.".startswith(f"{part}.") for part in parts))
    notes.append(f"Left out, as no part of the text model: {', '.join(told)}.")
    return peft, notes + _unsaved_biases(peft, places)


def _refuse_unsaved_modules(peft: PeftAdapter, places: Places) -> None:
    """Raise FormatError if the config promises whole modules that the file does not hold, or not all of.

    PEFT goes by how a module's name ends, and saves nothing for one that is not among the base's. With
    `ensure_weight_tying` the embedding's weight is the head's, too.
    """
    layout, saved = places.layout, peft.settings.modules_to_save
    one = peft.settings.tying and tied(places.layers)
    held = _held(peft, places)
    there = [name for name in layout.shapes if tensor_names.split(name)[1] == WEIGHT and _targets(layout.of(name))]
    for end in saved:
        known = hf_names.is_end(end) or any(f"{end}." in name for name in layout.shapes)
        tied_to = one and hf_names.is_head(end) and any(map(hf_names.is_embedding, saved))
        if known and not tied_to and not any(f"{end}." in name for name in peft.dense):
            raise FormatError(
                f"The PEFT config names '{end}' in modules_to_save, but the file does not hold it.", WHOLE
            )
        wanted = [name for name in there if _is_of_module(name, end)]
        lacking = [name for name in wanted if not _targets(layout.of(name)) & held]
        if 0 < len(lacking) < len(wanted):
            raise FormatError(
                f"The PEFT config names '{end}' in modules_to_save, but of these the file lacks '{lacking[0]}'.", WHOLE
            )


def _targets(pieces: list[Piece]) -> set[tuple[str, int | None]]:
    return {(piece.target, piece.index) for piece in pieces}


def _held(peft: PeftAdapter, places: Places) -> set[tuple[str, int | None]]:
    """Where mlx-lm has what the file holds whole."""
    return {place for name in peft.dense for place in _targets(places.tensor(name))}


def _is_of_module(name: str, end: str) -> bool:
    """Whether a tensor is of a module whose path ends so."""
    steps = tensor_names.split(name)[0].split(".")
    return any(".".join(steps[:i]).endswith(end) for i in range(1, len(steps) + 1))


def _untargeted(peft: PeftAdapter) -> list[str]:
    """What to tell of updates that the file holds and the config does not name."""
    settings = peft.settings
    if settings.raw.get("target_modules") in (None, "all-linear"):
        return []
    others = [
        path
        for path in peft.modules
        if not (hf_names.is_of_experts(path) or hf_names.is_head(path) or settings.targets(path))
        and not settings.names_parameter(tensor_names.join(path, WEIGHT))
    ]
    told = f"The PEFT config does not target '{others[0]}'" if others else ""
    more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
    return [f"{told}{more}, which the file updates: PEFT leaves that out, here it is taken."] if others else []


def _unsaved_biases(peft: PeftAdapter, places: Places) -> list[str]:
    """What to tell of biases that were trained by the word of the config and are not in the file, as PEFT wrote it for
    a time with "lora_only"."""
    kind, layout = peft.settings.raw.get("bias"), places.layout
    if kind in (None, "none"):
        return []
    adapted = (tensor_names.join(path, BIAS) for path in peft.modules)
    everywhere = (name for name in layout.shapes if tensor_names.split(name)[1] == BIAS and layout.of(name))
    held = _held(peft, places)
    wanted = everywhere if kind == "all" else adapted
    lacking = [name for name in wanted if (own := _targets(places.tensor(name))) and not own & held]
    told = f"The PEFT config trains biases (bias {kind!r}), but the file lacks {len(lacking):,} of them"
    return [f"{told}, such as '{lacking[0]}': these stay the base's."] if lacking else []


def _other_parts(peft: PeftAdapter, places: Places) -> dict[str, list[str]]:
    """The parts of the model (`model.visual`) in which tensors lie that mlx-lm's model has no places for, and these.

    A part is no other one where layers that it has lie, too: what is missing there is missing. Nor is it one without
    any: then it is another base.
    """
    there, missing = dict[str, None](), list[str]()
    for name in [*(tensor_names.join(path, WEIGHT) for path in peft.modules), *peft.dense]:
        path = tensor_names.split(name)[0]
        if hf_names.is_end(path) or hf_names.is_of_experts(path) or places.tensor(name):
            there[tensor_names.before_number(path)] = None
        else:
            missing.append(name)
    roots = [root.split(".") for root in there if root]
    parts = dict[str, list[str]]()
    for name in missing if roots else ():
        steps = tensor_names.split(name)[0].split(".")
        shared = max(
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(root, steps, strict=False))) for root in roots
        )
        if any(steps[: len(root)] == root for root in roots):
            path, leaf = tensor_names.split(name)
            if leaf != WEIGHT and places.tensor(tensor_names.join(path, WEIGHT)):
                raise IncompatibleError(f"The base's '{path}' has no {leaf}, which the PEFT adapter has.", OWN_BASE)
            places.find(".".join(steps), ".".join(steps))  # says what is wrong with it
            return {}
        parts.setdefault(".".join(steps[: shared + 1]), []).append(name)
    return parts


def _with_all_tokens(peft: PeftAdapter, layers: Mapping[str, nn.Module], base: str, resize: bool) -> PeftAdapter:
    """An adapter of a smaller vocabulary, with nothing for the base's further tokens."""
    if (differing := other_vocabulary(peft, layers, base)) is None:
        return peft
    rows, given, message = differing
    whole = any(module.m is not None for path, module in peft.modules.items() if hf_names.is_end(path))
    if given > rows or whole:  # DoRA would need the further tokens' magnitudes
        raise IncompatibleError(message, RESIZE_HINT)
    if not resize:
        raise IncompatibleError(message, "'import-peft --resize' takes it and leaves the further tokens as they are.")
    more = [(0, rows - given), (0, 0)]
    modules = {
        path: _padded(module, more) if hf_names.is_end(path) else module for path, module in peft.modules.items()
    }
    return replace(peft, modules=modules)


def _padded(module: PeftModule, more: list[tuple[int, int]]) -> PeftModule:
    if module.embedding:
        return replace(module, a=mx.pad(module.a, more[::-1]))
    return replace(module, b=mx.pad(module.b, more))


def other_vocabulary(peft: PeftAdapter, layers: Mapping[str, nn.Module], base: str) -> tuple[int, int, str] | None:
    """How many tokens the base has, the adapter was trained with, and that in words; None where they are as many."""
    rows = next((weight_shape(layer)[0] for path, layer in layers.items() if hf_names.is_embedding(path)), None)
    given = peft.vocabulary
    if given is None or rows is None or given == rows:
        return None
    return rows, given, f"The PEFT adapter is for {given} tokens, but '{base}' has {rows} (a resized vocabulary)."


def record(peft: PeftAdapter, converted: Converted, source: str) -> dict[str, Any]:
    """What export needs for the way back: the config as it was, how paths and experts were written, and what loading
    multiplied the weights by."""
    tying = {"repeated": converted.repeated} if peft.settings.raw.get("ensure_weight_tying") else {}
    extra = {
        "tied": converted.tied,
        "paths": converted.paths,
        "folds": converted.folds,
        "fused": converted.fused,
        "lost": converted.lost,
    }
    return {
        "from": source,
        "config": peft.settings.raw,
        "renames": [list(pair) for pair in converted.renames],
        "experts": converted.experts,
        **tying,
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
        if tuple(copy.shape[1:]) != weight_shape(layer)[1:] or copy.shape[0] > weight_shape(layer)[0]:
            raise IncompatibleError(
                f"The PEFT adapter's base has a '{path}' of {tuple(copy.shape)}, '{base_name}' one of "
                f"{weight_shape(layer)} (a resized vocabulary).",
                OWN_BASE,
            )
        trained = tensor_names.join(path, WEIGHT) in peft.dense or path in peft.token_rows
        own = replaced.get(key) if not trained else None
        own = (dense_weight(layer, mx.float32) if own is None else own)[: copy.shape[0]]
        copy = pieces[0].apply(copy.astype(mx.float32))
        distance = mx.sqrt(mx.square(own - copy).sum() / mx.square(copy).sum()).item()
        if not distance <= (QUANTIZED_TOLERANCE if is_quantized(layer) else DENSE_TOLERANCE):
            raise IncompatibleError(
                f"'{path}' of '{base_name}' differs from the copy in the PEFT adapter (by {distance:.0%}).",
                OWN_BASE,
            )
