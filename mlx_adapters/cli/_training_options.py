"""The options of `train` and `estimate`: one for each setting, flags winning over the config file."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_adapters.cli._habits import HABITS
from mlx_adapters.cli._options import UserPath
from mlx_adapters.cli._settings import TextFile, option, options
from mlx_adapters.config.mapping import from_mapping, read_yaml, to_mapping
from mlx_adapters.config.quantization import MODES, Precision
from mlx_adapters.config.settings import settings_of
from mlx_adapters.config.training import OBJECTIVES, SFT, LoraConfig, TrainConfig
from mlx_adapters.errors import AdapterError, ConfigError, did_you_mean

Command = TypeVar("Command", bound=Callable[..., Any])
LORA = [name for name in settings_of(LoraConfig) if name not in ("rank", "ranks")]
TRAINING = [name for name in settings_of(TrainConfig) if name not in ("fuse_aware", "objective")]
FUSE_AWARE = {"fuse_aware": "bits", "fuse_aware_group_size": "group_size", "fuse_aware_mode": "mode"}
# Of the objectives: setting -> name of each that has it.
OBJECTIVE = {
    setting: [name for name, kind in OBJECTIVES.items() if setting in settings_of(kind)]
    for kind in OBJECTIVES.values()
    for setting in settings_of(kind)
    if setting != "name"
}
# The parameters that `training_options` makes.
SETTINGS = " ".join(["config", "rank", "alpha", "rslora", *LORA, "objective", *OBJECTIVE, *TRAINING, *FUSE_AWARE])


def training_options(command: Command, without: str = "") -> Command:
    """All settings of LoraConfig and TrainConfig as options, those of `without` apart, and --config."""
    decorators = [
        click.option("--config", type=UserPath(dir_okay=False), help="YAML with base, data, name, lora, training."),
        option(LoraConfig, "rank", over_file=True, type=str, multiple=True),
        click.option("--alpha", type=float, help="Instead of --scale: scale = alpha / rank."),
        click.option("--rslora", is_flag=True, help="With --alpha: scale = alpha / sqrt(rank)."),
        options(LoraConfig, " ".join(LORA), over_file=True),
        option(TrainConfig, "objective", over_file=True, type=click.Choice(list(OBJECTIVES))),
        *(_objective_option(setting) for setting in OBJECTIVE),
        options(TrainConfig, " ".join(name for name in TRAINING if name not in without.split()), over_file=True),
        option(TrainConfig, "fuse_aware", over_file=True, type=int),
        click.option("--fuse-aware-group-size", type=int, help="Its group size [the base's at its own bits, else 64]."),
        click.option("--fuse-aware-mode", type=click.Choice(MODES), help="Its mode [likewise, else affine]."),
    ]
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def _objective_option(setting: str) -> Callable[[Command], Command]:
    """The option of an objective's setting, with what each objective takes it to be."""
    known = {name: settings_of(OBJECTIVES[name])[setting] for name in OBJECTIVE[setting]}
    first, *_ = known.values()
    defaults = {name: one.shown_default for name, one in known.items()}
    one_for_all = len(set(defaults.values())) == 1
    words = first.shown_default if one_for_all else ", ".join(f"{name} {value}" for name, value in defaults.items())
    words = "" if bool in first.kinds else f" [{words}]"
    who = f" ({', '.join(known)})" if one_for_all else ""
    return option(OBJECTIVES[OBJECTIVE[setting][0]], setting, over_file=True, help=f"{first.help}{who}{words}.")


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
        settings = _lasting(to_mapping(over) if over else {}, self.training) | self.training
        if isinstance(objective := self.training.get("objective"), Mapping) and "name" not in objective:
            before = over.objective if over else SFT()
            _check_objective(before.name, objective)
            settings["objective"] = {**to_mapping(before), **objective}
        return from_mapping(TrainConfig, settings, "the training settings")


def read_settings(options: dict[str, Any]) -> Settings:
    """Bring config file and flags together; a flag wins. Raises ConfigError."""
    given = {key: value for key, value in options.items() if value is not None}
    file = read_yaml(Path(given["config"])) if "config" in given else {}
    known = {field.name for field in dataclasses.fields(Settings)}
    for key in file:
        if key not in known:
            raise ConfigError(f"Unknown setting '{key}' in '{given['config']}'.", _where_it_goes(str(key), known))
    lora = (
        _mapping(file, "lora") | {name: given[name] for name in LORA if name in given} | _ranks(given.get("rank", ()))
    )
    flags = {name: given[name] for name in TRAINING if name in given}
    training = _lasting(_with_files(_mapping(file, "training")), flags) | flags
    if objective := _objective(given, training.get("objective")):
        training["objective"] = objective
    if quantization := _fuse_aware(given):
        training["fuse_aware"] = quantization
    places = {key: given.get(key, _text(file, key)) for key in ("base", "data", "name")}
    if training.get("fuse_aware") is not None:
        training["fuse_aware"] = _as_fused(training["fuse_aware"], places["base"], not given.get("print_config"))
    settings = Settings(**places, lora=lora, training=training)
    return dataclasses.replace(settings, lora=lora | _scale_of_alpha(given, settings))


def _where_it_goes(key: str, known: set[str]) -> str | None:
    """What to do with a line that a config file does not have at its top."""
    for group, kind in (("lora", LoraConfig), ("training", TrainConfig)):
        if key in settings_of(kind):
            return f"it goes below '{group}:', indented."
    hint = f"it may hold: {', '.join(sorted(known))}; --print-config prints such a file."
    if f"--{key.replace('_', '-')}" in HABITS["train"]:
        return f"mlx-lm's configs name it so; {hint}"
    return did_you_mean(key, known, hint)


def _lasting(settings: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what says how long a run is, where `over` says that in its own way."""
    length = ("iterations", "epochs")
    return {key: value for key, value in settings.items() if key not in length or not over.keys() & set(length)}


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


def _with_files(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config file, with the texts of the files that some of them name."""
    for name, one in settings_of(TrainConfig).items():
        value = settings.get(name)
        if one.from_file and isinstance(value, str) and "{" not in value:
            try:
                settings[name] = TextFile().convert(value, None, None)
            except click.BadParameter as error:
                raise ConfigError(f"'{name}' in the config file: {error.message}") from None
    return settings


def _ranks(texts: Sequence[str]) -> dict[str, Any]:
    ranks: dict[str, Any] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if not number.isdecimal() or (equals and not name):
            raise ConfigError(f"--rank '{text}' is neither a number nor NAME=NUMBER.", "for example v_proj=16.")
        if name:
            ranks.setdefault("ranks", {})[name] = int(number)
        else:
            ranks["rank"] = int(number)
    return ranks


def _objective(given: Mapping[str, Any], in_file: Any) -> dict[str, Any]:
    """What is typed of the objective, over what the file says of the same one."""
    typed = {"name": given["objective"]} if "objective" in given else {}
    typed |= {setting: given[setting] for setting in OBJECTIVE if setting in given}
    before = {"name": in_file} if isinstance(in_file, str) else in_file if isinstance(in_file, Mapping) else {}
    if not typed or typed.get("name", before.get("name")) != before.get("name"):
        before = {}
    objective = {**before, **typed}
    if (name := objective.get("name")) in OBJECTIVES:
        _check_objective(name, typed)
    return objective if typed else {}


def _check_objective(name: str, typed: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that this objective does not have."""
    for setting in typed:
        if setting != "name" and name not in OBJECTIVE.get(setting, [name]):
            flag, has = f"--{setting.replace('_', '-')}", "|".join(OBJECTIVE[setting])
            raise ConfigError(f"{name} has no {flag}.", f"those that have it: --objective {has}.")


def _fuse_aware(given: Mapping[str, Any]) -> dict[str, Any]:
    quantization = {key: given[name] for name, key in FUSE_AWARE.items() if name in given}
    if quantization and "bits" not in quantization:
        raise ConfigError("--fuse-aware-group-size and --fuse-aware-mode need --fuse-aware BITS.")
    return quantization


def _as_fused(asked: object, base: str | None, download: bool) -> dict[str, Any]:
    """The quantization that 'fuse' will take it for: what it leaves open is as in the base."""
    from mlx_adapters.sources.bases import resolve_base

    precision, own = Precision.of(asked, "fuse_aware"), None
    if base is not None:
        with contextlib.suppress(AdapterError):  # the training says it, with the rest
            own = resolve_base(base, download).quantization
    return to_mapping(precision.like(own))


def _scale_of_alpha(given: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    if "alpha" not in given:
        if given.get("rslora"):
            raise ConfigError("--rslora needs --alpha.", "it means scale = alpha / sqrt(rank).")
        return {}
    if "scale" in given:
        raise ConfigError("Give --scale or --alpha, not both.", "scale = alpha / rank.")
    rank = settings.lora_config().rank
    return {"scale": given["alpha"] / (math.sqrt(rank) if given.get("rslora") else rank)}
