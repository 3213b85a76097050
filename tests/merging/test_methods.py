"""The arithmetic of merging, against PEFT's own results and against the full matrices."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlx_adapters.errors import IncompatibleError
from mlx_adapters.merging import arithmetic
from mlx_adapters.merging.decomposition import Decomposition, decompose_matrix, decompose_product
from mlx_adapters.merging.methods import METHODS, Options, merge_updates
from mlx_adapters.models.low_rank import LowRankUpdate, inner, stack

MODULES = ("embed", "q", "v", "up")  # the order in which PEFT visits them
with safe_open(Path(__file__).parents[1] / "fixtures" / "merges.safetensors", "numpy") as _file:
    TENSORS = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118
    SCALINGS = json.loads(_file.metadata()["scalings"])
    CASES = json.loads(_file.metadata()["cases"])


class RecordedDraws:
    """Stands in for the random generator and replays what torch.bernoulli drew for PEFT."""

    def __init__(self, case: str):
        self.masks = [TENSORS[name] for name in sorted(TENSORS) if name.startswith(f"mask/{case}/")]

    def random(self, shape):
        mask = self.masks.pop(0)
        mask = mask if mask.shape == shape else mask.T
        assert mask.shape == shape
        return np.where(mask == 1, 0.0, 1.0)


def source(adapter: str, module: str) -> LowRankUpdate | None:
    name = f"source/{adapter}/{module}"
    if name + "/A" not in TENSORS:
        return None
    return LowRankUpdate(TENSORS[name + "/A"].T, TENSORS[name + "/B"].T, SCALINGS[f"{adapter}/{module}"])


def random_update(rng: np.random.Generator, inputs: int, rank: int, outputs: int, experts: int = 0) -> LowRankUpdate:
    lead = (experts,) if experts else ()
    a = rng.standard_normal((*lead, inputs, rank), dtype=np.float32)
    return LowRankUpdate(a, rng.standard_normal((*lead, rank, outputs), dtype=np.float32), float(rng.uniform(0.1, 20)))


def as_matrix(merged: LowRankUpdate | Decomposition, rank: int) -> np.ndarray:
    if isinstance(merged, LowRankUpdate):
        return merged.matrix()
    a, b = merged.factors(rank)
    return a @ b


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str):
    recipe, draws, compared = CASES[case], RecordedDraws(case), 0
    method = METHODS[recipe["method"].replace("_", "-")]
    for module in MODULES:
        present = [
            (u, w)
            for s, w in zip(recipe["sources"], recipe["weights"], strict=True)
            if (u := source(s, module)) is not None
        ]
        if not present:
            continue
        updates, weights = zip(*present, strict=True)
        rank = recipe.get("svd_rank", 6 if "wide" in recipe["sources"] else 4)
        options = Options(recipe.get("density", 1.0), recipe.get("majority_sign_method", "total"), rank=rank)
        merged = merge_updates(method, updates, weights, options, draws)
        name = f"merged/{case}/{module}"
        if name + "/product" in TENSORS:
            expected = TENSORS[name + "/product"].T
        else:
            a, b = TENSORS[name + "/A"].T, TENSORS[name + "/B"].T
            expected = a @ b
            if method.space == "factors":
                np.testing.assert_allclose(merged.a, a, atol=1e-6)
                np.testing.assert_allclose(merged.b, b, atol=1e-6)
        np.testing.assert_allclose(as_matrix(merged, rank), expected, atol=3e-6)
        compared += 1
    assert compared >= 2 and not draws.masks


def test_every_method_is_checked_against_peft():
    assert {case["method"].replace("_", "-") for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("ranks", [(4, 4), (2, 5), (3, 1, 4)])
def test_cat_and_full_svd_are_the_exact_weighted_sum(ranks, experts):
    rng = np.random.default_rng(sum(ranks) + experts)
    updates = [random_update(rng, 20, rank, 14, experts) for rank in ranks]
    weights = [0.5, -1.25, 2.0][: len(ranks)]
    exact = sum(w * u.matrix() for w, u in zip(weights, updates, strict=True))
    options = Options(rank=sum(ranks))
    for name in ("cat", "svd"):
        merged = merge_updates(METHODS[name], updates, weights, options, rng)
        np.testing.assert_allclose(as_matrix(merged, sum(ranks)), exact, rtol=1e-4, atol=1e-4)


def test_svd_is_the_nearest_of_its_rank_and_knows_its_energy():
    rng = np.random.default_rng(1)
    updates = [random_update(rng, 30, 6, 18) for _ in range(2)]
    exact = stack(updates, [1.0, 0.5]).matrix()
    singular = np.linalg.svd(exact, compute_uv=False).astype(np.float64)
    merged = merge_updates(METHODS["svd"], updates, [1.0, 0.5], Options(rank=3), rng)
    error = np.linalg.norm(exact - as_matrix(merged, 3))
    assert error == pytest.approx(np.sqrt(np.sum(singular[3:] ** 2)), rel=1e-5)
    assert merged.kept(3) == pytest.approx(np.sum(singular[:3] ** 2) / np.sum(singular**2), rel=1e-5)
    shares = np.cumsum(singular**2) / np.sum(singular**2)
    for energy in (0.5, 0.9, 0.99):
        assert merged.rank_for(energy) == 1 + int(np.argmax(shares >= energy))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_expert_is_merged_as_a_matrix_of_its_own(name):
    rng = np.random.default_rng(2)
    updates = [random_update(rng, 10, 3, 7, experts=2) for _ in range(2)]
    options = Options(density=0.5 if METHODS[name].prune == "magnitude" else 1.0, rank=4)
    together = merge_updates(METHODS[name], updates, [1, 2], options, rng)
    for expert in range(2):
        single = [LowRankUpdate(u.a[expert], u.b[expert], u.scale) for u in updates]
        alone = merge_updates(METHODS[name], single, [1, 2], options, rng)
        rank = 6 if name == "cat" else 4
        np.testing.assert_allclose(as_matrix(together, rank)[expert], as_matrix(alone, rank), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.space == "factors"])
def test_factor_methods_refuse_different_ranks_and_name_the_exact_ones(name):
    rng = np.random.default_rng(3)
    with pytest.raises(IncompatibleError, match=r"ranks differ \(2, 3\)") as caught:
        merge_updates(METHODS[name], [random_update(rng, 9, r, 9) for r in (2, 3)], [1, 1], Options(), rng)
    assert "'cat'" in caught.value.hint


def test_layers_of_different_shape_are_refused():
    rng = np.random.default_rng(4)
    updates = [random_update(rng, 9, 2, 9), random_update(rng, 8, 2, 9)]
    with pytest.raises(IncompatibleError, match="different shapes"):
        merge_updates(METHODS["cat"], updates, [1, 1], Options(), rng)


@pytest.mark.parametrize("shape", [(1100, 900), (900, 1100), (64, 900)])
def test_a_large_matrix_is_decomposed_as_well_as_an_exact_svd_would(shape):
    rng = np.random.default_rng(5)
    decay = np.float32(0.9) ** np.arange(min(shape), dtype=np.float32)
    left = np.linalg.qr(rng.standard_normal((shape[0], min(shape)), dtype=np.float32))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], min(shape)), dtype=np.float32))[0]
    matrix = (left * decay) @ right.T
    exact = decay.astype(np.float64) ** 2
    parts = decompose_matrix(matrix, rank=20)
    assert parts.rank == 20
    assert parts.kept(20) == pytest.approx(exact[:20].sum() / exact.sum(), abs=1e-4)
    residual = np.linalg.norm(matrix - as_matrix(parts, 20)) ** 2
    assert residual == pytest.approx(exact[20:].sum(), rel=1e-2)
    assert decompose_matrix(matrix, energy=0.9).rank == 1 + int(np.argmax(np.cumsum(exact) / exact.sum() >= 0.9))


def test_a_flat_spectrum_falls_back_to_the_exact_svd():
    rng = np.random.default_rng(6)
    matrix = rng.standard_normal((800, 790), dtype=np.float32)
    parts = decompose_matrix(matrix, energy=0.99)
    assert 500 < parts.rank < 790 and parts.kept(parts.rank) >= 0.99 > parts.kept(parts.rank - 1)


def test_norm_and_inner_product_come_from_the_factors():
    rng = np.random.default_rng(7)
    x, y = random_update(rng, 30, 4, 20), random_update(rng, 30, 7, 20)
    assert x.norm() == pytest.approx(np.linalg.norm(x.matrix()), rel=1e-5)
    assert inner(x, y) == pytest.approx(float(np.sum(x.matrix() * y.matrix())), rel=1e-3)


def test_factors_of_very_unequal_strength_are_decomposed_to_float32_precision():
    rng = np.random.default_rng(10)
    strength = np.float32(10.0) ** np.linspace(0, -5, 8, dtype=np.float32)
    a = rng.standard_normal((40, 8), dtype=np.float32) * strength
    b = rng.standard_normal((8, 30), dtype=np.float32) * strength[::-1, None]
    exact = a.astype(np.float64) @ b.astype(np.float64)
    parts = decompose_product(a, b)
    singular = np.linalg.svd(exact, compute_uv=False)[:8]
    np.testing.assert_allclose(parts.s, singular, atol=1e-6 * singular[0])
    np.testing.assert_allclose((parts.u * parts.s) @ parts.vt, exact, atol=2e-6 * singular[0])
    np.testing.assert_allclose(parts.u.T @ parts.u, np.eye(8), atol=1e-3)


def test_zero_updates_merge_to_zero():
    zero = LowRankUpdate(np.zeros((5, 2), np.float32), np.zeros((2, 4), np.float32))
    parts = decompose_product(zero.a, zero.b)
    assert parts.kept(1) == 1.0 and parts.rank_for(0.99) == 1 and not parts.factors(1)[0].any()


matrices = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).standard_normal((7, 5), dtype=np.float32)
)


@settings(max_examples=60)
@given(matrices, st.floats(0.01, 1))
def test_keep_largest_keeps_exactly_the_largest(matrix, density):
    kept = arithmetic.keep_largest(matrix, density)
    assert np.count_nonzero(kept) == int(density * matrix.size)
    assert np.all((kept == 0) | (kept == matrix))
    if (kept != 0).any() and (kept == 0).any():
        assert np.abs(matrix[kept != 0]).min() >= np.abs(matrix[kept == 0]).max()


@settings(max_examples=30)
@given(matrices, matrices, st.floats(0.05, 1))
def test_dropping_keeps_the_mean_and_the_seed_decides(x, y, density):
    one = arithmetic.drop_at_random(x, density, np.random.default_rng(9))
    again = arithmetic.drop_at_random(x, density, np.random.default_rng(9))
    np.testing.assert_array_equal(one, again)
    draws = [
        arithmetic.drop_at_random(np.ones((50, 40), np.float32), density, np.random.default_rng(s)) for s in range(9)
    ]
    assert np.mean(draws) == pytest.approx(1, abs=0.25)
    sign = arithmetic.elected_sign([x, y], "total")
    np.testing.assert_array_equal(sign, np.where(x + y >= 0, 1, -1))
