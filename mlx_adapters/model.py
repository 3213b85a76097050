"""A base model: find it, load it, ask it.

A base is named by `demo` (the embedded real model), a local folder, or a Hub id. On a CPU it computes in
float32, with quantized layers replaced by dense ones (the same function; MLX's quantized arithmetic is ten
times slower there); on a GPU it stays as stored.
"""

import contextlib
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters import files, tensor_files
from mlx_adapters.adapter import Adapter
from mlx_adapters.config import DTYPES, Quantization, require
from mlx_adapters.door import load_config, load_mlx_model, load_tokenizer, make_sampler, mx, nn, stream_generate
from mlx_adapters.errors import FormatError, HubError, ModelError, NotFoundError
from mlx_adapters.layers import attach, check_fits, check_made_for, dequantize_layers, detach, untie
from mlx_adapters.machine import on_gpu
from mlx_adapters.tensor_names import CONFIG_FILE

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
MODEL_FILES = ["*.json", "model*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]
# (mlx-lm's name, of which model type, the name that transformers 5 may write instead)
RENAMED_SETTINGS = (("num_experts", "qwen3_moe", "num_local_experts"), ("n_ctx", "gpt2", "n_positions"))
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model whose output layer has become a matrix of its own; `config` is as it was."""
    inner = {"text_config": untied_config(config["text_config"])} if isinstance(config.get("text_config"), dict) else {}
    return config | {"tie_word_embeddings": False} | inner


@dataclass(frozen=True)
class Base:
    """Where a base model lies. `revision` is the Hub's commit, None for a folder.

    `parameters` are biases and norms that `load_module` puts in place of the folder's own, by name. `untied`: the
    output layer becomes a matrix of its own, equal to the embedding that the folder's model uses for both.
    """

    name: str
    folder: Path
    revision: str | None = None
    parameters: dict[str, mx.array] = field(default_factory=dict, repr=False, compare=False)
    untied: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config, as mlx-lm needs it (see `normalized_config`)."""
        files.read_json(self.folder / "config.json")
        config = normalized_config(load_config(self.folder))
        return untied_config(config) if self.untied else config

    @property
    def positions(self) -> int | None:
        """How many positions a model has that learned each of them (GPT-2); None for all others."""
        return self.config.get("n_positions")

    def quantization_of(self, bits: int) -> Quantization:
        """What so many bits mean here: the base's own grouping if it has as many, else groups of 64."""
        own = self.config.get("quantization") or {}
        if own.get("bits") != bits:
            return Quantization(bits)
        return Quantization(bits, own["group_size"], own.get("mode", "affine"))

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
        return digest.hexdigest()

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted. Raises NotFoundError if there is none, FormatError for a broken one."""
        found = sorted(self.folder.glob("model*.safetensors"))
        if not found:
            raise NotFoundError(f"'{self.folder}' has no model*.safetensors.", "is it a whole model folder?")
        for path in found:
            tensor_files.read_safetensors_header(path)
        return found

    def record(self) -> dict[str, Any]:
        """What an adapter's metadata says of its base."""
        quantization = self.config.get("quantization")
        return {
            "name": self.name, "revision": self.revision, "fingerprint": self.fingerprint,
            "model_type": self.config.get("model_type"), "quantization": quantization,
        }  # fmt: skip


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
        raise ModelError("mlx-lm cannot follow this model's layer_types: full attention does not come periodically.")
    return period


def _rope_settings(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    if "full_attention" in rope:  # gemma3: one set for each kind of attention
        full, sliding = rope["full_attention"], rope.get("sliding_attention", {})
        found = _rope_settings(full, config)
        if "rope_theta" in sliding:
            found["rope_local_base_freq"] = float(sliding["rope_theta"])
        return found
    found = {}
    if "rope_theta" in rope:
        found["rope_theta"] = float(rope["rope_theta"])
    if rope.get("partial_rotary_factor") is not None:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        found["rope_scaling"] = scaling | {"type": rope["rope_type"]}
    return found


def resolve_base(name: str | Path | Base, download: bool = True) -> Base:
    """Find a base model: `demo`, a folder, or a Hub id with an optional @revision (downloaded once).

    Raises NotFoundError, HubError or, for a name that no repository can have, ConfigError; without `download`,
    NotFoundError for what is not on this machine yet.
    """
    if isinstance(name, Base):
        return name
    text = str(name)
    if text == DEMO:
        if not download and not (files.home() / "bases" / DEMO).is_dir():
            raise NotFoundError(f"'{DEMO}' is not on this machine yet.")
        from mlx_adapters.demo.base import demo_base_folder

        return Base(DEMO, demo_base_folder())
    folder = files.expanded(text)
    if isinstance(name, Path) or files.is_path(text) or folder.is_dir():
        if not (folder / "config.json").is_file():
            what = "no config.json in it" if folder.is_dir() else "no such folder"
            raise NotFoundError(f"There is no model at '{text}': {what}.", _adapter_hint(folder))
        return Base(str(folder), folder)
    if not HUB_ID.fullmatch(text):
        raise NotFoundError(
            f"There is no base model '{text}'.",
            "a base is 'demo', a folder, or a Hub id such as 'mlx-community/Qwen3-0.6B-4bit'.",
        )
    repo, _, revision = text.partition("@")
    folder = _snapshot(repo, revision or None, download)
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"There is no model in '{text}': no config.json in it.", _adapter_hint(folder))
    return Base(text, folder, folder.name if folder.parent.name == "snapshots" else revision or None)


def _adapter_hint(folder: Path) -> str | None:
    return "it is an adapter: name it with --adapter." if (folder / CONFIG_FILE).is_file() else None


def _snapshot(repo: str, revision: str | None, download: bool) -> Path:
    """The model's folder in huggingface_hub's cache; downloaded, if allowed, where it is not whole there."""
    from mlx_adapters.hub.client import snapshot

    with contextlib.suppress(HubError):
        folder, _ = snapshot(repo, revision, MODEL_FILES, local_only=True)
        if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
            return folder
    if not download:
        raise NotFoundError(f"'{repo}' is not on this machine yet.")
    return snapshot(repo, revision, MODEL_FILES, show_progress=sys.stderr.isatty())[0]


@dataclass(frozen=True)
class Generation:
    """What a model wrote. Times in seconds; `token_ids` without the prompt's."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    seconds_to_first_token: float
    seconds: float


@dataclass(repr=False)
class Model:
    """A loaded base model with at most one adapter on it."""

    module: nn.Module
    tokenizer: Any
    base: Base
    config: dict[str, Any]
    adapter: Adapter | None = field(default=None)

    def __repr__(self) -> str:
        return f"Model({self.base.name!r}, adapter={self.adapter.name if self.adapter else None!r})"

    def attach(self, adapter: Adapter, any_base: bool = False) -> None:
        """Put an adapter on, in place of the one that is on. When this raises, nothing was changed."""
        check_fits(adapter, self.module, f"'{self.base.name}'")
        if not any_base:
            check_made_for(adapter, self.base.name, self.base.fingerprint)
        detach(self.module)
        attach(self.module, adapter)
        self.adapter = adapter

    def detach(self) -> None:
        """Take the adapter off."""
        detach(self.module)
        self.adapter = None

    @cached_property
    def vocabulary(self) -> int:
        """How many token ids the model has a row for; another id would read foreign memory."""
        text_config = self.config.get("text_config") or {}
        return self.config.get("vocab_size") or text_config.get("vocab_size") or len(self.tokenizer)

    @property
    def positions(self) -> int | None:
        """See `Base.positions`."""
        return self.base.positions

    def room(self, prompt_tokens: int, max_tokens: int) -> int:
        """How many of `max_tokens` have a position after such a prompt."""
        return max_tokens if self.positions is None else min(max_tokens, self.positions - prompt_tokens + 1)

    def checked_ids(self, ids: Sequence[int] | mx.array, before: int = 0) -> mx.array:
        """The token ids as an array; `before` tokens were read already.

        Raises ModelError for none, for what is no id of the model's, and for more than it has positions.
        """
        found = np.asarray(ids)
        if found.size == 0:
            raise ModelError("The prompt is empty.", "write something to continue.")
        if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= self.vocabulary:
            raise ModelError(f"A prompt must be token ids from 0 to {self.vocabulary - 1}.", "or a text.")
        if self.positions is not None and before + found.shape[-1] > self.positions:
            tokens = before + found.shape[-1]
            raise ModelError(f"The prompt has {tokens} tokens; the model has {self.positions} positions.")
        return mx.array(found.astype(np.int32))

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template, which says how a conversation is written."""
        return bool(getattr(self.tokenizer, "has_chat_template", False))

    def encode(self, prompt: str, raw: bool = False) -> list[int]:
        """Token ids of a prompt: through the chat template as the user's turn, or as it is. Raises ModelError."""
        if self.has_template and not raw:
            return self.encode_chat([{"role": "user", "content": prompt}])
        _require_unicode(prompt)
        return list(self.tokenizer.encode(prompt))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Token ids of a conversation up to the answer that is to come, through the chat template.

        Raises ModelError for what the template refuses and for what is not valid Unicode.
        """
        _require_unicode(json.dumps(messages, ensure_ascii=False))
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        except Exception as error:  # a template may raise what it likes
            raise ModelError(f"The chat template refuses this conversation: {error}.") from None

    def logits(self, token_ids: list[int] | mx.array) -> mx.array:
        """(tokens, vocabulary) logits of one sequence, or (rows, tokens, vocabulary) of a batch."""
        ids = self.checked_ids(token_ids)
        return self.module(ids[None])[0] if ids.ndim == 1 else self.module(ids)

    def stream(
        self, prompt: str | list[int], *, max_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
        seed: int | None = None, raw: bool = False, cache: list[Any] | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Yield mlx-lm's responses (`.text`, `.token`, `.finish_reason`) as they are made.

        `cache` holds what came before the prompt (mlx-lm's prompt cache) and grows by prompt and answer.
        """
        require(max_tokens >= 1, f"max_tokens must be at least 1, not {max_tokens}.")
        require(0 <= temperature < math.inf, f"temperature must be finite and not negative, not {temperature}.")
        require(0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}.")
        before = getattr(cache[0], "offset", 0) if cache else 0
        ids = self.checked_ids(self.encode(prompt, raw) if isinstance(prompt, str) else prompt, before)
        sampler, max_tokens = self.sampler(temperature, top_p, seed), self.room(before + ids.size, max_tokens)
        extra = {} if cache is None else {"prompt_cache": cache}
        yield from stream_generate(self.module, self.tokenizer, ids, max_tokens=max_tokens, sampler=sampler, **extra)

    def sampler(self, temperature: float, top_p: float, seed: int | None) -> Any:
        """What chooses the next token from its log-probabilities."""
        if seed is not None:
            mx.random.seed(seed)
        return make_sampler(temp=temperature, top_p=top_p)

    def generate(
        self, prompt: str | list[int], *, max_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
        seed: int | None = None, raw: bool = False,
    ) -> Generation:  # fmt: skip
        """The model's answer to `prompt`; greedy unless a temperature is given."""
        start = time.perf_counter()
        first, pieces, tokens, reason, prompt_tokens = 0.0, [], [], "length", 0
        for response in self.stream(
            prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, raw=raw
        ):
            first = first or time.perf_counter() - start
            pieces.append(response.text)
            if response.finish_reason != "stop":
                tokens.append(int(response.token))
            reason, prompt_tokens = response.finish_reason or reason, response.prompt_tokens
        return Generation("".join(pieces), tokens, prompt_tokens, reason, first, time.perf_counter() - start)


def _require_unicode(text: str) -> None:
    """Raise ModelError for half a surrogate pair, as a file that is not UTF-8 leaves it: no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError("The prompt is not valid Unicode.", "is its file UTF-8?") from None


def load_model(
    base: str | Path | Base, adapter: Adapter | None = None, *, dtype: str = "auto", dense: bool | None = None,
    any_base: bool = False,
) -> Model:  # fmt: skip
    """Load a base model (or a fused folder), with an adapter on it if one is given.

    dtype: "auto" is float32 on a CPU and as stored on a GPU. dense: replace quantized layers by dense ones
    (default: on a CPU). Raises NotFoundError, HubError, FormatError, ModelError or IncompatibleError.
    """
    require(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
    found = resolve_base(base)
    module, config = load_module(found)
    set_precision(module, dtype, dense)
    mx.eval(module.parameters())
    model = Model(module, load_tokenizer_of(found), found, config)
    if adapter is not None:
        model.attach(adapter, any_base)
    return model


def set_precision(module: nn.Module, dtype: str = "auto", dense: bool | None = None) -> None:
    """Give a module the precision that `load_model` promises."""
    if dense if dense is not None else not on_gpu():
        dequantize_layers(module, getattr(mx, "float32" if dtype == "auto" else dtype))
    if dtype != "auto" or not on_gpu():
        module.set_dtype(getattr(mx, "float32" if dtype == "auto" else dtype))


def load_module(base: Base) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's module with lazy weights, in evaluation mode, and its config."""
    _ = base.weight_files
    try:
        config = replace(base, untied=False).config
        module, config = load_mlx_model(base.folder, lazy=True, model_config=config)
        if base.untied:
            untie(module)
        module.load_weights(list(base.parameters.items()), strict=False)
        return module, config
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(f"mlx-lm cannot load '{base.name}': {text}.") from error


def load_tokenizer_of(base: Base) -> Any:
    """The base's tokenizer, in mlx-lm's wrapper; never from the network."""
    eos = base.config.get("eos_token_id")
    try:
        tokenizer = load_tokenizer(base.folder, eos_token_ids=eos)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:300].rstrip(".")
        raise FormatError(f"The tokenizer of '{base.name}' cannot be loaded: {why}.") from error
    # It need not warn about long texts: whoever uses it cuts them where the model's limit asks for it.
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer
