"""What may leave this machine: which files of a folder, cleaned of local paths, and never with a secret.

Only known file names go up, so data, logs, checkpoints and optimizer states stay. In JSON files absolute paths
are cut down to their last part; a token, or a path of this machine in another text, stops the publishing.
"""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_adapters import files
from mlx_adapters.adapter import Adapter, read_adapter, read_metadata, weights_file
from mlx_adapters.errors import ConfigError, FormatError, HubError, NotFoundError
from mlx_adapters.events import OnEvent, Progress, ignore
from mlx_adapters.registry import locate, parse_reference
from mlx_adapters.tensor_names import ADAPTER_FILE, CONFIG_FILE, METADATA_FILE

PEFT_WEIGHTS = "adapter_model.safetensors"
RECIPE_FILE, REPORT_FILE = "fuse_recipe.json", "fuse_report.json"
TOKENIZER = (
    "tokenizer*.json", "tokenizer*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.jinja", "spiece.model", "sentencepiece*.model",
)  # fmt: skip
PUBLISHED = {
    "adapter": (ADAPTER_FILE, CONFIG_FILE, METADATA_FILE),
    "peft": (PEFT_WEIGHTS, CONFIG_FILE, *TOKENIZER),
    "model": (
        "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER,
        "preprocessor_config.json", "processor_config.json", "*.py", RECIPE_FILE, REPORT_FILE,
    ),
}  # fmt: skip
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
REQUIRED = {"adapter": (ADAPTER_FILE, CONFIG_FILE), "peft": (PEFT_WEIGHTS, CONFIG_FILE), "model": ("config.json",)}

SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# Two parts at least, so that "/use" or "and/or" is no path; a URL's slashes do not match.
_PART = r"[^\s/\\'\"<>|,;:()=]"
ABSOLUTE_PATH = re.compile(
    rf"(?<![\w./~<-])(?:file://|~|[A-Za-z]:)?[/\\]{_PART}+(?:[/\\]+{_PART}+)+[/\\]?|~[/\\]{_PART}+"
)
HOME_PATH = re.compile(r"(?:/(?:Users|home)/|[A-Za-z]:\\\\?Users\\\\?)[\w.-]+")
# Texts of a model in which a slash is just a character.
VERBATIM = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "model.safetensors.index.json")


@dataclass(frozen=True)
class Subject:
    """What is to be published. `sources` maps the name in the repository to the local file; `metadata`,
    `config`, `recipe` and `report` are cleaned of local paths."""

    kind: Literal["adapter", "peft", "model"]
    name: str
    folder: Path
    sources: dict[str, Path]
    left_out: tuple[str, ...]
    config: dict[str, Any]
    metadata: dict[str, Any]
    recipe: dict[str, Any]
    report: dict[str, Any]
    adapter: Adapter | None = None
    local_base: str | None = None  # the base's name as recorded, which may be a folder of this machine

    @property
    def base(self) -> dict[str, Any]:
        """The base model's record, {} if it is not known."""
        return _base_of(self.metadata, self.recipe, self.config)

    @property
    def transformers(self) -> bool:
        """Whether this is a model with the tensor names of the original checkpoint (`fuse --format hf`)."""
        return self.recipe.get("format") == "hf"

    @property
    def library(self) -> str:
        return "peft" if self.kind == "peft" else "transformers" if self.transformers else "mlx"

    @property
    def relation(self) -> str | None:
        """The Hub's base_model_relation; None where nothing says what was done to the base."""
        if self.kind != "model":
            return "adapter"
        adapters = self.recipe.get("adapters") or []
        return "merge" if len(adapters) > 1 else "finetune" if self.recipe else None

    @property
    def tags(self) -> list[str]:
        kind = self.config.get("fine_tune_type") or ("dora" if self.config.get("use_dora") else "lora")
        kinds = [kind] if self.kind != "model" else []
        quantization = self.config.get("quantization")
        bits = [f"{quantization['bits']}-bit"] if isinstance(quantization, dict) and "bits" in quantization else []
        return [self.library, "mlx-adapters", *kinds, *bits]

    @property
    def data_name(self) -> str:
        return str((self.metadata.get("data") or {}).get("source") or "validation rows")

    @property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """{"training" | "validation": (iteration, loss) points}."""
        found = {"training": "train_losses", "validation": "validation_losses"}
        return {name: [(float(x), float(y)) for x, y in self.metadata.get(key) or ()] for name, key in found.items()}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """[{"data": name, "metrics": {name: number}}]: the best validation loss and what `eval` saved."""
        found = []
        if self.validation_loss is not None:
            found.append({"data": self.data_name, "metrics": {"validation_loss": self.validation_loss}})
        return found

    @property
    def validation_loss(self) -> float | None:
        """That of the published weights: of the best iteration, or of the checkpoint that was named."""
        found = self.metadata.get("best_validation_loss")
        if self.adapter and self.adapter.iteration is not None:
            checkpoint = (self.metadata.get("checkpoints") or {}).get(str(self.adapter.iteration)) or {}
            found = checkpoint.get("validation")
        return float(found) if isinstance(found, int | float) else None

    def without(self, patterns: Iterable[str]) -> "Subject":
        """Leave out the files that match one of `patterns`. Raises ConfigError for a file that must go up."""
        kept = {name: path for name, path in self.sources.items() if not matches(name, patterns)}
        missing = [name for name in REQUIRED[self.kind] if name not in kept]
        if missing:
            raise ConfigError(f"'{missing[0]}' cannot be left out: without it the rest is useless.")
        return replace(self, sources=kept, left_out=(*self.left_out, *sorted(set(self.sources) - set(kept))))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name fits one of the wildcard patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def read_subject(source: str | Path | Adapter) -> Subject:
    """Find what `source` means: an adapter's name, NAME@ITERATION, or the folder of an adapter or a model.

    Raises NotFoundError or FormatError.
    """
    if isinstance(source, Adapter):
        folder, iteration = source.folder, source.iteration
    elif isinstance(source, Path):
        folder, iteration = source.expanduser().absolute(), None
    else:
        # Nothing is published from the Hub to the Hub: what has a slash is a folder.
        is_path = "/" in source and not source.startswith((".", "/", "~"))
        folder, iteration = locate(parse_reference(f"./{source}" if is_path else source))
    if folder is None:
        raise NotFoundError("This adapter is in memory only.", "save it with write_adapter or register first.")
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder '{folder}'.", "'mlx-adapters list' shows the adapters there are.")
    return _subject(folder, iteration)


def _subject(folder: Path, iteration: int | None) -> Subject:
    kind = _kind_of(folder)
    adapter = read_adapter(folder, iteration) if kind == "adapter" else None
    config = files.read_json(folder / ("config.json" if kind == "model" else CONFIG_FILE))
    patterns = (*PUBLISHED[kind], *LICENSE_FILES)
    there = sorted(p.name for p in folder.iterdir())
    sources = {name: folder / name for name in there if matches(name, patterns) and (folder / name).is_file()}
    metadata = adapter.metadata if adapter else read_metadata(folder) if kind == "peft" else {}
    if adapter and iteration is not None:
        sources[ADAPTER_FILE] = weights_file(folder, iteration)
        metadata = metadata | {"iteration": iteration, "sha256": {ADAPTER_FILE: files.sha256(sources[ADAPTER_FILE])}}
    left_out = [name for name in there if name not in sources and not name.startswith(".") and name != "README.md"]
    name = adapter.name.partition("@")[0] if adapter else folder.name
    optional = {f: files.read_json(folder / f) if (folder / f).is_file() else {} for f in (RECIPE_FILE, REPORT_FILE)}
    recipe, report = optional[RECIPE_FILE], optional[REPORT_FILE]
    return Subject(
        kind, name, folder, sources, tuple(left_out), clean(config), clean(metadata), clean(recipe), clean(report),
        adapter, _base_of(metadata, recipe, config).get("name"),
    )  # fmt: skip


def _base_of(metadata: Mapping[str, Any], recipe: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    found = metadata.get("base") or recipe.get("base")
    if isinstance(found, dict):
        return found
    name = config.get("base_model_name_or_path")
    return {"name": name} if isinstance(name, str) and name else {}


def _kind_of(folder: Path) -> Literal["adapter", "peft", "model"]:
    if (folder / CONFIG_FILE).is_file():
        return "peft" if "peft_type" in files.read_json(folder / CONFIG_FILE) else "adapter"
    if (folder / "config.json").is_file():
        return "model"
    raise NotFoundError(
        f"'{folder}' holds neither an adapter nor a model.",
        f"it needs {CONFIG_FILE} with {ADAPTER_FILE}, or config.json with model*.safetensors.",
    )


# -- checks ----------------------------------------------------------------------------------------


def check(subject: Subject, on_event: OnEvent = ignore) -> None:
    """Raise unless all files are there and whole, no weight is NaN or Inf, and no text holds a secret.

    Raises NotFoundError, FormatError or HubError.
    """
    for name in REQUIRED[subject.kind]:
        if name not in subject.sources:
            raise NotFoundError(f"'{subject.folder}' lacks {name}.", "publish a whole folder.")
    weights = [path for name, path in subject.sources.items() if name.endswith(".safetensors")]
    if subject.kind == "model":
        _check_model(subject)
    for number, path in enumerate(weights, 1):
        _check_finite(path)
        on_event(Progress("check", number, len(weights), "file"))
    for name, path in subject.sources.items():
        check_secrets(name, _text_of(path))


def _check_model(subject: Subject) -> None:
    there = {name for name in subject.sources if name.endswith(".safetensors")}
    if not there:
        raise NotFoundError(f"'{subject.folder}' has no model*.safetensors.", "publish a whole model folder.")
    index = subject.sources.get("model.safetensors.index.json")
    shards: Mapping[str, str] = files.read_json(index).get("weight_map") or {} if index else {}
    missing = sorted(set(shards.values()) - there)
    if missing:
        raise NotFoundError(f"'{subject.folder}' lacks {missing[0]}, which its index names.", "fuse or copy it again.")
    if not {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"} & set(subject.sources):
        raise NotFoundError(f"'{subject.folder}' has no tokenizer.", "copy the base model's tokenizer files into it.")


def _check_finite(path: Path) -> None:
    """Raise FormatError if a floating-point tensor holds NaN or Inf. One tensor is in memory at a time."""
    import mlx.core as mx

    tensors = files.read_safetensors(path)
    for name in sorted(tensors):
        tensor = tensors.pop(name)
        if mx.issubdtype(tensor.dtype, mx.floating) and not mx.isfinite(tensor).all().item():
            raise FormatError(
                f"'{path.name}' holds NaN or Inf in '{name}'; it is not published.",
                "take an earlier checkpoint, or fuse again.",
            )


def _text_of(path: Path) -> str:
    """What of a file may hold a secret or a path: a text as a whole, of safetensors the header's metadata."""
    if path.suffix == ".safetensors":
        return json.dumps(files.read_safetensors_header(path)[1])
    content = path.read_bytes()
    return "" if b"\0" in content[:8192] else content.decode("utf-8", "replace")


def check_secrets(name: str, text: str) -> None:
    """Raise HubError if the text holds a token or key."""
    for what, pattern in SECRETS.items():
        if match := re.search(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            raise HubError(f"'{name}' holds {what} in line {line}; nothing was published.", "remove it, and revoke it.")


def check_paths(name: str, text: str) -> None:
    """Raise HubError if the text names a home folder, of this machine or any other."""
    mine = os.path.expanduser("~") + os.sep
    match = HOME_PATH.search(text)
    start = match.start() if match else text.find(mine) if len(mine) > 2 else -1
    if start >= 0:
        line = text.count("\n", 0, start) + 1
        raise HubError(
            f"'{name}' names a path of this machine in line {line}; nothing was published.",
            f"change it, or leave the file out with --exclude '{name}'.",
        )


# -- clean copies ----------------------------------------------------------------------------------


def clean(value: Any) -> Any:
    """A JSON value with every absolute path in its strings cut down to the last part."""
    if isinstance(value, Mapping):
        return {clean(key): item if key == "chat_template" else clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return clean_text(value) if isinstance(value, str) else value


def clean_text(text: str) -> str:
    """`text` with every absolute path of two parts or more cut down to its last part."""
    return ABSOLUTE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


def stage(subject: Subject, folder: Path) -> None:
    """Fill `folder` with what goes up: links to the files, and clean copies of the JSON that holds paths.

    Raises HubError for a path of this machine in another text.
    """
    for name, source in subject.sources.items():
        if source.suffix == ".json" and name not in VERBATIM:
            value = files.read_json(source)
            cleaned = subject.metadata if name == METADATA_FILE else clean(value)
            if cleaned != value:
                files.write_json(folder / name, cleaned)
                check_paths(name, json.dumps(cleaned, ensure_ascii=False))
                continue
        if name not in VERBATIM:
            check_paths(name, _text_of(source))
        (folder / name).symlink_to(source)
