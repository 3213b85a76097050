"""A fused model under the names, shapes, types and config of the original Hugging Face checkpoint.

Most of mlx-lm's architectures keep those names. Where they do not, the way back is here: experts that mlx-lm
stacks become one matrix each again, and GPT-2's matrices are stored transposed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_adapters.assembly.tensors import Assembly, Rounded
from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.assembly.writing import (
    OTHER_BITS,
    Layout,
    Unit,
    Written,
    copy_companions,
    dtype_name,
    write_config,
    write_weights,
)
from mlx_adapters.checkpoints.left_out import without_place
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import UNQUANTIZED, Precision
from mlx_adapters.events import OnEvent
from mlx_adapters.models.base import Base
from mlx_adapters.storage import files, hf_names, tensor_names
from mlx_adapters.system.door import mx

# Architectures whose names are known to be right; the others differ in ways that are not written down here.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2")
Split = Callable[[str, str, tuple[int, ...]], tuple[Layout, Callable[[mx.array], list[mx.array]]]]


class HfWriter:
    """Unquantized weights under the names of the original checkpoint."""

    precision, rounds, loadable = UNQUANTIZED, False, True

    def __init__(self, precision: Precision, dtype: mx.Dtype | None, base: Base) -> None:
        require(precision.quantization is None, "The format 'hf' takes --bits none.", OTHER_BITS)
        config = files.read_json(base.folder / "config.json")
        self._config = base.changed(config)
        self._dtype = dtype or original_dtype(config)
        model_type = config.get("model_type")
        require(
            model_type in SUPPORTED,
            f"'{model_type}' models cannot be written in the Hugging Face format.",
            f"it is there for {', '.join(SUPPORTED)}; write the MLX format instead.",
        )
        self._split = _conv1d if model_type == "gpt2" else _experts

    def dtype(self, source: BaseWeights) -> mx.Dtype:
        """The one that is asked for, else the original checkpoint's."""
        return self._dtype or source.dtype

    def stored(self, rows: mx.array) -> mx.array:
        """As they are."""
        return rows

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """Write the weights in shards, the original's config.json, tokenizer and the like."""
        units = [_renamed(unit, self._split) for unit in assembly.units(rounded)]
        size = write_weights(folder, units, on_event)
        name = dtype_name(assembly.scale_dtype)
        types = {key: name for key in ("torch_dtype", "dtype") if key in self._config or key == "torch_dtype"}
        write_config(folder, self._config | types, None)
        copy_companions(assembly.base, folder)
        return Written(size, without_place(assembly.base, "hf"))


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
