"""MLX's codes as GGUF's blocks: the same numbers, held against MLX's own and the gguf package's reading."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import ConfigError
from mlx_adapters.gguf_format.blocks import blocks_of, finest, nbytes, quantized, restored, same_grid
from mlx_adapters.rounding.packed import Packed, dequantize, nearest

GRIDS = [
    *((Quantization(bits, size), "Q4_1") for bits in (2, 3, 4) for size in (32, 64, 128)),
    *((Quantization(5, size), "Q5_1") for size in (32, 64, 128)),
    (Quantization(4, 32, "mxfp4"), "MXFP4"),
]


def random_packed(quantization, dtype, seed=0, shape=(6, 256), spread=0.1):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * spread
    return nearest(mx.array(weight), quantization, dtype)


@pytest.mark.parametrize("shape", [(6, 256), (2, 3, 128)], ids=["matrix", "experts"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(("quantization", "form"), GRIDS, ids=lambda x: str(x))
def test_codes_go_over_to_the_bit(quantization, form, dtype, shape):
    packed = random_packed(quantization, dtype, shape=shape)
    made = blocks_of(packed)
    assert same_grid(quantization) == form and made.dtype == np.uint8
    assert made.nbytes == nbytes(shape, form)
    np.testing.assert_array_equal(restored(made, form), np.array(dequantize(packed)))


@settings(max_examples=40)
@given(st.integers(-34, 6), st.sampled_from([mx.bfloat16, mx.float32]), st.integers(0, 99))
def test_how_close_scales_of_another_type_are(exponent, dtype, seed):
    """bfloat16 is float16 to the bit from 2^-17 on, else off by half of the smallest step; float32 keeps 11 bits."""
    packed = random_packed(Quantization(4, 32), dtype, seed, (1, 64), 2.0**exponent)
    ours, theirs = np.array(dequantize(packed), np.float64), restored(blocks_of(packed), "Q4_1").astype(np.float64)
    scale, bias = (np.abs(np.array(part.astype(mx.float32), np.float64)) for part in (packed.scales, packed.biases))
    off = [np.maximum(2.0**-11 * (dtype == mx.float32) * part, 2.0**-25 * (part < 2.0**-14)) for part in (scale, bias)]
    if dtype == mx.bfloat16:
        off = [np.where(part >= 2.0**-17, 0, step) for part, step in zip((scale, bias), off, strict=True)]
    bound = np.repeat(15 * off[0] + off[1], 32, axis=-1) * 1.01 + np.abs(ours) * 2.0**-23
    assert (np.abs(ours - theirs) <= bound).all()


def test_columns_move_by_whole_blocks():
    packed = random_packed(Quantization(4, 64), mx.float16, shape=(4, 128))
    columns = np.concatenate([np.arange(64, 128), np.arange(64)])
    moved = restored(blocks_of(packed, columns), "Q4_1")
    np.testing.assert_array_equal(moved, np.array(dequantize(packed))[:, columns])
    with pytest.raises(ConfigError, match="too narrow"):
        blocks_of(packed, np.arange(128)[::-1])


@pytest.mark.parametrize("bits, mode", [(6, "affine"), (8, "affine"), (8, "mxfp8"), (4, "nvfp4")])
def test_what_gguf_has_no_grid_for(bits, mode):
    assert same_grid(Quantization(bits, {"nvfp4": 16}.get(mode, 32), mode)) is None


def test_a_layer_that_is_rounded_anew_uses_the_types_whole_grid():
    assert finest(Quantization(3, 128)) == finest(Quantization(4, 64)) == Quantization(4, 32)
    assert finest(Quantization(5, 64)) == Quantization(5, 32)
    assert finest(Quantization(4, 32, "mxfp4")) == Quantization(4, 32, "mxfp4")


def test_q8_0_is_rounded_by_the_package():
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    reach = np.abs(values.reshape(3, 2, 32)).max(axis=-1, keepdims=True)
    back = restored(quantized(values, "Q8_0"), "Q8_0").reshape(3, 2, 32)
    assert (np.abs(back - values.reshape(3, 2, 32)) <= reach / 127 * 0.51).all()


def test_a_packed_layer_of_float32_scales_is_one_of_float16_scales():
    packed = random_packed(Quantization(4, 32), mx.float32)
    halves = Packed(packed.weight, *(x.astype(mx.float16) for x in (packed.scales, packed.biases)), Quantization(4, 32))
    np.testing.assert_array_equal(blocks_of(packed), blocks_of(halves))
