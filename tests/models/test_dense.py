"""Numbers that are none are found where a GPU looks for them as where a CPU does."""

import mlx.core as mx
import pytest

from mlx_adapters.models import dense


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("dtype", dense.INFINITY)
def test_the_first_array_that_is_not_finite_is_named(dtype, cuda, monkeypatch):
    monkeypatch.setattr(dense, "on_cuda", lambda: cuda)
    monkeypatch.setattr(dense, "AT_A_TIME", 4)
    largest = mx.finfo(dtype).max
    weights = {str(i): mx.array([largest, -largest, 0, -0.0, i], dtype) for i in range(9)}
    weights |= {"empty": mx.zeros((0, 3), dtype), "ids": mx.array([1 << 30])}
    assert dense.first_not_finite(weights) is None
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        changed = weights | {"6": mx.array([0, bad], dtype), "8": mx.array([bad], dtype)}
        assert dense.first_not_finite(changed) == "6"
    assert dense.first_not_finite({}) is None
    small = {str(i): mx.array([1020, -1020, i], dtype) for i in range(9)}
    assert dense.first_not_finite(small, dense.LARGE) is None
    for large in (1024, -1024, float("nan"), largest):
        assert dense.first_not_finite(small | {"6": mx.array([0, large], dtype)}, dense.LARGE) == "6"
