"""PEFT's `adapter_config.json`: what it says, and what in it has no counterpart in MLX.

The update of a module is alpha / r · B A, or alpha / √r · B A for rsLoRA (arXiv 2312.03732); r and alpha may
differ by module, chosen by the first regular expression that matches the end of the module's path.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_adapters.checkpoints.places import MERGE_THERE
from mlx_adapters.errors import FormatError
from mlx_adapters.peft_format.patterns import full_match

# Initializations that leave the base's weights alone; the others move a part of them into the adapter.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")
CONVERTED_HINT = "save it in PEFT with path_initial_model_for_weight_conversion, which makes an ordinary adapter of it."
NO_TYPE = "it names no peft_type."
MEND = "mend adapter_config.json, or save the adapter again with PEFT."
FUSE_HINT = "'mlx-adapters fuse --from-peft' applies it while fusing."
NOT_EXPRESSIBLE = {
    "alora_invocation_tokens": "aLoRA switches on in the middle of the text",
    "layer_replication": "layer_replication changes the model's layers",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "kasa_config": "KaSA changes the base's weights",
    "arrow_config": "Arrow routes among several adapters",
    "monteclora_config": "MonteCLoRA samples its weights",
}
# Fields that need nothing: they steer the training, or are read through the tensors.
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size"),
    *("r", "rank_pattern", "alpha_pattern", "revision", "runtime_config", "target_modules", "target_parameters"),
    *("task_type", "trainable_token_indices", "use_dora", "use_rslora", "velora_config"),
}


@dataclass(frozen=True)
class PeftSettings:
    """The parts of a PEFT config that decide what an adapter computes. `raw` is the whole file."""

    raw: dict[str, Any]
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: tuple[str, ...]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "PeftSettings":
        """Check a config. Raises FormatError with the reason if MLX cannot express what it asks for."""
        _refuse_other_methods(raw)
        for field, value in raw.items():
            try:
                json.dumps(value, allow_nan=False)  # it is kept with the adapter
            except ValueError:
                raise FormatError(
                    f"{field} in the PEFT config holds NaN or Infinity, which JSON has not.", MEND
                ) from None
        settings = cls(
            raw=dict(raw),
            rank=_whole(raw.get("r", 8), "r"),
            alpha=_number(raw.get("lora_alpha", 8), "lora_alpha"),
            rslora=_flag(raw, "use_rslora"),
            dora=_flag(raw, "use_dora"),
            dropout=_number(raw.get("lora_dropout") or 0.0, "lora_dropout"),
            rank_pattern={k: _whole(v, "rank_pattern") for k, v in _mapping(raw, "rank_pattern").items()},
            alpha_pattern={k: _number(v, "alpha_pattern") for k, v in _mapping(raw, "alpha_pattern").items()},
            target_parameters=_names(raw, "target_parameters") or (),
        )
        if not 0 <= settings.dropout < 1:
            raise FormatError(f"lora_dropout in the PEFT config cannot be {settings.dropout}.", MEND)
        for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
            full_match(_ending(pattern), "")
        return settings

    @property
    def unknown(self) -> list[str]:
        """Settings that are set and that this package has never heard of, sorted."""
        known = WITHOUT_EFFECT | NOT_EXPRESSIBLE.keys()
        return sorted(key for key, value in self.raw.items() if key not in known and value not in (None, False))

    @property
    def tying(self) -> bool:
        """Whether an output layer that is the embedding repeats what was trained there."""
        return self.raw.get("ensure_weight_tying") is True

    @property
    def base_name(self) -> str | None:
        """The base model as the trainer named it: a Hub id, or a path on the trainer's machine."""
        name = self.raw.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def base_class(self) -> str | None:
        """The base model's class in transformers, if the trainer's PEFT wrote it down."""
        mapping = self.raw.get("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return name if isinstance(name, str) else None

    @cached_property
    def modules_to_save(self) -> tuple[str, ...]:
        """Names of modules that are trained whole."""
        return _names(self.raw, "modules_to_save") or ()

    def strength(self, path: str, parameter: str | None = None) -> tuple[int, float]:
        """(rank, scale) of the module at `path`, or of its parameter named in target_parameters."""
        key = self.pattern_path(path, parameter)
        rank = next((r for p, r in self.rank_pattern.items() if full_match(_ending(p), key)), self.rank)
        alpha = next((a for p, a in self.alpha_pattern.items() if full_match(_ending(p), key)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def pattern_path(self, path: str, parameter: str | None = None) -> str:
        """What the patterns are held against: the parameter's path if it was named as a parameter."""
        named = f"{path}.{parameter or 'weight'}"
        return named if parameter or self.names_parameter(named) else path

    def names_parameter(self, name: str) -> bool:
        """Whether target_parameters names this parameter."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def targets(self, path: str) -> bool:
        """Whether target_modules, less exclude_modules, modules_to_save and other layers, names this module."""
        if self._among("exclude_modules", path) or not self._among("target_modules", path):
            return False
        if any(f".{name}." in f".{path}." for name in self.modules_to_save):
            return False
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == [] or isinstance(self.raw.get("target_modules"), str):
            return True
        if path in (_names(self.raw, "target_modules") or ()):
            return True
        index = self._layer_index(path)
        return index is not None and index in (layers if isinstance(layers, list) else [layers])

    def _among(self, field: str, path: str) -> bool:
        value = self.raw.get(field)
        if isinstance(value, str):
            return full_match(value, path)
        return any(path == name or path.endswith(f".{name}") for name in _names(self.raw, field) or ())

    def _layer_index(self, path: str) -> int | None:
        parts = path.split(".")
        patterns = _names(self.raw, "layers_pattern")
        for i in range(1, len(parts) - 1):
            if not parts[i].isdecimal():
                continue
            before = ".".join(parts[:i])
            if (not patterns and i > 1) or any(full_match(rf"(.*\.)?{p}", before) for p in patterns or ()):
                return int(parts[i])
        return None


def _refuse_other_methods(raw: Mapping[str, Any]) -> None:
    method = raw.get("peft_type")
    if method != "LORA":
        raise FormatError(
            f"This is a PEFT adapter of type {method!r}, not LORA." if method else "This is not a PEFT config.",
            f"MLX's adapter layers are LoRA and DoRA only; if PEFT can, {MERGE_THERE}" if method else NO_TYPE,
        )
    for field, reason in NOT_EXPRESSIBLE.items():
        if raw.get(field):
            raise FormatError(f"The PEFT adapter uses {field}: {reason}.", MERGE_THERE)
    start = raw.get("init_lora_weights", True)
    if isinstance(start, dict | list) or (start.lower() if isinstance(start, str) else start) not in HARMLESS_STARTS:
        raise FormatError(
            f"The PEFT adapter was initialized by {start!r}, which changes the base model's weights.",
            MERGE_THERE if str(start).lower() == "loftq" else CONVERTED_HINT,
        )


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _whole(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
        raise FormatError(f"{field} in the PEFT config must be a whole number of at least 1, not {value!r:.80}.", MEND)
    return value


def _number(value: Any, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise FormatError(f"{field} in the PEFT config must be a number, not {value!r:.80}.", MEND)
    return float(value)


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field) or False
    if not isinstance(value, bool):
        raise FormatError(f"{field} in the PEFT config must be true or false, not {value!r:.80}.", MEND)
    return value


def _mapping(raw: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise FormatError(f"{field} in the PEFT config must map patterns to numbers, not be {value!r:.80}.", MEND)
    return value


def _names(raw: Mapping[str, Any], field: str) -> tuple[str, ...] | None:
    value = raw.get(field)
    value = [value] if isinstance(value, str) else value
    if value is not None and not (isinstance(value, Iterable) and all(isinstance(name, str) for name in value)):
        raise FormatError(f"{field} in the PEFT config must be a list of names, not {value!r:.80}.", MEND)
    return tuple(value) if value is not None else None
