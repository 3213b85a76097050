"""From PEFT's tensors to MLX's.

mlx-lm has one rank and one scale for a whole adapter. Where PEFT's differ by module, the factors are padded
with zeros to the largest rank and B takes up the ratio of the scales, which changes nothing in B·A.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_adapters import tensor_names
from mlx_adapters.adapter import Adapter, AdapterConfig
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.layers import EMBEDDING, SWITCH, nn, weight_shape
from mlx_adapters.peft_format.reading import PeftAdapter, PeftModule
from mlx_adapters.peft_format.settings import FUSE_HINT
from mlx_adapters.peft_format.tying import is_head, one_ended, repeated_head
from mlx_adapters.tensor_names import (
    DOWN,
    EMBEDDINGS,
    FUSED_DOWN,
    FUSED_GATE_UP,
    GATE,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    UP,
    Renames,
)

FUSED, PER_EXPERT = "fused", "per-expert"
TIE_HINT = (
    "'mlx-adapters fuse --from-peft' writes a model with two matrices, exactly; 'import-peft --tie' takes the update "
    "at both ends, as PEFT does after merge_and_unload."
)


@dataclass(frozen=True)
class Update:
    """scale · B A of one MLX layer, in MLX's shapes (see `tensor_names`)."""

    key: str
    a: mx.array
    b: mx.array
    m: mx.array | None
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2] if self.a.ndim == 3 else self.a.shape[-1]


@dataclass(frozen=True)
class Converted:
    """The adapter, the renames its paths took, the layout of its experts.

    `tied`: an update that PEFT has at one end of a tied embedding only was taken at both.
    """

    adapter: Adapter
    renames: Renames
    experts: str | None
    tied: bool


class _Places:
    """Finds the base's layer for each module path of transformers and remembers the renames."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.renames: dict[tuple[str, str], None] = {}
        self.taken: dict[str, str] = {}

    def find(self, path: str, source: str) -> str:
        """The MLX path of `path`, which the PEFT module `source` adapts. Raises IncompatibleError."""
        for candidate, renames in tensor_names.mlx_paths(path):
            if candidate in self.layers:
                if self.taken.setdefault(candidate, source) != source and tensor_names.split_expert(source) is None:
                    raise FormatError(f"Two PEFT modules, '{source}' and '{self.taken[candidate]}', are one layer.")
                self.renames |= dict.fromkeys(renames)
                return candidate
        raise IncompatibleError(
            f"The base model has no layer for '{source}' of the PEFT adapter.", "is it the base it was trained on?"
        )


def to_mlx(peft: PeftAdapter, layers: Mapping[str, nn.Module], tie: bool = False) -> Converted:
    """Convert the LoRA part of `peft` for a base with these adaptable `layers`.

    tie: where PEFT adapts one end of a tied embedding, adapt both. Raises FormatError or IncompatibleError with
    the reason.
    """
    places = _Places(layers)
    repeated, ends = repeated_head(peft, layers), one_ended(peft, layers)
    if ends and not tie:
        raise FormatError(
            f"The PEFT adapter updates '{ends[0].path}', one end of the base's tied embedding; in MLX both ends are "
            "one layer.",
            TIE_HINT,
        )
    apart = {m.path for m in (repeated, *ends) if m is not None}
    modules = {path: module for path, module in peft.modules.items() if path not in apart}
    experts = {path: m for path, m in modules.items() if tensor_names.split_expert(path)}
    fused = {path: m for path, m in modules.items() if tensor_names.split_fused(path)}
    plain = [m for path, m in modules.items() if path not in experts and path not in fused]
    updates = [_plain_update(module, peft, places) for module in plain]
    updates += _expert_updates(experts, peft, places)
    updates += _fused_updates(fused, peft, places)
    updates += _both_ends(ends, peft, places)
    _refuse_missing(peft, places, {update.key for update in updates})
    adapter = _assemble(updates, peft)
    layout = FUSED if fused else PER_EXPERT if experts else None
    return Converted(adapter, tuple(places.renames), layout, bool(ends))


def _strength(peft: PeftAdapter, module: PeftModule, rank: int, parameter: str | None = None) -> float:
    configured, scale = peft.settings.strength(module.path.removesuffix(".base_layer"), parameter)
    if configured != rank:
        raise FormatError(
            f"'{module.path}' has rank {rank}, but the PEFT config says {configured}.", "PEFT would not load it either."
        )
    if not math.isfinite(scale) or scale == 0:
        raise FormatError(f"The PEFT config gives '{module.path}' the scale {scale}, so it does nothing.")
    exact = peft.exact_scale
    return exact if exact is not None and math.isclose(exact, scale, rel_tol=1e-12) else scale


def _plain_update(module: PeftModule, peft: PeftAdapter, places: _Places) -> Update:
    if module.a.shape[0] != module.b.shape[1]:
        raise FormatError(f"The factors of '{module.path}' have ranks {module.a.shape[0]} and {module.b.shape[1]}.")
    key = places.find(module.path, module.path)
    layer = places.layers[key]
    if isinstance(layer, EMBEDDING) != module.embedding or isinstance(layer, SWITCH):
        raise IncompatibleError(f"'{module.path}' of the PEFT adapter is another kind of layer in the base model.")
    scale = _strength(peft, module, module.a.shape[0])
    update = Update(key, module.a.T, module.b.T, module.m, scale)
    _check_shape(update, layer, module.path)
    return update


def _check_shape(update: Update, layer: nn.Module, source: str) -> None:
    *_, out, inputs = weight_shape(layer)
    a, b = update.a.shape, update.b.shape
    found = (a[0], b[1]) if isinstance(layer, EMBEDDING) else (b[-2], a[-1]) if len(a) == 3 else (b[1], a[0])
    if found != (out, inputs):
        resized = " (a resized vocabulary)" if isinstance(layer, EMBEDDING) or is_head(source) else ""
        raise IncompatibleError(
            f"'{source}' of the PEFT adapter is made for a weight of {found[0]} x {found[1]}, "
            f"but the base's is {out} x {inputs}{resized}.",
            "give the base it was trained on.",
        )


def _expert_updates(modules: Mapping[str, PeftModule], peft: PeftAdapter, places: _Places) -> list[Update]:
    """Stack the experts of transformers 4's layout; an expert without an update gets a zero one."""
    stacks: dict[str, dict[int, Update]] = {}
    for path, module in modules.items():
        stacked, expert = tensor_names.split_expert(path) or ("", 0)
        key = places.find(stacked, path)
        if module.m is not None or module.embedding or module.a.shape[0] != module.b.shape[1]:
            raise FormatError(f"The expert '{path}' is no plain LoRA module, and MLX has only LoRA for experts.")
        if expert in stacks.get(key, {}):
            raise FormatError(f"The PEFT adapter has '{path}' twice.")
        scale = _strength(peft, module, module.a.shape[0])
        stacks.setdefault(key, {})[expert] = Update(key, module.a.T, module.b.T, None, scale)
    return [_stack(key, parts, places.layers[key]) for key, parts in stacks.items()]


def _stack(key: str, parts: Mapping[int, Update], layer: nn.Module) -> Update:
    shape = weight_shape(layer)
    if not isinstance(layer, SWITCH) or max(parts) >= shape[0]:
        raise IncompatibleError(f"The PEFT adapter has an expert {max(parts)} of '{key}', the base has {shape[0]}.")
    experts = dict(zip(parts, _unified(parts.values()), strict=True))
    some = next(iter(experts.values()))
    for expert in experts.values():
        if (expert.a.shape, expert.b.shape) != ((shape[2], some.rank), (some.rank, shape[1])):
            raise IncompatibleError(f"An expert of '{key}' is not made for a weight of {shape[1]} x {shape[2]}.")
    nothing = replace(some, a=mx.zeros_like(some.a), b=mx.zeros_like(some.b))
    rows = [experts.get(i, nothing) for i in range(shape[0])]
    a, b = mx.stack([row.a.T for row in rows]), mx.stack([row.b.T for row in rows])
    return Update(key, a, b, None, some.scale)


def _fused_updates(modules: Mapping[str, PeftModule], peft: PeftAdapter, places: _Places) -> list[Update]:
    """Split transformers 5's fused experts. Both parameters wrapped: gate_up is the inner one, down the outer."""
    updates = []
    for path, module in modules.items():
        block, inner = tensor_names.split_fused(path) or ("", False)
        both = tensor_names.fused_path(block, not inner) in modules
        names = peft.settings.names_parameter
        gate_up = inner if both else names(f"{block}.experts.{FUSED_GATE_UP}")
        clear = both or (not inner and gate_up != names(f"{block}.experts.{FUSED_DOWN}"))
        if not clear or module.m is not None or module.embedding:
            raise FormatError(f"The PEFT adapter does not say which parameter of the experts '{path}' is.")
        a, b, scale = _split_experts(module, peft, places, block, FUSED_GATE_UP if gate_up else FUSED_DOWN)
        out = b.shape[1] // 2
        parts = {GATE: b[:, :out], UP: b[:, out:]} if gate_up else {DOWN: b}
        for projection, half in parts.items():
            key = places.find(tensor_names.switch_path(block, projection), f"{path}:{projection}")
            update = Update(key, a, half, None, scale)
            _check_shape(update, places.layers[key], path)
            updates.append(update)
    return updates


def _split_experts(
    module: PeftModule, peft: PeftAdapter, places: _Places, block: str, parameter: str
) -> tuple[mx.array, mx.array, float]:
    """a (experts, rank, in), b (experts, out, rank) and the scale of one fused parameter."""
    projection = GATE if parameter == FUSED_GATE_UP else DOWN
    key = places.find(tensor_names.switch_path(block, projection), f"{module.path}:{projection}")
    experts, rows = weight_shape(places.layers[key])[0], module.a.shape[0]
    if rows != module.b.shape[1] or rows % experts or (parameter == FUSED_GATE_UP and module.b.shape[0] % 2):
        raise FormatError(f"The factors of '{module.path}' cannot be split among the base's {experts} experts.")
    rank = rows // experts
    scale = _strength(peft, module, rank, parameter)
    a = module.a.reshape(experts, rank, -1)
    b = module.b.reshape(-1, rank, experts).transpose(2, 0, 1)
    return a, b, scale


def _both_ends(ends: list[PeftModule], peft: PeftAdapter, places: _Places) -> list[Update]:
    """The sum of one-ended updates as one of the tied embedding: an output's factors are an embedding's, swapped."""
    layers, parts = places.layers, []
    for end in ends:
        if end.embedding:
            parts.append(_plain_update(end, peft, places))
            continue
        if end.m is not None:
            raise FormatError(f"DoRA of '{end.path}' cannot be taken at both ends of a tied embedding.", FUSE_HINT)
        key = next(path for path in layers if path.rpartition(".")[2] in EMBEDDINGS)
        part = Update(key, end.b, end.a, None, _strength(peft, end, end.a.shape[0]))
        _check_shape(part, layers[key], end.path)
        parts.append(part)
    if len(parts) < 2:
        return parts
    parts = _unified(parts)
    a, b = mx.concatenate([part.a for part in parts], axis=1), mx.concatenate([part.b for part in parts], axis=0)
    return [replace(parts[0], a=a, b=b)]


def _refuse_missing(peft: PeftAdapter, places: _Places, keys: set[str]) -> None:
    """Raise FormatError if the config names a layer of the base that the file has nothing for."""
    for key, layer in places.layers.items():
        if key in keys:
            continue
        path = tensor_names.peft_path(key, None, tuple(places.renames))
        switch = tensor_names.split_switch(path)
        if switch:
            fused = FUSED_DOWN if switch[1] == DOWN else FUSED_GATE_UP
            named = peft.settings.names_parameter(f"{switch[0]}.experts.{fused}")
        else:
            named = peft.settings.targets(path) or peft.settings.names_parameter(f"{path}.{tensor_names.WEIGHT}")
        if named and not isinstance(layer, EMBEDDING):
            raise FormatError(f"The PEFT config targets '{path}', but the file has no tensors for it.", "is it whole?")


def _unified(updates: Iterable[Update]) -> list[Update]:
    """The same updates with one rank and one scale: the largest rank, the commonest scale."""
    updates = list(updates)
    rank = max(update.rank for update in updates)
    scale = Counter(update.scale for update in updates).most_common(1)[0][0]
    return [_with(update, rank, scale) for update in updates]


def _with(update: Update, rank: int, scale: float) -> Update:
    a, b, ratio = update.a, update.b, update.scale / scale
    if ratio != 1:
        # A ratio that is no power of two would lose bits of a 16-bit B.
        b = b * ratio if math.frexp(ratio)[0] in (0.5, -0.5) else b.astype(mx.float32) * ratio
    if update.rank != rank:
        more, none, both = (0, rank - update.rank), (0, 0), a.ndim == 3
        a = mx.pad(a, [none, more, none] if both else [none, more])
        b = mx.pad(b, [none, none, more] if both else [more, none])
    return replace(update, a=a, b=b, scale=scale)


def _assemble(updates: list[Update], peft: PeftAdapter) -> Adapter:
    if not updates:
        raise FormatError("The PEFT adapter has no LoRA layers.")
    unified = _unified(updates)
    if peft.settings.dora and any(update.m is None for update in unified):
        raise FormatError("The PEFT adapter mixes DoRA layers with LoRA ones.", "MLX has one type for an adapter.")
    keys = tuple(sorted((update.key for update in unified), key=tensor_names.natural_order))
    weights: dict[str, mx.array] = {}
    for update in unified:
        leaves = {LORA_A: update.a, LORA_B: update.b, MAGNITUDE: update.m}
        weights |= {tensor_names.join(update.key, leaf): w for leaf, w in leaves.items() if w is not None}
    kind = "dora" if peft.settings.dora else "lora"
    config = AdapterConfig(unified[0].rank, unified[0].scale, keys, kind, peft.settings.dropout)
    return Adapter(config, weights)
