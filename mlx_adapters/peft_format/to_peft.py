"""From MLX's tensors to PEFT's.

An adapter that came from PEFT goes back as it came: its own config, ranks and layout. Any other gets a plain
config with full module paths; experts are written one by one (transformers 4's layout, which PEFT also loads
into transformers 5's fused experts), tied embeddings as PEFT's ensure_weight_tying stores them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_adapters import tensor_names
from mlx_adapters.adapter import Adapter
from mlx_adapters.errors import FormatError
from mlx_adapters.peft_format.places import Factors, Fold, back, fold_of
from mlx_adapters.peft_format.probing import Layout
from mlx_adapters.peft_format.settings import PeftSettings
from mlx_adapters.peft_format.to_mlx import FUSED
from mlx_adapters.tensor_names import (
    DOWN,
    EMBEDDINGS,
    FAN_IN_FAN_OUT,
    FUSED_DOWN,
    FUSED_GATE_UP,
    GATE,
    HEADS,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    POSITIONS,
    UP,
    WEIGHT,
    Renames,
)

LM_HEAD = HEADS[0]
ROUTER = ".gate"


class _NotAsItCame(Exception):
    """The adapter no longer has the form its PEFT config describes."""


@dataclass(frozen=True)
class PeftForm:
    """The tensors by PEFT's names, and the config."""

    tensors: dict[str, mx.array]
    config: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """Of the base: its model type, whether its embedding is also the output layer, its original checkpoint."""

    model_type: str | None
    tied: bool
    layout: Layout


def to_peft(adapter: Adapter, facts: Callable[[], Facts]) -> PeftForm:
    """Convert an adapter; `facts` are asked for unless it came from PEFT. Raises FormatError for what PEFT lacks."""
    origin = adapter.metadata.get("peft")
    if isinstance(origin, Mapping):
        try:
            return _as_it_came(adapter, origin)
        except (_NotAsItCame, FormatError):
            pass
    return _plain(adapter, facts())


# -- an adapter that came from PEFT -----------------------------------------------------------------------


def _as_it_came(adapter: Adapter, origin: Mapping[str, Any]) -> PeftForm:
    settings = PeftSettings.parse(origin["config"])
    if settings.dora != (adapter.config.type == "dora") or origin.get("tied"):
        raise _NotAsItCame
    renames: Renames = tuple((str(old), str(new)) for old, new in origin.get("renames", ()))
    paths, folds = ({**origin.get(name, {})} for name in ("paths", "folds"))
    tensors: dict[str, mx.array] = {}
    stacks: dict[str, dict[str, tuple[mx.array, mx.array]]] = {}
    for key, a, b, m in adapter.layers():
        path = paths.get(key) or tensor_names.peft_path(key, None, renames)
        switch = tensor_names.split_switch(path)
        if switch and origin.get("experts") == FUSED:
            stacks.setdefault(switch[0], {})[switch[1]] = (a, b)
        elif a.ndim == 3:
            for expert in range(a.shape[0]):
                name = tensor_names.expert_path(*switch, expert) if switch else path.replace("{}", str(expert))
                cut = _cut(adapter, settings, name, a[expert].T, b[expert].T, None, folds.get(key))
                tensors |= _tensors(name, *cut, False)
        else:
            embedding = path.rpartition(".")[2] in EMBEDDINGS + POSITIONS
            a, b, m = _cut(adapter, settings, path, a, b, m, folds.get(key), embedding=embedding)
            tensors |= _tensors(path, a, b, m, embedding)
            if embedding and settings.raw.get("ensure_weight_tying"):
                tensors |= _tensors(LM_HEAD, b.T, a.T, None, False)
    for block, parts in stacks.items():
        tensors |= _fused(adapter, settings, block, parts)
    return PeftForm(tensors, dict(settings.raw))


def _cut(
    adapter: Adapter, settings: PeftSettings, path: str, a: mx.array, b: mx.array, m: mx.array | None = None,
    fold: Fold | None = None, parameter: str | None = None, embedding: bool = False,
) -> tuple[mx.array, mx.array, mx.array | None]:  # fmt: skip
    """Undo padding, change of scale and what loading does: a (in, R) -> (in, r), b (R, out) -> (r, out), m."""
    rank, scale = settings.strength(path, parameter)
    padding = [a[:, rank:], b[rank:]]
    if a.shape[1] < rank or any(part.size and mx.any(part != 0).item() for part in padding):
        raise _NotAsItCame
    a, b, m, factor = _unloaded(a[:, :rank], b[:rank], m, fold, embedding)
    ratio = adapter.config.scale / (scale * factor)
    if ratio != 1 or fold is not None:
        b = (b.astype(mx.float32) * ratio).astype(a.dtype)
    return a, b, m if m is None or fold is None else m.astype(a.dtype)


def _unloaded(
    a: mx.array, b: mx.array, m: mx.array | None, fold: Fold | None, embedding: bool
) -> tuple[mx.array, mx.array, mx.array | None, float]:
    """a, b and m as they were before loading multiplied the weight, and what the scale has still to be divided by."""
    left, right = (a, b) if embedding else (b.T, a.T)
    factors, factor = back(Factors(left, right, m), fold)
    a, b = (factors.left, factors.right) if embedding else (factors.right.T, factors.left.T)
    return a, b, factors.m, factor


def _fused(
    adapter: Adapter, settings: PeftSettings, block: str, parts: Mapping[str, tuple[mx.array, mx.array]]
) -> dict[str, mx.array]:
    """transformers 5's layout: gate and up share their A; the two parameters are nested, gate_up inside."""
    gate, up, down = (parts.get(projection) for projection in (GATE, UP, DOWN))
    if (gate is None) != (up is None) or (gate and up and not mx.array_equal(gate[0], up[0])):
        raise _NotAsItCame
    stacked = {}
    if gate and up:
        stacked[FUSED_GATE_UP] = (gate[0], mx.concatenate([gate[1], up[1]], axis=1))
    if down:
        stacked[FUSED_DOWN] = down
    tensors: dict[str, mx.array] = {}
    for parameter, (a, b) in stacked.items():
        path = tensor_names.fused_path(block, inner=parameter == FUSED_GATE_UP and len(stacked) == 2)
        outer = tensor_names.fused_path(block, inner=False)
        cut = [_cut(adapter, settings, outer, x.T, y.T, parameter=parameter) for x, y in zip(a, b, strict=True)]
        lora_a = mx.concatenate([x.T for x, _, _ in cut])
        lora_b = mx.stack([y.T for _, y, _ in cut], axis=-1).reshape(b.shape[1], -1)
        tensors |= {tensor_names.peft_tensor(path, LORA_A): lora_a, tensor_names.peft_tensor(path, LORA_B): lora_b}
    return tensors


def _tensors(path: str, a: mx.array, b: mx.array, m: mx.array | None, embedding: bool) -> dict[str, mx.array]:
    """PEFT's tensors of one module from a (in, r), b (r, out), m (out,)."""
    leaves = {LORA_A: a.T, LORA_B: b.T} | ({} if m is None else {MAGNITUDE: m})
    return {tensor_names.peft_tensor(path, leaf, embedding): array for leaf, array in leaves.items()}


# -- an adapter that was made here ------------------------------------------------------------------------


def _plain(adapter: Adapter, facts: Facts) -> PeftForm:
    tensors: dict[str, mx.array] = {}
    targets: dict[str, None] = {}
    experts: dict[str, dict[str, tuple[mx.array, mx.array]]] = {}
    for key, a, b, m in adapter.layers():
        if a.ndim == 3:
            block, _, projection = key.rpartition(".")
            experts.setdefault(block, {})[projection] = (a, b)
            continue
        path, fold = _origin(key, facts)
        if m is not None and path.endswith(ROUTER):
            raise FormatError(
                f"PEFT has no DoRA for the router '{path}'.", "train it as LoRA, or leave the router out."
            )
        layer = path.rpartition(".")[2]
        embedding = layer in EMBEDDINGS + POSITIONS
        if m is not None and embedding:
            raise FormatError(f"PEFT's DoRA of an embedding is another function than MLX's: '{path}'.")
        a, b, m, factor = _unloaded(a, b, m, fold, embedding)
        b = b if factor == 1 else b.astype(mx.float32) / factor
        tensors |= _tensors(path, a, b, m, embedding)
        targets[path] = None
        if facts.tied and layer in EMBEDDINGS:
            tensors |= _tensors(LM_HEAD, b.T, a.T, None, False)
            targets[LM_HEAD] = None
    for block, parts in experts.items():
        tensors |= _per_expert(block, parts, targets, facts)
    whole = bool(experts) or any(path.endswith(ROUTER) for path in targets)
    tying = facts.tied and LM_HEAD in targets
    return PeftForm(tensors, _plain_config(adapter, list(targets), whole, tying, facts.model_type))


def _origin(key: str, facts: Facts) -> tuple[str, Fold | None]:
    """The path in transformers of a layer's module, and what loading multiplies its weight by.

    Raises FormatError if there is no such module.
    """
    weight = tensor_names.join(key, WEIGHT)
    pieces = facts.layout.into(weight)
    if len(pieces) != 1 or not pieces[0].whole or pieces[0].index is not None:
        why = facts.layout.problems.get(weight, "it is a part of a larger matrix there")
        raise FormatError(f"transformers has no module of its own for '{key}': {why}.", "leave it out of the targets.")
    path, leaf = tensor_names.split(pieces[0].source)
    if leaf != WEIGHT:
        raise FormatError(f"transformers has '{pieces[0].source}' for '{key}', which is no module that PEFT can adapt.")
    if path == key or facts.model_type in tensor_names.OWN_NAMES:
        path = tensor_names.peft_path(key, facts.model_type)
    return path, fold_of(pieces[0])


def _per_expert(
    block: str, parts: dict[str, tuple[mx.array, mx.array]], targets: dict[str, None], facts: Facts
) -> dict[str, mx.array]:
    """One A and B for each expert. With gate or up, PEFT wants all three; what is missing is added as zero."""
    tensors: dict[str, mx.array] = {}
    partner = parts.get(GATE) or parts.get(UP)
    if partner:
        (experts, rank, inputs), inner = partner[0].shape, partner[1].shape[1]
        shapes = {GATE: (inputs, inner), UP: (inputs, inner), DOWN: (inner, inputs)}
        nothing = {
            name: (mx.zeros((experts, rank, i), partner[0].dtype), mx.zeros((experts, o, rank), partner[1].dtype))
            for name, (i, o) in shapes.items()
        }
        parts = nothing | parts
    for projection, (a, b) in parts.items():
        key = tensor_names.join(block, projection)
        pieces = facts.layout.into(tensor_names.join(key, WEIGHT))
        if len(pieces) != a.shape[0] or any(piece.index is None or not piece.whole for piece in pieces):
            raise FormatError(f"PEFT has no name for the experts '{key}'.", "leave them out of the targets.")
        for expert, piece in enumerate(pieces):
            if fold_of(piece):
                raise FormatError(f"mlx-lm multiplies the weights of the experts '{key}' when it loads them.")
            path = tensor_names.split(piece.source)[0]
            tensors |= _tensors(path, a[expert].T, b[expert].T, None, False)
            targets[path] = None
    return tensors


def _plain_config(
    adapter: Adapter, targets: list[str], parameters: bool, tying: bool, model_type: str | None
) -> dict[str, Any]:
    config = adapter.config
    alpha = config.scale * config.rank
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": adapter.base_name, "revision": None,
        "r": config.rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT has none for experts and routers
        "use_rslora": False, "use_dora": config.type == "dora", "init_lora_weights": True,
        "target_modules": targets, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "fan_in_fan_out": model_type in FAN_IN_FAN_OUT, "layers_to_transform": None, "layers_pattern": None,
        **({"ensure_weight_tying": True} if tying else {}),
    }  # fmt: skip
