"""The update of one layer in MLX's shapes, and what PEFT's config says of its strength.

mlx-lm has one rank and one scale for a whole adapter. Where PEFT's differ by module, the factors are padded
with zeros to the largest rank and B takes up the ratio of the scales, which changes nothing in B·A.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.models.layers import EMBEDDING, nn, weight_shape
from mlx_adapters.peft_format.reading import PeftAdapter, PeftModule
from mlx_adapters.peft_format.tying import is_head


@dataclass(frozen=True)
class Update:
    """scale · B A of one MLX layer, in MLX's shapes (see `tensor_names`)."""

    key: str
    a: mx.array
    b: mx.array
    m: mx.array | None
    scale: float

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
        raise FormatError(f"The PEFT config gives '{module.path}' the scale {scale}, so it does nothing.")
    exact = peft.exact_scale
    return exact if exact is not None and math.isclose(exact, scale, rel_tol=1e-12) else scale


def check_shape(update: Update, layer: nn.Module, source: str) -> None:
    """Raise IncompatibleError if the update is not made for the layer."""
    *_, out, inputs = weight_shape(layer)
    a, b = update.a.shape, update.b.shape
    found = (a[0], b[1]) if isinstance(layer, EMBEDDING) else (b[-2], a[-1]) if len(a) == 3 else (b[1], a[0])
    if found != (out, inputs):
        resized = " (a resized vocabulary)" if isinstance(layer, EMBEDDING) or is_head(source) else ""
        raise IncompatibleError(
            f"'{source}' of the PEFT adapter is made for a weight of {found[0]} x {found[1]}, "
            f"but the base's is {out} x {inputs}{resized}.",
            "give the base it was trained on.",
        )


def unified(updates: Iterable[Update]) -> list[Update]:
    """The same updates with one rank and one scale: the largest rank, the commonest scale."""
    updates = list(updates)
    rank = max(update.rank for update in updates)
    scale = Counter(update.scale for update in updates).most_common(1)[0][0]
    return [_with(update, rank, scale) for update in updates]


def _with(update: Update, rank: int, scale: float) -> Update:
    a, b, ratio = update.a, update.b, update.scale / scale
    if ratio != 1:
        # A ratio that is no power of two would lose bits of a 16-bit B.
        b = b * ratio if math.frexp(ratio)[0] in (0.5, -0.5) else b.astype(mx.float32) * ratio
    if update.rank != rank:
        more, none, both = (0, rank - update.rank), (0, 0), a.ndim == 3
        a = mx.pad(a, [none, more, none] if both else [none, more])
        b = mx.pad(b, [none, none, more] if both else [more, none])
    return replace(update, a=a, b=b, scale=scale)
