"""Sums along an axis, as MLX's CUDA build computes them right.

MLX 0.32.4 starts too many blocks there for a sum along an axis whose numbers do not lie side by side, and they read and
write past the array's end: a state space's decays (`segsum` of mlx-lm's `ssm`) spoilt other arrays now and then. So
`mx.cumsum` is replaced: it sums a copy in which they do, and so does its gradient.
"""

from typing import Any

from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_cuda

plain = mx.cumsum


def cumsum(
    a: mx.array, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True, **more: Any
) -> mx.array:
    """`mx.cumsum`."""
    if axis is None or a.ndim < 2 or not on_cuda():
        return plain(a, axis, reverse=reverse, inclusive=inclusive, **more)

    @mx.custom_function
    def along_last(a: mx.array) -> mx.array:
        return plain(mx.contiguous(a), -1, reverse=reverse, inclusive=inclusive, **more)

    @along_last.vjp
    def backward(a: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return plain(mx.contiguous(cotangent), -1, reverse=not reverse, inclusive=inclusive, **more)

    return along_last(a.swapaxes(axis, -1)).swapaxes(axis, -1)


mx.cumsum = cumsum
