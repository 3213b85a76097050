"""Every setting as a frozen dataclass that checks itself. Imports no MLX.

`from_mapping` is the one strict way from YAML, JSON or a command line to a setting: an unknown key or a
wrong type is a ConfigError that names the key and its nearest neighbor.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlx_adapters.errors import ConfigError, NotFoundError, did_you_mean

Config = TypeVar("Config")

ADAPTER_TYPES = ("lora", "dora")
MOST_BYTES, MOST_VALUES = 1_000_000, 100_000  # of a config file
DTYPES = ("auto", "float32", "bfloat16", "float16")


def require(condition: bool, message: str, hint: str | None = None) -> None:
    """Raise ConfigError(message, hint) unless `condition` holds."""
    if not condition:
        raise ConfigError(message, hint)


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str = "the settings") -> Config:
    """Build the dataclass `cls` from `values`, converting lists to tuples and integers to floats.

    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    checked = {}
    for key, value in values.items():
        key = str(key)
        if key not in fields:
            raise ConfigError(f"Unknown setting '{key}' in {where}.", did_you_mean(key, fields))
        checked[key] = _convert(value, hints[key], key, where)
    return cls(**checked)


def _convert(value: Any, hint: Any, key: str, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
                return from_mapping(option, value, f"'{key}' of {where}")  # type: ignore[arg-type]
            try:
                return _convert(value, option, key, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if isinstance(value, str | int) and value in options:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, options[0], key, where) for item in value)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): _convert(v, options[1], key, where) for k, v in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    elif dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(hint, value, f"'{key}' of {where}")  # type: ignore[arg-type]
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"'{key}' in {where} cannot be {_shown(value)}.", f"it must be {_describe(hint)}.")


def _shown(value: Any) -> str:
    """A value from a file, as the short text of an error."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
    if typing.get_origin(hint) is tuple:
        return "a list"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping. Numbers such as 1e-5 are numbers, as in YAML 1.2."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        pass

    pattern = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))
    try:
        with open(path, "rb") as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        value = yaml.load(text, Loader)
        _check_size(value)
    except FileNotFoundError:
        raise NotFoundError(f"There is no config file '{path}'.", "'train --print-config' makes one.") from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"The config file '{path}' cannot be read: {detail}.") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"The config file '{path}' must hold 'key: value' lines.")
    return {str(key): item for key, item in value.items()}


def _check_size(value: Any) -> None:
    """Raise ValueError for a value that its YAML aliases make huge: written out, it would fill the memory."""
    left = [value]
    for _ in range(MOST_VALUES):
        if not left:
            return
        item = left.pop()
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple | set) else ()
    raise ValueError(f"it holds more than {MOST_VALUES:,} values")


def to_mapping(config: Any) -> dict[str, Any]:
    """The settings as plain JSON values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how strongly: y = W x + scale · B A x (LoRA, arXiv 2106.09685).

    `target_modules` holds module names (`q_proj`) or paths (`model.layers.3.mlp.up_proj`), or is "all"
    for every linear layer of the adapted blocks; `num_layers` counts the last blocks, or is "all".
    `ranks` gives some modules another rank ({"v_proj": 16}). `type` "dora" adds a trained magnitude per
    output (arXiv 2402.09353).
    """

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all"] = "all"
    num_layers: int | Literal["all"] = "all"
    type: Literal["lora", "dora"] = "lora"
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rank in self.ranks.items():
            require(rank >= 1, f"the rank of '{name}' must be at least 1, not {rank}.")
        require(self.rank >= 1, f"rank must be at least 1, not {self.rank}.")
        require(
            math.isfinite(self.scale) and self.scale != 0, f"scale must be a number other than 0, not {self.scale}."
        )
        require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}.")
        require(self.type in ADAPTER_TYPES, f"type must be 'lora' or 'dora', not '{self.type}'.")
        require(self.target_modules == "all" or len(self.target_modules) > 0, "target_modules is empty.")
        require(
            self.num_layers == "all" or self.num_layers >= 1, f"num_layers must be at least 1, not {self.num_layers}."
        )


# What MLX can quantize to: mode -> (bits, group sizes). Checked against mlx 0.32.4.
QUANTIZATIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
MODES = tuple(QUANTIZATIONS)


def default_group_size(mode: str) -> int:
    """MLX's own of a mode: 64, or the only one there is."""
    sizes = QUANTIZATIONS.get(mode, QUANTIZATIONS["affine"])[1]
    return sizes[0] if len(sizes) == 1 else 64


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Weights of `bits` bits in groups of `group_size` that share a scale, in an MLX mode."""

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in QUANTIZATIONS:  # (a hint takes time, and this is made for every layer of a model)
            hint = did_you_mean(self.mode, QUANTIZATIONS, "modes: " + ", ".join(QUANTIZATIONS))
            raise ConfigError(f"There is no quantization mode '{self.mode}'.", hint)
        bits, group_sizes = QUANTIZATIONS[self.mode]
        require(self.bits in bits, f"Mode '{self.mode}' has no {self.bits} bits.",
                f"it has {', '.join(map(str, bits))}.")  # fmt: skip
        require(self.group_size in group_sizes, f"Mode '{self.mode}' has no group size {self.group_size}.",
                f"it has {', '.join(map(str, group_sizes))}.")  # fmt: skip


OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "muon")
SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained. One iteration is one optimizer update of
    `batch_size * grad_accumulation` rows (or packed sequences).

    `warmup` iterations raise the learning rate linearly from 0; cosine and linear then lower it to 0 at
    `iterations`. `lora_plus_ratio` multiplies it for lora_b (LoRA+, arXiv 2402.12354). `max_grad_norm` clips
    the global norm of the gradient. `fuse_aware` trains through the rounding of a later fuse, from iteration
    `fuse_aware_from` on. `early_stop` counts evaluations without a better validation loss. `eval_batches` and
    `keep` (checkpoints, besides the best) of None mean all.
    """

    iterations: int = 600
    batch_size: int = 4
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    optimizer: Literal["adam", "adamw", "sgd", "adafactor", "muon"] = "adamw"
    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0
    max_grad_norm: float | None = None
    grad_accumulation: int = 1
    max_seq_length: int = 2048
    mask_prompt: bool = False
    last_turn_only: bool = False
    packing: bool = False
    grad_checkpoint: bool = False
    chunked_loss: Literal["auto", "on", "off"] = "auto"
    fuse_aware: Quantization | None = None
    fuse_aware_from: int = 0
    eval_every: int = 100
    eval_batches: int | None = None
    report_every: int = 10
    save_every: int = 100
    save_every_minutes: float | None = None
    keep: int | None = None
    early_stop: int | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        positive = ("iterations", "batch_size", "grad_accumulation", "eval_every", "eval_batches", "report_every",
                    "save_every", "keep", "early_stop")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}.")
        for name in ("learning_rate", "lora_plus_ratio", "max_grad_norm", "save_every_minutes"):
            value = getattr(self, name)
            good = value is None or (math.isfinite(value) and value > 0)
            require(good, f"{name} must be a number above 0, not {value}.")
        for name in ("weight_decay", "warmup", "fuse_aware_from", "seed"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be at least 0, not {value}.")
        require(self.seed < 1 << 64, f"seed must be below 2**64, not {self.seed}.")
        require(self.max_seq_length >= 2, f"max_seq_length must be at least 2, not {self.max_seq_length}.")
        self._check_choices()

    def _check_choices(self) -> None:
        choices = (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("dtype", DTYPES),
                   ("chunked_loss", ("auto", "on", "off")))  # fmt: skip
        for name, known in choices:
            value = getattr(self, name)
            require(value in known, f"There is no {name} '{value}'.", f"there are: {', '.join(known)}.")
        require(self.warmup < self.iterations, "warmup must be shorter than the training itself.")
        require(self.optimizer != "adam" or self.weight_decay == 0, "adam has no weight decay.", "use adamw.")
        require(self.mask_prompt or not self.last_turn_only, "last_turn_only needs mask_prompt.")
        in_time = self.early_stop is None or self.eval_every < self.iterations
        require(in_time, "early_stop needs an evaluation before the end.", f"use --eval-every below {self.iterations}.")
        require(self.fuse_aware is not None or self.fuse_aware_from == 0, "fuse_aware_from needs fuse_aware.")
