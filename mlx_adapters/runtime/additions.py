"""What an adapter adds to a base layer's output: one adapter for all rows, or another one for each row.

Both kinds know the three layers: `linear(y, x)`, `lookup(y, ids)` for embeddings and `experts(y, x, indices,
sorted_indices)` for mixtures. y is the base layer's output and is never changed in place.
"""

import math
from collections.abc import Sequence

from mlx_adapters.errors import IncompatibleError
from mlx_adapters.runtime.factors import Factors
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu


class ForAll:
    """One adapter for all rows: y · gain + shift + (x aᵀ) bᵀ."""

    def __init__(self, factors: Factors) -> None:
        self.factors, self.gain, self.shift = factors, factors.gain, factors.shift
        self.a, self.b = factors.a.swapaxes(-1, -2), factors.b.swapaxes(-1, -2)  # (..., in, r), (..., r, out)
        if self.a.ndim == 2:  # for one row: a product of equal ranks needs no reshaping around it
            self.one_a, self.one_b = self.a[None], self.b[None]  # (1, in, r), (1, r, out)
        self.adds = not on_gpu() and self.b.dtype == mx.float32  # a product that adds is one operation less

    @property
    def arrays(self) -> list[mx.array]:
        """What must be evaluated before it is used."""
        return [self.a, self.b, *([self.one_a, self.one_b] if self.a.ndim == 2 else [])]

    def linear(self, y: mx.array, x: mx.array) -> mx.array:
        """y (..., out) and x (..., in)."""
        if self.gain is not None:
            y = y * self.gain
            if self.shift is not None:
                y = y + self.shift
        if x.ndim == 3 and x.shape[0] == 1:
            a, b = self.one_a, self.one_b
        else:
            a, b = self.a, self.b
        return mx.addmm(y, x @ a, b) if self.adds else y + (x @ a) @ b

    def lookup(self, y: mx.array, ids: mx.array) -> mx.array:
        """y (..., dim) and ids (...)."""
        if self.gain is not None:
            y = y * self.gain[ids][..., None]
        return y + self.factors.b[ids] @ self.factors.a

    def experts(self, y: mx.array, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """y (..., 1, out) and x (..., 1, in), one expert for each entry of `indices`."""
        z = mx.gather_mm(x, self.a, rhs_indices=indices, sorted_indices=sorted_indices)  # (..., 1, r)
        return y + mx.gather_mm(z, self.b, rhs_indices=indices, sorted_indices=sorted_indices)


class Rows:
    """Which slot each row of the batch uses; one object for all layers, new for each new batch."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = mx.array(slots, dtype=mx.uint32)
        self.indices: mx.array | None = None
        self._spread: dict[tuple[int, ...], tuple[mx.array, mx.array]] = {}

    def spread(self, lead: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """(slot of each entry, entry's own number) for arrays whose leading axes are `lead`, both flat."""
        if lead not in self._spread:
            rows, count = self.slots.size, math.prod(lead)
            if count % rows or lead[0] % rows:
                raise IncompatibleError(f"A layer sees {lead} entries for a batch of {rows}: which is whose?")
            slots = mx.repeat(self.slots, count // rows) if count > rows else self.slots
            self._spread[lead] = slots, mx.arange(count, dtype=mx.uint32)
        return self._spread[lead]

    def sorted_slots(self) -> mx.array:
        """The slot of each (token, expert) pair after mlx-lm has sorted the pairs by expert."""
        if self.indices is None:
            raise IncompatibleError("This model's experts cannot serve several adapters in one batch.")
        slots, _ = self.spread(self.indices.shape[:-1])
        return slots[mx.argsort(self.indices.flatten()) // self.indices.shape[-1]]


class PerRow:
    """Another adapter for each row: the factors of slot `rows.slots[i]` for row i (Punica, arXiv 2310.18547;
    S-LoRA, arXiv 2311.03285). `stacked` holds (slots, r, in) and (slots, out, r); slot 0 is all zero."""

    def __init__(self, stacked: Factors, rows: Rows) -> None:
        self.stacked, self.rows = stacked, rows
        self.a, self.b = stacked.a.swapaxes(-1, -2), stacked.b.swapaxes(-1, -2)

    @property
    def parts(self) -> tuple["PerRow"]:
        """Itself, as the only part. (No attribute: what refers to itself stays in memory longer.)"""
        return (self,)

    def linear(self, y: mx.array, x: mx.array) -> mx.array:
        """y (rows, ..., out) and x (rows, ..., in)."""
        slots, order = self.rows.spread(x.shape[:-1])  # each (tokens,)
        if self.stacked.gain is not None:
            y = y * self.stacked.gain[slots].reshape(y.shape)
            if self.stacked.shift is not None:
                y = y + self.stacked.shift[slots].reshape(y.shape)
        z = mx.gather_mm(x.reshape(-1, 1, x.shape[-1]), self.a, order, slots)  # (tokens, 1, r)
        return y + mx.gather_mm(z, self.b, order, slots).reshape(y.shape)

    def lookup(self, y: mx.array, ids: mx.array) -> mx.array:
        """y (rows, tokens, dim) and ids (rows, tokens)."""
        slots, order = self.rows.spread(ids.shape)
        vocabulary, rank = self.stacked.b.shape[1:]
        flat = slots * vocabulary + ids.flatten()
        if self.stacked.gain is not None:
            y = y * self.stacked.gain.flatten()[flat].reshape(*ids.shape, 1)
        z = self.stacked.b.reshape(-1, rank)[flat][:, None]  # (tokens, 1, r)
        return y + mx.gather_mm(z, self.stacked.a, order, slots).reshape(y.shape)

    def experts(self, y: mx.array, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """y (rows, tokens, k, 1, out), or flat and sorted by expert."""
        if sorted_indices:
            slots = self.rows.sorted_slots()
        else:
            slots = self.rows.spread(indices.shape[:-1])[0].reshape(*indices.shape[:-1], 1)
        which = slots * self.a.shape[1] + indices.astype(mx.uint32)  # like indices
        z = mx.gather_mm(x, self.a.flatten(0, 1), rhs_indices=which)  # (..., 1, r)
        return y + mx.gather_mm(z, self.b.flatten(0, 1), rhs_indices=which)


class InTurn:
    """Updates after one another; of those of one row all but one are zero."""

    def __init__(self, parts: Sequence[PerRow]) -> None:
        self.parts = tuple(parts)

    def linear(self, y: mx.array, x: mx.array) -> mx.array:
        """See PerRow."""
        for part in self.parts:
            y = part.linear(y, x)
        return y

    def lookup(self, y: mx.array, ids: mx.array) -> mx.array:
        """See PerRow."""
        for part in self.parts:
            y = part.lookup(y, ids)
        return y

    def experts(self, y: mx.array, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """See PerRow."""
        for part in self.parts:
            y = part.experts(y, x, indices, sorted_indices)
        return y


Addition = ForAll | PerRow | InTurn
