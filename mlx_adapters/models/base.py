"""A base model on the disk: where it lies, what its config says, and whether it is still the same one."""

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import AdapterError, FormatError, ModelError, NotFoundError, refusals
from mlx_adapters.models.metadata import data_config
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.storage.tensor_names import FUSE_RECIPE_FILE
from mlx_adapters.system.door import TRUST_IT, load_config, logits_shape, mx, packed_by, trusts_remote_code

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = "model*.safetensors"  # which mlx-lm opens
OTHER_FILE = "other.safetensors"  # of a fused model: tensors that mlx-lm does not use (see `fusion.left_out`)
# (mlx-lm's name, of which model type, the name that transformers 5 may write instead)
RENAMED_SETTINGS = (("num_experts", "qwen3_moe", "num_local_experts"), ("n_ctx", "gpt2", "n_positions"))
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length")
MOST_LAYERS = 10_000
TIED = "tie_word_embeddings"
NOT_PACKED = "name the model that it was made from, unpacked, or one that mlx-lm quantized."
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model whose output layer has become a matrix of its own; `config` is as it was."""
    inner = {"text_config": untied_config(config["text_config"])} if isinstance(config.get("text_config"), dict) else {}
    return config | {TIED: False} | inner


def tying_config(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """`config` that says whether the output layer is the embedding, which mlx-lm and transformers take for granted
    differently; what it says already stays."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return {TIED: tied} | config
    return {TIED: text.get(TIED, tied)} | config | {"text_config": {TIED: config.get(TIED, tied)} | text}


def says_tied(config: dict[str, Any]) -> bool | None:
    """Whether transformers takes a model's two ends for one by its config, whatever its checkpoint holds.

    None where the config does not say, and transformers would: then who wrote it may have thought otherwise.
    """
    told = config.get(TIED, (config.get("text_config") or {}).get(TIED))
    if told is not None:
        return bool(told)
    from transformers import CONFIG_MAPPING  # late: it takes a second

    kind = config.get("model_type")
    return None if kind in CONFIG_MAPPING and getattr(CONFIG_MAPPING[kind], TIED, False) else False


def resized_config(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """The config of a model whose vocabulary has become `rows` tokens; `config` is as it was."""
    sizes: dict[str, Any] = dict.fromkeys((key for key in config if key.endswith("vocab_size")), rows)
    if isinstance(inner := config.get("text_config"), dict):
        sizes |= {"text_config": resized_config(inner, rows)}
    return config | {"vocab_size": rows} | sizes


def context_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens a config's model is made for; None where it does not tell.

    Positions that are stretched (YaRN, arXiv 2309.00071) reach further than the limit that a config may still name.
    """
    for part in (config, config.get("text_config") or {}):
        for key in CONTEXT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 0:
                return max(part[key], _stretched(part))
    return None


def _stretched(config: Mapping[str, Any]) -> int:
    """The length that a config's rope reaches, as mlx-lm's does: the one it was trained on, times a factor; else 0."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling: Any = config.get(key)
        with contextlib.suppress(TypeError, ValueError, KeyError, OverflowError):  # not there, or not numbers
            return int(float(scaling["original_max_position_embeddings"]) * float(scaling["factor"]))
    return 0


@runtime_checkable
class Named(Protocol):
    """A result that stands for the adapter or the model that it is about: whatever takes one takes the result."""

    @property
    def reference(self) -> str:
        """How the adapter or model is spelled."""


@dataclass(frozen=True)
class Trained:
    """What a full fine-tune's record says, and the folder that it lies in: an adapter's in all but the weights."""

    metadata: dict[str, Any]
    folder: Path | None


class Loaded(Protocol):
    """A model in memory: where a base is asked for, it stands for the one that it was loaded from."""

    @property
    def base(self) -> "Base":
        """Where that lies."""


@dataclass(frozen=True)
class Base:
    """Where a base model lies. `revision` is the Hub's commit, None for a folder.

    `parameters` are what `load_module` puts in place of the folder's own, by name: biases and norms, or what a full
    fine-tune trained, of which `tuned` is a hash. `untied`: the output layer becomes a matrix of its own, equal to the
    embedding that the folder's model uses for both. `rows`: the vocabulary is cut to so many tokens, or grows to them
    by `appended`, by layer path. `tokenizer`: the folder of one that takes the place of the folder's own. `trained`:
    what a full fine-tune says of its training.
    """

    name: str
    folder: Path
    revision: str | None = None
    parameters: dict[str, mx.array] = field(default_factory=dict, repr=False, compare=False)
    untied: bool = False
    rows: int | None = None
    appended: dict[str, mx.array] = field(default_factory=dict, repr=False, compare=False)
    tokenizer: Path | None = None
    tuned: str | None = None
    trained: Trained | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config, as mlx-lm needs it (see `normalized_config`)."""
        files.read_json(self.folder / "config.json")
        if odd := next(
            (path for path in self.folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())), None
        ):
            raise FormatError(f"'{odd}' is neither a file nor a folder.", "a pipe or a broken link? Take it away.")
        wrong = files.no_object(self.folder, "generation_config.json") or "config.json"  # mlx-lm reads both
        mend = f"mend its {wrong}, or name another model."
        with refusals(lambda why: FormatError(f"The {wrong} of '{self.name}' cannot be used: {why}.", mend)):
            config = normalized_config(load_config(self.folder))
            _check(config, self.name)
        if config.get("model_file") is not None and not trusts_remote_code():
            code = config["model_file"]
            raise FormatError(f"'{self.name}' brings code of its own, '{code}', which is not run unasked.", TRUST_IT)
        return self.changed(config)

    def changed(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config of the folder's model with what is to be other than there: its ends, its vocabulary."""
        config = config if self.rows is None else resized_config(config, self.rows)
        return untied_config(config) if self.untied else config

    @property
    def positions(self) -> int | None:
        """How many positions a model has that learned each of them (GPT-2); None for all others."""
        return self.config.get("n_positions")

    @cached_property
    def vocabulary(self) -> int | None:
        """How many token ids the model has a row for; None where neither its config nor mlx-lm's model tells."""
        told = self.config.get("vocab_size") or (self.config.get("text_config") or {}).get("vocab_size")
        with contextlib.suppress(Exception):  # whoever loads the model will be told what is wrong with it
            return told or logits_shape(copy.deepcopy(self.config), self.folder)[-1]
        return None

    @cached_property
    def template(self) -> TemplateConfig:
        """How a full fine-tune, or the adapters that were fused into it, were trained to see conversations, if its
        record says so."""
        if self.trained is not None:
            return data_config(self.trained.metadata).template
        with contextlib.suppress(AdapterError, AttributeError, KeyError, TypeError):
            recipe = files.read_json(self.folder / FUSE_RECIPE_FILE)
            arguments = [entry.get("chat_template_args") for entry in recipe["adapters"] or [recipe["base"]]]
            if arguments and isinstance(arguments[0], dict) and all(one == arguments[0] for one in arguments):
                return TemplateConfig(chat_template_args=arguments[0])
        return TemplateConfig()

    def check_tokens(self, tokens: np.ndarray, where: str) -> None:
        """Raise ModelError for an id that the model has no row for: its embedding would read foreign memory."""
        bad = self.lacks(tokens)
        if bad.size:
            raise ModelError(
                f"{where}: '{self.name}' has no token {bad[0]}, its ids end at {(self.vocabulary or 0) - 1}.",
                "its tokenizer is another model's, or was given more tokens than the model.",
            )

    def lacks(self, tokens: np.ndarray) -> np.ndarray:
        """The ids among `tokens` (n,) that the model has no row for."""
        return tokens[(tokens < 0) | (tokens >= self.vocabulary)] if self.vocabulary is not None else tokens[:0]

    @property
    def context(self) -> int | None:
        """How many tokens the model is made for; None where its config does not tell."""
        return context_of(self.config)

    @property
    def quantization(self) -> Quantization | None:
        """The precision that the model as a whole is stored in; None if it is not quantized."""
        return quantization_in(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weight files' headers and 64 evenly spaced samples of 64 KiB of each.

        It changes with any retraining or requantization and is read in a fraction of a second.
        """
        digest = hashlib.sha256()
        for path in self.weight_files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as stream:
                for i in range(SAMPLES):
                    stream.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
                    if size <= SAMPLE_BYTES:
                        break
        if self.tuned is not None:
            digest.update(self.tuned.encode())
        return digest.hexdigest()

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted. Raises NotFoundError if there is none, FormatError for a broken one or
        for files of two models."""
        shards = sorted(self.folder.glob(WEIGHT_FILES))
        if not shards:
            raise NotFoundError(f"'{self.folder}' has no {WEIGHT_FILES}.", "is it a whole model folder?")
        tensor_files.refuse_two_values(shards)
        return shards

    @property
    def lacking(self) -> list[str]:
        """The weight files for mlx-lm that are not there, by the index or, where there is none, by their numbers.

        An index that does not know a weight file which is there is another model's, and tells nothing.
        """
        there = {path.name for path in self.folder.glob(WEIGHT_FILES) if path.is_file()}
        index = self.folder / INDEX_FILE
        places = files.read_json(index).get("weight_map") if index.is_file() else None
        named = {n for n in places.values() if isinstance(n, str)} if isinstance(places, dict) else set()
        named = named or numbered(there)
        return sorted(n for n in named - there if fnmatch(n, WEIGHT_FILES)) if there <= named else []

    def record(self) -> dict[str, Any]:
        """What an adapter's metadata says of its base."""
        quantization = self.config.get("quantization")
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "model_type": self.config.get("model_type"),
            "quantization": quantization,
        }


BaseLike = Base | Loaded | str | Path | Named  # what stands for a base above `sources`: itself, or a reference to it


def numbered(names: Iterable[str]) -> set[str]:
    """All files of the series that some belong to, as model-00001-of-00003.safetensors does."""
    series = {
        (match[1], int(match[2])) for name in names if (match := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\..*", name))
    }
    return {
        *names,
        *(f"{start}-{i + 1:05d}-of-{n:05d}.safetensors" for start, n in series for i in range(min(n, 9999))),
    }


def _check(config: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless what this package itself reads from a config has its type, FormatError for weights that
    mlx-lm does not unpack; `name`: the model's."""
    file = config.get("model_file")
    if file is not None and not (isinstance(file, str) and Path(file).name == file):
        raise ValueError(f"'model_file' is {str(file)[:40]!r}")
    if not isinstance(config.get("text_config") or {}, dict):
        raise ValueError("'text_config' is no object")
    quantization_in(config)
    if packer := packed_by(config):
        raise FormatError(f"The weights of '{name}' are packed by {packer}, which mlx-lm does not read.", NOT_PACKED)
    for part in (config, config.get("text_config") or {}):
        for key in ("n_positions", "vocab_size"):
            value = part.get(key)
            if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
                raise ValueError(f"'{key}' is {str(value)[:40]!r}")
        for key, value in part.items():  # mlx-lm would build them one by one, until the memory ends
            if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"'{key}' is {value:,}")


def quantization_in(config: Mapping[str, Any]) -> Quantization | None:
    """The precision that a model's config gives as its own, None if it gives none."""
    stored = config.get("quantization")
    if not isinstance(stored, dict) or "bits" not in stored:
        return None
    return Quantization(stored["bits"], stored["group_size"], stored.get("mode", "affine"))


def normalized_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model config with what mlx-lm 0.32 needs, where transformers 5 spells it otherwise.

    transformers 5 writes `rope_parameters` instead of `rope_theta` and `rope_scaling`; mlx-lm's llama, qwen2,
    qwen3_moe, mixtral, phi3 and gemma3 would silently compute with rope_theta 10000.
    """
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        config.update(_rope_settings(rope, config))
    for name, model_type, other in RENAMED_SETTINGS:
        if config.get("model_type") == model_type and other in config:
            config.setdefault(name, config[other])
    kinds = config.get("layer_types")
    if "gemma3" in str(config.get("model_type")) and isinstance(kinds, list) and "full_attention" in kinds:
        config["sliding_window_pattern"] = _window_pattern(kinds)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = normalized_config(config["text_config"])
    return config


def _window_pattern(kinds: list[str]) -> int:
    """Of how many layers in a row the last one looks at everything. Raises ModelError if there is no such rule."""
    period = kinds.index("full_attention") + 1
    if any((kind == "full_attention") != ((i + 1) % period == 0) for i, kind in enumerate(kinds)):
        raise ModelError(
            "mlx-lm cannot follow this model's layer_types: full attention does not come periodically.",
            "take another base.",
        )
    return period


def _rope_settings(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    if "full_attention" in rope:  # gemma3: one set for each kind of attention
        full, sliding = rope["full_attention"], rope.get("sliding_attention", {})
        local = {"rope_local_base_freq": float(sliding["rope_theta"])} if "rope_theta" in sliding else {}
        return _rope_settings(full, config) | local
    settings: dict[str, Any] = {}
    if "rope_theta" in rope:
        settings["rope_theta"] = float(rope["rope_theta"])
    if rope.get("partial_rotary_factor") is not None:
        settings["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        settings["rope_scaling"] = rope | {"type": rope["rope_type"]}  # whole: transformers takes it before the other
    elif "rope_scaling" not in config:  # llama4 must be told that there is none
        settings["rope_scaling"] = None
    return settings
