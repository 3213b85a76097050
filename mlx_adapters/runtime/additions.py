"""What an adapter adds to a base layer's output: one adapter for all rows, or another one for each row.

Both kinds know the three layers: `linears(y, x, widths)` for linear layers on one input, `lookup(y, ids)` for
embeddings and `experts(y, x, indices, sorted_indices)` for mixtures. y, what the base computed, is never changed.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from mlx_adapters.errors import IncompatibleError
from mlx_adapters.runtime import kernel, product_kernel
from mlx_adapters.runtime.factors import Factors
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import compiled
from mlx_adapters.system.machine import on_gpu

Product = Callable[[mx.array], mx.array]
MANY_TOKENS = 256  # from here on a GPU, too, is faster with a product that adds, and with a weight unpacked for it


def split(y: mx.array, widths: Sequence[int]) -> list[mx.array]:
    """(..., Σ widths) -> (..., width) for each."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    return mx.split(y, ends, axis=-1) if ends else [y]


class _Added:
    """An update of linear layers. `factors`: what it adds."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self._served: dict[tuple[tuple[int, ...], mx.Dtype], bool] = {}

    def by_kernel(self, x: mx.array) -> bool:
        """Whether one kernel serves x (..., in) and what layers make of it; found once for each of its shapes, since
        every layer asks for every token."""
        shape, dtype = x.shape, x.dtype
        if x.size > kernel.MOST_TOKENS * shape[-1]:
            return False
        if (shape, dtype) not in self._served:
            self._served[shape, dtype] = kernel.serves(x, x, self.factors.b)
        return self._served[shape, dtype]


class ForAll(_Added):
    """One adapter for all rows: y · gain + shift + (x aᵀ) bᵀ."""

    def __init__(self, factors: Factors) -> None:
        super().__init__(factors)
        a = factors.a
        self.linear_like = factors.b.ndim == 2
        if self.linear_like:
            a = a.reshape(-1, a.shape[-1])  # (layers · r, in)
        self.a, self.b = a.swapaxes(-1, -2), factors.b.swapaxes(-1, -2)  # (..., in, layers · r), (..., r, Σ out)
        if self.linear_like:  # for one row: a product of equal ranks needs no reshaping around it
            self.one_a, self.one_b = self.a[None], self.b[None]
            self.kernel_a, self.kernel_b = a.reshape(1, -1, *factors.a.shape[-2:]), factors.b[None]  # one slot
        self.adds = not on_gpu() and self.b.dtype == mx.float32  # a product that adds is one operation less
        self._compiled: Callable[[mx.array], list[mx.array]] | None = None
        self._parts: list[mx.array] | None = None
        self._each: list[tuple[mx.array, mx.array]] | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What must be evaluated before it is used."""
        views = [self.one_a, self.one_b, self.kernel_a, self.kernel_b] if self.linear_like else []
        return [self.a, self.b, *views]

    def linears(self, y: mx.array, x: mx.array, widths: Sequence[int]) -> list[mx.array]:
        """The outputs of linear layers on x (..., in), from what they computed, y (..., Σ widths)."""
        f = self.factors
        if y.dtype == x.dtype and self.by_kernel(x):
            slots = kernel.first(x)
            return split(kernel.add_update(y, x, self.kernel_a, self.kernel_b, widths, slots, f.gain, f.shift), widths)
        return self.added(split(y, widths), x)

    def added(self, parts: Sequence[mx.array], x: mx.array) -> list[mx.array]:
        """The outputs, from what each of the layers computed, (..., width) each."""
        f, widths = self.factors, [part.shape[-1] for part in parts]
        if f.gain is not None:
            parts = [part * gain for part, gain in zip(parts, split(f.gain, widths), strict=True)]
            if f.shift is not None:
                parts = [part + shift for part, shift in zip(parts, split(f.shift, widths), strict=True)]
        if x.size > MANY_TOKENS * x.shape[-1]:
            shares = zip(parts, self._lows(x), self._highs(widths), strict=True)
            return [mx.addmm(part, low, high) for part, low, high in shares]
        a, b = (self.one_a, self.one_b) if x.ndim == 3 and x.shape[0] == 1 else (self.a, self.b)
        z = x @ a  # (..., layers · r)
        shares = zip(parts, split(z, [self.b.shape[-2]] * len(widths)), split(b, widths), strict=True)
        return [mx.addmm(part, low, high) if self.adds else part + low @ high for part, low, high in shares]

    def _lows(self, x: mx.array) -> list[mx.array]:
        """x aᵀ of each layer, (..., r), in arrays of their own: a part of one would be copied for what follows."""
        rank = self.b.shape[-2]
        if self.a.shape[-1] == rank:
            return [x @ self.a]
        z = x.reshape(1, -1, x.shape[-1]) @ self.factors.a.swapaxes(-1, -2)  # (layers, tokens, r)
        return [low.reshape(*x.shape[:-1], rank) for low in z]

    def _highs(self, widths: Sequence[int]) -> list[mx.array]:
        """bᵀ of each layer, (r, width), made once."""
        if self._parts is None:
            self._parts = split(self.b, widths)
        return self._parts

    @property
    def rank(self) -> int:
        """r."""
        return self.b.shape[-2]

    @property
    def is_sum(self) -> bool:
        """Whether it is b a alone, of linear layers."""
        return self.linear_like and self.factors.gain is None

    def of_each(self, widths: Sequence[int]) -> list[tuple[mx.array, mx.array]]:
        """(a, b) of each layer, (r, in) and (width, r), made once."""
        if self._each is None:
            ends = [sum(widths[:i]) for i in range(len(widths) + 1)]
            a = self.factors.a.reshape(len(widths), self.rank, -1)
            self._each = [(a[i], self.factors.b[ends[i] : ends[i + 1]]) for i in range(len(widths))]
        return self._each

    def compiled(self, product: Product, widths: Sequence[int]) -> Callable[[mx.array], list[mx.array]]:
        """`of_few`, compiled; gone with this object, as its constants are."""
        if self._compiled is None:
            twin = copy(self)  # not this one, which holds it
            self._compiled = compiled(lambda x: twin.of_few(product, x, widths))
        return self._compiled

    def of_few(self, product: Product, x: mx.array, widths: Sequence[int]) -> list[mx.array]:
        """`linears` of what `product` gives for few tokens; for one by one kernel, if that serves."""
        f, packed = self.factors, getattr(product, "arrays", {})
        options: Any = getattr(product, "options", None)
        if product_kernel.serves(x, packed, options, f.b):
            return product_kernel.product_and_update(
                x, packed, options, self.kernel_a, self.kernel_b, widths, f.gain, f.shift
            )
        return self.linears(product(x), x, widths)

    def lookup(self, y: mx.array, ids: mx.array) -> mx.array:
        """y (..., dim) and ids (...)."""
        f = self.factors
        if f.gain is not None:
            y = y * f.gain[ids][..., None]
        return y + f.b[ids] @ f.a

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


class PerRow(_Added):
    """Another adapter for each row: the factors of slot `rows.slots[i]` for row i (Punica, arXiv 2310.18547;
    S-LoRA, arXiv 2311.03285). `factors` are stacked: (slots, ..., r, in) and (slots, ..., out, r); slot 0 is all zero.
    `rows` may be others' from one batch to the next."""

    def __init__(self, stacked: Factors, rows: Rows) -> None:
        super().__init__(stacked)
        self.rows, a = rows, stacked.a
        if stacked.b.ndim == 3:  # of linear layers
            a = a.reshape(a.shape[0], -1, a.shape[-1])  # (slots, layers · r, in)
        self.a, self.b = a.swapaxes(-1, -2), stacked.b.swapaxes(-1, -2)
        self._compiled: Callable[[mx.array, mx.array], list[mx.array]] | None = None

    @property
    def parts(self) -> tuple["PerRow"]:
        """Itself, as the only part. (No attribute: what refers to itself stays in memory longer.)"""
        return (self,)

    def linears(self, y: mx.array, x: mx.array, widths: Sequence[int]) -> list[mx.array]:
        """The outputs of linear layers on x (rows, ..., in), from what they computed, y (rows, ..., Σ widths)."""
        f, rank = self.factors, self.b.shape[-2]
        slots, order = self.rows.spread(x.shape[:-1])  # each (tokens,)
        if y.dtype == x.dtype and self.by_kernel(x):
            return self._by_kernel(y, x, widths, slots)
        if f.gain is not None:
            y = y * f.gain[slots].reshape(y.shape)
            if f.shift is not None:
                y = y + f.shift[slots].reshape(y.shape)
        if x.ndim == 3 and x.shape[1] > 1 and len(x) == self.rows.slots.size:  # of many tokens a product for each row
            low = x @ self.a[self.rows.slots]  # (rows, tokens, layers · r)
            high = self.b[self.rows.slots]  # (rows, r, Σ out)
            parts = zip(split(y, widths), split(low, [rank] * len(widths)), split(high, widths), strict=True)
            return [part + each @ out for part, each, out in parts]
        z = mx.gather_mm(x.reshape(-1, 1, x.shape[-1]), self.a, order, slots)  # (tokens, 1, layers · r)
        parts = zip(split(y, widths), split(z, [rank] * len(widths)), split(self.b, widths), strict=True)
        return [part + mx.gather_mm(low, high, order, slots).reshape(part.shape) for part, low, high in parts]

    def _by_kernel(self, y: mx.array, x: mx.array, widths: Sequence[int], slots: mx.array) -> list[mx.array]:
        f = self.factors
        a = f.a.reshape(-1, len(widths), f.b.shape[-1], x.shape[-1])
        return split(kernel.add_update(y, x, a, f.b, widths, slots, f.gain, f.shift), widths)

    def compiled(self, product: Product, widths: Sequence[int]) -> Callable[[mx.array], list[mx.array]]:
        """See ForAll."""
        if self._compiled is None:
            twin = copy(self)
            self._compiled = compiled(lambda x, slots: twin._by_kernel(product(x), x, widths, slots))
        made = self._compiled
        return lambda x: made(x, self.rows.spread(x.shape[:-1])[0])

    def lookup(self, y: mx.array, ids: mx.array) -> mx.array:
        """y (rows, tokens, dim) and ids (rows, tokens)."""
        slots, order = self.rows.spread(ids.shape)
        vocabulary, rank = self.factors.b.shape[1:]
        flat = slots * vocabulary + ids.flatten()
        if self.factors.gain is not None:
            y = y * self.factors.gain.flatten()[flat].reshape(*ids.shape, 1)
        z = self.factors.b.reshape(-1, rank)[flat][:, None]  # (tokens, 1, r)
        return y + mx.gather_mm(z, self.factors.a, order, slots).reshape(y.shape)

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

    def linears(self, y: mx.array, x: mx.array, widths: Sequence[int]) -> list[mx.array]:
        """See PerRow."""
        *earlier, last = self.parts
        for part in earlier:
            y = mx.concatenate(part.linears(y, x, widths), axis=-1)
        return last.linears(y, x, widths)

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


def outputs_of(update: Addition, product: Product, x: mx.array, widths: Sequence[int]) -> list[mx.array]:
    """The outputs of linear layers on x (..., in), of which `product` gives the base's.

    For few tokens on a GPU by a compiled function: Python takes longer to build the operations than a GPU to do them.
    """
    if isinstance(update, _Added) and update.by_kernel(x):
        return update.compiled(product, widths)(x)
    return update.linears(product(x), x, widths)
