"""Rounding: packing as MLX packs, grids as MLX decodes, and less error than rounding to nearest."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_adapters.calibration.moments import gram
from mlx_adapters.config.quantization import QUANTIZATIONS, Quantization
from mlx_adapters.rounding import feedback
from mlx_adapters.rounding.engines import NUMPY
from mlx_adapters.rounding.grids import make_grid, pack_codes, round_to, to_numpy
from mlx_adapters.rounding.packed import dequantize, nearest, to_nearest

ALL = [Quantization(b, g, mode) for mode, (bits, groups) in QUANTIZATIONS.items() for b in bits for g in groups]


def unpack(words, bits):
    """The inverse of `pack`: uint8 codes."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    planes = np.unpackbits(stream, axis=-1, bitorder="little")
    planes = planes.reshape(*stream.shape[:-1], -1, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (planes * weights).sum(axis=-1, dtype=np.uint8)


def hessian(n, rng, tokens=600):
    """Correlated inputs, some much stronger than others, as in a real layer."""
    mix = rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 40)[None]
    x = (rng.standard_normal((tokens, n)) @ mix.T).astype(np.float32)
    return x.T @ x / tokens


def error_under(weight, packed, h):
    """tr(E H Eᵀ) per weight, on the scale that `calibrated` returns."""
    errors = to_numpy(weight) - to_numpy(dequantize(packed))
    return feedback.error_felt(errors.T, feedback.damped(h)) / errors.size


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_numbers_are_rounded_to_a_type_as_mlx_rounds_them(dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.abs(values) < (6e4 if dtype == mx.float16 else 3e38)]
    np.testing.assert_array_equal(round_to(values, dtype), to_numpy(mx.array(values).astype(dtype)))


@settings(max_examples=30)
@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), rows=st.integers(1, 3), words=st.integers(1, 3), data=st.data())
def test_packing_round_trips_and_is_what_mlx_reads(bits, rows, words, data):
    n = 32 * words
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * n, max_size=rows * n))
    codes = np.array(codes, np.uint8).reshape(rows, n)
    packed = pack_codes(codes, bits)
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    ones, zeros = mx.ones((rows, words)), mx.zeros((rows, words))
    seen = mx.dequantize(mx.array(packed), ones, zeros, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(seen), codes.astype(np.float32))


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_grid_decodes_exactly_as_mlx_does(quantization):
    rng = np.random.default_rng(1)
    weight = mx.array(rng.standard_normal((8, 256)).astype(np.float32))
    packed = nearest(weight, quantization, mx.bfloat16)
    grid = make_grid(quantization, mx.bfloat16)
    scales = np.repeat(grid.decode_scales(packed.scales), quantization.group_size, axis=1)
    biases = 0 * scales
    if packed.biases is not None:
        biases = np.repeat(np.array(packed.biases.astype(mx.float32)), quantization.group_size, axis=1)
    codes = unpack(np.array(packed.weight), quantization.bits).astype(np.float32)
    np.testing.assert_array_equal(grid.values(codes[:, None], scales, biases)[:, 0], np.array(dequantize(packed)))


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_calibrated_beats_nearest_and_reports_its_error_truly(quantization):
    rng = np.random.default_rng(2)
    h = hessian(256, rng)
    weight = mx.array(rng.standard_normal((48, 256)).astype(np.float32) * 0.02)
    packed, loss = feedback.calibrated(weight, h, quantization, mx.bfloat16)
    expected = nearest(weight, quantization, mx.bfloat16)
    assert {k: (v.shape, v.dtype) for k, v in packed.tensors.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.tensors.items()
    }
    assert loss == pytest.approx(error_under(weight, packed, h), rel=1e-3)
    assert loss < 0.4 * error_under(weight, expected, h)


def test_sweeps_never_make_it_worse():
    rng = np.random.default_rng(3)
    h = hessian(128, rng)
    weight = mx.array(rng.standard_normal((32, 128)).astype(np.float32))
    losses = [feedback.calibrated(weight, h, Quantization(3, 64), mx.float16, sweeps=n)[1] for n in (0, 1, 2, 4, 8)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_rows_that_are_felt_together_cancel_each_other(monkeypatch, rows=192):
    rng = np.random.default_rng(6)
    h, g = hessian(128, rng), hessian(rows, rng)
    weight = rng.standard_normal((rows, 128)).astype(np.float32)
    losses = []
    for together in (False, True):
        packed, loss = feedback.calibrated(
            mx.array(weight), h, Quantization(4, 64), mx.bfloat16, outputs=g, together=together
        )
        error = weight - np.array(dequantize(packed))
        felt = feedback.damped(g, feedback.OUTPUT_DAMPING) @ error @ feedback.damped(h)
        assert loss == pytest.approx(float(np.vdot(felt, error)) / error.size, rel=1e-3)
        losses.append(loss)
    assert losses[1] < 0.7 * losses[0]
    monkeypatch.setattr(feedback, "PASSES", 2)
    *_, twice = feedback.calibrated(mx.array(weight), h, Quantization(4, 64), mx.bfloat16, outputs=g)
    assert losses[1] < 0.998 * twice


def test_weights_already_on_the_base_grid_stay_where_they_are():
    rng = np.random.default_rng(4)
    weight = mx.array(rng.standard_normal((32, 128)).astype(np.float32))
    base = nearest(weight, Quantization(4, 64), mx.bfloat16)
    packed, loss = feedback.calibrated(
        dequantize(base), hessian(128, rng), Quantization(4, 64), mx.bfloat16, start=base
    )
    assert loss == 0
    np.testing.assert_array_equal(np.array(dequantize(packed)), np.array(dequantize(base)))


@pytest.mark.parametrize("kind", ["zero", "singular", "dead", "nan", "inf"])
@pytest.mark.parametrize("quantization", [Quantization(4, 64), Quantization(4, 16, "nvfp4")], ids=str)
def test_bad_hessians_still_give_a_sound_rounding(kind, quantization):
    rng = np.random.default_rng(5)
    h = hessian(128, rng)
    if kind == "zero":
        h[:] = 0
    elif kind == "singular":
        x = rng.standard_normal((3, 128)).astype(np.float32)
        h = x.T @ x
    elif kind == "dead":
        h[:40] = 0
        h[:, :40] = 0
    else:
        h[3, 3] = np.nan if kind == "nan" else np.inf
    weight = mx.array(rng.standard_normal((16, 128)).astype(np.float32))
    packed, loss = feedback.calibrated(weight, h, quantization, mx.float32)
    assert np.isfinite(loss)
    error = np.abs(np.array(dequantize(packed) - weight))
    assert error.mean() < 0.5


@pytest.mark.parametrize("quantization", [Quantization(4, 64), Quantization(8, 32, "mxfp8")], ids=str)
def test_constant_and_zero_groups(quantization):
    weight = mx.concatenate([mx.zeros((4, 64)), mx.full((4, 64), 0.37)], axis=1)
    packed, _ = feedback.calibrated(weight, np.eye(128, dtype=np.float32), quantization, mx.float32)
    np.testing.assert_allclose(np.array(dequantize(packed)), np.array(weight), rtol=0.04, atol=1e-6)


def test_the_error_of_a_large_matrix_is_estimated_within_some_percent(monkeypatch):
    random = np.random.default_rng(3)
    errors = random.normal(size=(96, 160)).astype(np.float32)
    x, g = random.normal(size=(300, 96)), random.normal(size=(300, 160)) * np.linspace(0.2, 2, 160)
    hessian, outputs = (x.T @ x).astype(np.float32), (g.T @ g).astype(np.float32)
    exact = feedback.error_felt(errors, hessian, outputs)
    assert exact == pytest.approx(np.trace(outputs @ errors.T @ hessian @ errors), rel=1e-4)
    monkeypatch.setattr(feedback, "ESTIMATED", 0)
    for factor in (NUMPY.factor(outputs), None):
        estimate = feedback.error_felt(errors, hessian, outputs, factor)
        assert estimate != exact and estimate == pytest.approx(exact, rel=0.05)


def test_a_large_matrix_is_rounded_almost_as_well(monkeypatch):
    rng = np.random.default_rng(4)
    weight = mx.array(rng.standard_normal((512, 128)).astype(np.float32))
    h, outputs = hessian(128, rng), hessian(512, rng)
    _, thorough = feedback.calibrated(weight, h, Quantization(4, 64), mx.float32, None, outputs)
    monkeypatch.setattr(NUMPY, "large", 0.0)
    packed, _ = feedback.calibrated(weight, h, Quantization(4, 64), mx.float32, None, outputs)
    errors = to_numpy(weight - dequantize(packed)).T
    felt = feedback.error_felt(errors, feedback.damped(h), feedback.damped(outputs, feedback.OUTPUT_DAMPING))
    monkeypatch.undo()
    assert felt / errors.size < 1.1 * thorough


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_light_update_survives_eight_bits(dtype):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((64, 256)).astype(np.float32)
    update = 0.008 * (rng.standard_normal((64, 1)) @ rng.standard_normal((1, 256))).astype(np.float32)
    weight, quantization = mx.array(base + update), Quantization(8, 64)
    errors, kept = [], []
    for way in (to_nearest, nearest):
        packed = way(weight, quantization, dtype)
        survived = np.array(dequantize(packed)) - base
        errors.append(np.linalg.norm(survived - update) / np.linalg.norm(update))
        kept.append((survived * update).sum() / np.square(update).sum())
        assert packed.scales.dtype == packed.biases.dtype == dtype
    assert abs(kept[0] - 1) < 0.05 and errors[0] < 0.85 * errors[1] if dtype == mx.bfloat16 else errors[0] < errors[1]
    flat = to_nearest(mx.zeros((2, 64)), quantization, dtype)
    assert mx.array_equal(dequantize(flat), mx.zeros((2, 64)))


def test_a_light_update_keeps_its_length():
    rng = np.random.default_rng(5)
    h = hessian(256, rng)
    base = nearest(mx.array(rng.standard_normal((192, 256)).astype(np.float32)), Quantization(4, 64), mx.float32)
    factors = rng.standard_normal((192, 4)) @ rng.standard_normal((4, 256))
    update = mx.array((0.02 * factors).astype(np.float32))  # a quarter of the grid's steps
    weight = dequantize(base) + update

    def kept(**options):
        packed, _ = feedback.calibrated(weight, h, Quantization(4, 64), mx.float32, base, **options)
        stored = to_numpy(dequantize(packed) - dequantize(base)).T
        felt = feedback.damped(h) @ to_numpy(update).T
        return float(np.vdot(stored, felt) / np.vdot(to_numpy(update).T, felt))

    assert kept() < 0.95
    assert abs(kept(update=update) - 1) < 0.5 * (1 - kept())


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_gram_is_the_product_of_a_matrix_with_itself(tokens):
    rows = np.random.default_rng(0).standard_normal((tokens, 96)).astype(np.float32)
    np.testing.assert_allclose(np.array(gram(mx.array(rows))), rows.T @ rows, atol=1e-3)


def test_nearest_is_kept_where_it_moves_the_outputs_less():
    weight, h = mx.random.normal((64, 128), key=mx.random.key(1)), np.eye(128, dtype=np.float32)
    quantization = Quantization(4, 32)
    plain = to_nearest(weight, quantization, mx.float32)
    packed, _ = feedback.calibrated(weight, h, quantization, mx.float32)
    assert not feedback.nearest_if_better(packed, weight, h, mx.float32)[2]
    worse = to_nearest(weight * 1.2, quantization, mx.float32)
    kept, loss, better = feedback.nearest_if_better(worse, weight, h, mx.float32)
    assert better
    assert all(mx.array_equal(a, b) for a, b in zip(kept.tensors.values(), plain.tensors.values(), strict=True))
    error = weight - dequantize(plain)
    assert loss == pytest.approx(error.square().mean().item() * 1.01, rel=1e-4)  # H is damped by 1 %
    spoiled = replace(plain, scales=plain.scales * mx.nan)
    assert feedback.nearest_if_better(spoiled, weight, h, mx.float32)[2]


def test_few_tokens_are_doubted():
    """What is best for one token moves all others; nearest moves none much."""
    weight, token = mx.random.normal((64, 128), key=mx.random.key(1)), np.zeros((128, 128), np.float32)
    token[0, 0] = 1
    quantization = Quantization(4, 32)
    packed, _ = feedback.calibrated(weight, token, quantization, mx.float32)
    assert not feedback.nearest_if_better(packed, weight, token, mx.float32, damping=1e-4)[2]
    spoiled = to_nearest(mx.concatenate([weight[:, :1], weight[:, 1:] * 1.5], axis=1), quantization, mx.float32)
    spoiled.weight[:, :1] = packed.weight[:, :1]
    assert feedback.nearest_if_better(spoiled, weight, token, mx.float32, damping=128.0)[2]
