"""The files of a PEFT adapter's weights: one, several with an index, or the parts that a sharded training left.

DeepSpeed (ZeRO-3) and FSDP keep a part of each tensor on each machine; saved without gathering them, it is empty, or
flat, or lies in files of another kind. All that is told, with what makes it whole.
"""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.models.base import numbered
from mlx_adapters.storage import files, hf_names, paths, tensor_names
from mlx_adapters.storage.hf_names import INDEXES, PEFT_PICKLE_FILE, PEFT_PICKLE_SHARDS, PEFT_SHARDS, PEFT_WEIGHTS_FILE

ZERO, DCP = "*zero_pp_rank*", "*.distcp"  # files of DeepSpeed, of torch's distributed checkpoints
CUT_UP = {
    ZERO: (
        "DeepSpeed",
        "make it whole where it was trained: 'python zero_to_fp32.py . OUT' in its checkpoint, or save it again with "
        "stage3_gather_16bit_weights_on_model_save.",
    ),
    DCP: (
        "FSDP",
        "make it whole where it was trained: 'accelerate merge-weights FOLDER OUT', or save it again with the state "
        "dict type FULL_STATE_DICT.",
    ),
}
PICKLE_HINT = "pickles can run code; load it in PEFT and save it again, which writes adapter_model.safetensors."


def peft_weight_files(folder: Path) -> list[Path]:
    """The file of an adapter's weights, or all shards of it. Raises FormatError or NotFoundError."""
    if (folder / PEFT_WEIGHTS_FILE).is_file():
        return [folder / PEFT_WEIGHTS_FILE]
    there = {path.name for path in paths.visible(folder, PEFT_SHARDS)}
    named = numbered(there)
    for index in paths.visible(folder, INDEXES):  # transformers calls it as a model's
        places = files.read_json(index).get("weight_map")
        places = set(places.values()) if isinstance(places, dict) else set()
        named |= {name for name in places if isinstance(name, str) and fnmatch(name, PEFT_SHARDS)}
    if lacking := sorted(named - there):
        raise FormatError(f"'{folder}' lacks {', '.join(lacking[:3])} of its shards.", "copy or download it again.")
    if there:
        return [folder / name for name in sorted(there)]
    for pickle in (PEFT_PICKLE_FILE, PEFT_PICKLE_SHARDS):
        if found := paths.visible(folder, pickle):
            raise FormatError(f"'{folder}' holds its weights in a pickle, {found[0].name}.", PICKLE_HINT)
    for pattern, (what, cure) in CUT_UP.items():
        if found := [*paths.visible(folder, pattern), *paths.visible(folder, f"*/{pattern}")]:
            name = found[0].relative_to(folder)
            raise FormatError(f"'{folder}' holds the parts that {what} cut its weights into, such as {name}.", cure)
    raise NotFoundError(f"'{folder}' has no {PEFT_WEIGHTS_FILE}.", "a config alone is no adapter: copy both.")


def refuse_parts(header: Mapping[str, Any], path: Path) -> None:
    """Raise FormatError if tensors are what a sharded training left in their place when it saved them."""
    for name, entry in header.items():
        shape, factor = entry["shape"], hf_names.parse_peft_tensor(hf_names.unwrapped([name])[name])
        if 0 in shape:
            raise FormatError(f"'{path}' is empty in places: it has no numbers for '{name}'.", CUT_UP[ZERO][1])
        flat = name.endswith("_flat_param") or (len(shape) == 1 and factor and factor[1] != tensor_names.MAGNITUDE)
        if flat:
            raise FormatError(
                f"'{path}' is not whole: '{name}' is one part of what FSDP laid out flat.", CUT_UP[DCP][1]
            )
