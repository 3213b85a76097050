"""Kernels of our own, of one text for Metal and CUDA but for the words that the two spell differently; and `cumsum`,
which stands in for one of MLX's that is wrong.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx

from mlx_adapters.system.machine import on_cuda

Language = Literal["metal", "cuda"]


def language() -> Language:
    """What this device's kernels are written in."""
    return "metal" if mx.metal.is_available() else "cuda"


def spelled(text: str, words: Mapping[str, str]) -> str:
    """The text with its words in capital letters as `words` has them; others stay."""
    return re.sub(r"\b[A-Z_]+\b", lambda word: words.get(word[0], word[0]), text)


def build(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
) -> Callable[..., list[mx.array]]:
    """The kernel of this device's language. It is compiled when it is first called."""
    make: Any = mx.fast.metal_kernel if language() == "metal" else mx.fast.cuda_kernel
    return make(name=name, input_names=list(inputs), output_names=list(outputs), source=source, header=header)


_plain_cumsum = mx.cumsum


def cumsum(
    a: mx.array, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True, **more: Any
) -> mx.array:
    """`mx.cumsum`, as MLX's CUDA build computes it right; the door puts it in that one's place.

    MLX 0.32.4 starts too many blocks there for a sum along an axis whose numbers do not lie side by side, and they read
    and write past the array's end: a state space's decays (`segsum` of mlx-lm's `ssm`) spoilt other arrays now and
    then. Here a copy in which they do is summed, and so is the gradient's.
    """
    if axis is None or a.ndim < 2 or not on_cuda():
        return _plain_cumsum(a, axis, reverse=reverse, inclusive=inclusive, **more)

    @mx.custom_function
    def along_last(a: mx.array) -> mx.array:
        return _plain_cumsum(mx.contiguous(a), -1, reverse=reverse, inclusive=inclusive, **more)

    @along_last.vjp
    def backward(a: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _plain_cumsum(mx.contiguous(cotangent), -1, reverse=not reverse, inclusive=inclusive, **more)

    return along_last(a.swapaxes(axis, -1)).swapaxes(axis, -1)
