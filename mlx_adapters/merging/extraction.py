"""An adapter out of a full fine-tune: the truncated SVD of what each layer's weight has changed by.

One layer of each model is in memory at a time. What low-rank layers cannot hold (norms, biases, layers that
were not asked for) is measured and recorded, never passed over in silence.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters.config.training import LoraConfig
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.events import Note, OnEvent, Progress, log_warnings
from mlx_adapters.merging.decomposition import (
    Decomposition,
    check_rank,
    decompose_matrix,
    join_decompositions,
    kept_energy,
)
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.models.dense import dense_weight, weight_shape
from mlx_adapters.models.layers import EMBEDDING, resolve_target_modules, weight_layers
from mlx_adapters.models.loading import load_module
from mlx_adapters.models.low_rank import LowRankUpdate, Matrix, tensors_of
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources import registry
from mlx_adapters.sources.bases import resolve_base, tuned
from mlx_adapters.storage import files, paths, replacing
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.storage.tensor_names import ADAPTER_OUTPUT, CONFIG_FILE, QUANTIZED_LEAVES, WEIGHT, join
from mlx_adapters.system import machine


@dataclasses.dataclass(frozen=True)
class _Change:
    """What one layer's weight has changed by, as (in, out) matrices (one for each expert)."""

    key: str
    matrices: list[Matrix]
    experts: bool

    @property
    def energy(self) -> float:
        return float(sum(np.vdot(m, m) for m in self.matrices))


def extract(
    finetuned: BaseLike,
    base: BaseLike,
    *,
    rank: int | Literal["auto"] = 16,
    energy: float | None = None,
    target_modules: tuple[str, ...] | Literal["all"] = "all",
    name: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
    on_event: OnEvent = log_warnings,
) -> Adapter:
    """The adapter of a given rank that is nearest to `finetuned` - `base`.

    The shares of ‖ΔW‖² kept, and the norms of what was left out, are in `metadata["extract"]`.

    Args:
        finetuned: a model (folder or Hub id), or a full fine-tune: its name, or its folder, also mlx-lm's.
        base: what it was made of.
        rank: of the adapter; "auto": what keeps the share `energy` of every layer's ‖ΔW‖².
        energy: with rank "auto"; None: 0.99.
        target_modules: names or paths of linear layers, or "all".
        name: put the result into the registry as this.
        dtype: of its tensors.
        overwrite: replace an adapter of this name.
        on_event: called with progress and notes.

    Raises ConfigError, NotFoundError, FormatError, IncompatibleError or ExistsError.

    Example:
        >>> whole = ma.fuse("demo", "sql", "out/sql-none", quantization="none").folder
        >>> ma.extract(whole, "demo", rank=4).config.rank
        4
    """
    check_rank(rank, energy)
    found_base = resolve_base(base)
    if name is not None:
        replacing.refuse_existing(registry.adapter_folder(name), overwrite, ADAPTER_OUTPUT)
        replacing.refuse_reading_inside(registry.adapter_folder(name), [registry.base_name(finetuned), found_base])
    module, _ = load_module(found_base)
    keys = resolve_target_modules(module, LoraConfig(target_modules=target_modules))
    parts: dict[str, Decomposition] = {}
    left_out: dict[str, float] = {}
    for change in _changes(module, _tuned_weights(finetuned, found_base), on_event):
        if change.key in keys and change.energy > 0:
            parts[change.key] = _decompose(change, None if rank == "auto" else rank, energy or 0.99)
        elif change.energy > 0:
            left_out[change.key] = change.energy**0.5
    if not parts:
        raise IncompatibleError(
            f"'{finetuned}' and '{base}' have the same weights in the layers asked for.",
            f"what differs: {', '.join(sorted(left_out)[:5])}." if left_out else "is it the right pair?",
        )
    if left_out:
        on_event(Note(f"{len(left_out)} changed tensors are not in the adapter, e.g. {min(left_out)}.", "warning"))
    return _assemble(parts, left_out, found_base, str(finetuned), getattr(mx, dtype), name, overwrite)


def _assemble(
    parts: dict[str, Decomposition],
    left_out: dict[str, float],
    base: Base,
    finetuned: str,
    dtype: mx.Dtype,
    name: str | None,
    overwrite: bool,
) -> Adapter:
    rank = max(part.rank for part in parts.values())
    weights: dict[str, mx.array] = {}
    for key, part in parts.items():
        weights |= tensors_of(key, LowRankUpdate(*part.factors(rank)), dtype)
    recipe = {"finetuned": finetuned, **kept_energy(parts, rank), "left_out": left_out}
    metadata = {"source": "extract", "extract": recipe, "base": base.record()} | machine.made_now()
    adapter = Adapter(AdapterConfig(rank, 1.0, tuple(parts)), weights, metadata).check()
    return adapter if name is None else registry.register(adapter, name, overwrite=overwrite)


def _decompose(change: _Change, rank: int | None, energy: float) -> Decomposition:
    parts = [decompose_matrix(matrix, rank, energy) for matrix in change.matrices]
    return join_decompositions(parts, change.experts)


# -- reading the two models, layer by layer -------------------------------------------------------------


def _tuned_weights(finetuned: BaseLike, base: Base) -> Any:
    """The fine-tuned module with lazy weights, or the base with an mlx-lm full fine-tune's weights over it."""
    folder = paths.expanded(registry.base_name(finetuned))
    if (folder / CONFIG_FILE).is_file():
        if files.read_json(folder / CONFIG_FILE).get("fine_tune_type") != "full":
            raise FormatError(f"'{finetuned}' is an adapter, not a full fine-tune.", "'merge --method svd' reduces it.")
        return load_module(tuned(base, folder))[0]
    return load_module(resolve_base(finetuned))[0]


def _changes(base: Any, tuned: Any, on_event: OnEvent) -> Iterator[_Change]:
    """Each layer's change, and each other parameter's as one of (1, size); frees what has been read."""
    old, new = weight_layers(base), weight_layers(tuned)
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())[0]
        raise IncompatibleError(f"The models differ in their layers: only one has '{odd}'.")
    for done, (key, layer) in enumerate(old.items(), start=1):
        if weight_shape(layer) != weight_shape(new[key]):
            shapes = f"{weight_shape(new[key])}, the base's {weight_shape(layer)}"
            raise IncompatibleError(f"'{key}' differs in shape: the fine-tune's is {shapes}.")
        difference = as_numpy(dense_weight(new[key], mx.float32) - dense_weight(layer, mx.float32))
        if not np.isfinite(difference).all():
            raise FormatError(f"'{join(key, WEIGHT)}' holds NaN or Inf in one of the models.")
        experts, embedding = difference.ndim == 3, isinstance(layer, EMBEDDING)
        matrices = list(difference) if experts else [difference]
        yield _Change(key, [m if embedding else m.T for m in matrices], experts)
        for seen in (layer, new[key]):
            for leaf in QUANTIZED_LEAVES:
                seen.pop(leaf, None)
        on_event(Progress("extract", done, len(old), "layer"))
    rest, tuned_rest = dict(tree_flatten(base.parameters())), dict(tree_flatten(tuned.parameters()))
    for key in rest.keys() & tuned_rest.keys():
        difference = as_numpy((tuned_rest[key] - rest[key]).astype(mx.float32))
        yield _Change(key, [difference.reshape(1, -1)], False)
