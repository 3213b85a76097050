"""Rounding on MLX gives what rounding on NumPy gives, one matrix or many at a time; kernels are held to plain loops."""

import difflib
import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.config.quantization import QUANTIZATIONS, Quantization
from mlx_adapters.errors import ModelError
from mlx_adapters.rounding import cholesky, engines, feedback, kernel_texts, kernels
from mlx_adapters.rounding.columns import again, diagonal_blocks, forward
from mlx_adapters.rounding.engines import NUMPY, MlxEngine
from mlx_adapters.rounding.grids import make_grid, pack_codes, to_numpy
from mlx_adapters.rounding.packed import dequantize, nearest
from mlx_adapters.system.machine import on_gpu

MODES = [Quantization(b, g[0], mode) for mode, (bits, g) in QUANTIZATIONS.items() for b in bits]
WIDTH, ROWS = 128, 136  # two blocks of rows


def moments(n, random):
    x = random.standard_normal((3 * n, n)) * np.exp(random.standard_normal(n))
    return (x.T @ x).astype(np.float32)


def layers(count, quantization, seed=0):
    """Weights, H, G, base and update of some layers, each with one axis for the batch."""
    random = np.random.default_rng(seed)
    base = nearest(mx.array(random.standard_normal((count, ROWS, WIDTH)).astype(np.float32)), quantization, mx.bfloat16)
    update = random.standard_normal((count, ROWS, 2)) @ random.standard_normal((count, 2, WIDTH))
    update = mx.array((0.02 * update).astype(np.float32))
    h, g = (np.stack([moments(n, random) for _ in range(count)]) for n in (WIDTH, ROWS))
    return dequantize(base) + update, h, g, base, update


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("quantization", MODES, ids=str)
def test_mlx_rounds_a_batch_as_numpy_rounds_each(quantization, together):
    weights, h, g, base, update = layers(2, quantization)
    if quantization.bits > 2:  # of one matrix, the aim moves
        update = update * mx.array([1.0, 20.0])[:, None, None]
    batch, losses = feedback.calibrated(
        weights,
        mx.array(h),
        quantization,
        mx.bfloat16,
        base,
        mx.array(g) if together else None,
        update=update,
        engine=MlxEngine(),
    )
    for i in range(2):
        packed, loss = feedback.calibrated(
            weights[i], h[i], quantization, mx.bfloat16, base[i], g[i] if together else None, update=update[i]
        )
        assert losses[i].item() == pytest.approx(float(loss), rel=0.03)  # a code that falls the other way moves others
        same = (dequantize(packed) == dequantize(batch[i])).mean().item()
        assert same > 0.5
        assert {n: (t.shape, t.dtype) for n, t in packed.tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in batch[i].tensors.items()
        }


def test_a_large_matrixs_error_is_estimated_well(monkeypatch):
    weights, h, g, base, _ = layers(2, Quantization(4, 64))
    engine, runs = MlxEngine(), []
    for limit in (1 << 23, 0):
        monkeypatch.setattr(feedback, "ESTIMATED", limit)
        arguments = weights, mx.array(h), Quantization(4, 64), mx.bfloat16, base, mx.array(g)
        packed, loss = feedback.calibrated(*arguments, engine=engine)
        _, plain, better = feedback.nearest_if_better(packed, *arguments[:2], mx.bfloat16, mx.array(g), engine=engine)
        runs.append(np.array([loss, plain]))
        assert not better.any()
    np.testing.assert_allclose(runs[1], runs[0], rtol=0.15)
    assert (runs[1] != runs[0]).all()


def test_one_engine_gives_the_same_bits_again():
    weights, h, _, base, update = layers(2, Quantization(4, 64))
    runs = []
    for _ in range(2):
        packed, _ = feedback.calibrated(
            weights, mx.array(h), Quantization(4, 64), mx.bfloat16, base, update=update, engine=MlxEngine()
        )
        runs.append(packed.tensors)
    assert all(mx.array_equal(runs[0][name], runs[1][name]).item() for name in runs[0])


@pytest.mark.parametrize("n", [1, 64, 200, 600])
def test_a_factor_made_by_panels_is_the_upper_one(n):
    random = np.random.default_rng(n)
    h = np.stack([feedback.damped(moments(n, random)) for _ in range(2)])
    factors = MlxEngine().factor(mx.array(h))
    for i in range(2):
        np.testing.assert_allclose(np.array(factors[i]), NUMPY.factor(h[i]), rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(np.array(factors), np.triu(np.array(factors)))


@pytest.mark.parametrize("n", [1, 128, 300, 600])
def test_upper_triangular_matrices_are_inverted_by_panels_many_at_once(n):
    random = np.random.default_rng(n)
    uppers = [NUMPY.factor(feedback.damped(moments(n, random), 0.1)) for _ in range(2)]
    expected = [np.linalg.inv(upper.astype(np.float64)) for upper in uppers]
    for engine in (NUMPY, MlxEngine()):
        for mine, theirs in zip(
            engine.each(engine.inverse_upper, list(map(engine.array, uppers))), expected, strict=True
        ):
            np.testing.assert_allclose(np.array(mine), theirs, rtol=1e-2, atol=1e-4 * np.abs(theirs).max())


def test_no_product_of_nothing_is_asked_for(monkeypatch):
    """CUDA divides by zero there, which ends the process."""
    products, rounds, addmm, kept = [], [], mx.addmm, feedback._BlockedRounder._round
    monkeypatch.setattr(
        mx, "addmm", lambda c, a, b, **k: (products.append(c.size * a.size * b.size), addmm(c, a, b, **k))[1]
    )
    monkeypatch.setattr(
        feedback._BlockedRounder, "_round", lambda *a: (rounds.append(a[2] is None or a[2].size), kept(*a))
    )
    weights, h, g, base, update = layers(1, Quantization(4, 64))
    engine = MlxEngine()
    feedback.calibrated(
        weights, mx.array(h), Quantization(4, 64), mx.bfloat16, base, mx.array(g), update=update, engine=engine
    )
    assert products and len(rounds) > 1 and all(products + rounds)  # a GPU rounds more at once: how many are its own


def test_a_matrix_that_is_not_positive_definite_is_damped_until_it_is():
    h = mx.array(np.diag([1.0, -0.005, 2.0]).astype(np.float32))
    factor = np.array(MlxEngine().factor(h))
    np.testing.assert_allclose(factor @ factor.T, np.array(h) + 0.01 * np.eye(3), atol=1e-6)
    np.testing.assert_allclose(NUMPY.factor(np.array(h)), factor, atol=1e-6)


def test_a_device_that_computes_nan_is_an_error_and_no_endless_loop():
    with pytest.raises(ModelError, match="does not factor"):
        MlxEngine().factor(mx.full((3, 3), mx.nan))


def test_blocks_along_the_diagonal_are_cut_out_of_every_matrix():
    matrix = np.arange(2 * 6 * 6).reshape(2, 6, 6)
    for xp in (np, mx):
        blocks = diagonal_blocks(xp.array(matrix), 4, xp)
        for block, span in zip(blocks, (slice(0, 4), slice(4, 6)), strict=True):
            np.testing.assert_array_equal(np.array(block), matrix[:, span, span])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_packs_as_numpy_packs(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 96)).astype(np.uint8)
    np.testing.assert_array_equal(np.array(pack_codes(mx.array(codes), bits, mx)), pack_codes(codes, bits))


@pytest.mark.parametrize("quantization", MODES, ids=str)
def test_plain_columns_are_numpys_and_the_case_for_kernels_is_exact(quantization):
    case = kernels.exact_group(quantization)
    codes, values = kernels.plain_columns(make_grid(quantization, mx.float32, mx), *case)
    for i in range(2):
        mine = [np.array(part[i]) for part in case]
        theirs = NUMPY.columns(make_grid(quantization, mx.float32), *mine)
        np.testing.assert_array_equal(np.array(values[i]), theirs[1])
        other = np.array(codes[i]) != theirs[0]
        assert not theirs[1][other].any()  # a float has two zeros
    assert len(np.unique(np.array(codes))) > 0 and to_numpy(values).max() < 2**14  # of sixteenths: 18 of 24 bits


def test_kernels_are_one_text_but_for_a_few_words():
    for text in (kernel_texts.HEADER, cholesky.TEXT, *(text.body for text in kernel_texts.TEXTS.values())):
        texts = [kernel_texts.source(language, text) for language in ("cuda", "metal")]
        words = [re.findall(r"[\w:.]+|\S", one) for one in texts]
        changed = [op for op in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes() if op[0] != "equal"]
        assert 2 <= len(changed) <= 20
        assert sum(op[2] - op[1] for op in changed) < 0.25 * len(words[0])


def fake(name):
    """In place of the kernels: the plain operations."""
    plain = SimpleNamespace(xp=mx, columns=kernels.plain_columns)

    def forwards(inputs, **_):
        target, weight, block, variances, _, settings, *start = inputs
        grid = make_grid(QUANTIZATION, DTYPE, mx)
        start = start if settings[2].item() else ()
        return list(forward(plain, grid, target, weight, block, variances, *start))

    def agains(inputs, **_):
        slope, block, scale, bias, codes, _ = inputs
        grid = make_grid(QUANTIZATION, DTYPE, mx)
        own_scale, own_bias = (mx.repeat(part, QUANTIZATION.group_size, axis=-2) for part in (scale, bias))
        values = own_scale * codes + own_bias
        return list(again(plain, grid, slope, block, scale, bias, codes, values))

    def panels(inputs, **_):
        matrices, factored = inputs
        return list(cholesky.plain_panels(matrices, factored.item()))

    return {"forward": forwards, "again": agains, "panels": panels}[name]


def use(monkeypatch, kernel):
    """`kernel(name)` in place of each kernel, none of them tried yet."""
    monkeypatch.setattr(kernels, "_built", kernel)
    monkeypatch.setattr(cholesky, "_kernel", lambda: kernel("panels"))
    for check in (kernels.problem_with, cholesky.problem_with_panels):
        check.cache_clear()


QUANTIZATION, DTYPE = Quantization(4, 32), mx.bfloat16


@pytest.mark.parametrize("what", ["forward", "again", "panels"])
@pytest.mark.parametrize("how", ["right", "fails", "lies"])
def test_kernels_that_fail_or_lie_give_way_with_a_note(monkeypatch, what, how):
    def broken(*_, **__):
        raise RuntimeError("nvrtc: error\nline 2")

    def lying(*arguments, **keywords):
        made = fake(what)(*arguments, **keywords)
        return [*made[:-1], made[-1] + 0.3 * (mx.arange(made[-1].shape[-1]) % 7 == 3)]

    other = {"right": fake(what), "fails": broken, "lies": lying}[how]
    monkeypatch.setattr(engines, "on_gpu", lambda: True)
    use(monkeypatch, lambda name: other if name == what else fake(name))
    weights, h, _, base, update = layers(2, QUANTIZATION)
    engine = MlxEngine()
    arguments = weights, mx.array(h), QUANTIZATION, DTYPE, base
    _, losses = feedback.calibrated(*arguments, update=update, engine=engine)
    said = {"right": None, "fails": "nvrtc: error)", "lies": "do not give"}[how]
    assert (said is None) == (engine.note is None) and (said is None or said in str(engine.note))
    monkeypatch.setattr(engines, "on_gpu", lambda: False)
    _, plain = feedback.calibrated(*arguments, update=update, engine=MlxEngine())
    np.testing.assert_allclose(np.array(losses), np.array(plain), rtol=1e-3)
    use(monkeypatch, fake)


@pytest.mark.metal
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("quantization", MODES, ids=str)
def test_kernels_for_metal_are_used_and_give_what_plain_operations_give(quantization, dtype, monkeypatch):
    assert on_gpu() and kernels.problem_with(quantization, dtype) is cholesky.problem_with_panels() is None
    weights, h, g, base, update = layers(2, quantization)
    arguments = weights, mx.array(h), quantization, dtype, base, mx.array(g)
    _, losses = feedback.calibrated(*arguments, update=update, engine=MlxEngine())
    monkeypatch.setattr(engines, "on_gpu", lambda: False)
    _, plain = feedback.calibrated(*arguments, update=update, engine=MlxEngine())
    np.testing.assert_allclose(np.array(losses), np.array(plain), rtol=0.03)
