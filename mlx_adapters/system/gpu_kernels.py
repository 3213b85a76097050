"""Kernels of our own, of one text for Metal and CUDA but for the words that the two spell differently."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx

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
