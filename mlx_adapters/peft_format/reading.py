"""Read a PEFT adapter folder: every tensor is accounted for, or the folder is refused.

PEFT itself loads an adapter with missing, unknown or NaN tensors with at most a warning. Here each tensor is
one half of an update, a copy of the base's embedding, or one of the things MLX's adapter layers cannot hold
(whole modules, biases, single token rows), which are kept apart.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.checkpoints.places import MERGE_THERE
from mlx_adapters.checkpoints.shards import peft_weight_files, refuse_parts
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.models.dense import first_not_finite
from mlx_adapters.peft_format.settings import FUSE_HINT, MEND, PeftSettings
from mlx_adapters.storage import files, hf_names, paths, tensor_files, tensor_names
from mlx_adapters.storage.hf_names import (
    EMBEDDINGS,
    HEADS,
    ORIGINAL,
    PEFT_CLASSIFIERS,
    PEFT_PREFIX,
    PEFT_SCALE,
    POSITIONS,
    TOKEN_ROWS,
    TRAINED,
    is_embedding,
)
from mlx_adapters.storage.tensor_names import CONFIG_FILE, WEIGHT

DTYPES = ("F32", "F16", "BF16")
WHOLE, AGAIN = "is the file whole?", "save the adapter again with PEFT."


@dataclass(frozen=True)
class PeftModule:
    """The update of one module: a (rank, in), b (out, rank), m (out,) or None."""

    path: str
    a: mx.array
    b: mx.array
    m: mx.array | None
    embedding: bool


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter in memory, in PEFT's own names and shapes.

    `dense` holds whole weights and biases by tensor name (without the prefix), `token_rows` the replaced
    rows of embeddings by module path, `base_copies` the copies of the base's embeddings by module path.
    `exact_scale` is what a folder written by `export_peft` says of alpha / r, to the last bit.
    """

    folder: Path
    settings: PeftSettings
    modules: dict[str, PeftModule]
    dense: dict[str, mx.array] = field(default_factory=dict)
    token_rows: dict[str, mx.array] = field(default_factory=dict)
    base_copies: dict[str, mx.array] = field(default_factory=dict)
    exact_scale: float | None = None

    def renamed(self, old: str, new: str) -> "PeftAdapter":
        """The same with `new` in front of all names instead of `old`."""

        def under(things: Mapping[str, Any]) -> dict[str, Any]:
            return {new + name[len(old) :] if name.startswith(old) else name: thing for name, thing in things.items()}

        modules = {path: replace(module, path=path) for path, module in under(self.modules).items()}
        apart: dict[str, Any] = {name: under(getattr(self, name)) for name in ("dense", "token_rows", "base_copies")}
        return replace(self, modules=modules, **apart)

    def without(self, left_out: Callable[[str], bool]) -> "PeftAdapter":
        """The same without what lies at paths that are to be left out."""

        def kept(things: Mapping[str, Any]) -> dict[str, Any]:
            return {path: thing for path, thing in things.items() if not left_out(path)}

        names = ("modules", "dense", "token_rows", "base_copies")
        parts: dict[str, Any] = {name: kept(getattr(self, name)) for name in names}
        return replace(self, **parts)

    @property
    def unnamed(self) -> dict[str, mx.array]:
        """Whole tensors that the config does not speak of: the base's, mostly, saved with the rest."""
        saved, biases = self.settings.modules_to_save, self.settings.raw.get("bias") in (None, "none")
        if self.settings.tying and any(map(is_embedding, saved)):
            saved += HEADS
        return {
            name: array
            for name, array in self.dense.items()
            if not any(f".{module}." in f".{name}" for module in saved)
            and (biases or tensor_names.split(name)[1] != tensor_names.BIAS)
        }

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model was trained with, by whatever the file holds of its two ends; None if nothing.

        Raises FormatError for two numbers.
        """
        weights = {path: array.shape[0] for path, array in self.base_copies.items()}
        for name, array in self.dense.items():
            path, leaf = tensor_names.split(name)
            weights |= {path: array.shape[0]} if leaf == WEIGHT else {}
        weights |= {path: (m.a.shape[1] if m.embedding else m.b.shape[0]) for path, m in self.modules.items()}
        ends = {path: rows for path, rows in weights.items() if path.rpartition(".")[2] in EMBEDDINGS + HEADS}
        if len(set(ends.values())) > 1:
            raise FormatError(
                f"The PEFT adapter is of two vocabularies: {', '.join(f'{p} {n}' for p, n in ends.items())}.", AGAIN
            )
        return next(iter(ends.values()), None)

    @property
    def beyond_lora(self) -> str | None:
        """What of the adapter no MLX adapter can hold, as words, or None."""
        kinds = {
            "biases": [name for name in self.dense if name.endswith(f".{tensor_names.BIAS}")],
            "whole modules (modules_to_save)": [n for n in self.dense if not n.endswith(f".{tensor_names.BIAS}")],
            "rows of single tokens (trainable_token_indices)": list(self.token_rows),
        }
        parts = [f"{what}, such as '{names[0]}'" for what, names in kinds.items() if names]
        return "; ".join(parts) or None


def find_folder(folder: Path) -> Path:
    """The folder itself, its one subfolder with an adapter (PEFT makes one for a named one), or a file's own.

    Raises NotFoundError that lists what there is.
    """
    folder = folder.parent if folder.is_file() else folder
    if (folder / CONFIG_FILE).is_file():
        return folder
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder '{folder}'.", "a repository on the Hub is 'user/name'.")
    inner = [path.parent for path in paths.visible(folder, f"*/{CONFIG_FILE}")]
    if len(inner) == 1:
        return inner[0]
    names = ", ".join(path.name for path in inner)
    raise NotFoundError(
        f"'{folder}' has no {CONFIG_FILE}.",
        f"its subfolders hold adapters, name one of them: {names}." if names else "is it a PEFT adapter?",
    )


def read_peft(folder: Path) -> PeftAdapter:
    """Read and check a PEFT adapter folder.

    Raises NotFoundError, or FormatError with the reason why it cannot be an adapter in MLX or is damaged.
    """
    folder = find_folder(paths.expanded(folder))
    raw = files.read_json(folder / CONFIG_FILE)
    if "fine_tune_type" in raw and "peft_type" not in raw:
        raise FormatError(f"'{folder}' is an MLX adapter already.", "take it in with 'mlx-adapters add'.")
    settings = PeftSettings.parse(raw)
    tensors, scale = _read_tensors(folder)
    return _sort(PeftAdapter(folder, settings, {}, exact_scale=scale), tensors)


def _read_tensors(folder: Path) -> tuple[dict[str, mx.array], float | None]:
    tensors, scale = dict[str, mx.array](), None
    for path in peft_weight_files(folder):
        header, metadata = tensor_files.read_safetensors_header(path)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise FormatError(
                    f"'{name}' in '{path}' is of type {entry['dtype']}, not {', '.join(DTYPES)}.",
                    "load it in PEFT and save it in one of these.",
                )
        refuse_parts(header, path)
        read = tensor_files.read_safetensors(path)
        if bad := first_not_finite(read):
            raise FormatError(f"'{bad}' in '{path}' holds NaN or Inf.", "the training that made it diverged.")
        tensors |= read
        scale = _number(metadata.get(PEFT_SCALE)) if scale is None else scale
    if not tensors:
        raise FormatError(f"The PEFT adapter '{folder}' holds no tensors.", WHOLE)
    names = hf_names.without_adapter_name(hf_names.unwrapped(tensors))
    if len(set(names.values())) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise FormatError(f"The PEFT adapter has '{twice}' twice.", "the file holds more than one adapter.")
    return {names[name]: array for name, array in tensors.items()}, scale


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _sort(peft: PeftAdapter, tensors: dict[str, mx.array]) -> PeftAdapter:
    halves: dict[str, dict[Any, mx.array]] = {}
    kinds: dict[str, set[bool]] = {}
    for name, array in tensors.items():
        parsed = hf_names.parse_peft_tensor(name)
        if parsed is None:
            _set_apart(name, array, peft)
            continue
        path, leaf, embedding = parsed
        if leaf in halves.setdefault(path, {}):
            raise FormatError(f"Two tensors give the {leaf} of '{path}'.", "the file holds more than one adapter.")
        halves[path][leaf] = array
        if leaf != tensor_names.MAGNITUDE:
            kinds.setdefault(path, set()).add(embedding)
    for path, leaves in halves.items():
        peft.modules[path] = _module(path, leaves, kinds.get(path, set()), peft.settings)
        _take_for_copy(path, peft)
    if not peft.modules and peft.beyond_lora is None:
        raise FormatError(f"'{peft.folder}' holds no LoRA tensors.", WHOLE)
    return peft


def _take_for_copy(path: str, peft: PeftAdapter) -> None:
    """A whole weight beside its own update is the base's: PEFT before 0.7 called it so in a state that is saved whole.

    Raises FormatError if the config has it trained.
    """
    weight = peft.dense.pop(tensor_names.join(path, WEIGHT), None)
    if weight is None:
        return
    if any(path.endswith(name) for name in peft.settings.modules_to_save):
        raise FormatError(f"The PEFT adapter has both an update of '{path}' and its whole weight, trained.", AGAIN)
    peft.base_copies.setdefault(path, weight)


def _module(path: str, leaves: dict[str, mx.array], kinds: set[bool], settings: PeftSettings) -> PeftModule:
    a, b = leaves.get(tensor_names.LORA_A), leaves.get(tensor_names.LORA_B)
    m = leaves.get(tensor_names.MAGNITUDE)
    if a is None or b is None or len(kinds) != 1:
        raise FormatError(f"The PEFT adapter lacks one of the two factors of '{path}'.", WHOLE)
    embedding = kinds.pop()
    rows = path.rpartition(".")[2] in EMBEDDINGS + POSITIONS
    if rows and not embedding and m is None and settings.names_parameter(tensor_names.join(path, WEIGHT)):
        a, b, embedding = b.T, a.T, True  # the same matrix, named as a parameter
    if embedding and m is not None:
        raise FormatError(
            f"The PEFT adapter has DoRA on the embedding '{path}', normed over the vocabulary.",
            "MLX's DoRA norms an embedding token by token.",
        )
    if settings.dora and m is None and not embedding:
        raise FormatError(f"The PEFT adapter lacks the DoRA magnitude of '{path}'.", WHOLE)
    if m is not None and not settings.dora:
        raise FormatError(f"The PEFT adapter has a magnitude for '{path}', but its config does not say use_dora.", MEND)
    if m is not None:
        m = m.reshape(-1) if m.size == max(m.shape, default=0) else m
    if a.ndim != 2 or b.ndim != 2 or (m is not None and m.shape != (b.shape[0],)):
        raise FormatError(
            f"The factors of '{path}' have shapes {a.shape} and {b.shape}, which no LoRA layer has.", AGAIN
        )
    return PeftModule(path, a, b, m, embedding)


def _set_apart(name: str, array: mx.array, peft: PeftAdapter) -> None:
    """File a tensor that is no LoRA factor where it belongs. Raises FormatError for an unknown one."""
    path, leaf = tensor_names.split(name.removeprefix(PEFT_PREFIX))
    if not name.startswith(PEFT_PREFIX):
        raise FormatError(
            f"'{name}' does not begin with '{PEFT_PREFIX}'; PEFT itself would ignore it.",
            AGAIN,
        )
    own, _, holder = path.rpartition(".")
    if hf_names.VELORA in name:
        return
    if leaf == TOKEN_ROWS:
        peft.token_rows[path.removesuffix(".token_adapter")] = array
    elif leaf == WEIGHT and holder == ORIGINAL:  # beside the same module's trained weight
        peft.base_copies[own] = array
    elif holder == TRAINED:
        _set_apart(tensor_names.join(PEFT_PREFIX + own, leaf), array, peft)
    elif leaf == tensor_names.BIAS and (path.endswith(".lora_B") or ".lora_B." in path):
        raise FormatError(f"The PEFT adapter has lora_bias: '{name}'.", MERGE_THERE)
    elif leaf == WEIGHT and path.endswith(".base_layer"):
        peft.base_copies[path.removesuffix(".base_layer").removesuffix(".token_adapter")] = array
    elif "lora_" not in name and (
        leaf in (WEIGHT, tensor_names.BIAS)
        or any(f".{module}." in f".{name}" for module in peft.settings.modules_to_save)
    ):
        peft.dense[tensor_names.join(path.removesuffix(".base_layer"), leaf)] = array
    else:
        raise FormatError(f"The PEFT adapter has a tensor that is no part of LoRA: '{name}'.", AGAIN)


def refuse_beyond_lora(adapter: PeftAdapter) -> None:
    """Raise FormatError if the adapter holds more than an MLX adapter can, as far as can be told without its base."""
    refuse_unsaved(adapter)
    unnamed = adapter.unnamed  # which may turn out to be the base's own
    refuse_whole(replace(adapter, dense={name: array for name, array in adapter.dense.items() if name not in unnamed}))


def refuse_whole(adapter: PeftAdapter) -> None:
    """Raise FormatError if the adapter holds whole tensors."""
    if adapter.beyond_lora:
        raise FormatError(f"The PEFT adapter holds more than an MLX adapter can: {adapter.beyond_lora}.", FUSE_HINT)


def refuse_unsaved(adapter: PeftAdapter) -> None:
    """Raise FormatError for what no base can give: a classifier's head, tokens that the config promises and the file
    does not hold."""
    raw = adapter.settings.raw
    if raw.get("lora_bias"):
        raise FormatError("The PEFT adapter has lora_bias.", MERGE_THERE)
    if head := next((n for n in PEFT_CLASSIFIERS if any(f".{n}." in f".{tensor}" for tensor in adapter.dense)), None):
        task = f" (task_type {raw['task_type']})" if isinstance(raw.get("task_type"), str) else ""
        raise FormatError(
            f"The PEFT adapter answers with '{head}', a classifier's head{task}: no language model has one.",
            "take one that was trained on a language model (CAUSAL_LM).",
        )
    if raw.get("trainable_token_indices") and not adapter.token_rows:
        raise FormatError("The PEFT config has trainable_token_indices, but the file holds no rows for them.", WHOLE)
