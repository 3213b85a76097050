"""The formats that a fused model can be written in. Each is a `Writer`; this one is mlx-lm's own."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mlx_adapters.assembly.gguf import GgufWriter
from mlx_adapters.assembly.hf import HfWriter
from mlx_adapters.assembly.plan import LayerPlan, packed_shapes
from mlx_adapters.assembly.tensors import Assembly, Rounded, Writer
from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.assembly.writing import (
    Written,
    copy_companions,
    dtype_name,
    tensor_bytes,
    write_config,
    write_weights,
)
from mlx_adapters.checkpoints.left_out import Stored, hand_on, left_out, optional_head, quantization_with
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import Precision
from mlx_adapters.events import OnEvent
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import equal_weights
from mlx_adapters.system.door import mx


class MlxWriter:
    """A folder that mlx-lm loads: any precision, and what mlx-lm leaves out of the base is handed on."""

    rounds, loadable = False, True

    def __init__(self, precision: Precision, dtype: mx.Dtype | None, base: Base) -> None:
        self.precision, self._dtype = precision.settled(base.quantization), dtype
        self._base = base

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

    def beside_bytes(self, assembly: Assembly) -> int:
        """Of what mlx-lm leaves out, and of layers that are written once more."""
        twins = {*self.twins(assembly).values()}
        again = (packed_shapes(p, dtype_name(assembly.scale_dtype)) for p in assembly.plans if p.path in twins)
        handed_on = sum(tensor.nbytes for tensor in self._left_out[0].values())
        return handed_on + sum(tensor_bytes(dtype, shape) for leaves in again for _, dtype, shape in leaves)

    @cached_property
    def _left_out(self) -> tuple[Stored, list[str]]:
        return left_out(self._base)

    def twins(self, assembly: Assembly) -> dict[str, str]:
        """Layers that are written once more, where mlx-lm does not look: the new name, and that of the layer."""
        return {}

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """Write the weights in shards, what is handed on, config.json, tokenizer and the like."""
        base, twins, config = assembly.base, self.twins(assembly), dict(assembly.base.config)
        beside = self.beside_bytes(assembly)
        written = write_weights(folder, assembly.units(rounded), on_event)
        if assembly.dtype is not None:
            config |= {key: dtype_name(assembly.dtype) for key in ("torch_dtype", "dtype") if key in config}
        others, missing = self._left_out
        notes = hand_on(others, missing, folder, twins)
        quantization = assembly.quantization or {}
        quantization |= {twin: quantization[own] for twin, own in twins.items() if own in quantization}
        write_config(folder, config, quantization_with(others, base.config, quantization or None))
        copy_companions(base, folder)
        return replace(written, size_bytes=written.size_bytes + beside, beside_bytes=beside, notes=tuple(notes))


class VlmWriter(MlxWriter):
    """A folder for mlx-vlm too, which makes an output layer where mlx-lm does well without (Gemma 3).

    It gives that layer the embedding's `weight`, whatever else there is. So the scales of a packed one have to lie
    there in the layer's name, and a layer of the base's own must be the embedding's equal, and remain so.
    """

    def settled(self, base: Base, source: BaseWeights, plans: list[LayerPlan]) -> list[LayerPlan]:
        """As it is. Raises ConfigError where mlx-vlm would compute something else than mlx-lm."""
        if (ends := self._ends) and ends[1] in source.layers:
            changed = any(plan.changed for plan in plans if plan.path in ends)
            require(
                not changed and equal_weights(*(source.layers[path] for path in ends)),
                f"mlx-vlm takes the embedding of '{base.name}' for its output layer too, and "
                f"{'the adapter changes one of them' if changed else 'the two differ'}.",
                "leave --for out: mlx-lm computes with both.",
            )
        return plans

    def twins(self, assembly: Assembly) -> dict[str, str]:
        """The output layer, where the embedding is packed and the model has no other."""
        packed = {plan.path for plan in assembly.plans if plan.target is not None}
        lacks = self._ends is not None and self._ends[1] not in assembly.source.layers
        return {self._ends[1]: self._ends[0]} if self._ends and lacks and self._ends[0] in packed else {}

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """The same, with an output layer that is rounded as the embedding is."""
        embedding, head = self._ends or ("", "")
        plans = {plan.path: plan for plan in assembly.plans}
        if head in plans:
            plans[head] = replace(plans[embedding], path=head)
            assembly.plans = list(plans.values())
        return super().write(assembly, folder, lambda p, to: rounded(embedding if p == head else p, to), on_event)

    @cached_property
    def _ends(self) -> tuple[str, str] | None:
        return optional_head(self._base)


WRITERS: dict[str, type[Writer]] = {"mlx": MlxWriter, "mlx-vlm": VlmWriter, "hf": HfWriter, "gguf": GgufWriter}


def make_writer(options: FuseOptions, precision: Precision, dtype: str, base: Base) -> Writer:
    """The writer of a format. Raises ConfigError for what it cannot hold, ModelError if a package is missing."""
    return WRITERS[options.program if options.program in WRITERS else options.format](
        precision, None if dtype == "auto" else getattr(mx, dtype), base
    )
