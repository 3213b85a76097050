"""A fused model under the names, shapes, types and config of the original Hugging Face checkpoint.

Most of mlx-lm's architectures keep those names. Where they do not, the way back is here: experts that mlx-lm
stacks become one matrix each again, and GPT-2's matrices are stored transposed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_adapters.assembly.tensors import Assembly, not_rounded
from mlx_adapters.assembly.writing import Layout, Unit, copy_companions, dtype_name, write_config, write_weights
from mlx_adapters.errors import ConfigError
from mlx_adapters.events import OnEvent
from mlx_adapters.models.base import untied_config
from mlx_adapters.storage import files, hf_names, tensor_names
from mlx_adapters.system.door import mx

# Architectures whose names are known to be right; the others differ in ways that are not written down here.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2")
Split = Callable[[str, str, tuple[int, ...]], tuple[Layout, Callable[[mx.array], list[mx.array]]]]


def check_supported(model_type: str | None) -> None:
    """Raise ConfigError for an architecture whose Hugging Face names are not known here."""
    if model_type not in SUPPORTED:
        raise ConfigError(
            f"'{model_type}' models cannot be written in the Hugging Face format.",
            f"it is there for {', '.join(SUPPORTED)}; write the MLX format instead.",
        )


def write_hf(assembly: Assembly, folder: Path, on_event: OnEvent) -> int:
    """Write the unquantized model; return the bytes of the tensors. `assembly` must be planned for "none"."""
    raw = files.read_json(assembly.base.folder / "config.json")
    raw = untied_config(raw) if assembly.base.untied else raw
    model_type = raw.get("model_type")
    check_supported(model_type)
    split = _conv1d if model_type == "gpt2" else _experts
    assembly.dtype = assembly.dtype or original_dtype(raw) or assembly.source.dtype
    size = write_weights(folder, [_renamed(unit, split) for unit in assembly.units(not_rounded)], on_event)
    name = dtype_name(assembly.dtype)
    write_config(
        folder, raw | {key: name for key in ("torch_dtype", "dtype") if key in raw or key == "torch_dtype"}, None
    )
    copy_companions(assembly.base, folder)
    return size


def original_dtype(config: dict[str, Any]) -> mx.Dtype | None:
    """The type that the original checkpoint was stored in, if the config tells."""
    name = config.get("torch_dtype") or config.get("dtype")
    return getattr(mx, name) if name in ("float32", "bfloat16", "float16") else None


def _renamed(unit: Unit, split: Split) -> Unit:
    """The unit with each of its tensors renamed, transposed or cut up by `split`."""
    parts = [split(*entry) for entry in unit.layout]

    def make() -> list[mx.array]:
        arrays = unit.make()
        return [piece for (_, cut), array in zip(parts, arrays, strict=True) for piece in cut(array)]

    return replace(unit, layout=[entry for layout, _ in parts for entry in layout], make=make)


def _experts(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[Layout, Callable[[mx.array], list[mx.array]]]:
    path, leaf = tensor_names.split(name)
    stacked = hf_names.split_switch(path)
    if stacked is None:
        return [(name, dtype, shape)], lambda array: [array]
    block, projection = stacked
    names = [tensor_names.join(hf_names.expert_path(block, projection, e), leaf) for e in range(shape[0])]
    return [(n, dtype, shape[1:]) for n in names], lambda array: [array[e] for e in range(shape[0])]


def _conv1d(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[Layout, Callable[[mx.array], list[mx.array]]]:
    name = name.removeprefix("model.")
    path, leaf = tensor_names.split(name)
    if leaf != tensor_names.WEIGHT or path.rpartition(".")[2] not in hf_names.GPT2_TRANSPOSED:
        return [(name, dtype, shape)], lambda array: [array]
    return [(name, dtype, shape[::-1])], lambda array: [mx.contiguous(array.T)]
