"""Of many tokens an update comes in where a packed matrix is unpacked, if the kernel for it serves."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_adapters.runtime import sites, unpacked
from mlx_adapters.runtime.additions import MANY_TOKENS, ForAll
from mlx_adapters.runtime.factors import Factors


def plain(layer, a, b):
    packed = (layer[name] for name in ("weight", "scales", "biases"))
    return mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits, dtype=a.dtype) + b @ a


def alone(layer, x):
    """What the layer computes; CUDA's own product with a matrix of one group in a row is wrong."""
    y = x @ plain(layer, mx.zeros((1, x.shape[-1])), mx.zeros((layer.weight.shape[0], 1))).T
    return y + layer.bias if "bias" in layer else y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(48,), (48, 16, 16)])
def test_it_comes_in_or_beside_with_the_same_outputs(widths, bias, monkeypatch):
    monkeypatch.setattr(sites, "on_cuda", lambda: True)
    keys = iter(mx.random.split(mx.random.key(0), 12))
    layers = [nn.QuantizedLinear(64, width, bias=bias, bits=4) for width in widths]
    a = mx.random.normal((len(widths), 3, 64) if len(widths) > 1 else (3, 64), key=next(keys))
    b = mx.random.normal((sum(widths), 3), key=next(keys))
    paths = tuple(f"block.{i}" for i in range(len(widths)))
    site = sites.Group(paths, layers) if len(widths) > 1 else sites.Site(paths, layers)
    site.update = ForAll(Factors(a, b))
    x = mx.random.normal((2, MANY_TOKENS, 64), key=next(keys))
    starts = [sum(widths[:i]) for i in range(len(widths) + 1)]
    expected = [
        alone(layer, x) + x @ a.reshape(len(widths), 3, 64)[i].T @ b[starts[i] : starts[i + 1]].T
        for i, layer in enumerate(layers)
    ]
    for serves in (False, True):
        monkeypatch.setattr(unpacked, "serves", lambda *_, serves=serves: serves)
        monkeypatch.setattr(unpacked, "unpacked", plain if serves else None)
        for made, wanted in zip(site.outputs(x), expected, strict=True):
            assert mx.allclose(made, wanted, rtol=1e-4, atol=1e-3)
    site.update = ForAll(Factors(a, b, gain=mx.full((sum(widths),), 2.0)))
    monkeypatch.setattr(unpacked, "unpacked", None)  # what scales rows is computed beside it
    for made, wanted, layer in zip(site.outputs(x), expected, layers, strict=True):
        assert mx.allclose(made, wanted + alone(layer, x), rtol=1e-4, atol=2e-3)


def test_it_serves_what_it_is_made_for_alone(monkeypatch):
    monkeypatch.setattr(unpacked, "language", lambda: "cuda")
    monkeypatch.setattr(unpacked, "is_right", lambda *_: True)
    layer = nn.QuantizedLinear(64, 16, bias=False, bits=4)
    assert unpacked.serves(layer, mx.float32, 16) and not unpacked.serves(layer, mx.bfloat16, 16)
    assert not unpacked.serves(layer, mx.float32, 17)
    assert not unpacked.serves(nn.QuantizedLinear(64, 16, bias=False, bits=3), mx.float32, 8)
    assert not unpacked.serves(nn.QuantizedLinear(64, 16, False, 32, 4, "mxfp4"), mx.bfloat16, 8)
