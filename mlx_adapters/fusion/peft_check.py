"""A second opinion on what a PEFT adapter changes: mlx-lm's own loading, run on the change itself.

The fused weights are made of pieces (see `probing`). Here the same change is written out under the checkpoint's
names, as full matrices, and given to `sanitize` as `mlx_lm.load` would; both must agree.
"""

import mlx.core as mx

from mlx_adapters.checkpoints.probing import Layout, Shapes, Tensors
from mlx_adapters.errors import FidelityError
from mlx_adapters.fusion.peft_whole import WholeTensors
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import Base
from mlx_adapters.models.layers import updated_weight
from mlx_adapters.peft_format.reading import PeftAdapter, PeftModule
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.hf_names import EMBEDDINGS, POSITIONS
from mlx_adapters.storage.tensor_names import WEIGHT
from mlx_adapters.system.door import make_module, sanitize_of

TOLERANCE = 1e-3  # of the largest number: both ways compute in float32, from factors of 16 or 32 bits


def check_as_loaded(
    peft: PeftAdapter, base: Base, layout: Layout, whole: WholeTensors, adapters: list[Adapter]
) -> None:
    """Raise FidelityError if mlx-lm would load another change than `whole` and `adapters` are."""
    sanitize = sanitize_of(make_module(base.config, base.folder))
    tensors = _named({name: array.astype(mx.float32) for name, array in peft.dense.items()}, layout)
    turned = layout.model_type in hf_names.FAN_IN_FAN_OUT  # whatever the config says: so does PEFT
    products = {f"{path}.{WEIGHT}": _product(peft, module, turned) for path, module in peft.modules.items()}
    updates = _named(products, layout)
    nothing = sanitize(layout.packed(_zeros(layout.shapes)))
    loaded = sanitize(layout.packed(_zeros(layout.shapes) | tensors | updates))
    for target in (piece.target for name in tensors for piece in layout.of(name) if piece.index is None):
        path, leaf = tensor_names.split(target)
        ours = whole.replaced.get(path) if leaf == WEIGHT else None
        _compare(target, whole.parameters.get(target) if ours is None else ours, loaded[target])
    of_whole = {target: change for changes in whole.updated.values() for target, change in changes.items()}
    for target in dict.fromkeys(piece.target for name in updates for piece in layout.of(name)):
        ours = _change(tensor_names.split(target)[0], adapters) if target not in of_whole else of_whole[target]
        _compare(target, ours, loaded[target] - nothing[target])


def _zeros(shapes: Shapes) -> Tensors:
    return {name: mx.zeros(shape) for name, shape in shapes.items()}


def _named(arrays: Tensors, layout: Layout) -> Tensors:
    """The arrays that have a place in the checkpoint, under its names."""
    named = {}
    for name, array in arrays.items():
        path, leaf = tensor_names.split(name)
        for place, _ in hf_names.mlx_paths(path):
            own = tensor_names.join(place, leaf)
            pieces = layout.into(own)
            source = own if own in layout.shapes else pieces[0].source if len(pieces) == 1 else None
            if source is not None and layout.shapes[source] == tuple(array.shape):
                named[source] = array
                break
    return named


def _product(peft: PeftAdapter, module: PeftModule, turned: bool) -> mx.array:
    """The update of a module's weight, as transformers keeps it (`turned`: as (in, out)), in float32; computed when it
    is read."""
    a, b = module.a.astype(mx.float32), module.b.astype(mx.float32)
    product = (b @ a) * peft.settings.strength(module.path)[1]
    return product.T if module.embedding or turned else product


def _change(path: str, adapters: list[Adapter]) -> mx.array | None:
    for adapter in adapters:
        if path in adapter.config.keys:
            a, b, _ = adapter.factors(path)
            embedding = path.rpartition(".")[2] in EMBEDDINGS + POSITIONS
            return updated_weight(mx.zeros(()), a, b, None, adapter.config.scale, embedding)
    return None


def _compare(target: str, ours: mx.array | None, loaded: mx.array) -> None:
    if ours is None:
        return
    loaded = loaded.astype(mx.float32)
    far = mx.abs(ours.astype(mx.float32) - loaded).max() if ours.shape == loaded.shape else mx.array(float("inf"))
    if not far.item() <= TOLERANCE * max(mx.abs(loaded).max().item(), 1e-30):
        raise FidelityError(
            f"mlx-lm would load other numbers for '{target}' than the fused model would have.",
            "nothing was written; this is a fault of the conversion, please report it.",
        )
