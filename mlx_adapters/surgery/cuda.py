"""What MLX's CUDA build is slow at where text is generated, computed otherwise.

A product with a packed matrix reads it anew for each row of a batch (a 4B model's in 4 bits on an H200: 16 rows of one
token took 118 to 328 us, 16 tokens in one row 20 to 36), of four to seven tokens it takes longer than of eight (a step
of 4 rows 10.7 ms, filled up 10.3, of 6 rows 15.1 and 10.8; of 3 rows 8.4 and 9.9), and from some hundred on the matrix
is better unpacked first. Attention over several tokens is cuDNN's, which is compiled for each new shape, in 75 to
230 ms; prompts that join a batch nearly always have one. And operations are launched as graphs of a hundred or more,
and one of a form that was not there before takes 0.1 ms for each of them: three quarters of the time of a pass over
prompts. What is handed over layer by layer (`hand_over`) has the same form in all of them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from mlx_adapters.surgery.calls import function_call_as
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_cuda

MANY_TOKENS = 256  # from here on a product is faster with an unpacked matrix
FEW, EIGHT = 4, 8  # from so many tokens on a product with a large matrix is filled up to eight
LARGE = 12 << 20  # numbers in it; of 2560 x 2560 MLX's own product of seven was the faster one
MOST_SCORES = 1 << 26  # numbers between tokens that may be in memory; cuDNN keeps none of them


packed = mx.quantized_matmul


def hand_over(*arrays: Any) -> None:
    """Let a CUDA device begin with what these take, as a graph of its own."""
    if on_cuda():
        mx.async_eval(*arrays)


_here = threading.local()  # `.generates`: not in training, which would keep what is unpacked


@contextlib.contextmanager
def generating() -> Iterator[None]:
    """Within the block, in this thread, a CUDA device reads several tokens, a prompt's say, as it is fastest."""
    if not on_cuda():
        yield
        return
    before, _here.generates = getattr(_here, "generates", False), True
    try:
        with function_call_as(mx.fast, "scaled_dot_product_attention", by_products):
            yield
    finally:
        _here.generates = before


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    **kind: Any,
) -> mx.array:
    """`mx.quantized_matmul`: of x (rows, tokens, in) with one matrix w (out, in), of all rows' tokens at once."""
    shape = x.shape
    if shape[:2] == (1, 1):  # soon decided: every layer calls it for every token
        return packed(x, w, scales, biases, transpose, **kind)
    tokens, alone = x.size // shape[-1], w.ndim == 2
    unpacks = alone and transpose and tokens > MANY_TOKENS and kind.get("mode", "affine") == "affine"
    if unpacks and getattr(_here, "generates", False):
        return x @ mx.dequantize(w, scales, biases, **kind, dtype=x.dtype).T
    fills = alone and transpose and FEW <= tokens < EIGHT and w.size * 32 >= LARGE * kind.get("bits", 4)
    if not fills and (not alone or len(shape) < 3 or tokens == shape[-2]):
        return packed(x, w, scales, biases, transpose, **kind)
    x = x.reshape(tokens, shape[-1])
    y = packed(x[_eight(tokens)] if fills else x, w, scales, biases, transpose, **kind)
    return (y[:tokens] if fills else y).reshape(*shape[:-1], y.shape[-1])


@cache
def _eight(tokens: int) -> mx.array:
    """(8,) the rows of so many, and the last one again."""
    return mx.array([min(row, tokens - 1) for row in range(EIGHT)], mx.uint32)


if on_cuda():
    mx.quantized_matmul = quantized_matmul


def by_products(
    original: Callable[..., mx.array],
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: Any = None,
    **others: Any,
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention` of some tokens, unless their scores would take too much memory.

    queries (rows, heads, tokens, width); keys and values (rows, key heads, length, width); the mask broadcasts to
    (rows, heads, tokens, length), True where a token is seen, or is added to the scores.
    """
    rows, heads, tokens, width = queries.shape
    shared, length = keys.shape[1:3]
    hand_over(queries, keys, values)
    few = tokens > 1 and rows * heads * tokens * length <= MOST_SCORES
    if not few or queries.dtype == mx.float32 or any(other is not None for other in others.values()):
        return original(queries, keys, values, scale=scale, mask=mask, **others)
    scores = (queries * scale).reshape(rows, shared, -1, tokens, width) @ keys[:, :, None].swapaxes(-1, -2)
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(length - tokens, length)[:, None] >= mx.arange(length)
    if mask is not None:
        if mask.ndim > 3 and mask.shape[-3] > 1:  # another for each head
            mask = mask.reshape(mask.shape[0], shared, -1, *mask.shape[-2:])
        elif mask.ndim > 3:
            mask = mask[:, :, None]
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if mask.dtype == mx.bool_ else scores + mask
    weights = mx.softmax(scores, axis=-1, precise=True)  # (rows, shared, heads / shared, tokens, length)
    return (weights @ values[:, :, None]).reshape(rows, heads, tokens, -1)
