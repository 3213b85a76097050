"""Adapters in, one adapter out: merge, subtract, scale, interpolate. The result records its recipe.

An adapter has one rank and one scale, so layers of lower rank are padded with zeros and what else a layer
needs is folded into its factors. Both are exact. Results are float32; where the sum only puts the sources'
own numbers side by side (`cat` with factors that are powers of two), they keep their type, too.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import finite, require, to_mapping, weights_of
from mlx_adapters.config.merging import MergeMethod, MergeSettings
from mlx_adapters.config.quantization import Dtype
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.merging.arithmetic import SignMethod
from mlx_adapters.merging.decomposition import Decomposition, check_rank, kept_energy, pad_rank
from mlx_adapters.merging.methods import METHODS, Method, Options, merge_updates
from mlx_adapters.models.adapter import Adapter, AdapterLike, place_of, template_of, weights_file
from mlx_adapters.models.low_rank import LowRankUpdate, factors_of, stack_tensors, tensors_of, update_of, update_shape
from mlx_adapters.models.metadata import AdapterConfig, base_of
from mlx_adapters.sources import lookup, registry
from mlx_adapters.storage import files, paths, replacing
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, LORA_A, LORA_B, join, natural_order
from mlx_adapters.system import machine

MOST_TO_FIRST = 2.0**60  # how much stronger than the first a share may be for that scale to be the result's


def merge(
    sources: AdapterLike | Iterable[AdapterLike],
    weights: Sequence[float] | None = None,
    *,
    method: MergeMethod = "cat",
    name: str | None = None,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    sign_method: SignMethod | None = None,
    dtype: Dtype = "auto",
    any_base: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = log_warnings,
) -> Adapter:
    """One adapter out of several.

    The share of the exact result's energy ‖ΔW‖² that a truncated rank keeps is in `metadata["merge"]`, over all layers
    and for each.

    Args:
        sources: adapters of one base.
        weights: one for each source, of either sign; None: 1/n each.
        method: "cat": the exact weighted sum, ranks add up (arXiv 2212.04089); "svd": the nearest to it of a given
            rank; "linear", "ties" (arXiv 2306.01708), "dare-linear", "dare-ties" (arXiv 2311.03099), "magnitude-prune":
            on the factors; these with "-svd": on full updates.
        name: put the result into the registry as this.
        rank: of the result, for "svd" and the methods that end in "-svd"; "auto": what keeps `energy`; None: the
            largest source's.
        energy: share of ‖ΔW‖² to keep with rank "auto"; None: 0.99.
        density: share of entries that pruning keeps.
        seed: of random pruning.
        sign_method: how "ties" elects signs: by the "total" of the weights or by their "frequency".
        dtype: of the result; "auto": the sources'.
        any_base: merge adapters that were trained on different bases.
        overwrite: replace an adapter of this name.
        on_event: called with progress and notes.

    Raises ConfigError, NotFoundError, FormatError, IncompatibleError or ExistsError.

    Example:
        >>> both = ma.merge(["sql", "chat"], [0.7, 0.3], name="both")
        >>> both.config.rank
        8
        >>> ma.merge(["sql", "chat"], method="svd", rank=4).config.rank
        4
    """
    adapters = [lookup.load_adapter(source) for source in lookup.several(sources)]
    _require_place(name, overwrite, adapters)
    weights = _checked_weights(adapters, weights)
    asked = MergeSettings(method, rank, energy, density, seed, sign_method, dtype, any_base)
    chosen, seed = _checked_method(asked), asked.seed or 0
    check_mergeable(adapters, asked.any_base)
    if chosen.space == "stack":
        adapters, weights = _without_zeros(adapters, weights)
    options = Options(
        density=1.0 if asked.density is None else asked.density,
        sign_method=asked.sign_method or "total",
        scale=_common_scale(adapters, weights) if method == "cat" else 1.0,
        rank=None if asked.rank == "auto" else asked.rank or max(adapter.config.rank for adapter in adapters),
        energy=0.99 if asked.energy is None else asked.energy,
    )
    result_dtype = _result_dtype(asked.dtype, method, adapters, weights, options)
    if method == "cat":
        result, energies = _stack_layers(adapters, weights, options, result_dtype), {}
    else:
        merged = _merge_layers(method, chosen, adapters, weights, options, seed, on_event)
        result = _assemble(merged, adapters, options, result_dtype)
        cut = {key: layer for key, layer in merged.items() if isinstance(layer, Decomposition)}
        energies = kept_energy(cut, result.config.rank)
    recipe = {"method": method, "sources": [_describe(*pair) for pair in zip(adapters, weights, strict=True)]}
    seed_used = seed if chosen.prune == "random" else None
    settings = {"density": asked.density, "sign_method": asked.sign_method, "seed": seed_used}
    recipe |= {key: value for key, value in settings.items() if value is not None} | energies
    return _finish(result, adapters, recipe, name, overwrite)


def subtract(
    minuend: AdapterLike,
    subtrahend: AdapterLike,
    *,
    weight: float = 1.0,
    name: str | None = None,
    any_base: bool = False,
    overwrite: bool = False,
) -> Adapter:
    """ΔA - weight · ΔB, exactly: takes away what the second adapter has learned (arXiv 2212.04089).

    Args:
        minuend: A.
        subtrahend: B, of the same base.
        weight: of B.
        name: put the result into the registry as this.
        any_base: take adapters that were trained on different bases.
        overwrite: replace an adapter of this name.

    Raises ConfigError, NotFoundError, FormatError, IncompatibleError or ExistsError.

    Example:
        >>> ma.subtract("sql", "chat", weight=0.5, name="sql-only").name
        'sql-only'
    """
    return merge(
        [minuend, subtrahend], [1.0, -finite(weight, "The weight")], name=name, any_base=any_base, overwrite=overwrite
    )


def scale(source: AdapterLike, factor: float, *, name: str | None = None, overwrite: bool = False) -> Adapter:
    """factor · ΔW, exactly: the same tensors under another scale.

    Args:
        source: the adapter.
        factor: any number but 0.
        name: put the result into the registry as this.
        overwrite: replace an adapter of this name.

    Raises ConfigError, NotFoundError, FormatError or ExistsError.

    Example:
        >>> ma.scale("sql", 0.5).config.scale == ma.load_adapter("sql").config.scale / 2
        True
    """
    factor = finite(factor, "The factor")
    require(factor != 0, "The factor must be a number other than 0.")
    adapter = lookup.load_adapter(source)
    _require_place(name, overwrite, [adapter])
    check_mergeable([adapter], any_base=True)
    config = dataclasses.replace(adapter.config, scale=adapter.config.scale * factor)
    result = Adapter(config, adapter.weights)
    return _finish(result, [adapter], {"method": "scale", "sources": [_describe(adapter, factor)]}, name, overwrite)


def interpolate(
    first: AdapterLike, second: AdapterLike, *, steps: int = 5, any_base: bool = False
) -> list[tuple[float, Adapter]]:
    """(t, (1 - t) · first + t · second) for evenly spaced t from 0 to 1, by exact sums.

    Args:
        first: the adapter at t = 0.
        second: the adapter at t = 1, of the same base.
        steps: how many.
        any_base: take adapters that were trained on different bases.

    Raises ConfigError, NotFoundError, FormatError or IncompatibleError.

    Example:
        >>> [t for t, adapter in ma.interpolate("sql", "chat", steps=3)]
        [0.0, 0.5, 1.0]
    """
    require(steps >= 2, f"steps must be at least 2, not {steps}.", "the two ends count.")
    pair = [lookup.load_adapter(first), lookup.load_adapter(second)]
    points = [i / (steps - 1) for i in range(steps)]
    return [(t, merge(pair, [1 - t, t], any_base=any_base)) for t in points]


def check_mergeable(adapters: Sequence[Adapter], any_base: bool) -> None:
    """Raise IncompatibleError for DoRA sources, for other bases, and for layers of other shapes."""
    for adapter in adapters:
        if adapter.config.type == "dora":
            raise IncompatibleError(
                f"'{adapter.name}' is a DoRA adapter: its update is no low-rank matrix, so it cannot be merged as one.",
                "'fuse' puts DoRA adapters into the base's weights.",
            )
    first = adapters[0]
    for other in adapters[1:]:
        if not any_base and not _same_base(first, other):
            raise IncompatibleError(
                f"'{first.name}' was made for '{first.base_name}', '{other.name}' for '{other.base_name}'.",
                "pass --any-base if the bases have the same layers and meaning.",
            )
        for key in (key for key in first.config.keys if key in other.config.keys):
            (a, b, _), (c, d, _) = first.factors(key), other.factors(key)
            if update_shape(a, b) != update_shape(c, d):
                raise IncompatibleError(
                    f"'{key}' is {update_shape(a, b)} in '{first.name}' but {update_shape(c, d)} in '{other.name}'.",
                    "merge adapters of one base model.",
                )


def _same_base(x: Adapter, y: Adapter) -> bool:
    for field in ("fingerprint", "name"):
        a, b = base_of(x.metadata).get(field), base_of(y.metadata).get(field)
        if a and b:
            return paths.same_source(a, b)
    return True


def _checked_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    require(len(adapters) > 0, "There is nothing to merge.", "name at least one adapter.")
    checked = weights_of(weights, len(adapters), 1 / len(adapters))
    require(any(weight != 0 for weight in checked), "All weights are 0: nothing would be left.")
    return checked


def _checked_method(asked: MergeSettings) -> Method:
    """The method; what it would ignore or lacks is a ConfigError."""
    name, method = asked.method, METHODS[asked.method]
    require(
        method.truncate or (asked.rank is None and asked.energy is None),
        f"Method '{name}' has no rank to choose.",
        "use 'svd' or a method that ends in '-svd'.",
    )
    check_rank(asked.rank, asked.energy)
    require(
        method.prune is None or asked.density is not None,
        f"Method '{name}' needs a density.",
        "the share of entries to keep, for example --density 0.5.",
    )
    pruned = method.prune is not None or asked.density is None
    require(pruned, f"Method '{name}' prunes nothing, so it takes no density.")
    drawn = method.prune == "random" or asked.seed is None
    require(drawn, f"Method '{name}' draws nothing, so it takes no seed.")
    elected = method.elect or asked.sign_method is None
    require(elected, f"Method '{name}' elects no signs, so it takes no sign method.")
    return method


def _without_zeros(adapters: list[Adapter], weights: list[float]) -> tuple[list[Adapter], list[float]]:
    kept = [(a, w) for a, w in zip(adapters, weights, strict=True) if w != 0]
    return [a for a, _ in kept], [w for _, w in kept]


def _common_scale(adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """The first share's strength, which its factors then keep; the largest one's where others are beyond all proportion
    to it, so that no factor leaves float32."""
    strengths = [abs(weight * adapter.config.scale) for weight, adapter in zip(weights, adapters, strict=True)]
    return strengths[0] if max(strengths) < MOST_TO_FIRST * strengths[0] else max(strengths) or 1.0


def _stack_layers(adapters: Sequence[Adapter], weights: Sequence[float], options: Options, dtype: mx.Dtype) -> Adapter:
    """The exact sum on the tensors as stored: nothing is computed that factors of 1 make needless."""
    factors = [weight * a.config.scale / options.scale for weight, a in zip(weights, adapters, strict=True)]
    parts = {
        key: [
            (*factors_of(a, key), factor) for a, factor in zip(adapters, factors, strict=True) if key in a.config.keys
        ]
        for key in _all_keys(adapters)
    }
    rank = max(sum(a.shape[1] for a, _, _ in sources) for sources in parts.values())
    tensors: dict[str, mx.array] = {}
    for key, sources in parts.items():
        a, b = stack_tensors([(a.astype(dtype), b.astype(dtype), factor) for a, b, factor in sources], rank)
        tensors |= {join(key, LORA_A): a, join(key, LORA_B): b}
    return Adapter(_config(adapters, rank, options.scale, tuple(parts)), tensors)


def _all_keys(adapters: Sequence[Adapter]) -> list[str]:
    return sorted({key for adapter in adapters for key in adapter.config.keys}, key=natural_order)


def _config(adapters: Sequence[Adapter], rank: int, scale: float, keys: tuple[str, ...]) -> AdapterConfig:
    blocks = [adapter.config.num_layers for adapter in adapters]
    return AdapterConfig(rank, scale, keys, num_layers=-1 if min(blocks) < 0 else max(blocks))


def _merge_layers(
    name: str,
    method: Method,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    options: Options,
    seed: int,
    on_event: OnEvent,
) -> dict[str, LowRankUpdate | Decomposition]:
    keys = _all_keys(adapters)
    merged: dict[str, LowRankUpdate | Decomposition] = {}
    for done, key in enumerate(keys, start=1):
        present = [(update_of(a, key), w) for a, w in zip(adapters, weights, strict=True) if key in a.config.keys]
        # A generator for each layer: the result does not depend on which other layers there are.
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        try:
            merged[key] = merge_updates(method, [u for u, _ in present], [w for _, w in present], options, rng)
        except IncompatibleError as error:
            raise IncompatibleError(f"'{key}' cannot be merged by '{name}': {error.message}", error.hint) from None
        on_event(Progress("merge", done, len(keys), "layer"))
    return merged


def _assemble(
    merged: dict[str, LowRankUpdate | Decomposition], adapters: Sequence[Adapter], options: Options, dtype: mx.Dtype
) -> Adapter:
    rank = max(_rank_of(layer, options) for layer in merged.values())
    weights: dict[str, mx.array] = {}
    for key, layer in merged.items():
        if isinstance(layer, Decomposition):
            update = LowRankUpdate(*layer.factors(rank))
        else:
            update = LowRankUpdate(pad_rank(layer.a, -1, rank), pad_rank(layer.b, -2, rank))
        weights |= tensors_of(key, update, dtype)
    return Adapter(_config(adapters, rank, options.scale, tuple(merged)), weights)


def _rank_of(layer: LowRankUpdate | Decomposition, options: Options) -> int:
    if isinstance(layer, LowRankUpdate):
        return layer.rank
    return min(layer.rank, options.rank or layer.rank_for(options.energy))


def _result_dtype(
    dtype: str, method: str, adapters: Sequence[Adapter], weights: Sequence[float], options: Options
) -> mx.Dtype:
    if dtype != "auto":
        return getattr(mx, dtype)
    stored = {w.dtype for adapter in adapters for w in adapter.weights.values()}
    factors = [weight * adapter.config.scale / options.scale for weight, adapter in zip(weights, adapters, strict=True)]
    lossless = method == "cat" and len(stored) == 1 and all(math.frexp(abs(factor))[0] == 0.5 for factor in factors)
    return stored.pop() if lossless else mx.float32


def _describe(adapter: Adapter, weight: float) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "weight": weight,
        "rank": adapter.config.rank,
        "scale": adapter.config.scale,
        "sha256": _sha256(adapter),
    }


def _sha256(adapter: Adapter) -> str | None:
    """The hash of the weights file that holds the adapter; as recorded where it is. None: it is in memory only."""
    if adapter.folder is None or place_of(adapter) is None:
        return None
    recorded = registry.checksums_of(adapter.metadata).get(ADAPTER_FILE) if adapter.iteration is None else None
    return recorded or files.sha256(weights_file(adapter.folder, adapter.iteration))


def _finish(
    result: Adapter, adapters: Sequence[Adapter], recipe: dict[str, Any], name: str | None, overwrite: bool
) -> Adapter:
    bases = [base_of(adapter.metadata) for adapter in adapters]
    base = max(bases, key=len)
    metadata = {"source": "merge", "merge": recipe} | ({"base": base} if base else {}) | machine.made_now()
    templates = [template_of(adapter) for adapter in adapters]
    if templates and templates[0] != TemplateConfig() and all(one == templates[0] for one in templates):
        metadata["template"] = to_mapping(templates[0])
    result = dataclasses.replace(result, metadata=metadata)
    if name is None:
        return result.check()
    return registry.register(result, name, overwrite=overwrite)


def _require_place(name: str | None, overwrite: bool, adapters: Sequence[Adapter]) -> None:
    """Raise ExistsError if the result may not take this name: what is read has checkpoints that it would lose."""
    if name is not None:
        target = registry.adapter_folder(name)
        replacing.refuse_existing(target, overwrite, registry.ADAPTER_OUTPUT)
        replacing.refuse_reading_inside(target, adapters)
