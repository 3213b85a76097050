"""The files of an adapter's weights: one, several with an index, or the parts that a sharded training left.

DeepSpeed (ZeRO-3) and FSDP keep a part of each tensor on each machine; saved without gathering them, it is empty, or
flat, or lies in files of another kind. All that is told, with what makes it whole.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_adapters.checkpoints.contents import is_of_tokenizer
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.models.base import numbered
from mlx_adapters.storage import files, hf_names, paths, tensor_names
from mlx_adapters.storage.hf_names import (
    FOREIGN_WEIGHTS,
    INDEXES,
    NPZ_FILE,
    PEFT_PICKLE_FILE,
    PEFT_PICKLE_SHARDS,
    PEFT_SHARDS,
    PEFT_WEIGHTS_FILE,
)
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, CONFIG_FILE, METADATA_FILE

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
        if pickles := paths.visible(folder, pickle):
            raise FormatError(f"'{folder}' holds its weights in a pickle, {pickles[0].name}.", PICKLE_HINT)
    for pattern, (what, cure) in CUT_UP.items():
        if parts := [*paths.visible(folder, pattern), *paths.visible(folder, f"*/{pattern}")]:
            name = parts[0].relative_to(folder)
            raise FormatError(f"'{folder}' holds the parts that {what} cut its weights into, such as {name}.", cure)
    if not (folder / CONFIG_FILE).is_file():
        raise NotFoundError(f"'{folder}' is no adapter: it has no {CONFIG_FILE}.", "is it the right folder?")
    lacks = f"'{folder}' has no {PEFT_WEIGHTS_FILE}"
    if others := [path.name for path in paths.visible(folder, "*.safetensors")]:
        raise NotFoundError(f"{lacks}, but {others[0]}.", "if that is the adapter's, rename it so.")
    raise NotFoundError(f"{lacks}.", "a config alone is no adapter: copy both.")


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


BEST = "best"  # optiq's folder of the best checkpoint


def is_peft(config: Mapping[str, Any]) -> bool:
    """Whether a config is PEFT's own; optiq writes PEFT's fields beside mlx-lm's."""
    return "peft_type" in config and "lora_parameters" not in config


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name makes its folder an adapter's, whatever program wrote it."""
    return name in (CONFIG_FILE, ADAPTER_FILE, NPZ_FILE, PEFT_WEIGHTS_FILE) or fnmatch(name, PEFT_SHARDS)


def weight_names(there: Iterable[str], where: str, tokenizer: bool = False) -> list[str]:
    """Which files of an adapter's folder are needed: the first form of its weights that there is, and its records.

    Raises FormatError where there is none that is opened.
    """
    there = sorted(there)
    own = [name for name in FOREIGN_WEIGHTS if name in there][:1]
    shards = [name for name in there if fnmatch(name, PEFT_SHARDS) or ("/" not in name and fnmatch(name, INDEXES))]
    if not own and not shards:
        pickles = [name for name in there if name == PEFT_PICKLE_FILE or fnmatch(name, PEFT_PICKLE_SHARDS)]
        if pickles:
            raise FormatError(f"'{where}' holds its weights in a pickle, {pickles[0]}.", PICKLE_HINT)
        raise FormatError(f"'{where}' has a {CONFIG_FILE}, but no weights.", "is it an adapter, and whole?")
    beside = [
        name for name in there if (tokenizer and is_of_tokenizer(name)) or (shards and name in hf_names.TEMPLATE_FILES)
    ]
    return [*(own or shards), *(name for name in (CONFIG_FILE, METADATA_FILE) if name in there), *beside]
