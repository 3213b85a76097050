"""From MLX's tensors to PEFT's.

An adapter that came from PEFT goes back as it came: its own config, ranks and layout. Any other gets a plain
config with full module paths; experts are written one by one (transformers 4's layout, which PEFT also loads
into transformers 5's fused experts), tied embeddings as PEFT's ensure_weight_tying stores them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.checkpoints.places import Fold
from mlx_adapters.errors import FormatError
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.peft_format.own_form import Facts, PeftForm, own_form, tensors_of, unloaded
from mlx_adapters.peft_format.settings import PeftSettings
from mlx_adapters.peft_format.to_mlx import FUSED
from mlx_adapters.peft_format.updates import DamagedBitsError, joined_experts, regained, steps_of
from mlx_adapters.storage import hf_names, tensor_names
from mlx_adapters.storage.hf_names import EMBEDDINGS, FUSED_GATE_UP, HEADS, POSITIONS, Renames
from mlx_adapters.storage.tensor_names import LORA_A, LORA_B, WEIGHT

LM_HEAD = HEADS[0]


class _NotAsItCame(Exception):
    """The adapter no longer has the form its PEFT config describes."""


def to_peft(adapter: Adapter, facts: Callable[[], Facts]) -> PeftForm:
    """Convert an adapter; `facts` are asked for unless it came from PEFT. Raises FormatError for what PEFT lacks, or a
    damaged record of what it was there."""
    origin = adapter.metadata.get("peft")
    if isinstance(origin, Mapping):
        try:
            return _as_it_came(adapter, origin)
        except DamagedBitsError:
            raise
        except (_NotAsItCame, FormatError, TypeError, ValueError, KeyError, AttributeError):
            pass  # or metadata from elsewhere, in which anything may stand
    return own_form(adapter, facts())


# -- an adapter that came from PEFT -----------------------------------------------------------------------


def _as_it_came(adapter: Adapter, origin: Mapping[str, Any]) -> PeftForm:
    settings = PeftSettings.parse(origin["config"])
    if settings.dora != (adapter.config.type == "dora") or origin.get("tied"):
        raise _NotAsItCame
    renames: Renames = tuple((str(old), str(new)) for old, new in origin.get("renames", ()))
    paths, folds, fused, lost = ({**origin.get(name, {})} for name in ("paths", "folds", "fused", "lost"))
    stacked = {key for parameters in fused.values() for entry in parameters.values() for key in entry["rows"]}
    if origin.get("experts") == FUSED and not fused:
        raise _NotAsItCame  # taken in by an older version
    repeated = origin.get("repeated", settings.raw.get("ensure_weight_tying"))  # older records do not say
    tensors: dict[str, mx.array] = {}
    stacks: dict[str, tuple[mx.array, mx.array]] = {}
    for key, a, b, m in adapter.layers():
        path = paths.get(key) or hf_names.peft_path(key, None, renames)
        switch = hf_names.split_switch(path)
        if key in stacked:
            stacks[key] = (a, b)
        elif a.ndim == 3:
            for expert in range(a.shape[0]):
                name = hf_names.expert_path(*switch, expert) if switch else path.replace("{}", str(expert))
                cut = _cut(adapter, settings, name, a[expert].T, b[expert].T, None, folds.get(key))
                tensors |= tensors_of(name, *cut, False)
        else:
            embedding = path.rpartition(".")[2] in EMBEDDINGS + POSITIONS
            a, b, m = _cut(adapter, settings, path, a, b, m, folds.get(key), embedding=embedding, lost=lost.get(key))
            turned = embedding and settings.names_parameter(tensor_names.join(path, WEIGHT))
            tensors |= tensors_of(path, b.T, a.T, m, False) if turned else tensors_of(path, a, b, m, embedding)
            if embedding and repeated:
                tensors |= tensors_of(LM_HEAD, b.T, a.T, None, False)
    for path, parameters in fused.items():
        tensors |= _fused(adapter, settings, path, parameters, stacks, lost)
    return PeftForm(tensors, dict(settings.raw))


def _cut(
    adapter: Adapter,
    settings: PeftSettings,
    path: str,
    a: mx.array,
    b: mx.array,
    m: mx.array | None = None,
    fold: Fold | None = None,
    parameter: str | None = None,
    embedding: bool = False,
    lost: str | np.ndarray | None = None,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Undo padding, change of scale and what loading does: a (in, R) -> (in, r), b (R, out) -> (r, out), m."""
    rank, scale = settings.strength(path, parameter)
    padding = [a[:, rank:], b[rank:]]
    if a.shape[1] < rank or any(part.size and mx.any(part != 0).item() for part in padding):
        raise _NotAsItCame
    a, b, m, factor = unloaded(a[:, :rank], b[:rank], m, fold, embedding)
    ratio = adapter.config.scale / (scale * factor)
    if lost is not None and fold is None:
        steps = steps_of(lost, tuple(b.shape)) if isinstance(lost, str) else lost
        b = regained(b, scale / adapter.config.scale, steps)
    elif ratio != 1 or fold is not None:
        b = (b.astype(mx.float32) * ratio).astype(a.dtype)
    return a, b, m if m is None or fold is None else m.astype(a.dtype)


def _fused(
    adapter: Adapter,
    settings: PeftSettings,
    path: str,
    parameters: Mapping[str, Any],
    stacks: Mapping[str, tuple[mx.array, mx.array]],
    lost: Mapping[str, str],
) -> dict[str, mx.array]:
    """Fused experts: layers of one parameter share their A; of two parameters gate_up is the inner one."""
    tensors: dict[str, mx.array] = {}
    for parameter, entry in parameters.items():
        keys = list(entry["rows"])
        a = stacks[keys[0]][0]
        if not all(mx.array_equal(stacks[key][0], a) for key in keys):
            raise _NotAsItCame
        rank, _ = settings.strength(path, parameter)
        b = mx.zeros((a.shape[0], entry["out"], a.shape[1]), stacks[keys[0]][1].dtype)
        steps = np.zeros((a.shape[0], entry["out"], rank), np.int8)
        for key, rows in entry["rows"].items():
            b[:, slice(*rows)] = stacks[key][1]
            if key in lost:
                steps[:, slice(*rows)] = steps_of(lost[key], (*stacks[key][1].shape[:2], rank))
        cut = [  # (in, R), (R, out) of each expert
            _cut(adapter, settings, path, x.T, y.T, parameter=parameter, lost=z.T if steps.any() else None)
            for x, y, z in zip(a, b, steps, strict=True)
        ]
        left, right = mx.stack([y.T for _, y, _ in cut]), mx.stack([x.T for x, _, _ in cut])
        if entry["turned"]:
            left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
        lora_a, lora_b = joined_experts(left, right)
        place = path + (".base_layer" if parameter == FUSED_GATE_UP and len(parameters) == 2 else "")
        tensors |= {hf_names.peft_tensor(place, LORA_A): lora_a, hf_names.peft_tensor(place, LORA_B): lora_b}
    return tensors
