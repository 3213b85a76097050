"""An adapter in the form that inference wants.

Whatever the layer, an adapted weight is W' = gain · W + b a (gain scales rows; it is 1 for LoRA):

| layer                  | a           | b           | gain    |
| ---------------------- | ----------- | ----------- | ------- |
| linear W (out, in)     | (r, in)     | (out, r)    | (out,)  |
| P of them on one input | (P, r, in)  | (Σ out, r)  | (Σ out,)|
| embedding W (vocab, d) | (r, d)      | (vocab, r)  | (vocab,)|
| experts W (E, out, in) | (E, r, in)  | (E, out, r) | none    |

The scale lies in b. DoRA's m / ‖W + ΔW‖ (arXiv 2402.09353) depends on weights alone, so it is computed once,
here, and becomes a gain. The change W' - W is linear in (gain - 1, b a): adapters add up, with any weights.
Both factors are stored with the contracted axis last, as matrix-vector kernels want it; but see `stored`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.layers import EMBEDDING, LINEAR, SWITCH
from mlx_adapters.models.low_rank import filled
from mlx_adapters.surgery.groups import in_advance
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.machine import on_gpu


def stored(b: mx.array) -> mx.array:
    """The factor b of linear layers, laid out in memory for products with bᵀ.

    On a CPU that is (r, out): BLAS packs an (out, r) so slowly that the product of one row takes 1.7 times as long
    (8.5 to 5.0 µs for (576, 8), 11.9 to 6.6 µs for (1536, 8); OpenBLAS, one core).
    """
    return mx.contiguous(b) if on_gpu() else mx.contiguous(b.swapaxes(-1, -2)).swapaxes(-1, -2)


def get_ready() -> None:
    """Let the device bring in beforehand what `prepare` takes longest to use first: turning a matrix."""
    in_advance(lambda: mx.contiguous(mx.zeros((8, 4)).T))


@dataclass(frozen=True)
class Factors:
    """W' = gain · W + b a for one layer or for several, one below the other (shapes above).

    A base product with a bias counts the bias into the gain; `shift` = bias · (1 - gain) takes it out again.
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None
    shift: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays that are there."""
        return [x for x in (self.a, self.b, self.gain, self.shift) if x is not None]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(x.nbytes for x in self.arrays)


def prepare(layer: nn.Module, adapter: Adapter, key: str, dtype: mx.Dtype) -> Factors:
    """The factors of `adapter` for the layer at `key`, computed in float32 and stored in `dtype`."""
    lora_a, lora_b, m = adapter.factors(key)
    a, b = lora_a.astype(mx.float32), lora_b.astype(mx.float32)
    if isinstance(layer, EMBEDDING):
        a, b = b, a
    elif isinstance(layer, SWITCH):
        a, b = filled(a, b)
    else:
        a, b = a.T, b.T
    b, gain, shift = adapter.config.scale * b, None, None
    if m is not None:
        gain = m.astype(mx.float32) / mx.linalg.norm(dense_weight(layer, mx.float32) + b @ a, axis=-1)
        b = gain[:, None] * b
        shift = layer.bias.astype(mx.float32) * (1 - gain) if "bias" in layer else None
    a, b, gain, shift = (None if x is None else mx.contiguous(x.astype(dtype)) for x in (a, b, gain, shift))
    made = Factors(a, stored(b) if isinstance(layer, LINEAR) else b, gain, shift)
    if gain is not None:  # else it is small, and evaluating all layers at once takes less time
        mx.eval(made.arrays)
    return made


def combine(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The weighted sum of updates of one layer: exact, with a rank that is the sum of the ranks."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    a = mx.concatenate([f.a for f, _ in parts], axis=-2)  # (..., Σ r, in)
    b = mx.concatenate([weight * f.b for f, weight in parts], axis=-1)  # (..., out, Σ r)
    gains = [weight * (f.gain - 1) for f, weight in parts if f.gain is not None]
    shifts = [weight * f.shift for f, weight in parts if f.shift is not None]
    return Factors(a, stored(b), 1 + sum(gains) if gains else None, sum(shifts) if shifts else None)


def below_each_other(parts: Sequence[Factors | None], widths: Sequence[int]) -> Factors | None:
    """The factors of several linear layers on one input, whose outputs lie one after the other.

    A part that no adapter touches is None; all None gives None.
    """
    there = [f for f in parts if f is not None]
    if len(parts) == 1 or not there:
        return there[0] if there else None
    no_a, dtype, rank = mx.zeros_like(there[0].a), there[0].a.dtype, there[0].b.shape[1]
    pairs = list(zip(parts, widths, strict=True))
    return Factors(
        mx.stack([no_a if f is None else f.a for f in parts]),  # (P, r, in)
        stored(mx.concatenate([mx.zeros((width, rank), dtype) if f is None else f.b for f, width in pairs])),
        _row(parts, widths, "gain", 1, dtype),
        _row(parts, widths, "shift", 0, dtype),
    )


def _row(
    parts: Sequence[Factors | None], widths: Sequence[int], name: str, neutral: float, dtype: mx.Dtype
) -> mx.array | None:
    rows = [getattr(f, name, None) for f in parts]
    if all(row is None for row in rows):
        return None
    return mx.concatenate(
        [mx.full((w,), neutral, dtype) if row is None else row for row, w in zip(rows, widths, strict=True)]
    )


def stack(adapters: Sequence[Factors | None], linear: bool) -> Factors:
    """The factors of many adapters for one layer (linear or not), each in a slot of a new first axis; None is all zero.

    Ranks are padded with zeros to the largest.
    """
    like = next(f for f in adapters if f is not None)
    rank = max(f.a.shape[-2] for f in adapters if f is not None)
    out = like.b.shape[-2]

    def padded(array: mx.array | None, model: mx.array, axis: int) -> mx.array:
        shape = list(model.shape)
        shape[axis] = rank
        if array is None:
            return mx.zeros(shape, model.dtype)
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, rank - array.shape[axis])
        return mx.pad(array, widths)

    def rows(name: str, neutral: float) -> mx.array | None:
        given = [getattr(f, name, None) for f in adapters]
        if all(row is None for row in given):
            return None
        return mx.stack([mx.full((out,), neutral, like.a.dtype) if row is None else row for row in given])

    a = mx.stack([padded(f and f.a, like.a, -2) for f in adapters])  # (slots, ..., r, in)
    b = mx.stack([padded(f and f.b, like.b, -1) for f in adapters])  # (slots, ..., out, r)
    return Factors(a, stored(b) if linear else b, rows("gain", 1), rows("shift", 0))


def slot_of(stacked: Factors, slot: int) -> Factors:
    """One adapter's factors as views into a stack (a slice is a view; an index would copy)."""
    arrays = (stacked.a, stacked.b, stacked.gain, stacked.shift)
    return Factors(*(None if x is None else x[slot : slot + 1].squeeze(0) for x in arrays))


def own(factors: Factors, linear: bool) -> Factors:
    """The same factors in arrays of their own, where they are views into larger ones."""
    a, gain, shift = (None if x is None else mx.contiguous(x) for x in (factors.a, factors.gain, factors.shift))
    return Factors(a, stored(factors.b) if linear else mx.contiguous(factors.b), gain, shift)
