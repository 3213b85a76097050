"""Which layers of a model can be adapted, what they weigh, and how an adapter is put on and taken off.

An adapted layer is mlx-lm's own (LoRALinear, DoRALinear, ...), so what is trained and fused here is what
plain mlx-lm computes.
"""

import math
from collections.abc import Mapping
from typing import Any

from mlx.utils import tree_unflatten

from mlx_adapters import units
from mlx_adapters.config.training import LoraConfig
from mlx_adapters.errors import ConfigError, IncompatibleError, did_you_mean
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import is_quantized, own_parameters, unpack, weight_shape
from mlx_adapters.models.metadata import FULL, AdapterConfig, base_of
from mlx_adapters.storage import tensor_names
from mlx_adapters.storage.tensor_names import LORA_A, LORA_B, MAGNITUDE, QUANTIZED_LEAVES, WEIGHT
from mlx_adapters.surgery.caches import trace
from mlx_adapters.surgery.calls import parts
from mlx_adapters.system.door import (
    DoRAEmbedding,
    DoRALinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
    QuantizedSwitchLinear,
    SwitchLinear,
    mx,
    nn,
)

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
ADAPTABLE = LINEAR + SWITCH + EMBEDDING


class AdapterLayer(nn.Module):
    """Base of adapter layers that are not mlx-lm's; `linear` or `embedding` is the layer below."""


ADAPTED = (LoRALinear, DoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRAEmbedding, AdapterLayer)


def adaptable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Path and layer of every linear, expert and embedding layer, in the model's order.

    An adapted layer is given as the layer it wraps, so the paths do not change when an adapter is attached.
    """
    return {path: layer for path, layer in weight_layers(module).items() if isinstance(layer, ADAPTABLE)}


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The adaptable layers, and those that no adapter takes but mlx-lm quantizes (the matrices of each head in MLA)."""
    layers = ((path, base_layer(layer)) for path, layer in named_layers(module))
    return {path: layer for path, layer in layers if isinstance(layer, ADAPTABLE) or _quantizable(layer)}


def _quantizable(layer: nn.Module) -> bool:
    return is_quantized(layer) or (hasattr(layer, "to_quantized") and WEIGHT in layer)


def named_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, layer) of all leaves, adapted layers counting as leaves, in natural order of the paths."""
    modules = dict(parts(module))
    adapted = {path: layer for path, layer in modules.items() if isinstance(layer, ADAPTED)}
    leaves = {path: layer for path, layer in modules.items() if path and _is_leaf(layer)}
    flat = {path: layer for path, layer in leaves.items() if not adapted or not _inside(path, adapted)} | adapted
    return [(path, flat[path]) for path in sorted(flat, key=tensor_names.natural_order)]


def _is_leaf(module: nn.Module) -> bool:
    return not any(isinstance(value, dict | list) for value in module.values()) or not module.children()


def _inside(path: str, adapted: dict[str, nn.Module]) -> bool:
    return tensor_names.split(path)[0] in adapted


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer below an adapter layer, or the layer itself."""
    if not isinstance(layer, ADAPTED):
        return layer
    return layer.embedding if "embedding" in layer else layer.linear


def updated_weight(
    weight: mx.array, a: mx.array, b: mx.array, m: mx.array | None, scale: float, embedding: bool = False
) -> mx.array:
    """The weight with the adapter in it, in float32. Shapes as in `tensor_names`.

    LoRA: W + scale · (a b)ᵀ (arXiv 2106.09685); DoRA: m · (W + ΔW) / ‖W + ΔW‖ row by row (arXiv 2402.09353).
    """
    weight, a, b = (x.astype(mx.float32) for x in (weight, a, b))
    left, right = (b, a) if a.ndim == 3 else (a, b) if embedding else (b.T, a.T)
    changed = mx.addmm(weight, scale * left, right)
    if m is None:
        return changed
    return changed * (m.astype(mx.float32) / mx.linalg.norm(changed, axis=-1))[..., None]


def resolve_target_modules(module: nn.Module, lora: LoraConfig) -> tuple[str, ...]:
    """The full paths of the modules that `lora` names.

    "all" means every linear and expert layer of the adapted blocks that the model's code lets be adapted. A name
    matches a whole path or its trailing components (`q_proj`, `mlp.up_proj`); names outside the blocks
    (`embed_tokens`, `lm_head`) match whatever `num_layers` is. Of a full fine-tune they are the modules that hold
    parameters of their own. Raises ConfigError for a name that matches nothing.
    """
    layers = _owners(module) if lora.type == FULL else adaptable_layers(module)
    blocks = {tensor_names.block_index(path) for path in layers} - {None}
    count = len(blocks) if lora.num_layers == "all" else lora.num_layers
    if count > len(blocks):
        raise ConfigError(
            f"The model has {units.count(len(blocks), 'block')}, so num_layers cannot be {count}.",
            "take fewer, or all.",
        )
    first = len(blocks) - count
    adapted = [path for path in layers if (index := tensor_names.block_index(path)) is None or index >= first]
    if lora.target_modules == "all":
        inside = [path for path in adapted if tensor_names.block_index(path) is not None]
        if lora.type == FULL:
            return tuple(inside)
        return _that_run(module, [path for path in inside if not isinstance(layers[path], EMBEDDING)], lora)
    keys: dict[str, None] = {}
    for name in lora.target_modules:
        matches = [path for path in adapted if path == name or path.endswith("." + name)]
        if not matches:
            known = {path.rpartition(".")[2] for path in adapted}
            near = did_you_mean(name, known | set(adapted), f"its modules are: {', '.join(sorted(known))}.")
            raise ConfigError(f"The target module '{name}' matches nothing in this model.", near)
        keys |= dict.fromkeys(matches)
    return tuple(sorted(keys, key=tensor_names.natural_order))


def _owners(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters themselves, in natural order of their paths."""
    found = {path: each for path, each in module.named_modules() if own_parameters(each)}
    return {path: found[path] for path in sorted(found, key=tensor_names.natural_order)}


def _that_run(module: nn.Module, paths: list[str], lora: LoraConfig) -> tuple[str, ...]:
    """Those of the paths at which adapter layers do what the model's code asks of its own: some of that reads a
    layer's weight (Gemma 3n's AltUp). Tried on one token, of which nothing is computed."""
    if _runs(module, paths, lora):
        return tuple(paths)
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    good = {name for name, alike in kinds.items() if _runs(module, alike, lora)}
    return tuple(path for path in paths if path.rpartition(".")[2] in good)


def _runs(module: nn.Module, paths: list[str], lora: LoraConfig) -> bool:
    there = {path: layer for path, layer in module.named_modules() if path in set(paths)}
    try:
        add_adapter_layers(module, AdapterConfig(1, lora.scale, tuple(paths), lora.type))
    except ConfigError:
        return True  # whoever adds them will be told
    try:
        trace(module)
    except Exception:
        return False
    finally:
        module.update_modules(tree_unflatten(list(there.items())))
    return True


def expected_shapes(layer: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape of the adapter tensors that fit the layer; of a full fine-tune, of the layer's own."""
    if config.type == FULL:
        own = own_parameters(layer)
        packed = set(QUANTIZED_LEAVES) if is_quantized(layer) else set()
        shapes = {name: tuple(value.shape) for name, value in own.items() if name not in packed}
        return shapes | ({WEIGHT: weight_shape(layer)} if packed else {})
    *experts, out, inputs = weight_shape(layer)
    rank = config.rank
    if experts:
        shapes = {LORA_A: (*experts, rank, inputs), LORA_B: (*experts, out, rank)}
    elif isinstance(layer, EMBEDDING):
        shapes = {LORA_A: (out, rank), LORA_B: (rank, inputs)}
    else:
        shapes = {LORA_A: (inputs, rank), LORA_B: (rank, out)}
    return shapes | ({MAGNITUDE: (out,)} if config.type == "dora" else {})


def check_fits(adapter: Adapter, model: nn.Module | Mapping[str, nn.Module], base: str = "the base") -> None:
    """Raise IncompatibleError unless every tensor of the adapter has its place in the model (or its layers)."""
    layers = adaptable_layers(model) if isinstance(model, nn.Module) else model
    made_for = f"it was made for '{adapter.base_name}'." if adapter.base_name else None
    for key in adapter.config.keys:
        if key not in layers:
            raise IncompatibleError(
                f"Adapter '{adapter.name}' does not fit {base}: the model has no layer '{key}'.",
                _under_other_paths(adapter, layers, base) or made_for,
            )
        if adapter.config.type == "dora" and isinstance(layers[key], (*SWITCH, nn.QuantizedEmbedding)):
            raise IncompatibleError(f"'{key}' cannot take a DoRA adapter.", "mlx-lm has no such layer.")
        for leaf, shape in expected_shapes(layers[key], adapter.config).items():
            own = tuple(adapter.weights[tensor_names.join(key, leaf)].shape)
            if own != shape:
                raise IncompatibleError(
                    f"Adapter '{adapter.name}' does not fit {base}: '{tensor_names.join(key, leaf)}' is {own}, "
                    f"the model needs {shape}.",
                    made_for,
                )


def _under_other_paths(adapter: Adapter, layers: Mapping[str, nn.Module], base: str) -> str | None:
    """The way on for an adapter whose paths differ from the base's in their beginnings; None for another one."""
    beginnings = tensor_names.other_beginning(adapter.config.keys, layers.__contains__, layers)
    if beginnings is None:
        return None
    old, new = (f"'{beginning}'" if beginning else "nothing" for beginning in beginnings)
    name = base.strip("'") if base.startswith("'") else "BASE"
    anew = f"'mlx-adapters add {adapter.folder or 'FOLDER'} --base {name} --name NAME'"
    made = f", or give the base that it was made for: --base {adapter.base_name}" if adapter.base_name else ""
    return f"its paths begin with {old}, there it is {new}. {anew} takes it in under the paths of this base{made}."


def check_made_for(adapter: Adapter, base_name: str, fingerprint: str) -> None:
    """Raise IncompatibleError if the adapter's record names another base's weights."""
    recorded = base_of(adapter.metadata).get("fingerprint")
    if recorded and recorded != fingerprint:
        raise IncompatibleError(
            f"Adapter '{adapter.name}' was trained on other weights than '{base_name}' holds now "
            f"(it was made for '{adapter.base_name}').",
            "pass --any-base to use it all the same.",
        )


def add_adapter_layers(module: nn.Module, config: AdapterConfig) -> None:
    """Wrap the layers at `config.keys` in mlx-lm's adapter layers with fresh weights (lora_b zero).

    Changes `module` in place, all layers or none. The random numbers come from `mx.random`. For a full fine-tune the
    modules there are trained themselves, packed ones as dense ones.
    """
    if config.type == FULL:
        unpack(module, config.keys)
        for key, owner in dict(module.named_modules()).items():
            if key in config.keys:
                owner.unfreeze(recurse=False, keys=list(own_parameters(owner)))
        return
    layers = adaptable_layers(module)
    missing = [key for key in config.keys if key not in layers]
    if missing:
        raise IncompatibleError(f"The model has no layer '{missing[0]}'.", "is it the base that the adapter is for?")
    made = [(key, _adapter_layer(layers[key], key, config)) for key in config.keys]
    module.update_modules(tree_unflatten(made))


def _adapter_layer(layer: nn.Module, key: str, config: AdapterConfig) -> nn.Module:
    kind = _adapter_class(layer, config.type)
    if kind is None:
        raise ConfigError(f"'{key}' cannot take a DoRA adapter.", "leave it out of the target modules, or train LoRA.")
    made = kind.from_base(layer, r=config.rank, dropout=config.dropout, scale=config.scale)
    shape = expected_shapes(layer, config)[LORA_A]
    if made.lora_a.shape != shape:  # DoRALinear takes the packed size for the input's at 3, 5 and 6 bits
        bound = 1 / math.sqrt(shape[0])
        made.lora_a = mx.random.uniform(low=-bound, high=bound, shape=shape)
    return made


def _adapter_class(layer: nn.Module, kind: str) -> Any:
    """mlx-lm's adapter layer for a layer, None if it has none."""
    if isinstance(layer, SWITCH):
        return None if kind == "dora" else LoRASwitchLinear
    if isinstance(layer, EMBEDDING):
        return LoRAEmbedding if kind == "lora" else None if is_quantized(layer) else DoRAEmbedding
    return DoRALinear if kind == "dora" else LoRALinear


def loads_in_mlx_lm(layer: nn.Module, config: AdapterConfig) -> bool:
    """Whether mlx-lm's own adapter layer on `layer`, as the base's folder holds it, takes tensors of our shapes.

    Tried, not listed: its DoRA has other shapes on layers packed in 3, 5 or 6 bits. Draws random numbers.
    """
    kind = _adapter_class(layer, config.type)
    try:
        made = None if kind is None else kind.from_base(layer, r=config.rank, scale=config.scale)
    except (ValueError, TypeError, AttributeError):
        return False
    shapes = expected_shapes(layer, config)
    return made is not None and all(tuple(made[leaf].shape) == shape for leaf, shape in shapes.items())


def attach(module: nn.Module, adapter: Adapter) -> None:
    """Put the adapter on the model in place. Checks first: when this raises, nothing was changed.

    On float32 layers the adapter is float32, too: mlx-lm's DoRA would compute the new weight's norm in 16 bits.
    """
    check_fits(adapter, module)
    layers = adaptable_layers(module)
    add_adapter_layers(module, adapter.config)
    wide = {key for key in adapter.config.keys if layers[key].weight.dtype == mx.float32}
    weights = [
        (name, mx.contiguous(array.astype(mx.float32) if tensor_names.split(name)[0] in wide else array))
        for name, array in adapter.weights.items()
    ]  # contiguous: a product of experts copies other factors each time, and on CUDA fails on copies of some ranks
    module.load_weights(weights, strict=False)
    module.eval()


def detach(module: nn.Module) -> None:
    """Take all adapter layers off; the base's own layers come back untouched."""
    wrapped = [(path, base_layer(layer)) for path, layer in module.named_modules() if isinstance(layer, ADAPTED)]
    module.update_modules(tree_unflatten(wrapped))


def tied(layers: Mapping[str, nn.Module]) -> bool:
    """Whether a base's output layer is its input embedding: it has none of its own."""
    return output_layer(layers) is None


def output_layer(layers: Mapping[str, nn.Module]) -> str | None:
    """The path of a base's output layer: a linear one outside the blocks that is as tall as an embedding."""
    heights = {weight_shape(layer)[0] for layer in layers.values() if isinstance(layer, EMBEDDING)}
    outside = {path: layer for path, layer in layers.items() if tensor_names.block_index(path) is None}
    tall = (p for p, layer in outside.items() if isinstance(layer, LINEAR) and weight_shape(layer)[0] in heights)
    return next(tall, None)


def untie(module: nn.Module) -> None:
    """Give a model with tied embeddings an output layer of its own, equal to the embedding, in place.

    Raises IncompatibleError for an architecture that mlx-lm has in the tied form only.
    """
    owner = getattr(module, "language_model", module)
    switch = owner if hasattr(owner, "tie_word_embeddings") else getattr(owner, "args", None)
    embedding = getattr(getattr(owner, "model", None), "embed_tokens", None)
    if switch is None or not hasattr(switch, "tie_word_embeddings") or not isinstance(embedding, EMBEDDING):
        raise IncompatibleError(
            "mlx-lm has this architecture with one matrix for input and output only.", "leave the embedding as it is."
        )
    kind = nn.QuantizedLinear if is_quantized(embedding) else nn.Linear
    head = kind.__new__(kind)
    nn.Module.__init__(head)
    for name in ("bits", "group_size", "mode"):
        if hasattr(embedding, name):
            setattr(head, name, getattr(embedding, name))
    for leaf, array in embedding.parameters().items():
        head[leaf] = array
    owner.lm_head = head
    switch.tie_word_embeddings = False
