"""The update of one layer, or of its stacked experts, in MLX's shapes, and what PEFT's config says of its strength.

mlx-lm has one rank and one scale for a whole adapter. Where PEFT's differ by module, the factors are padded
with zeros to the largest rank and B takes up the ratio of the scales, which changes nothing in B·A.
"""

import base64
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.checkpoints.places import MERGE_THERE, OWN_BASE, Places
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.layers import EMBEDDING, SWITCH, nn
from mlx_adapters.peft_format.reading import AGAIN, PeftAdapter, PeftModule
from mlx_adapters.peft_format.settings import MEND
from mlx_adapters.storage import hf_names
from mlx_adapters.storage.hf_names import FUSED_DOWN, FUSED_GATE_UP, PEFT_TURNED, is_head
from mlx_adapters.storage.tensor_files import as_numpy

KNOWN = (FUSED_GATE_UP, FUSED_DOWN)


@dataclass(frozen=True)
class LayerFactors:
    """scale · B A of one MLX layer, in MLX's shapes (see `tensor_names`).

    `lost`: what rounding took from b when it took up another scale (see `lost_bits`).
    """

    key: str
    a: mx.array
    b: mx.array
    m: mx.array | None
    scale: float
    lost: str | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2] if self.a.ndim == 3 else self.a.shape[-1]


def strength(peft: PeftAdapter, module: PeftModule, rank: int, parameter: str | None = None) -> float:
    """The scale of a module whose factors have this rank. Raises FormatError if the config says otherwise."""
    configured, scale = peft.settings.strength(module.path.removesuffix(".base_layer"), parameter)
    if configured != rank:
        raise FormatError(
            f"'{module.path}' has rank {rank}, but the PEFT config says {configured}.", "PEFT would not load it either."
        )
    if not math.isfinite(scale) or scale == 0:
        raise FormatError(f"The PEFT config gives '{module.path}' the scale {scale}, so it does nothing.", MEND)
    exact = peft.exact_scale
    return exact if exact is not None and math.isclose(exact, scale, rel_tol=1e-12) else scale


def check_shape(update: LayerFactors, layer: nn.Module, source: str) -> None:
    """Raise IncompatibleError if the update is not made for the layer."""
    *_, out, inputs = weight_shape(layer)
    a, b = update.a.shape, update.b.shape
    shape = (a[0], b[1]) if isinstance(layer, EMBEDDING) else (b[-2], a[-1]) if len(a) == 3 else (b[1], a[0])
    if shape != (out, inputs):
        resized = " (a resized vocabulary)" if isinstance(layer, EMBEDDING) or is_head(source) else ""
        raise IncompatibleError(
            f"'{source}' of the PEFT adapter is made for a weight of {shape[0]} x {shape[1]}, "
            f"but the base's is {out} x {inputs}{resized}.",
            OWN_BASE,
        )


def unified(updates: Iterable[LayerFactors]) -> list[LayerFactors]:
    """The same updates with one rank and one scale: the largest rank, the commonest scale."""
    updates = list(updates)
    rank = max(update.rank for update in updates)
    scale = Counter(update.scale for update in updates).most_common(1)[0][0]
    return [_with(update, rank, scale) for update in updates]


def _with(update: LayerFactors, rank: int, scale: float) -> LayerFactors:
    a, b, ratio, lost = update.a, update.b, update.scale / scale, update.lost
    if ratio != 1:
        # A ratio that is no power of two would lose bits of a 16-bit B.
        b = b * ratio if math.frexp(ratio)[0] in (0.5, -0.5) else b.astype(mx.float32) * ratio
        lost = lost_bits(update.b, b, ratio) if update.b.dtype == b.dtype == mx.float32 else None
    if update.rank != rank:
        more, none, both = (0, rank - update.rank), (0, 0), a.ndim == 3
        a = mx.pad(a, [none, more, none] if both else [none, more])
        b = mx.pad(b, [none, none, more] if both else [more, none])
    return replace(update, a=a, b=b, scale=scale, lost=lost)


# -- a float32 B that takes up another scale, and comes back to the bit ----------------------------


def lost_bits(b: mx.array, scaled: mx.array, ratio: float) -> str | None:
    """By how many units in the last place `scaled` / `ratio` misses `b`, number by number, as text; None for nothing.

    Multiplied by a ratio, neighboring numbers may be rounded to one; so the scale alone does not lead back.
    """
    steps = as_numpy(b).view(np.int32).astype(np.int64) - _divided(scaled, ratio).view(np.int32)
    if not steps.any() or np.abs(steps).max() > 127:
        return None
    return base64.b64encode(zlib.compress(steps.astype(np.int8).tobytes())).decode()


class DamagedBitsError(FormatError):
    """The text of `lost_bits` is not as it was written: PEFT's own numbers cannot be had again."""


def steps_of(lost: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The units of `lost_bits` for a b of this shape, int8. Raises DamagedBitsError for a text that is none of its."""
    try:
        size = math.prod(shape)
        steps = zlib.decompressobj().decompress(base64.b64decode(lost, validate=True), size + 1)
        return np.frombuffer(steps, np.int8).reshape(shape)
    except (ValueError, TypeError, zlib.error):
        message = "The record of what rounding took from PEFT's numbers is damaged."
        raise DamagedBitsError(message, "import the adapter again from PEFT's folder.") from None


def regained(scaled: mx.array, ratio: float, steps: np.ndarray) -> mx.array:
    """The inverse: the b that became `scaled`."""
    return mx.array((_divided(scaled, ratio).view(np.int32) + steps).astype(np.int32).view(np.float32))


def _divided(scaled: mx.array, ratio: float) -> np.ndarray:
    return (as_numpy(scaled.astype(mx.float32)).astype(np.float64) / ratio).astype(np.float32)


# -- stacked experts, from either of the layouts in which PEFT has them ----------------------------


def expert_updates(experts: Mapping[str, tuple[str, int]], peft: PeftAdapter, places: Places) -> list[LayerFactors]:
    """Stack the experts of transformers 4's layout; `experts` gives the layer and the number of each expert's path.

    An expert without an update gets a zero one.
    """
    stacks: dict[str, dict[int, LayerFactors]] = {}
    for path, (key, expert) in experts.items():
        module = peft.modules[path]
        if module.m is not None or module.embedding or module.a.shape[0] != module.b.shape[1]:
            raise FormatError(
                f"The expert '{path}' is no plain LoRA module, and MLX has only LoRA for experts.", MERGE_THERE
            )
        if expert in stacks.get(key, {}):
            raise FormatError(f"The PEFT adapter has '{path}' twice.", AGAIN)
        fold = places.folds.get(key, 1.0)
        if isinstance(fold, list):
            raise FormatError(
                f"mlx-lm multiplies the rows of the experts '{key}', which no adapter can follow.", MERGE_THERE
            )
        scale = strength(peft, module, module.a.shape[0]) * fold
        stacks.setdefault(key, {})[expert] = LayerFactors(key, module.a.T, module.b.T, None, scale)
    return [_stack(key, parts, places.layers[key]) for key, parts in stacks.items()]


def _stack(key: str, parts: Mapping[int, LayerFactors], layer: nn.Module) -> LayerFactors:
    shape = weight_shape(layer)
    if not isinstance(layer, SWITCH) or max(parts) >= shape[0]:
        raise IncompatibleError(
            f"The PEFT adapter has an expert {max(parts)} of '{key}', the base has {shape[0]}.", OWN_BASE
        )
    experts = dict(zip(parts, unified(parts.values()), strict=True))
    some = next(iter(experts.values()))
    for expert in experts.values():
        if (expert.a.shape, expert.b.shape) != ((shape[2], some.rank), (some.rank, shape[1])):
            raise IncompatibleError(
                f"An expert of '{key}' is not made for a weight of {shape[1]} x {shape[2]}.", OWN_BASE
            )
    nothing = replace(some, a=mx.zeros_like(some.a), b=mx.zeros_like(some.b))
    rows = [experts.get(i, nothing) for i in range(shape[0])]
    a, b = mx.stack([row.a.T for row in rows]), mx.stack([row.b.T for row in rows])
    return LayerFactors(key, a, b, None, some.scale)


def fused_updates(
    modules: Mapping[str, PeftModule], peft: PeftAdapter, places: Places
) -> tuple[list[LayerFactors], dict[str, Any]]:
    """The updates of the layers that transformers 5's fused experts become, and the record by which they go back.

    Both parameters wrapped: gate_up is the inner one, down the outer. The record: by path and parameter the layers with
    their rows (start, stop, step), and whether PEFT takes the parameter's inputs for outputs.
    """
    updates, record = list[LayerFactors](), dict[str, Any]()
    for path, module in modules.items():
        block, inner = hf_names.split_fused(path) or ("", False)
        both = hf_names.fused_path(block, not inner) in modules
        names = peft.settings.names_parameter
        gate_up = inner if both else names(f"{block}.experts.{FUSED_GATE_UP}")
        down = names(f"{block}.experts.{FUSED_DOWN}")
        told = not peft.settings.target_parameters or (down and names(f"{block}.experts.{FUSED_GATE_UP}"))
        clear = told if both else not inner and gate_up != down
        others = {name.rpartition(".")[2] for name in peft.settings.target_parameters if ".experts." in f".{name}"}
        if other := sorted(name for name in others if names(f"{block}.experts.{name}") and name not in KNOWN):
            why = (
                f"The PEFT adapter updates '{block}.experts.{other[0]}'; experts of that form are not taken from PEFT."
            )
            raise FormatError(why, MERGE_THERE)
        if not clear or module.m is not None or module.embedding:
            raise FormatError(f"The PEFT adapter does not say which parameter of the experts '{path}' is.", MEND)
        parameter = FUSED_GATE_UP if gate_up else FUSED_DOWN
        parts, shape = places.fused(block, parameter, path)
        layer = places.layers[parts[0].key]
        left, right, scale = _split_experts(module, peft, parameter, weight_shape(layer)[0])
        turned = (right.shape[2], left.shape[1]) == shape != (left.shape[1], right.shape[2])
        turned = turned or (shape[0] == shape[1] and places.layout.model_type in PEFT_TURNED)
        if turned:
            left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
        if (left.shape[1], right.shape[2]) != shape:
            raise IncompatibleError(
                f"'{path}' of the PEFT adapter is made for experts of {left.shape[1]} x {right.shape[2]}, "
                f"but the base's are {shape[0]} x {shape[1]}.",
                OWN_BASE,
            )
        for part in parts:
            update = LayerFactors(part.key, right, left[:, part.rows], None, scale)
            check_shape(update, places.layers[part.key], path)
            updates.append(update)
        rows = {part.key: [part.rows.start, part.rows.stop, part.rows.step] for part in parts}
        record.setdefault(f"{block}.experts", {})[parameter] = {"rows": rows, "out": shape[0], "turned": turned}
    return updates, record


def _split_experts(
    module: PeftModule, peft: PeftAdapter, parameter: str, experts: int
) -> tuple[mx.array, mx.array, float]:
    """left (experts, out, rank), right (experts, rank, in) and the scale of one fused parameter."""
    rows = module.a.shape[0]
    if rows != module.b.shape[1] or rows % experts:
        raise FormatError(
            f"The factors of '{module.path}' cannot be split among the base's {experts} experts.", OWN_BASE
        )
    rank = rows // experts
    scale = strength(peft, module, rank, parameter)
    right = module.a.reshape(experts, rank, -1)
    left = module.b.reshape(-1, rank, experts).transpose(2, 0, 1)
    return left, right, scale


def joined_experts(left: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
    """The inverse of the split: PEFT's A (experts · rank, in), expert by expert, and B (out, rank · experts)."""
    return right.reshape(-1, right.shape[2]), left.transpose(1, 2, 0).reshape(left.shape[1], -1)
