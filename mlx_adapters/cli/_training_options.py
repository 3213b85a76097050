"""The options of `train` and `estimate`: one for each setting, flags winning over the config file."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_adapters.cli._options import UserPath, module_names
from mlx_adapters.config.mapping import from_mapping, read_yaml, to_mapping
from mlx_adapters.config.quantization import DTYPES, MODES
from mlx_adapters.config.training import ADAPTER_TYPES, OPTIMIZERS, SCHEDULES, LoraConfig, TrainConfig
from mlx_adapters.errors import AdapterError, ConfigError, did_you_mean

Command = TypeVar("Command", bound=Callable[..., Any])

# Flag, type, help; the setting is the flag's name.
LORA_OPTIONS: list[tuple[str, Any, str]] = [
    ("--scale", float, "Factor on the update B·A [20]."),
    ("--dropout", float, "Dropout on the adapter's input [0]."),
    ("--type", click.Choice(ADAPTER_TYPES), "Kind of adapter [lora]."),
]
TRAINING_OPTIONS: list[tuple[str, Any, str]] = [
    ("--iterations", int, "Optimizer updates [600]."),
    ("--batch-size", int, "Rows per batch [4]."),
    ("--learning-rate", float, "Step size [1e-4]."),
    ("--schedule", click.Choice(SCHEDULES), "How the learning rate falls [constant]."),
    ("--warmup", int, "Iterations of linear warm-up [0]."),
    ("--optimizer", click.Choice(OPTIMIZERS), "Update rule [adamw]."),
    ("--weight-decay", float, "Weight decay [0]."),
    ("--lora-plus-ratio", float, "Learning rate of lora_b over that of lora_a (LoRA+) [1]."),
    ("--max-grad-norm", float, "Clip the gradient's norm [no clipping]."),
    ("--grad-accumulation", int, "Batches per update [1]."),
    ("--max-seq-length", int, "Longer rows lose their end [2048]."),
    ("--chunked-loss", click.Choice(["auto", "on", "off"]), "Never hold all logits [auto: where it is exact]."),
    ("--fuse-aware-from", int, "Iteration after which the rounding is trained through [0]."),
    ("--eval-every", int, "Iterations between validations [100]."),
    ("--eval-batches", int, "Validation batches [all]."),
    ("--report-every", int, "Iterations between reports [10]."),
    ("--save-every", int, "Iterations between checkpoints [100]."),
    ("--save-every-minutes", float, "Also save after so many minutes."),
    ("--keep", int, "Checkpoints to keep besides the best [all]."),
    ("--early-stop", int, "Stop after so many validations without a better loss."),
    ("--seed", int, "Seed of initialization, order and dropout [0]."),
    ("--dtype", click.Choice(DTYPES), "Type to compute in [auto: float32 on a CPU, the model's on a GPU]."),
]
FLAGS: list[tuple[str, str]] = [
    ("--mask-prompt", "Train on the assistant's turns (or completions) only."),
    ("--last-turn-only", "With --mask-prompt: on the last turn only."),
    ("--packing", "Put several rows in one sequence, kept apart exactly."),
    ("--grad-checkpoint", "Recompute activations: less memory, more time."),
]


_FLAGS = (flag for flag, *_ in [*LORA_OPTIONS, *TRAINING_OPTIONS, *FLAGS])
# The parameters that `training_options` makes.
SETTINGS = " ".join(
    [
        "config",
        "ranks",
        "alpha",
        "rslora",
        "target_modules",
        "num_layers",
        "fuse_aware",
        "fuse_aware_group_size",
        "fuse_aware_mode",
        *(flag.removeprefix("--").replace("-", "_") for flag in _FLAGS),
    ]
)


def training_options(command: Command) -> Command:
    """All settings of LoraConfig and TrainConfig as options, and --config."""
    options = [
        click.option("--config", type=UserPath(dir_okay=False), help="YAML with base, data, name, lora, training."),
        click.option("--rank", "ranks", multiple=True, metavar="N|NAME=N", help="Rank, or one module's rank [8]."),
        click.option("--alpha", type=float, help="Instead of --scale: scale = alpha / rank."),
        click.option("--rslora", is_flag=True, help="With --alpha: scale = alpha / sqrt(rank)."),
        click.option("--target-modules", metavar="NAMES|all", help="Modules to adapt, comma-separated [all]."),
        click.option("--num-layers", metavar="N|all", help="How many of the last blocks to adapt [all]."),
        *(click.option(flag, type=kind, help=text) for flag, kind, text in LORA_OPTIONS + TRAINING_OPTIONS),
        *(click.option(flag, is_flag=True, default=None, help=text) for flag, text in FLAGS),
        click.option("--fuse-aware", type=int, metavar="BITS", help="Train through the rounding of a fuse to BITS."),
        click.option("--fuse-aware-group-size", type=int, help="Its group size [the base's at its own bits, else 64]."),
        click.option("--fuse-aware-mode", type=click.Choice(MODES), help="Its mode [likewise, else affine]."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dataclasses.dataclass(frozen=True)
class Settings:
    """What config file and flags say. `lora` and `training` hold the given settings only."""

    base: str | None
    data: str | None
    name: str | None
    lora: dict[str, Any]
    training: dict[str, Any]

    def lora_config(self, over: LoraConfig | None = None) -> LoraConfig:
        """The given settings over those of `over`, or over the defaults."""
        return from_mapping(LoraConfig, (to_mapping(over) if over else {}) | self.lora, "the lora settings")

    def train_config(self, over: TrainConfig | None = None) -> TrainConfig:
        """The given settings over those of `over`, or over the defaults."""
        return from_mapping(TrainConfig, (to_mapping(over) if over else {}) | self.training, "the training settings")


def read_settings(options: dict[str, Any]) -> Settings:
    """Bring config file and flags together; a flag wins. Raises ConfigError."""
    given = {key: value for key, value in options.items() if value is not None}
    file = read_yaml(Path(given["config"])) if "config" in given else {}
    known = {field.name for field in dataclasses.fields(Settings)}
    for key in file:
        if key not in known:
            hint = did_you_mean(key, known, f"it may hold: {', '.join(sorted(known))}.")
            raise ConfigError(f"Unknown setting '{key}' in '{given['config']}'.", hint)
    lora = _mapping(file, "lora") | _pick(given, LORA_OPTIONS) | _lora_extras(given)
    training = _mapping(file, "training") | _pick(given, TRAINING_OPTIONS)
    training |= {_key(flag): True for flag, _ in FLAGS if given.get(_key(flag))}
    if quantization := _fuse_aware(given):
        training["fuse_aware"] = quantization
    places = {key: given.get(key, _text(file, key)) for key in ("base", "data", "name")}
    own_bits = training.get("fuse_aware")
    if isinstance(own_bits, dict) and set(own_bits) == {"bits"} and places["base"] is not None:
        own = _own_grouping(places["base"], own_bits["bits"], not given.get("print_config"))
        training["fuse_aware"] = own_bits | own
    settings = Settings(**places, lora=lora, training=training)
    return dataclasses.replace(settings, lora=lora | _scale_of_alpha(given, settings))


def _text(file: Mapping[str, Any], key: str) -> str | None:
    value = file.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"'{key}' in the config file must be text, not {value}.", f"write {key}: '...' in quotes.")
    return value


def _mapping(file: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = file.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"'{key}' in the config file must hold 'key: value' lines.")
    return {str(name): setting for name, setting in (value or {}).items()}


def _key(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _pick(given: Mapping[str, Any], options: list[tuple[str, Any, str]]) -> dict[str, Any]:
    return {_key(flag): given[_key(flag)] for flag, _, _ in options if _key(flag) in given}


def _lora_extras(given: Mapping[str, Any]) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    for text in given.get("ranks", ()):
        name, equals, number = text.rpartition("=")
        if not number.isdecimal() or (equals and not name):
            raise ConfigError(f"--rank '{text}' is neither a number nor NAME=NUMBER.", "for example v_proj=16.")
        if name:
            extras.setdefault("ranks", {})[name] = int(number)
        else:
            extras["rank"] = int(number)
    if targets := given.get("target_modules"):
        extras["target_modules"] = module_names(targets)
    if layers := given.get("num_layers"):
        if layers != "all" and not layers.isdecimal():
            raise ConfigError(f"--num-layers '{layers}' is neither a number nor 'all'.")
        extras["num_layers"] = layers if layers == "all" else int(layers)
    return extras


def _fuse_aware(given: Mapping[str, Any]) -> dict[str, Any]:
    names = {"fuse_aware": "bits", "fuse_aware_group_size": "group_size", "fuse_aware_mode": "mode"}
    quantization = {names[key]: given[key] for key in names if key in given}
    if quantization and "bits" not in quantization:
        raise ConfigError("--fuse-aware-group-size and --fuse-aware-mode need --fuse-aware BITS.")
    return quantization


def _own_grouping(base: str, bits: int, download: bool) -> dict[str, Any]:
    """The grouping that 'fuse --bits' will take; {} if there is none."""
    from mlx_adapters.sources.bases import resolve_base

    try:
        return to_mapping(resolve_base(base, download).quantization_of(bits))
    except AdapterError:
        return {}  # the training says it, with the rest


def _scale_of_alpha(given: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    if "alpha" not in given:
        if given.get("rslora"):
            raise ConfigError("--rslora needs --alpha.", "it means scale = alpha / sqrt(rank).")
        return {}
    if "scale" in given:
        raise ConfigError("Give --scale or --alpha, not both.", "scale = alpha / rank.")
    rank = settings.lora_config().rank
    return {"scale": given["alpha"] / (math.sqrt(rank) if given.get("rslora") else rank)}
