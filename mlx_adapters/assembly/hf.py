"""A fused model under the names, shapes, types and config of the original Hugging Face checkpoint.

What mlx-lm makes of such a checkpoint is found by trying (see `checkpoints.probing`), and is turned around here:
experts that it stacks become one matrix each again, norms lose the one that it adds, transposed matrices are turned.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.assembly.plan import LayerPlan
from mlx_adapters.assembly.tensors import Assembly, Rounded
from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.assembly.writing import (
    OTHER_BITS,
    Unit,
    Written,
    copy_companions,
    dtype_name,
    write_config,
    write_weights,
)
from mlx_adapters.checkpoints.forms import UNLIKE
from mlx_adapters.checkpoints.inverse import Group, groups_of
from mlx_adapters.checkpoints.left_out import left_out, without_place
from mlx_adapters.checkpoints.originals import layout_of
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import UNQUANTIZED, Precision
from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.events import OnEvent
from mlx_adapters.models.base import Base, tying_config
from mlx_adapters.models.layers import adaptable_layers, tied
from mlx_adapters.models.loading import load_module
from mlx_adapters.storage import files, tensor_names
from mlx_adapters.storage.tensor_files import StoredTensor
from mlx_adapters.storage.tensor_names import QUANTIZED_LEAVES, WEIGHT
from mlx_adapters.system.door import mx


class HfWriter:
    """Unquantized weights under the names of the original checkpoint."""

    precision, rounds = UNQUANTIZED, False

    def __init__(self, precision: Precision, dtype: mx.Dtype | None, base: Base) -> None:
        require(precision.quantization is None, "The format 'hf' takes --bits none.", OTHER_BITS)
        config = files.read_json(base.folder / "config.json")
        module, _ = load_module(base)
        self._config = tying_config(base.changed(config), tied(adaptable_layers(module)))
        self._dtype = dtype or original_dtype(config)
        kind = config.get("model_type")
        require(
            kind not in UNLIKE,
            f"transformers has other names for '{kind}' models, which mlx-lm does not read.",
            "write the MLX format instead.",
        )
        self._layout = layout_of(base, module)
        self.loadable = not self._layout.unpacked
        try:
            self._groups = groups_of(self._layout, _dense_names(module))
        except FormatError as error:
            message = f"This '{kind}' model cannot be written in the Hugging Face format. {error.message}"
            raise ConfigError(message, "write the MLX format instead.") from None

    def dtype(self, source: BaseWeights) -> mx.Dtype:
        """The one that is asked for, else the original checkpoint's."""
        return self._dtype or source.dtype

    def scale_dtype(self) -> None:
        """The same."""

    def settled(self, base: Base, source: BaseWeights, plans: list[LayerPlan]) -> list[LayerPlan]:
        """As it is."""
        return plans

    def stored(self, path: str, rows: mx.array) -> mx.array:
        """As they are."""
        return rows

    def beside_bytes(self, assembly: Assembly) -> int:
        """Of what mlx-lm leaves out and the original names."""
        return sum(tensor.nbytes for tensor in self._others(assembly).values())

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """Write the weights in shards, the original's config.json, tokenizer and the like."""
        made = {entry[0]: unit for unit in assembly.units(rounded) for entry in unit.layout}
        units = [_unit(group, made) for group in self._groups]
        others = self._others(assembly)
        written = write_weights(folder, units, on_event, more=others, made_by="pt")
        name = dtype_name(assembly.weight_dtype)
        types = {key: name for key in ("torch_dtype", "dtype") if key in self._config or key == "torch_dtype"}
        write_config(folder, self._config | types, None)
        copy_companions(assembly.base, folder)
        return replace(written, notes=without_place(assembly.base, "hf", others))

    def _others(self, assembly: Assembly) -> dict[str, StoredTensor]:
        return {name: t for name, t in left_out(assembly.base)[0].items() if name in self._layout.shapes}


def original_dtype(config: dict[str, Any]) -> mx.Dtype | None:
    """The type that the original checkpoint was stored in, if the config tells."""
    name = config.get("torch_dtype") or config.get("dtype")
    return getattr(mx, name) if name in ("float32", "bfloat16", "float16") else None


def _dense_names(module: Any) -> list[str]:
    """The names of the module's parameters as they are when no layer is packed."""
    names = {name: None for name, _ in tree_flatten(module.parameters())}
    packed = {path for path, leaf in map(tensor_names.split, names) if leaf == tensor_names.SCALES}
    beside = {tensor_names.join(path, leaf) for path in packed for leaf in (*QUANTIZED_LEAVES, "global_scale")}
    kept = beside - {tensor_names.join(path, WEIGHT) for path in packed}
    return sorted((name for name in names if name not in kept), key=tensor_names.natural_order)


def _unit(group: Group, made: dict[str, Unit]) -> Unit:
    """The unit of the original's tensors that the units of a group's targets give."""
    parts = {id(made[name]): made[name] for name in group.targets}.values()
    dtypes = {name: dtype for unit in parts for name, dtype, _ in unit.layout}
    layout = [(name, dtypes[group.target_of(name)], shape) for name, shape in group.sources.items()]

    def make() -> list[mx.array]:
        arrays = {e[0]: array for unit in parts for e, array in zip(unit.layout, unit.make(), strict=True)}
        return group.sources_of(arrays)

    return Unit(layout, make)
