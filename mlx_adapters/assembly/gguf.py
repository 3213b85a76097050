"""A fused model as one GGUF file (f16, bf16 or q8_0) for llama.cpp, for architectures whose names are known.

llama.cpp expects the rows of q_proj and k_proj of llama-like models in the order of interleaved rotary
embeddings, the tokenizer as bare lists, and matrices with their axes named in reverse (which the `gguf` package
does). Norms and biases stay float32.
"""

import errno
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.assembly.gguf_tokenizer import check_strings, read_tokenizer
from mlx_adapters.assembly.survival import not_finite
from mlx_adapters.assembly.tensors import Assembly, Rounded
from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.assembly.writing import OTHER_BITS, Unit, Written
from mlx_adapters.checkpoints.left_out import without_place
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import UNQUANTIZED, Precision
from mlx_adapters.errors import ConfigError, FormatError, ModelError
from mlx_adapters.events import Note, OnEvent, Progress
from mlx_adapters.models.base import Base
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.rounding.grids import to_numpy
from mlx_adapters.storage import paths, tensor_names
from mlx_adapters.system.door import mx

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FILE_NAME = "model.gguf"
LARGEST = {"f16": 65504.0, "q8_0": 127 * 65504.0}  # what fits; float32 and bfloat16 reach as far as ours


class GgufWriter:
    """One file of unquantized weights, or of q8_0, which the file's own rounding makes."""

    loadable = False

    def __init__(self, precision: Precision, dtype: mx.Dtype | None, base: Base) -> None:
        self.rounds = precision.quantization is not None
        q8_0 = precision.bits == 8 and precision.mode in (None, "affine") and precision.group_size in (None, 32, 64)
        require(not self.rounds or q8_0, "The format 'gguf' takes --bits none or 8.", OTHER_BITS)
        self.precision = Precision(8, 32, "affine") if self.rounds else UNQUANTIZED
        self.kind = "q8_0" if self.rounds else {mx.float32: "f32", mx.bfloat16: "bf16"}.get(dtype, "f16")
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ModelError("Writing GGUF needs the package 'gguf'.", "pip install 'mlx_adapters[gguf]'.") from None
        _check_supported(base.config)

    def dtype(self, source: BaseWeights) -> mx.Dtype:
        """The file's types are made from float32."""
        return mx.float32

    def stored(self, rows: mx.array) -> mx.array:
        """The rows as they come back from the file."""
        import gguf

        form = _form(rows.shape, self.kind)
        return mx.array(gguf.quants.dequantize(gguf.quants.quantize(to_numpy(rows), form), form))

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """Write `folder`/model.gguf. Raises FormatError for a tokenizer or numbers that cannot be written correctly."""
        import gguf

        config, loaded = assembly.base.config, load_tokenizer_of(assembly.base)
        tokenizer = read_tokenizer(assembly.base.tokenizer or assembly.base.folder, config["vocab_size"], loaded)
        for text in check_strings(tokenizer, loaded):
            on_event(Note(f"llama.cpp cuts up {text!r} otherwise than this tokenizer.", "warning"))
        units, path = assembly.units(rounded), folder / FILE_NAME
        paths.require_free_space(folder, 4 * assembly.parameters)
        with paths.storage_errors(path):
            writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
            try:
                _write_settings(writer, config, assembly.base.name, self.kind)
                tokenizer.write(writer)
                _write_tensors(writer, units, config, self.kind, on_event)
            finally:
                writer.close()
        return Written(path.stat().st_size, without_place(assembly.base, "gguf"))


def _check_supported(config: dict[str, Any]) -> None:
    """Raise ConfigError for a model that cannot be written correctly."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"'{model_type}' models cannot be written as GGUF.",
            f"it is there for {', '.join(ARCHITECTURES)}; for others write --format hf and use llama.cpp's converter.",
        )
    scaling = config.get("rope_scaling")
    if scaling and (scaling.get("rope_type") or scaling.get("type")) not in (None, "default", "linear"):
        raise ConfigError(
            "This model's rotary scaling is not written to GGUF here.",
            "write --format hf and use llama.cpp's converter.",
        )


def _write_settings(writer: Any, config: dict[str, Any], name: str, kind: str) -> None:
    import gguf

    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_name(Path(name).name)
    writer.add_file_type(getattr(gguf.LlamaFileType, file_types[kind]))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    scaling = config.get("rope_scaling") or {}
    if (scaling.get("rope_type") or scaling.get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def _write_tensors(writer: Any, units: list[Unit], config: dict[str, Any], kind: str, on_event: OnEvent) -> None:
    import gguf

    entries = [(unit, entry) for unit in units for entry in unit.layout]
    chosen = []
    for _, (name, _, shape) in entries:
        form = _form(shape, kind)
        nbytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, form)))
        writer.add_tensor_info(tensor_names.to_gguf(name), shape, np.dtype(np.float32), nbytes, raw_dtype=form)
        chosen.append(form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, ((unit, (name, _, _)), form) in enumerate(zip(entries, chosen, strict=True), 1):
        (array,) = unit.make()
        values = _interleaved(name, to_numpy(array), config)
        _require_room(name, values, form.name.lower())
        try:
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), form))
        except OSError as error:  # NumPy does not tell which
            raise OSError(error.errno or errno.ENOSPC, str(error)) from error
        mx.clear_cache()
        on_event(Progress("write", number, len(entries), "layer"))


def _require_room(name: str, values: np.ndarray, form: str) -> None:
    """Raise FormatError for NaN, and for what the file's type cannot hold."""
    reach, limit = float(np.abs(values).max(initial=0)), LARGEST.get(form, np.finfo(np.float32).max)
    if not np.isfinite(reach):
        raise not_finite(tensor_names.split(name)[0])
    if reach > limit:
        raise FormatError(
            f"'{name}' holds {reach:.3g}, which {form} cannot (up to {limit:.3g}).", "pass --dtype bfloat16."
        )


def _form(shape: tuple[int, ...], kind: str) -> Any:
    """A tensor's type in the file: vectors stay float32, and q8_0 needs rows of whole blocks of 32."""
    import gguf

    name = "f32" if len(shape) != 2 else "f16" if kind == "q8_0" and shape[-1] % 32 else kind
    return getattr(gguf.GGMLQuantizationType, name.upper())


def _interleaved(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of q_proj and k_proj of llama-like models, each head's halves interleaved."""
    if ARCHITECTURES[config["model_type"]] != "llama":
        return values
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    count = heads.get(tensor_names.split(name)[0].rpartition(".")[2])
    if count is None:
        return values
    halves = values.reshape(count, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
