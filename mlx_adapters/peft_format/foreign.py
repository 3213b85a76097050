"""Adapters as other MLX programs write them, in mlx-lm's form.

What they write, read in the programs' own sources (versions in brackets); tensors as mlx-lm's unless it says otherwise:

- mlx-examples (2023): `adapters.npz` without a config; the strength stood in the code: 2, later 20.
- mlx-lm (2024): `lora_layers` for `num_layers`, no `dropout`, `alpha` beside `scale` (see `Adapter.strength_note`).
- mlx-vlm (0.1 to 0.7): `rank`, `alpha`, `dropout` by themselves; `.A` (in, rank) and `.B` (rank, out), applied at
  alpha / rank since 0.5 and at alpha before.
- mlx-tune (0.6): mlx-lm's, or `lora_config` with `r` and `lora_alpha` (strength alpha / r) and an `adapters.npz`.
- unsloth (2026.10): mlx-lm's, with the rank and scale of single modules; tensors of several ranks.
- optiq (0.7): mlx-lm's with PEFT's fields beside them; tensors of several ranks, one scale.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.checkpoints.contents import MODEL_CONFIG
from mlx_adapters.checkpoints.shards import peft_weight_files
from mlx_adapters.config.mapping import to_mend
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.models.adapter import Adapter, Weights, keys_of
from mlx_adapters.models.layers import nn
from mlx_adapters.models.metadata import (
    AdapterConfig,
    check_config,
    is_number,
    parse_config,
    read_config,
    read_metadata,
)
from mlx_adapters.peft_format.updates import LayerFactors, unified
from mlx_adapters.storage import paths, tensor_files, tensor_names
from mlx_adapters.storage.hf_names import FOREIGN_LEAVES, FOREIGN_WEIGHTS, NPZ, PEFT_SHARDS, parse_peft_tensor
from mlx_adapters.storage.tensor_names import ADAPTER_LEAVES, CONFIG_FILE, LORA_A, LORA_B, MAGNITUDE, METADATA_FILE
from mlx_adapters.units import count

# What a setting is called; where several are there, the first counts.
RANK, ALPHA, DROPOUT = ("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")
BASE = ("model", "base_model_name_or_path", "model_name")
MODULE_SCALES = "unsloth_mlx_lora_module_scales"
MORE_THAN_STORED = 64 << 20  # bytes that an .npz may unfold to beyond its own size


def weights_in(folder: Path) -> Path:
    """The file of an adapter folder's weights, whatever the program called it. Raises NotFoundError."""
    for name in FOREIGN_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    inner = sorted({path.parent.relative_to(folder).as_posix() for path in paths.visible(folder, f"**/{CONFIG_FILE}")})
    if inner and inner != ["."]:
        several = (
            f"'{folder}' holds adapters in folders of it: {', '.join(inner[:10])}{', …' if len(inner) > 10 else ''}."
        )
        raise NotFoundError(several, f"name one: --subfolder {inner[-1]}, or the folder itself.")
    if (folder / MODEL_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file():
        raise NotFoundError(f"'{folder}' is a model, not an adapter.", "name it as the base: --base.")
    loose = [path.name for kind in ("*.safetensors", f"*{NPZ}") for path in paths.visible(folder, kind)]
    if loose and not any(fnmatch(name, PEFT_SHARDS) for name in loose):
        several = (
            f"'{folder}' has no {FOREIGN_WEIGHTS[0]}, but {', '.join(loose[:5])}{', …' if len(loose) > 5 else ''}."
        )
        raise NotFoundError(several, f"name the file itself, if it is the adapter's: {folder / loose[-1]}")
    peft_weight_files(folder)  # says what is wrong where there are none
    raise FormatError(f"'{folder}' is a PEFT adapter.", "take it in with 'mlx-adapters import-peft'.")


@dataclass(frozen=True)
class Foreign:
    """An adapter in mlx-lm's form.

    `notes`: what is to be told of it; `beside`: a config of mlx-lm's, whose other fields stay; `as_is`: its file holds
    these very tensors.
    """

    adapter: Adapter
    notes: tuple[str, ...]
    beside: dict[str, Any]
    as_is: bool


def read_foreign(folder: Path, weights: Path, name: str) -> Foreign:
    """Read an adapter of any MLX program.

    Args:
        folder: where its config lies.
        weights: the file of its tensors.
        name: what it is to be called.

    Raises FormatError that names the field or the tensor that is wrong.
    """
    raw = read_config(folder) if (folder / CONFIG_FILE).is_file() else {}
    tensors = _read_npz(weights) if weights.suffix == NPZ else tensor_files.read_safetensors(weights)
    if any(parse_peft_tensor(name) for name in tensors):
        raise FormatError(f"'{folder}' is a PEFT adapter.", "take it in with 'mlx-adapters import-peft'.")
    adapter, notes = own_form(raw, tensors, str(folder))
    recorded = read_metadata(folder) if raw or (folder / METADATA_FILE).is_file() else {"source": "mlx-lm"}
    base = next((raw[name] for name in BASE if isinstance(raw.get(name), str)), None)
    metadata = ({"base": {"name": base}} if base else {}) | recorded | {"name": name}
    same = adapter.weights.keys() == tensors.keys() and all(adapter.weights[n] is tensors[n] for n in tensors)
    adapter = replace(adapter, metadata=metadata, folder=folder).check()
    beside = raw if "lora_parameters" in raw and "peft_type" not in raw else {}
    if beside and adapter.alpha is None:  # the scale says it now; beside one, mlx-lm of 2024 multiplied it in
        own = {name: value for name, value in raw["lora_parameters"].items() if name not in ALPHA}
        beside = raw | {"lora_parameters": own}
    return Foreign(adapter, tuple(notes), beside, same and weights.suffix != NPZ)


def own_form(raw: Mapping[str, Any], tensors: Weights, where: str) -> tuple[Adapter, list[str]]:
    """The adapter that a config and its tensors describe, without a record, and notes on its strength.

    Layers of several ranks or scales get the largest rank and the commonest scale, exactly.
    Raises FormatError that names the field or the tensor that is wrong.
    """
    kind, own = raw.get("fine_tune_type"), raw.get("lora_parameters")
    if kind not in (None, "lora", "dora") or not isinstance(own or {}, Mapping) or ("peft_type" in raw and own is None):
        check_config(raw, f"'{where}'")  # says what it is
    weights = {_own_name(name): array for name, array in tensors.items()}
    if unknown := next((n for n in weights if tensor_names.split(n)[1] not in ADAPTER_LEAVES), None):
        raise FormatError(
            f"'{where}' holds a tensor '{unknown}' that no adapter has.",
            "have the program that made it save the adapter alone: its lora_a, lora_b and m.",
        )
    keys = keys_of(weights)
    if not keys:
        raise FormatError(f"'{where}' holds no layer: its file of weights is empty.", "was its training saved?")
    ranks = {key: _rank(weights, key, where) for key in keys}
    settings = next((raw[n] for n in ("lora_parameters", "lora_config") if isinstance(raw.get(n), Mapping)), raw)
    rank, alpha, dropout = (_first(settings, names) for names in (RANK, ALPHA, DROPOUT))
    _check_rank(rank, ranks, where)
    widest = max(ranks.values(), default=1)
    scale, notes = _scale(settings, alpha, rank or widest, weights != tensors, where)
    layers = raw.get("num_layers")
    spelled = {
        "fine_tune_type": _kind(raw, weights),
        "num_layers": layers if isinstance(layers, int) and not isinstance(layers, bool) else None,
        "lora_parameters": {"rank": widest, "scale": scale, "dropout": 0.0 if dropout is None else dropout},
    }
    config = parse_config(spelled, keys, f"'{where}'")
    scales = raw.get(MODULE_SCALES)
    config, weights = _one_rank(config, weights, ranks, scales if isinstance(scales, Mapping) else {}, where)
    if config.scale == 0:
        notes.append(f"{CONFIG_FILE} gives it the strength 0: it changes nothing.")
    if (other := _other_alpha(raw, settings, config)) is not None:
        notes.append(f"{CONFIG_FILE} has alpha {str(other)[:40]!r} beside scale {config.scale:g}: used at the scale.")
    both = "scale" in settings and is_number(alpha)
    return Adapter(config, weights, alpha=float(alpha) if both else None), notes


def _other_alpha(raw: Mapping[str, Any], settings: Mapping[str, Any], config: AdapterConfig) -> Any:
    """An alpha that is no number, or lies outside of the settings and leads to another scale than theirs; else None."""
    alpha = _first(settings, ALPHA)
    if alpha is not None or settings is raw:
        return None if is_number(alpha) else alpha
    alpha, rank = _first(raw, ALPHA), _first(raw, RANK) or config.rank
    same = is_number(alpha) and is_number(rank) and math.isclose(alpha / rank, config.scale, rel_tol=1e-6)
    return None if same else alpha


def _own_name(name: str) -> str:
    path, leaf = tensor_names.split(name)
    return tensor_names.join(path, FOREIGN_LEAVES.get(leaf, leaf))


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _kind(raw: Mapping[str, Any], weights: Weights) -> Any:
    magnitudes = any(tensor_names.split(name)[1] == MAGNITUDE for name in weights)
    return raw.get("fine_tune_type") or ("dora" if magnitudes or raw.get("use_dora") is True else "lora")


def _rank(weights: Weights, key: str, where: str) -> int:
    """The rank of one layer, by its factors. Raises FormatError if they are not two, or do not belong together."""
    a, b = (weights.get(tensor_names.join(key, leaf)) for leaf in (LORA_A, LORA_B))
    if a is None or b is None or a.ndim != b.ndim or a.ndim not in (2, 3):
        return 0  # `check` says what is wrong with it
    rank = a.shape[1]
    if rank != b.shape[0 if b.ndim == 2 else 2]:
        raise FormatError(
            f"'{where}': the factors of '{key}' have shapes {a.shape} and {b.shape}: of no one rank.",
            "mlx-lm has (in, rank) and (rank, out); PEFT's, the other way round, are for 'import-peft'.",
        )
    return rank


def _check_rank(rank: Any, ranks: Mapping[str, int], where: str) -> None:
    """One rank in all tensors and another in the config do not belong together."""
    if missing := next((key for key, width in ranks.items() if not width), None):
        raise FormatError(f"'{where}' does not hold both factors of '{missing}' as matrices.", "is the file whole?")
    if rank is not None and not is_number(rank):
        raise FormatError(
            f"'{where}': {CONFIG_FILE} needs a number as 'rank', not {str(rank)[:40]!r}.", to_mend("rank", rank)
        )
    widths = {width for width in ranks.values() if width}
    if rank is not None and len(widths) == 1 and rank != (width := widths.pop()):
        raise FormatError(
            f"'{where}': {CONFIG_FILE} says rank {str(rank)[:40]}, but its tensors have rank {width}.",
            "config and tensors are of two adapters; copy both again.",
        )


def _scale(settings: Mapping[str, Any], alpha: Any, rank: Any, other_names: bool, where: str) -> tuple[Any, list[str]]:
    """The factor on B·A, and what there is to tell of it. Raises FormatError where nothing says it."""
    if settings.get("scale") is not None:
        return settings["scale"], []
    if alpha is None:
        raise FormatError(
            f"'{where}': nothing says how strong it is: no {CONFIG_FILE} with a 'scale', or an 'alpha'.",
            f"write the scale of its training beside it, as {CONFIG_FILE}: "
            f'{{"lora_parameters": {{"rank": {rank}, "scale": SCALE}}}} (mlx-examples had 2.0, then 20.0).',
        )
    if not is_number(alpha) or not is_number(rank) or not rank:
        raise FormatError(
            f"'{where}': {CONFIG_FILE} needs a number as 'alpha', not {str(alpha)[:40]!r}.", to_mend("alpha", alpha)
        )
    note = f"{CONFIG_FILE} has alpha {alpha:g} and no scale: taken in at alpha / rank = {alpha / rank:g}."
    if other_names:
        note += f" mlx-vlm does so since 0.5; before, it trained at alpha itself: then scale the adapter by {rank:g}."
    return alpha / rank, [note]


def _one_rank(
    config: AdapterConfig, weights: Weights, ranks: Mapping[str, int], scales: Mapping[str, Any], where: str
) -> tuple[AdapterConfig, Weights]:
    """Layers of several ranks or scales with the largest rank and the commonest scale."""
    if 0 in ranks.values() or (len(set(ranks.values())) == 1 and not scales):
        return config, weights
    updates = []
    for key in config.keys:
        scale = scales.get(key, config.scale)
        if not is_number(scale) or scale == 0:
            raise FormatError(
                f"'{where}': {CONFIG_FILE} gives '{key}' the scale {str(scale)[:40]!r}.", to_mend("scale", scale)
            )
        a, b, m = (weights.get(tensor_names.join(key, leaf)) for leaf in (LORA_A, LORA_B, MAGNITUDE))
        assert a is not None and b is not None
        updates.append(LayerFactors(key, a, b, m, float(scale)))
    updates = unified(updates)
    taken = {
        tensor_names.join(update.key, leaf): array
        for update in updates
        for leaf, array in ((LORA_A, update.a), (LORA_B, update.b), (MAGNITUDE, update.m))
        if array is not None
    }
    others = {name: array for name, array in weights.items() if name not in taken}
    return replace(config, rank=updates[0].rank, scale=updates[0].scale), taken | others


def _read_npz(path: Path) -> Weights:
    """The arrays of an .npz file. Raises FormatError for what is none, or unfolds to far more than it holds."""
    bad = FormatError(f"'{path}' is not a whole .npz file of numbers.", "it may be damaged; copy or download it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size + MORE_THAN_STORED:
                raise bad
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _array(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, MemoryError):
        raise bad from None


def _array(array: np.ndarray[Any, Any]) -> mx.array:
    """An array of an .npz file, in which MLX writes bfloat16 as two bytes of no type."""
    return mx.array(array.view(np.uint16)).view(mx.bfloat16) if array.dtype == "V2" else mx.array(array)


def fit_paths(adapter: Adapter, layers: Mapping[str, nn.Module]) -> Adapter:
    """The adapter under the base's own paths, where both differ in nothing but their beginnings.

    Vision-language models put `language_model.` before what a text model of the same blocks has; others `model.`.
    """
    old, new = tensor_names.other_beginning(adapter.config.keys, layers.__contains__, layers) or ("", "")
    if old == new:
        return adapter
    weights = {new + name.removeprefix(old): array for name, array in adapter.weights.items()}
    keys = tuple(new + key.removeprefix(old) for key in adapter.config.keys)
    return replace(adapter, config=replace(adapter.config, keys=keys), weights=weights)


def text_part(adapter: Adapter, layers: Mapping[str, nn.Module]) -> tuple[Adapter, str] | None:
    """The part of an adapter that is of the base's text model, under its paths, and the other parts in words.

    A part is what lies below one path (`vision_tower.blocks`); None where all fit, or none does.
    """
    parts: dict[str, list[str]] = {}
    for key in adapter.config.keys:
        parts.setdefault(tensor_names.before_number(key) or key, []).append(key)
    fits = {
        part: tensor_names.other_beginning(keys, layers.__contains__, layers) is not None
        for part, keys in parts.items()
    }
    if all(fits.values()) or not any(fits.values()):
        return None
    keys = tuple(key for key in adapter.config.keys if any(fits[part] and key in own for part, own in parts.items()))
    weights = {name: array for name, array in adapter.weights.items() if tensor_names.split(name)[0] in keys}
    others = ", ".join(f"'{part}' ({count(len(own), 'layer')})" for part, own in parts.items() if not fits[part])
    taken = replace(adapter, config=replace(adapter.config, keys=keys), weights=weights)
    return fit_paths(taken, layers), others
