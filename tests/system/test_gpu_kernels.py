"""The sum along an axis that stands in for MLX's: its values and gradients, also where CUDA's own are wrong."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.system import door, gpu_kernels


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("axis", [-2, 1, -1, 0])
def test_it_sums_as_mlx_does_on_a_cpu(axis, reverse, inclusive, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "on_cuda", lambda: True)
    x, weighed = mx.random.normal((3, 4, 14, 5)).swapaxes(0, 1), mx.random.normal((4, 3, 14, 5))
    assert door.mx.cumsum is gpu_kernels.cumsum
    how = {"axis": axis, "reverse": reverse, "inclusive": inclusive}
    given = np.array(x)
    turned = np.flip(given, axis) if reverse else given
    summed = np.cumsum(turned, axis) - (0 if inclusive else turned)
    expected = np.flip(summed, axis) if reverse else summed
    np.testing.assert_allclose(mx.cumsum(x, **how), expected, atol=1e-5)
    back = mx.grad(lambda x: (mx.cumsum(x, **how) * weighed).sum())(x)
    with mx.stream(mx.cpu):
        own = mx.grad(lambda x: (gpu_kernels._plain_cumsum(x, **how) * weighed).sum())(x)
        assert mx.allclose(back, own, atol=1e-5)
