"""What lies beside an adapter's weights: its config and its metadata, read as from a stranger.

Whatever the two files hold, what comes out of here is plain: text that can be written, numbers that a float or 64 bits
hold, and under each name that we know a value of its kind. What is not so is left out, and named.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.mapping import from_mapping, to_mend
from mlx_adapters.errors import AdapterError, ConfigError, FormatError
from mlx_adapters.storage import files, locks
from mlx_adapters.storage.replacing import read_whole
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, CONFIG_FILE, METADATA_FILE

MAX_BYTES = 64 << 20  # a loss curve of a million points has 30 MB
MAX_DEPTH = 20
LARGEST_SCALE = 3e38  # float32 ends there
FULL = "full"  # mlx-lm's word for a fine-tune of a model's own weights
HOW_IT_LOOKS = 'it looks like {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}.'


class WholeRecord(dict[str, Any]):
    """The kinds of a record that says nothing unless all its fields are there."""


# A name stands for a value's kind: a type, a pattern for text, [kind], or the kinds of a mapping's fields, "*" for any
# other name. Under names that are not here any plain value may stand.
NAME = re.compile(r"[^./\\~][^/\\]{0,199}")  # an adapter's name becomes part of file names
TEXTS = ["source", "status", "type", "date", "command", "chosen_by", "added_from", "init_from"]
WHOLE_NUMBERS = ["rank", "iteration", "iterations", "trained_tokens", "seed"]
NUMBERS = ["scale", "alpha", "best_validation_loss", "final_validation_loss", "final_train_loss", "duration_seconds"]
KINDS: Mapping[str, Any] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(WHOLE_NUMBERS, int),
    **dict.fromkeys(NUMBERS, float),
    **{f"{split}_losses": [[float]] for split in ("train", "validation")},
    **{f"{split}_figures": [[object]] for split in ("train", "validation")},
    "sha256": {"*": str},
    "versions": {"*": str},
    "hub": {"*": str},
    "name": NAME,
    "tags": [str],
    "ranks": {"*": int},
    "checkpoints": {"*": {"*": float}},
    "base": {"name": str, "revision": str, "fingerprint": str, "model_type": str, "quantization": {}},
    "data": {"source": str, "splits": {"*": {"rows": int, "sha256": str}}},
    "training": {"iterations": int, "fuse_aware": {}, "fuse_aware_from": int},
    "evaluations": [WholeRecord(data=str, split=str, rows=int, metrics={"*": float})],
    "merge": WholeRecord(method=str, sources=[WholeRecord(name=str, weight=float)]),
    "extract": {"energy_kept": float, "energy_by_layer": {"*": float}},
    "peft": WholeRecord(config={}),
}

# Of what lies beside a fused model.
RECIPE_KINDS: Mapping[str, Any] = {
    **dict.fromkeys(["date", "command"], str),
    "versions": {"*": str},
    "adapters": [{"name": str, "reference": str, "fingerprint": str}],
    "options": {"format": str},
    "base": KINDS["base"],
}
REPORT_KINDS: Mapping[str, Any] = {
    "method": str,
    "fidelity": {"tokens": int, "rows": int, "*": float},
    "text": {"source": str, "calibration_rows": int},
    "bits_per_weight": float,
    "update_survival": float,
}

_OUT = object()


def clean(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Metadata with what is not of its kind left out, and the names of what was, as in "base.name"."""
    wrong: list[str] = []
    return _fit(raw, KINDS, "", wrong), wrong


def fit(raw: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what is not of its kind left out."""
    return _fit(raw, kinds, "", [])


def check(raw: Mapping[str, Any], kinds: WholeRecord, where: str) -> None:
    """Raise FormatError, naming what is missing or of another kind, unless a record has all its fields."""
    wrong: list[str] = []
    if _fit(raw, kinds, "", wrong) is _OUT or wrong:
        fields = wrong or [name for name in kinds if raw.get(name) is None]
        message = f"{where} is damaged: {', '.join(fields[:5])} missing, or not as it was written."
        raise FormatError(message, "copy it again.")


def plain(value: Any) -> Any:
    """A JSON value with text, numbers and depth that everything can take; what is beyond them is left out."""
    fitted = _fit(value, object, "", [])
    return None if fitted is _OUT else fitted


def is_number(value: Any, limit: float = math.inf) -> bool:
    """Whether it is a finite number that a float can hold, below `limit` in size."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(float(value)) < limit
    except OverflowError:
        return False


def text(value: str) -> str:
    """Text that can be encoded: halves of a character and control characters are replaced, but tab and newline."""
    return "".join(c if c in "\t\n" or not (c < " " or "\x7f" <= c < "\xa0" or _half(c)) else "\ufffd" for c in value)


def _half(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _fit(value: Any, kind: Any, where: str, wrong: list[str], depth: int = 0) -> Any:
    """The value made plain, or `_OUT`, and `where` added to `wrong`, if it is not of its kind. None is of any kind."""
    result: Any = _OUT
    if value is None:
        return None
    if isinstance(value, Mapping):
        if depth < MAX_DEPTH and (kind is object or isinstance(kind, Mapping)):
            result = _fit_fields(value, kind, where, wrong, depth + 1)
    elif isinstance(value, list):
        if depth < MAX_DEPTH and (kind is object or isinstance(kind, list)):
            each = kind[0] if isinstance(kind, list) else object
            items = [_fit(item, each, f"{where}[{i}]", wrong, depth + 1) for i, item in enumerate(value)]
            result = [item for item in items if item is not _OUT]
    elif isinstance(value, str):
        clean_text = text(value)
        if kind in (str, object) or (isinstance(kind, re.Pattern) and kind.fullmatch(clean_text)):
            result = clean_text
    elif isinstance(value, bool):
        result = value if kind in (bool, object) else _OUT
    elif kind in (type(value), float, object) and is_number(value):
        result = value if kind is float or isinstance(value, float) or abs(value) < 1 << 63 else _OUT
    if result is _OUT and where:
        wrong.append(where)
    return result


def _fit_fields(values: Mapping[str, Any], kind: Any, where: str, wrong: list[str], depth: int) -> Any:
    fields = {} if kind is object else kind
    kept = {}
    for name, value in values.items():
        inner = f"{where}.{text(name)}" if where else text(name)
        fitted = _fit(value, fields.get(name, fields.get("*", object)), inner, wrong, depth)
        if fitted is not _OUT:
            kept[text(name)] = fitted
    return _OUT if isinstance(kind, WholeRecord) and any(kept.get(name) is None for name in kind) else kept


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter folder's config, as plain values. Raises NotFoundError or FormatError."""
    return plain(_read(Path(folder) / CONFIG_FILE))


def check_config(raw: Mapping[str, Any], where: str) -> None:
    """Raise FormatError, saying what is missing or wrong, unless this is mlx-lm's form of an adapter's settings."""
    kind, parameters, layers = _kind(raw), raw.get("lora_parameters"), raw.get("num_layers")
    if kind == FULL:
        way = "it is a model: name it with --base, or write it with 'mlx-adapters fuse'; 'extract' makes an adapter."
        raise FormatError(f"{where} holds a full fine-tune, not a low-rank adapter.", way)
    if "peft_type" in raw:
        raise FormatError(f"{where} is a PEFT adapter.", "take it in with 'mlx-adapters import-peft'.")
    if kind not in ("lora", "dora") or not isinstance(parameters, Mapping):
        what = f"'fine_tune_type' is {str(kind)[:40]!r}" if isinstance(parameters, Mapping) else "no 'lora_parameters'"
        raise FormatError(f"{where}: {CONFIG_FILE} is not an mlx-lm adapter config: {what}.", HOW_IT_LOOKS)
    rank, scale, dropout = parameters.get("rank"), parameters.get("scale"), parameters.get("dropout", 0.0)
    needed = {
        "rank": (rank, "a whole number of at least 1", _is_whole(rank, least=1)),
        "scale": (scale, "a number that float32 holds", is_number(scale, LARGEST_SCALE)),
        "dropout": (dropout, "a number from 0 to below 1", is_number(dropout) and 0 <= dropout < 1),
        "num_layers": (layers, "a whole number", layers is None or _is_whole(layers)),
    }
    for name, (value, what, right) in needed.items():
        if not right:
            there = "which is missing" if value is None else f"not {str(value)[:40]!r}"
            raise FormatError(f"{where}: {CONFIG_FILE} needs {what} as '{name}', {there}.", to_mend(name, value))


def _kind(raw: Mapping[str, Any]) -> Any:
    """What was trained; mlx-lm of 2024 said it with 'use_dora'."""
    return raw.get("fine_tune_type") or ("dora" if raw.get("use_dora") is True else "lora")


def _is_whole(value: Any, least: int = -(1 << 62)) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 62


@dataclass(frozen=True)
class AdapterConfig:
    """The settings an adapter needs to be applied: y = W x + scale · B A x.

    Args:
        rank: width of the update, one for all layers.
        scale: the factor on B·A; PEFT's alpha / rank.
        keys: full paths of the adapted modules.
        type: "lora", "dora", or of a run that trains the modules' own weights "full".
        dropout: what training dropped.
        num_layers: what was asked for when training (-1: all blocks).

    Example:
        >>> ma.AdapterConfig(8, 20.0, ("model.layers.0.self_attn.q_proj",)).to_mlx_lm()["fine_tune_type"]
        'lora'
    """

    rank: int
    scale: float
    keys: tuple[str, ...]
    type: str = "lora"
    dropout: float = 0.0
    num_layers: int = -1

    def to_mlx_lm(self, existing: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings as mlx-lm's `adapter_config.json` spells them today.

        Args:
            existing: a config that other versions or programs wrote; what else it holds stays.
        """
        existing = existing or {}
        parameters = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": list(self.keys)}
        settings = {"fine_tune_type": self.type, "num_layers": self.num_layers}
        low_rank = {"lora_parameters": {**existing.get("lora_parameters", {}), **parameters}}
        return {**existing, **settings, **({} if self.type == FULL else low_rank)}


def parse_config(raw: Mapping[str, Any], keys: tuple[str, ...], where: str) -> AdapterConfig:
    """Read mlx-lm's form of the settings; `keys` come from the tensors, which are the truth.

    Raises FormatError that names what is missing or wrong.
    """
    check_config(raw, where)
    parameters, layers = raw["lora_parameters"], raw.get("num_layers")
    scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
    return AdapterConfig(parameters["rank"], scale, keys, _kind(raw), dropout, -1 if layers is None else layers)


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise FormatError(f"'{path}' is not a file.", "a pipe or a folder? Put the file there.")
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise FormatError(f"'{path}' has more than {MAX_BYTES >> 20} MB.", "this is no record of an adapter.")
    return files.read_json(path)


# What plain mlx-lm's trainer records beside the settings of the layers.
MLX_LM_SETTINGS = (
    "data",
    "iters",
    "batch_size",
    "learning_rate",
    "lr_schedule",
    "optimizer",
    "seed",
    "max_seq_length",
    "mask_prompt",
    "grad_accumulation_steps",
)


def read_metadata(folder: Path) -> dict[str, Any]:
    """An adapter folder's metadata; for a folder made by plain mlx-lm, what its config tells.

    Raises NotFoundError or FormatError.
    """
    return examine_metadata(folder)[0]


def examine_metadata(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Metadata as `read_metadata` gives it, and the names of what was left out."""
    path = Path(folder) / METADATA_FILE
    if path.exists():
        metadata, wrong = clean(_read(path))
        return _of_the_weights(Path(folder), metadata), wrong
    config = read_config(folder)
    known = {"base": {"name": config["model"]}} if isinstance(config.get("model"), str) else {}
    training = {key: config[key] for key in MLX_LM_SETTINGS if config.get(key) is not None}
    return known | {"source": "mlx-lm", "name": Path(folder).name} | ({"training": training} if training else {}), []


T = TypeVar("T")


def read_version(folder: Path, read: Callable[[], T], also: Sequence[str] = ()) -> T:
    """What `read` gives of an adapter's folder, all from one version of its files, `also` (names) among them.

    Raises what `read` raises, and TrainingError if the files never stay the same.
    """

    def once() -> tuple[bool, T]:
        return _is_behind(folder), read()

    names = (ADAPTER_FILE, CONFIG_FILE, METADATA_FILE, *also)
    behind, value = read_whole(folder, names, once)
    if behind:  # between the two steps of a change, or a kill was there: then nobody holds the lock
        locks.wait_for_change(folder)
        _, value = read_whole(folder, names, once)
    return value


def _is_behind(folder: Path) -> bool:
    """Whether the record is not yet that of the weights."""
    try:
        chosen = files.chosen_iteration(folder, None)
        return chosen is not None and _read(folder / METADATA_FILE).get("iteration") != chosen
    except (AdapterError, OSError):
        return False


def _of_the_weights(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata, true to the weights: which checkpoint `adapters.safetensors` is, is decided by that file alone.

    It is replaced in one step, and the metadata after it: a kill in between leaves these behind.
    """
    recorded = metadata.get("iteration")
    chosen = files.chosen_iteration(folder, recorded)
    if chosen is None or chosen == recorded:
        return metadata
    sums = {name: value for name, value in (metadata.get("sha256") or {}).items() if name != ADAPTER_FILE}
    return metadata | {"iteration": chosen, "sha256": sums}


def base_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's record in an adapter's metadata, or {}."""
    base = metadata.get("base")
    return base if isinstance(base, dict) else {}


def data_config(metadata: Mapping[str, Any]) -> DataConfig:
    """How the adapter's training read its rows; the defaults where its metadata say nothing that makes sense.

    Of an adapter that was made of others, `template` says how these saw conversations.
    """
    names = {field.name for field in fields(DataConfig)}
    told = [record for key in ("training", "template") if isinstance(record := metadata.get(key), dict)]
    known = {name: value for record in told for name, value in record.items() if name in names}
    try:
        return from_mapping(DataConfig, known)
    except ConfigError:
        return DataConfig()


def losses_of(metadata: Mapping[str, Any]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(training, validation) losses as (iteration, nats per trained token), ascending; empty where none are known."""
    return curve_of(metadata.get("train_losses")), curve_of(metadata.get("validation_losses"))


def curve_of(points: Any) -> list[tuple[int, float]]:
    """Recorded (iteration, number) pairs, ascending; what is none is left out."""
    pairs = (
        [p for p in points if isinstance(p, list | tuple) and len(p) == 2] if isinstance(points, list | tuple) else []
    )
    return sorted({int(i): float(loss) for i, loss in pairs if is_number(i) and is_number(loss)}.items())
