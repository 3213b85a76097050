"""Before anything is sent: is it whole, does it keep secrets, is it finite; and the clean copies that go up."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.checkpoints.contents import is_tokenizer
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.models.base import INDEX_FILE
from mlx_adapters.publishing.cleaning import check_paths, check_secrets, clean
from mlx_adapters.publishing.subject import REQUIRED, Subject, matches
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.storage.tensor_names import CONFIG_FILE, FUSE_RECIPE_FILE, METADATA_FILE, REPORT_FILE

# Settings, in whose texts a path is a path. Of other files a slash may be a token.
CLEANED = ("*config.json", METADATA_FILE, FUSE_RECIPE_FILE, REPORT_FILE)
VOCABULARIES = ("tokenizer.json*", "*vocab*", "*merges*", "tekken*.json", "*.tiktoken", INDEX_FILE)


def check(subject: Subject) -> None:
    """Raise unless all files are there and whole and no text holds a secret. Reads no weights.

    Raises NotFoundError, FormatError or HubError.
    """
    for name in REQUIRED[subject.kind]:
        if name not in subject.sources:
            raise NotFoundError(f"'{subject.folder}' lacks {name}.", "publish a whole folder.")
    if subject.kind == "model":
        _check_model(subject)
    for name, path in subject.sources.items():
        check_secrets(name, _text_of(path))


def _check_model(subject: Subject) -> None:
    there = {name for name in subject.sources if name.endswith(".safetensors")}
    if not there:
        raise NotFoundError(f"'{subject.folder}' has no model*.safetensors.", "publish a whole model folder.")
    index = subject.sources.get("model.safetensors.index.json")
    places = files.read_json(index).get("weight_map") if index else None
    missing = sorted({str(name) for name in places.values()} - there) if isinstance(places, Mapping) else []
    if missing:
        raise NotFoundError(f"'{subject.folder}' lacks {missing[0]}, which its index names.", "fuse or copy it again.")
    if not any(is_tokenizer(name) for name in subject.sources):
        raise NotFoundError(f"'{subject.folder}' has no tokenizer.", "copy the base model's tokenizer files into it.")


def check_finite(subject: Subject, on_event: OnEvent = log_warnings) -> None:
    """Raise FormatError if a weight is NaN or Inf. Reads everything."""
    weights = [path for name, path in subject.sources.items() if name.endswith(".safetensors")]
    for number, path in enumerate(weights, 1):
        _check_finite(path)
        on_event(Progress("reading weights for NaN", number, len(weights), "file"))


def _check_finite(path: Path) -> None:
    """Raise FormatError if a floating-point tensor holds NaN or Inf. One tensor is in memory at a time."""
    tensors = tensor_files.read_safetensors(path)
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
        return json.dumps(tensor_files.read_safetensors_header(path)[1])
    with open(path, "rb") as stream:
        start = stream.read(8192)
        return "" if b"\0" in start else (start + stream.read()).decode("utf-8", "replace")


def sizes(subject: Subject) -> dict[str, int]:
    """Bytes of each file as it goes up."""
    nbytes = {}
    for name, path in subject.sources.items():
        copy = _clean_copy(subject, name)
        nbytes[name] = path.stat().st_size if copy is None else len(files.json_text(copy, path))
    return nbytes


def stage(subject: Subject, folder: Path) -> None:
    """Fill `folder` with what goes up: links to the files, and clean copies of the JSON that holds paths.

    Raises HubError for a path of this machine in another text.
    """
    for name, source in subject.sources.items():
        copy = _clean_copy(subject, name)
        if not matches(name, VOCABULARIES):
            check_paths(name, _text_of(source) if copy is None else json.dumps(copy, ensure_ascii=False))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if copy is None:
            (folder / name).symlink_to(source)
        else:
            files.write_json(folder / name, copy)


def _clean_copy(subject: Subject, name: str) -> dict[str, Any] | None:
    """What goes up in place of settings that hold paths; None for a file that goes up as it is."""
    source = subject.sources[name]
    if not matches(name, CLEANED):
        return None
    value = files.read_json(source)
    made = {METADATA_FILE: subject.metadata, CONFIG_FILE: subject.config}
    cleaned = made[name] if subject.kind == "adapter" and name in made else clean(value)
    return None if cleaned == value else files.tagged(cleaned)
