"""Calibrated rounding of a whole model, block by block, each result put on the disk at once."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mlx_adapters import files, tensor_files
from mlx_adapters.config import Quantization
from mlx_adapters.door import mx
from mlx_adapters.events import OnEvent
from mlx_adapters.fusion.blocks import TokenBatch, Variant
from mlx_adapters.fusion.hessian import Collector, Moments, mix
from mlx_adapters.fusion.plan import LayerPlan, Updates
from mlx_adapters.fusion.rounding import OUTPUT_DAMPING, Packed, calibrated
from mlx_adapters.model import Base


class Spool:
    """Rounded layers on the disk, by path and precision, until the shards are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: dict[tuple[str, Quantization], float] = {}
        self._files: dict[tuple[str, Quantization], Path] = {}

    def put(self, path: str, packed: Packed, loss: float) -> None:
        """Keep one rounded layer."""
        key = (path, packed.quantization)
        self.losses[key] = loss
        self._files[key] = self.folder / f"{len(self._files):06d}.safetensors"
        tensor_files.write_safetensors(self._files[key], packed.tensors)

    def get(self, path: str, quantization: Quantization | None) -> Packed | None:
        """The layer rounded to that precision, or None."""
        file = self._files.get((path, quantization)) if quantization is not None else None
        if file is None or quantization is None:
            return None
        parts = tensor_files.read_safetensors(file)
        return Packed(parts["weight"], parts["scales"], parts.get("biases"), quantization)

    def remove(self) -> None:
        """Delete everything."""
        if self.folder.is_dir():
            files.remove(self.folder)


def round_layers(
    base: Base,
    updates: Updates,
    plans: Sequence[LayerPlan],
    batches: Sequence[TokenBatch],
    dtype: mx.Dtype,
    spool: Spool,
    on_event: OnEvent,
    also: Iterable[Quantization] = (),
    seed: int = 0,
    thorough: bool = True,
) -> None:
    """Round every layer of `plans` that is to be quantized anew, to its target and to the precisions `also`."""
    wanted = {plan.path: plan.rounded_to for plan in plans if plan.rounded_to is not None}
    if not wanted:
        return
    forward, backward = Variant(base, updates), Variant(base, updates)
    for _, moments in Collector(forward, backward, set(wanted), batches).run(on_event, seed):
        for path, found in moments.items():
            start = backward.source.packed(path)
            for target in dict.fromkeys([wanted[path], *also]):
                main = thorough and target == wanted[path]
                packed, loss = round_layer(backward.weight(path), found, target, dtype, start, together=main)
                spool.put(path, packed, loss)


def round_layer(
    weight: mx.array,
    moments: Moments,
    target: Quantization,
    dtype: mx.Dtype,
    start: Packed | None,
    together: bool = True,
) -> tuple[Packed, float]:
    """Round one layer, experts each by their own moments; also returns the error that Fisher weights expect.

    The error is about tr(G E H Eᵀ) with the unscaled moments of what the predictions feel: proportional to the KL
    that the layer alone would cost. `together`: see `calibrated`.
    """
    plain, fisher = np.array(moments.plain), np.array(moments.fisher)
    if weight.ndim == 2:
        outputs = None if moments.outputs is None else np.array(moments.outputs)
        # Few tokens know little of how outputs are felt together.
        damping = OUTPUT_DAMPING + weight.shape[0] / max(moments.output_tokens, 1)
        packed, loss = calibrated(
            weight, mix(plain, fisher), target, dtype, start, outputs, together=together, output_damping=damping
        )
        return packed, loss * weight.size * _mean_diagonal(fisher)
    parts, total = [], 0.0
    for e in range(weight.shape[0]):
        part, loss = calibrated(weight[e], mix(plain[e], fisher[e]), target, dtype, _expert(start, e))
        parts.append(part)
        total += loss * weight[e].size * _mean_diagonal(fisher[e])
    stacked = {name: mx.stack([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return Packed(stacked["weight"], stacked["scales"], stacked.get("biases"), target), total


def _mean_diagonal(fisher: np.ndarray) -> float:
    return float(np.trace(fisher)) / len(fisher)


def _expert(start: Packed | None, e: int) -> Packed | None:
    if start is None:
        return None
    return Packed(
        start.weight[e], start.scales[e], None if start.biases is None else start.biases[e], start.quantization
    )
