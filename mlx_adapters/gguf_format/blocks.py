"""The types of a GGUF file's tensors, and MLX's codes as its blocks: the numbers stay what they are.

MLX's mode `affine` stores scale · code + bias for each group, and so do GGUF's q4_1 and q5_1 for each 32 weights, with
scale and bias in float16. A group of 64 or 128 becomes two or four blocks of the same scale. So codes of up to 4 bits
are a q4_1, codes of 5 bits a q5_1, without rounding again; mxfp4 is the same in both. Scales that MLX has in bfloat16
are float16's to the bit from 7.6e-6 (2^-17) up to 65,504; smaller ones are off by 3e-8 at most; scales in float32 are
rounded to 11 bits. Nothing in GGUF is like 6 or 8 bits with a bias: these layers are given unrounded, and become q8_0.
"""

from typing import Any

import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import ModelError
from mlx_adapters.rounding.grids import to_numpy
from mlx_adapters.rounding.packed import Packed
from mlx_adapters.system.door import mx

BLOCK = 32
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}  # what fits; float32 and bfloat16 reach as far as ours


def package() -> Any:
    """The package `gguf`. Raises ModelError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError("Writing GGUF needs the package 'gguf'.", "pip install 'mlx_adapters[gguf]'.") from None
    return gguf


def same_grid(quantization: Quantization) -> str | None:
    """GGUF's type whose grid holds MLX's codes; None if there is none."""
    if quantization.mode == "affine":
        return "Q4_1" if quantization.bits <= 4 else "Q5_1" if quantization.bits == 5 else None
    return "MXFP4" if quantization.mode == "mxfp4" else None


def finest(quantization: Quantization) -> Quantization:
    """The best grid of the type that holds this one: what a layer that is rounded anew may use for no more bytes."""
    if same_grid(quantization) in (None, "MXFP4"):
        return quantization
    return Quantization(max(quantization.bits, 4), BLOCK)


def blocks_of(packed: Packed, columns: np.ndarray | None = None) -> np.ndarray:
    """(..., bytes of a row): codes, scales and biases of `packed` as GGUF's blocks of 32, in the order of `columns`.

    Raises ConfigError where `columns` would tear a block apart.
    """
    form, q = same_grid(packed.quantization), packed.quantization
    bits = 4 if form == "MXFP4" else q.bits
    ones, zeros = (make((*packed.scales.shape,), mx.float32) for make in (mx.ones, mx.zeros))
    codes = mx.dequantize(packed.weight, ones, zeros, group_size=q.group_size, bits=bits)
    codes = to_numpy(codes).astype(np.uint8).reshape(*codes.shape[:-1], -1, BLOCK)  # (..., rows, blocks, 32)
    nibbles = (codes[..., :16] & 15) | (codes[..., 16:] & 15) << 4
    if form == "MXFP4":
        head = [np.array(packed.scales)[..., None]]
    else:
        head = [_halves(scale, q.group_size // BLOCK) for scale in (packed.scales, packed.biases)]
    if form == "Q5_1":
        head.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))  # the fifth bits, 32 to a block
    whole = np.concatenate([*head, nibbles], axis=-1)
    if columns is not None:
        runs = columns.reshape(-1, BLOCK)
        whole_runs = (runs == runs[:, :1] + np.arange(BLOCK)).all() and not (runs[:, 0] % BLOCK).any()
        require(bool(whole_runs), "This model's heads are too narrow for blocks of 32.", "pass --bits none or 8.")
        whole = whole[..., runs[:, 0] // BLOCK, :]
    return whole.reshape(*whole.shape[:-2], -1)


def _halves(values: mx.array, times: int) -> np.ndarray:
    """One float16 for each block, as two bytes."""
    halves = np.repeat(to_numpy(values), times, axis=-1).astype(np.float16)
    return np.ascontiguousarray(halves)[..., None].view(np.uint8)


def quantized(values: np.ndarray, form: str) -> np.ndarray:
    """float32 `values` in one of GGUF's types, by the `gguf` package."""
    gguf = package()
    return np.asarray(gguf.quants.quantize(np.ascontiguousarray(values), getattr(gguf.GGMLQuantizationType, form)))


def restored(stored: np.ndarray, form: str) -> np.ndarray:
    """float32 of what `quantized` or `blocks_of` gave."""
    gguf = package()
    return np.asarray(gguf.quants.dequantize(stored, getattr(gguf.GGMLQuantizationType, form)))


def form_of(name: str, shape: tuple[int, ...], kind: str, exact: tuple[str, ...]) -> str:
    """The type of an unquantized tensor: vectors and what is computed in float32 stay so; q8_0 needs whole blocks."""
    if len(shape) < 2 or name.endswith(".bias") or any(part in name for part in exact):
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % BLOCK else kind


def nbytes(shape: tuple[int, ...], form: str) -> int:
    """Bytes of a tensor."""
    gguf = package()
    size = gguf.quant_shape_to_byte_shape(shape or (1,), getattr(gguf.GGMLQuantizationType, form))
    return int(np.prod(size))


def why_not(name: str, values: Any, form: str) -> str | None:
    """Why finite float32 `values` cannot be stored in a type, if so."""
    reach, limit = float(np.abs(values).max(initial=0)), LARGEST.get(form, float(np.finfo(np.float32).max))
    return f"'{name}' holds {reach:.3g}, which {form.lower()} cannot (up to {limit:.3g})." if reach > limit else None
