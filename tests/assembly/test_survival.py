"""Weights that the file's type cannot hold are refused, and none else."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.assembly.survival import require_representable
from mlx_adapters.errors import FormatError

ABOUT = {mx.float16: 65504.0, mx.bfloat16: 3.3895313892515355e38, mx.float32: 3.4028234663852886e38}


@pytest.mark.parametrize("dtype", ABOUT, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_stored_as_inf_is_refused(dtype, sign):
    largest, weight = ABOUT[dtype], np.zeros((3, 4), np.float32)
    for value in (largest, largest * 0.999, 1e-30, 0):
        weight[1, 2] = sign * value
        require_representable("layer", mx.array(weight), dtype)
        assert mx.isfinite(mx.array(weight).astype(dtype)).all()
    others = [np.nan, np.inf] + [65520.0, 1e6] * (dtype == mx.float16) + [3.4e38] * (dtype == mx.bfloat16)
    for value in others:
        weight[1, 2] = sign * value
        assert not mx.isfinite(mx.array(weight).astype(dtype)).all()
        with pytest.raises(FormatError, match="layer"):
            require_representable("layer", mx.array(weight), dtype)
