"""Weights that the file's type cannot hold are refused, and none else."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.assembly import survival
from mlx_adapters.assembly.survival import RowsTold, require_representable
from mlx_adapters.errors import FormatError

ABOUT = {mx.float16: 65504.0, mx.bfloat16: 3.3895313892515355e38, mx.float32: 3.4028234663852886e38}


def extremes(weight):
    """The least and the greatest number, as they are read of some rows."""
    return RowsTold(mx.array(weight), []).read()[1:3]


@pytest.mark.parametrize("dtype", ABOUT, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_stored_as_inf_is_refused(dtype, sign):
    largest, weight = ABOUT[dtype], np.zeros((3, 4), np.float32)
    for value in (largest, largest * 0.999, 1e-30, 0):
        weight[1, 2] = sign * value
        require_representable("layer", *extremes(weight), dtype)
        assert mx.isfinite(mx.array(weight).astype(dtype)).all()
    others = [np.nan, np.inf] + [65520.0, 1e6] * (dtype == mx.float16) + [3.4e38] * (dtype == mx.bfloat16)
    for value in others:
        weight[1, 2] = sign * value
        assert not mx.isfinite(mx.array(weight).astype(dtype)).all()
        with pytest.raises(FormatError, match="layer"):
            require_representable("layer", *extremes(weight), dtype)


@pytest.mark.parametrize("dtype", ABOUT, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_what_is_stored_is_finite_or_not_whatever_device_says_so(dtype, value, monkeypatch):
    stored = mx.array(np.array([[1.0, ABOUT[dtype]], [-ABOUT[dtype], value]], np.float32)).astype(dtype)
    for gpu in (False, True):
        monkeypatch.setattr(survival, "on_gpu", lambda gpu=gpu: gpu)
        told = RowsTold(mx.zeros((2, 2)), [mx.zeros((2, 2), mx.uint32), stored])
        assert told.read()[0] == np.isfinite(value)


@pytest.mark.parametrize("shape", [(40, 6), (9, 4, 5)])
@pytest.mark.parametrize("some", [survival.EVERY, slice(None, None, 3)])
@pytest.mark.parametrize("at_once", [1, 13, 1000])
def test_sums_are_those_of_all_rows_however_many_are_added_up_at_once(monkeypatch, shape, some, at_once):
    monkeypatch.setattr(survival, "AT_ONCE", at_once)
    base, fused, stored = (mx.random.normal(shape, key=mx.random.key(n)) for n in range(3))
    told = mx.stack([mx.array(each) for each in survival.sums_of(base, fused, stored[some], some)]).tolist()
    w, changed, kept = (np.array(part, np.float64)[some] for part in (base, fused, stored))
    d, held = changed - w, kept - w
    wanted = [(x * y).sum() for x, y in ((d, held), (d, d), (held, held), (w, w))]
    assert told == pytest.approx(wanted, rel=1e-5)
