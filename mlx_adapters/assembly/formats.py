"""The formats that a fused model can be written in. Each is a `Writer`; this one is mlx-lm's own."""

from pathlib import Path

from mlx_adapters.assembly.gguf import GgufWriter
from mlx_adapters.assembly.hf import HfWriter
from mlx_adapters.assembly.plan import LayerPlan
from mlx_adapters.assembly.tensors import Assembly, Rounded, Writer
from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.assembly.writing import Written, copy_companions, dtype_name, write_config, write_weights
from mlx_adapters.checkpoints.left_out import hand_on, quantization_with
from mlx_adapters.config.quantization import Precision
from mlx_adapters.events import OnEvent
from mlx_adapters.models.base import Base
from mlx_adapters.system.door import mx


class MlxWriter:
    """A folder that mlx-lm loads: any precision, and what mlx-lm leaves out of the base is handed on."""

    rounds, loadable = False, True

    def __init__(self, precision: Precision, dtype: mx.Dtype | None, base: Base) -> None:
        self.precision, self._dtype = precision.settled(base.quantization), dtype

    def dtype(self, source: BaseWeights) -> mx.Dtype | None:
        """The one that is asked for."""
        return self._dtype

    def scale_dtype(self) -> None:
        """The same."""

    def settled(self, base: Base, source: BaseWeights, plans: list[LayerPlan]) -> list[LayerPlan]:
        """As it is."""
        return plans

    def stored(self, path: str, rows: mx.array) -> mx.array:
        """As they are."""
        return rows

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """Write the weights in shards, what is handed on, config.json, tokenizer and the like."""
        base, config = assembly.base, dict(assembly.base.config)
        size = write_weights(folder, assembly.units(rounded), on_event)
        if assembly.dtype is not None:
            config |= {key: dtype_name(assembly.dtype) for key in ("torch_dtype", "dtype") if key in config}
        others, notes = hand_on(base, folder)
        write_config(folder, config, quantization_with(others, base.config, assembly.quantization))
        copy_companions(base, folder)
        return Written(size, tuple(notes))


WRITERS: dict[str, type[Writer]] = {"mlx": MlxWriter, "hf": HfWriter, "gguf": GgufWriter}


def make_writer(format: str, precision: Precision, dtype: str, base: Base) -> Writer:
    """The writer of a format. Raises ConfigError for what it cannot hold, ModelError if a package is missing."""
    return WRITERS[format](precision, None if dtype == "auto" else getattr(mx, dtype), base)
