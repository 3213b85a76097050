"""What MLX computes wrong on a device is noticed at load and replaced; simulated with kernels that lie."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_adapters.errors import ModelError
from mlx_adapters.models import quantized_check
from mlx_adapters.models.layers import is_quantized, weight_layers
from mlx_adapters.models.model import load_model
from mlx_adapters.models.quantized_check import MiscomputedWarning, check_device, check_layer, kind_of

DENSE = [
    nn.Linear(64, 48),
    nn.Linear(128, 300, bias=False),
    nn.Embedding(320, 64),
    SwitchLinear(64, 32, 6),
    SwitchLinear(128, 272, 3, bias=False),
    MultiLinear(64, 64, 2),
]
MODES = [(4, 32, "affine"), (3, 64, "affine"), (8, 64, "affine"), (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]


@pytest.mark.parametrize("dense", DENSE, ids=lambda layer: f"{type(layer).__name__}-{layer.weight.shape[-2]}")
@pytest.mark.parametrize("bits, group_size, mode", MODES)
def test_what_is_right_here_passes(dense, bits, group_size, mode):
    layer = dense.to_quantized(group_size=group_size, bits=bits, mode=mode)
    check = check_layer(layer, mx.float32)
    assert check.right and check.error < 1e-3, check


def test_a_bias_is_part_of_the_result():
    dense = nn.Linear(64, 300)
    dense.bias = 100 * mx.arange(300)
    layer = dense.to_quantized(group_size=32, bits=4)
    assert check_layer(layer, mx.float32).error < 1e-3


@pytest.fixture
def lying_kernel(monkeypatch):
    """`quantized_matmul` is wrong for more than one token and inputs of 64, as MLX's CUDA build is in float32."""
    right = mx.quantized_matmul

    def lie(x, *weights, **options):
        y = right(x, *weights, **options)
        return y * 1.5 if x.shape[-1] == 64 and x.shape[-2] > 1 else y

    monkeypatch.setattr(mx, "quantized_matmul", lie)
    monkeypatch.setattr("mlx_adapters.models.model.on_gpu", lambda: True)


def test_wrong_layers_become_dense_with_a_warning(tiny_model, lying_kernel, monkeypatch, caplog):
    folder = tiny_model("llama", bits=4)
    caplog.set_level("INFO", logger="mlx_adapters.models.quantized_check")
    with pytest.warns(
        MiscomputedWarning, match=r"computes \d+ quantized layers wrong on this device \('.*embed_tokens'"
    ):
        model = load_model(folder)
    quantized = {path for path, layer in weight_layers(model.module).items() if is_quantized(layer)}
    assert quantized == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}  # 128 inputs
    ids = [5, 6, 7, 8]
    logits = np.array(model.logits(ids).astype(mx.float32))
    exact = np.array(load_model(folder, dense=True, dtype="float32").logits(ids))
    np.testing.assert_allclose(logits, exact, atol=1e-3 * np.abs(exact).max())

    monkeypatch.setattr(quantized_check, "check_layer", None)  # what was found is remembered
    with pytest.warns(MiscomputedWarning):
        load_model(folder)
    assert caplog.messages == ["5 kinds of quantized layers are tried on this device, once."]


def test_a_kernel_that_raises_is_wrong_too(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("No implementation for problem shape")

    layer = nn.QuantizedLinear(64, 64)
    monkeypatch.setattr(mx, "quantized_matmul", refuse)
    check = check_layer(layer, mx.float32)
    assert not check.right and "No implementation" in check.kind


def test_a_dense_copy_that_does_not_fit_is_refused(tiny_model, lying_kernel, monkeypatch):
    monkeypatch.setattr(quantized_check, "usable_memory_bytes", lambda: 1000)
    with pytest.raises(ModelError, match="no room for unquantized ones"):
        load_model(tiny_model("llama", bits=4))


def test_right_layers_are_left_alone(tiny_model, monkeypatch):
    monkeypatch.setattr("mlx_adapters.models.model.on_gpu", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MiscomputedWarning)
        model = load_model(tiny_model("qwen3_moe", bits=4))
    kinds = {kind_of(layer, mx.float32) for layer in weight_layers(model.module).values() if is_quantized(layer)}
    assert any(kind.startswith("QuantizedSwitchLinear 4x64x64, 4 bits") for kind in kinds), kinds


def test_the_device_is_checked_without_a_model():
    checks = check_device()
    assert len(checks) == 12 and all(check.right for check in checks)
    assert any("mxfp4" in check.kind for check in checks)
