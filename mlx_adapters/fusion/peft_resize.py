"""A base with the vocabulary that a PEFT adapter was trained with.

transformers' `resize_token_embeddings` appends rows to a model's two ends, or cuts them, before the training. PEFT then
saves both ends, in one form or another; their rows beyond the base's are appended here as they are.
"""

from dataclasses import replace

import mlx.core as mx

from mlx_adapters.checkpoints.contents import tokenizer_files
from mlx_adapters.checkpoints.places import Places
from mlx_adapters.checkpoints.probing import Layout
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.events import Note, OnEvent
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import dense_weight, weight_shape
from mlx_adapters.models.layers import adaptable_layers, nn, tied
from mlx_adapters.peft_format.conversion import other_vocabulary
from mlx_adapters.peft_format.reading import PeftAdapter
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.tensor_names import WEIGHT
from mlx_adapters.units import count


def resized(peft: PeftAdapter, base: Base, module: nn.Module, layout: Layout, resize: bool, on_event: OnEvent) -> Base:
    """`base`, with as many tokens as `peft` was trained with; unless `resize`, IncompatibleError if they differ."""
    layers = adaptable_layers(module)
    if (differing := other_vocabulary(peft, layers, base.name)) is None:
        return base
    rows, wanted, message = differing
    if not resize:
        raise IncompatibleError(
            message, "--resize gives the fused model as many; or give the base that it was trained on."
        )
    ends = [path for path, layer in layers.items() if hf_names.is_end(path) and weight_shape(layer)[0] == rows]
    stored = _stored(peft, Places(layers, layout), ends[0] if tied(layers) else None)
    appended, unknown = dict[str, mx.array](), []
    for path in ends:
        if path not in stored and wanted > rows:
            unknown.append(path)
        own = dense_weight(layers[path], mx.float32)
        mean = mx.broadcast_to(own.mean(axis=0), (max(wanted - rows, 0), own.shape[1]))
        appended[path] = stored[path][rows:] if path in stored else mean
    text = f"The model has {wanted} tokens, not {rows} as the base: {'cut' if wanted < rows else 'rows appended'}."
    own = peft.folder if tokenizer_files(peft.folder) else None
    on_event(Note(text + (" Its tokenizer is the one beside the adapter." if own else "")))
    if own is None and wanted > rows:
        on_event(
            Note("No tokenizer lies beside the adapter: the base's own knows nothing of the new tokens.", "warning")
        )
    if unknown:
        what = f"The adapter does not hold the new tokens' rows of '{unknown[0]}'"
        on_event(Note(f"{what}: the mean of the others stands for {count(wanted - rows, 'row')}.", "warning"))
    return replace(base, rows=wanted, appended=appended, tokenizer=own)


def _stored(peft: PeftAdapter, places: Places, both: str | None) -> dict[str, mx.array]:
    """The whole weights of the two ends, by layer path, as mlx-lm would have them; `both`: the layer that is both."""
    weights = {name.removesuffix(f".{WEIGHT}"): array for name, array in peft.dense.items()} | peft.base_copies
    stored = dict[str, mx.array]()
    for path, array in weights.items():
        pieces = places.look_up(path)[0] if hf_names.is_end(path) else []
        if pieces:
            stored[tensor_names.split(pieces[0].target)[0]] = pieces[0].apply(array.astype(mx.float32))
        elif both and hf_names.is_end(path):
            stored.setdefault(both, array.astype(mx.float32))
    return stored
