"""A prompt cache in a file, in mlx-lm's format, so that its programs read ours.

Beside mlx-lm's metadata stands a record: with which weights it was made, and of which tokens. A file without one is
refused, since nobody can tell whether what is to follow begins with it.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.errors import FormatError, IncompatibleError, refusals
from mlx_adapters.prompt_caches.layers import held, leaves
from mlx_adapters.prompt_caches.quantized import forms
from mlx_adapters.storage.tensor_files import read_safetensors, read_safetensors_header, write_safetensors
from mlx_adapters.system.door import mx, nn

RECORD = "mlx_adapters"
WORDS = {"base": "another base", "adapters": "another adapter", "dtype": "another --dtype", "kv": "other --kv-bits"}


def write_cache(path: Path, cache: Sequence[Any], tokens: Sequence[int], of: Mapping[str, Any], model: str) -> None:
    """Write a cache that holds `tokens`, whole or not at all. `of`: what it was made with; `model`: its folder.

    Raises StorageError, or FormatError for a state that the format has no place for.
    """
    arrays, kinds = {}, [""]  # an empty list would be left out
    for name, value in tree_flatten([layer.state for layer in cache]):
        arrays[name], kind = _as_array(value)
        kinds += [(name, kind)] if kind else []  # type: ignore[list-item]
    record = json.dumps({"of": dict(of), "tokens": [int(token) for token in tokens]})
    about = [
        {"model": model, "tokenizer_config": "{}", RECORD: record},
        [type(layer).__name__ for layer in cache],
        kinds,
    ]
    write_safetensors(path, arrays, dict(tree_flatten(about)))


def _as_array(value: Any) -> tuple[mx.array, str | None]:
    """A part of a state as an array, and what it was."""
    if isinstance(value, mx.array):
        return value, None
    if isinstance(value, bool | int | float):
        return mx.array(value), "scalar"
    if isinstance(value, str):
        return mx.array([ord(char) for char in value]), "string"
    if value is None:
        return mx.array([]), "none"
    raise FormatError(f"mlx-lm's format has no place for a {type(value).__name__} of this model's cache.")


def read_cache(
    path: Path, module: nn.Module, kv: CacheQuantization | None, of: Mapping[str, Any]
) -> tuple[list[Any], list[int]]:
    """The cache in a file and the tokens it holds, for this model and what it keeps in few bits.

    Raises NotFoundError, FormatError for what is no such file, IncompatibleError if it was made with other weights.
    """
    _, metadata = read_safetensors_header(path)
    if RECORD not in _about(metadata):
        raise FormatError(f"'{path}' does not say of which tokens it is.", "let --prompt-cache write a new file.")

    def refused(why: str) -> FormatError:
        return FormatError(f"'{path}' is no prompt cache of this model: {why}.", "remove it, or name another file.")

    with refusals(refused):
        about, classes, kinds = tree_unflatten(list(metadata.items()))
        record = json.loads(about[RECORD])
        tokens = [int(token) for token in record["tokens"]]
        for key, words in WORDS.items():
            if record["of"].get(key) != of.get(key):
                raise IncompatibleError(f"'{path}' was made with {words}.", "name another file.")
        arrays: dict[str, Any] = read_safetensors(path)
        for name, kind in kinds[1:]:
            arrays[name] = _as_value(arrays[name], kind)
        form = next(
            (form for form in forms(module, kv) if [type(layer).__name__ for layer in form] == list(classes)), None
        )
        if form is None:
            raise refused("its layers are others")
        states = tree_unflatten(list(arrays.items()))
        cache = [type(layer).from_state(state) for layer, state in zip(form, states, strict=True)]
        mx.eval([layer.state for layer in cache])
        for layer in leaves(cache):
            if held(layer) is not None and layer.offset != len(tokens):
                raise refused("it holds other tokens than it says")
        module(mx.zeros((1, 1), mx.int32), cache=copy.deepcopy(cache))  # only the graph: other shapes raise
    return cache, tokens


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    return {name.partition(".")[2]: value for name, value in metadata.items() if name.startswith("0.")}


def _as_value(array: mx.array, kind: str) -> Any:
    values = {"none": lambda: None, "string": lambda: "".join(map(chr, array.tolist())), "scalar": array.item}
    return values[kind]()
