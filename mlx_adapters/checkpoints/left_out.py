"""Tensors of a base that mlx-lm has no use for: a vision tower, layers that predict further tokens.

mlx-lm drops them when it loads a model; which they are is seen by running its own `sanitize` on the base's tensors and
asking which of them no result depends on. A fused model hands them on as they are, in a file that mlx-lm does not open
and that the index names, where mlx-vlm and transformers look.
"""

import copy
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.models.base import INDEX_FILE, OTHER_FILE, WEIGHT_FILES, Base, quantization_in
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.layers import output_layer, weight_layers
from mlx_adapters.storage import files, tensor_files, tensor_names
from mlx_adapters.storage.tensor_files import StoredTensor
from mlx_adapters.storage.tensor_names import SCALES
from mlx_adapters.system.door import make_module, mx, sanitize_of
from mlx_adapters.units import count

AT_ONCE = 1000  # arrays that can be given by name in one call
LOOK = 4096  # bytes that mostly tell two tensors apart

Stored = dict[str, StoredTensor]


def left_out(base: Base) -> tuple[Stored, list[str]]:
    """(the tensors that mlx-lm leaves out, by name; names in the index whose file is not there).

    Not among them is a second copy of a matrix that it reads, as of tied embeddings.
    """
    arrays, own = dict[str, mx.array](), Stored()
    for path in base.weight_files:
        arrays |= tensor_files.read_safetensors(path)
        own |= tensor_files.stored_tensors(path)
    read = _read(base, arrays)
    others, missing = _others(base)
    kept = [own[name] for name in read]
    dropped = {name: own[name] for name in arrays if name not in read} | others
    return {name: dropped[name] for name in sorted(dropped) if not _is_copy(dropped[name], kept)}, missing


def _read(base: Base, arrays: dict[str, mx.array]) -> set[str]:
    """The names of the arrays that something depends on in what mlx-lm makes of them. Nothing is computed."""
    module = make_module(copy.deepcopy(base.config), base.folder)
    results = list(sanitize_of(module)(dict(arrays)).values())
    names = {id(array): name for name, array in arrays.items()}
    read = {names[id(array)] for array in results if id(array) in names}
    made = [array for array in results if id(array) not in names]
    rest = [name for name in arrays if name not in read]
    return read | _ancestors(made, rest, arrays)


def optional_head(base: Base) -> tuple[str, str] | None:
    """(embedding, output layer): the paths in a model that has such a layer just where its weights hold one.

    Seen by giving mlx-lm the weights without it. Nothing is computed.
    """
    arrays = dict[str, mx.array]()
    for path in base.weight_files:
        arrays |= tensor_files.read_safetensors(path)
    module = make_module(copy.deepcopy(base.config), base.folder)
    layers = weight_layers(module)
    head = output_layer(layers)
    if head is None or not hasattr(module, "sanitize"):
        return None
    own = {
        id(array) for name, array in sanitize_of(module)(dict(arrays)).items() if tensor_names.split(name)[0] == head
    }
    module.sanitize({name: array for name, array in arrays.items() if id(array) not in own})
    if head in weight_layers(module):
        return None
    shape = weight_shape(layers[head])
    return next(p for p, layer in layers.items() if p != head and weight_shape(layer) == shape), head


def _ancestors(made: Sequence[mx.array], names: Sequence[str], arrays: dict[str, mx.array]) -> set[str]:
    """Of the `names` those whose arrays `made` is computed from, by the graph that MLX keeps of it."""
    ancestors: set[str] = set()
    for first in range(0, len(names) if made else 0, AT_ONCE):
        some = names[first : first + AT_ONCE]
        graph = io.StringIO()
        mx.export_to_dot(graph, *made, **{f"input{i}": arrays[name] for i, name in enumerate(some)})
        ancestors |= {some[int(i)] for i in re.findall(r'"input(\d+)" ->', graph.getvalue())}
    return ancestors


def _others(base: Base) -> tuple[Stored, list[str]]:
    """What the index names in files that mlx-lm does not open, and the names whose file is missing."""
    opened, index = {path.name for path in base.weight_files}, base.folder / INDEX_FILE
    places = files.read_json(index).get("weight_map") if index.is_file() else None
    others, missing = Stored(), []
    for name, file in places.items() if isinstance(places, dict) else ():
        if not isinstance(file, str) or file in opened or Path(file).name != file:
            continue
        if (base.folder / file).is_file():
            others |= {name: tensor_files.stored_tensors(base.folder / file)[name]}
        else:
            missing.append(name)
    held = {name for path in base.weight_files if missing for name in tensor_files.read_safetensors_header(path)[0]}
    return others, [name for name in missing if name not in held]


def _is_copy(tensor: StoredTensor, others: Iterable[StoredTensor]) -> bool:
    """Whether a matrix is equal to one of the others, and not just to one as empty."""
    if len(tensor.shape) < 2:
        return False
    start = tensor.read(0, LOOK)
    return len(set(start)) > 1 and any(tensor.equals(other) for other in others if other.read(0, LOOK) == start)


def hand_on(tensors: Stored, missing: list[str], folder: Path, twins: Mapping[str, str] | None = None) -> list[str]:
    """Write what `left_out` has found into a model folder and its index; return what is to be told about it.

    `twins`: layers that go there too, each by the layer of the folder's own whose tensors it has.
    """
    more = tensors | _twins(folder, twins or {})
    notes = []
    if more:
        tensor_files.copy_tensors(folder / OTHER_FILE, more)
        index = files.read_json(folder / INDEX_FILE)
        index["weight_map"] |= dict.fromkeys(more, OTHER_FILE)
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in more.values())
        files.write_json(folder / INDEX_FILE, index)
    if tensors:
        notes.append(f"{described(tensors)} copied as in the base; mlx-lm does not use them")
    if missing:
        notes.append(f"{described(missing)} left out: the base's folder lacks their file, which its index names")
    return notes


def _twins(folder: Path, twins: Mapping[str, str]) -> Stored:
    stored = Stored()
    for file in sorted(folder.glob(WEIGHT_FILES)) if twins else ():
        stored |= tensor_files.stored_tensors(file)
    split = [(*tensor_names.split(name), tensor) for name, tensor in stored.items()]
    return {
        tensor_names.join(twin, leaf): tensor
        for twin, own in twins.items()
        for path, leaf, tensor in split
        if path == own
    }


def without_place(base: Base, format: str, handed_on: Iterable[str] = ()) -> tuple[str, ...]:
    """What is to be told where a format cannot hand on what `left_out` finds."""
    handed_on = list(handed_on)
    others = [name for name in left_out(base)[0] if name not in handed_on]
    told = [f"{described(handed_on)} copied as in the base"] if handed_on else []
    return (*told, *([f"{described(others)} left out: the format '{format}' has no place for them"] if others else []))


def described(names: Iterable[str]) -> str:
    """ "3 tensors (vision_tower, mtp)"."""
    names = list(names)
    roots = list(dict.fromkeys(".".join(name.split(".")[: 1 + name.startswith("model.")]) for name in names))
    return f"{count(len(names), 'tensor')} ({', '.join(roots[:3])}{', …' if len(roots) > 3 else ''})"


def quantization_with(
    tensors: Iterable[str], base: dict[str, Any], fused: dict[str, Any] | None
) -> dict[str, Any] | None:
    """config.json's "quantization" of the fused model that also tells how `tensors`, left out by mlx-lm, are packed."""
    own, default = base.get("quantization"), quantization_in(base)
    if not isinstance(own, dict) or default is None:
        return fused
    entries: dict[str, Any] = {}
    for path in dict.fromkeys(tensor_names.split(name)[0] for name in tensors):
        if path in own:
            entries[path] = own[path]
    packed = [path for path, leaf in map(tensor_names.split, tensors) if leaf == SCALES and path not in entries]
    if fused is None:
        return to_mapping(default) | entries if packed or any(entries.values()) else None
    plain = to_mapping(default)
    differs = any(fused.get(key) != value for key, value in plain.items())
    return fused | entries | (dict.fromkeys(packed, plain) if differs else {})
