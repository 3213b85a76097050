"""PEFT's form of an adapter that was made here: its names, and a config that names each module by its full path.

Experts are written one by one where PEFT loads them so (transformers 4's layout; PEFT fuses them), else as the
parameters that transformers 5 has for all of them. Where PEFT takes experts one by one, it takes any module that is
called like a part of one for such a part, whatever its path; so those are named as parameters (not routers, which are
parts of experts to PEFT as well). Tied embeddings are written as PEFT's
ensure_weight_tying stores them.
"""

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_adapters.checkpoints.places import Fold, WeightFactors, back, fold_of
from mlx_adapters.checkpoints.probing import Layout
from mlx_adapters.errors import FormatError
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.peft_format.updates import joined_experts
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.hf_names import (
    DOWN,
    EMBEDDINGS,
    FAN_IN_FAN_OUT,
    FUSED_DOWN,
    FUSED_GATE_UP,
    GATE,
    HEADS,
    PEFT_AS_PARAMETERS,
    PEFT_EXPERTS_EACH,
    PEFT_TURNED,
    PEFT_UNHEEDED,
    POSITIONS,
    ROUTERS,
    UP,
)
from mlx_adapters.storage.tensor_names import LORA_A, LORA_B, MAGNITUDE, WEIGHT

LM_HEAD = HEADS[0]
LEAVE_OUT = "leave it out of the targets."


@dataclass(frozen=True)
class PeftForm:
    """The tensors by PEFT's names, and the config."""

    tensors: dict[str, mx.array]
    config: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """Of the base: its type, whether its embedding is also the output layer, whether it has experts, its checkpoint,
    whether transformers has its type; other code has the modules of its checkpoint."""

    model_type: str | None
    tied: bool
    experts: bool
    layout: Layout
    in_transformers: bool = True


def own_form(adapter: Adapter, facts: Facts) -> PeftForm:
    """PEFT's form of an adapter that was made here. Raises FormatError for what PEFT cannot express."""
    tensors: dict[str, mx.array] = {}
    targets: dict[str, None] = {}
    parameters: list[str] = []
    experts: dict[str, dict[str, tuple[mx.array, mx.array]]] = {}
    for key, a, b, m in adapter.layers():
        if a.ndim == 3:
            block, _, projection = key.rpartition(".")
            experts.setdefault(block, {})[projection] = (a, b)
            continue
        path, fold = _origin(key, facts)
        layer = path.rpartition(".")[2]
        _refuse_unheeded(path, layer, facts.model_type)
        each = facts.model_type in PEFT_EXPERTS_EACH
        parts_of_experts = PEFT_AS_PARAMETERS if each else ROUTERS
        embedding, parameter = layer in EMBEDDINGS + POSITIONS, facts.experts and layer in parts_of_experts
        if m is not None and parameter:
            what = "router" if layer in ROUTERS else "layer"
            raise FormatError(
                f"PEFT has no DoRA for the {what} '{path}'.", f"train it as LoRA, or leave the {what} out."
            )
        if m is not None and embedding:
            raise FormatError(f"PEFT's DoRA of an embedding is another function than MLX's: '{path}'.", LEAVE_OUT)
        a, b, m, factor = unloaded(a, b, m, fold, embedding)
        b = b if factor == 1 else b.astype(mx.float32) / factor
        tensors |= tensors_of(hf_names.stored_path(path, facts.model_type), a, b, m, embedding)
        if parameter and not (layer in ROUTERS and each):
            parameters.append(tensor_names.join(path, WEIGHT))
        else:
            targets[path] = None
        if facts.tied and layer in EMBEDDINGS:
            tensors |= tensors_of(LM_HEAD, b.T, a.T, None, False)
            targets[LM_HEAD] = None
    ranks: dict[str, int] = {}
    for block, parts in experts.items():
        if facts.model_type in PEFT_EXPERTS_EACH or not facts.in_transformers:
            tensors |= _per_expert(block, parts, targets, facts)
            continue
        for form in _fused_experts(block, parts, facts):
            tensors |= form.tensors
            parameters.append(form.parameter)
            ranks[form.parameter] = form.rank
    tying = facts.tied and LM_HEAD in targets
    config = _config(adapter, list(targets), parameters, tying, facts.model_type)
    _note_ranks(config, {name: rank for name, rank in ranks.items() if rank != adapter.config.rank})
    if experts or parameters or any(path.rpartition(".")[2] in ROUTERS for path in targets):
        config["lora_dropout"] = 0.0  # PEFT has none for experts and parameters
    return PeftForm(tensors, config)


def _refuse_unheeded(path: str, layer: str, model_type: str | None) -> None:
    """Raise FormatError for a module of a Mamba model whose weight is read past PEFT's layer."""
    if layer in PEFT_UNHEEDED.get(model_type or "", ()):
        raise FormatError(
            f"transformers reads the weight of '{path}' itself, so that an adapter there does nothing in PEFT.",
            LEAVE_OUT,
        )


def _origin(key: str, facts: Facts) -> tuple[str, Fold | None]:
    """The path in transformers of a layer's module, and what loading multiplies its weight by.

    Raises FormatError if there is no such module.
    """
    weight = tensor_names.join(key, WEIGHT)
    pieces = facts.layout.into(weight)
    if len(pieces) != 1 or not pieces[0].whole or pieces[0].index is not None:
        why = facts.layout.problems.get(weight, "it is a part of a larger matrix there")
        raise FormatError(f"transformers has no module of its own for '{key}': {why}.", LEAVE_OUT)
    path, leaf = tensor_names.split(pieces[0].source)
    if leaf != WEIGHT:
        raise FormatError(
            f"transformers has '{pieces[0].source}' for '{key}', which is no module that PEFT can adapt.", LEAVE_OUT
        )
    if path == key or facts.model_type in hf_names.OWN_NAMES:
        path = hf_names.peft_path(key, facts.model_type)
    return path, fold_of(pieces[0])


def _per_expert(
    block: str, parts: dict[str, tuple[mx.array, mx.array]], targets: dict[str, None], facts: Facts
) -> dict[str, mx.array]:
    """One A and B for each expert. With gate or up, PEFT wants all three where it fuses them; what is missing is added
    as zero."""
    tensors: dict[str, mx.array] = {}
    partner = parts.get(GATE) or parts.get(UP)
    if partner and facts.in_transformers:
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
            raise FormatError(f"PEFT has no name for the experts '{key}'.", LEAVE_OUT)
        for expert, piece in enumerate(pieces):
            if fold_of(piece):
                raise FormatError(
                    f"mlx-lm multiplies the weights of the experts '{key}' when it loads them.", LEAVE_OUT
                )
            path = tensor_names.split(piece.source)[0]
            tensors |= tensors_of(path, a[expert].T, b[expert].T, None, False)
            targets[path] = None
    return tensors


@dataclass(frozen=True)
class _FusedExperts:
    """One parameter of fused experts with the path that PEFT has for it."""

    parameter: str
    rank: int
    tensors: dict[str, mx.array]


def _fused_experts(block: str, parts: dict[str, tuple[mx.array, mx.array]], facts: Facts) -> list[_FusedExperts]:
    """A block's experts as the parameters that transformers has for all of them.

    Gate and up are rows of one parameter. Their updates with an A of each become one of twice the rank.
    """
    if unknown := set(parts) - {GATE, UP, DOWN}:
        key = tensor_names.join(block, min(unknown))
        raise FormatError(f"PEFT has no name for the experts '{key}' of a {facts.model_type}.", LEAVE_OUT)
    made = list[_FusedExperts]()
    for parameter, names in ((FUSED_GATE_UP, (GATE, UP)), (FUSED_DOWN, (DOWN,))):
        keys = [tensor_names.join(block, name) for name in names]
        given = [parts.get(name) for name in names]
        if not any(given):
            continue
        pieces = [facts.layout.into(tensor_names.join(key, WEIGHT)) for key in keys]
        inside = hf_names.block_of_experts(pieces[0][0].source) if all(pieces) else None
        if inside is None or any(fold_of(piece) for some in pieces for piece in some):
            raise FormatError(f"PEFT has no name for the experts '{block}' of a {facts.model_type}.", LEAVE_OUT)
        if facts.model_type in hf_names.OWN_NAMES:
            inside = hf_names.peft_path(block, facts.model_type).rpartition(".")[0]
        outs = [_rows_of(key, facts) for key in keys]
        rows = [
            some[0].select[some[0].axes[1]] if some[0].index is None else slice(sum(outs[:i]), sum(outs[: i + 1]))
            for i, some in enumerate(pieces)
        ]
        shared = all(given) and all(mx.array_equal(part[0], given[0][0]) for part in given if part and given[0])
        left, right = _stacked([part for part in given], rows, sum(outs), bool(shared))
        if facts.model_type in PEFT_TURNED:
            left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
        lora_a, lora_b = joined_experts(left, right)
        path = hf_names.fused_path(inside, inner=parameter == FUSED_GATE_UP and DOWN in parts)
        tensors = {hf_names.peft_tensor(path, LORA_A): lora_a, hf_names.peft_tensor(path, LORA_B): lora_b}
        made.append(
            _FusedExperts(
                f"{hf_names.fused_path(inside, inner=False)}.{parameter}",
                left.shape[2] if facts.model_type not in PEFT_TURNED else right.shape[1],
                tensors,
            )
        )
    return made


def _rows_of(key: str, facts: Facts) -> int:
    """How many rows a stacked layer has in its expert's matrix."""
    piece = facts.layout.into(tensor_names.join(key, WEIGHT))[0]
    shape = piece.shape(facts.layout.shapes[piece.source])
    return shape[0] if piece.index is not None else shape[1]


def _stacked(
    given: list[tuple[mx.array, mx.array] | None], rows: list[slice], out: int, shared: bool
) -> tuple[mx.array, mx.array]:
    """left (experts, out, R) and right (experts, R, in) of the layers that are these rows of one parameter."""
    there = [(part, own) for part, own in zip(given, rows, strict=True) if part is not None]
    (experts, rank, _), dtype = there[0][0][0].shape, there[0][0][1].dtype
    width = rank if shared else rank * len(there)
    left = mx.zeros((experts, out, width), dtype)
    for i, ((_, b), own) in enumerate(there):
        left[:, own, slice(None) if shared else slice(i * rank, (i + 1) * rank)] = b
    right = there[0][0][0] if shared else mx.concatenate([a for (a, _), _ in there], axis=1)
    return left, right


def _note_ranks(config: dict[str, Any], ranks: dict[str, int]) -> None:
    """Parameters of another rank, of the same scale."""
    for name, rank in ranks.items():
        config["rank_pattern"][re.escape(name)] = rank
        alpha = config["lora_alpha"] * rank / config["r"]
        config["alpha_pattern"][re.escape(name)] = int(alpha) if float(alpha).is_integer() else alpha


def _config(
    adapter: Adapter, targets: list[str], parameters: list[str], tying: bool, model_type: str | None
) -> dict[str, Any]:
    config = adapter.config
    alpha = config.scale * config.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "base_model_name_or_path": adapter.base_name,
        "revision": None,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": config.dropout,
        "use_rslora": False,
        "use_dora": config.type == "dora",
        "init_lora_weights": True,
        "target_modules": targets,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "fan_in_fan_out": model_type in FAN_IN_FAN_OUT,
        "layers_to_transform": None,
        "layers_pattern": None,
        **({"ensure_weight_tying": True} if tying else {}),
        **({"target_parameters": parameters} if parameters else {}),
    }


def unloaded(
    a: mx.array, b: mx.array, m: mx.array | None, fold: Fold | None, embedding: bool
) -> tuple[mx.array, mx.array, mx.array | None, float]:
    """a, b and m as they were before loading multiplied the weight, and what the scale has still to be divided by."""
    left, right = (a, b) if embedding else (b.T, a.T)
    factors, factor = back(WeightFactors(left, right, m), fold)
    a, b = (factors.left, factors.right) if embedding else (factors.right.T, factors.left.T)
    return a, b, factors.m, factor


def tensors_of(path: str, a: mx.array, b: mx.array, m: mx.array | None, embedding: bool) -> dict[str, mx.array]:
    """PEFT's tensors of one module from a (in, r), b (r, out), m (out,)."""
    leaves = {LORA_A: a.T, LORA_B: b.T} | ({} if m is None else {MAGNITUDE: m})
    return {hf_names.peft_tensor(path, leaf, embedding): array for leaf, array in leaves.items()}
