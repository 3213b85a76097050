"""Models whose kernels have no gradient on some device: calibration takes another path, or says that there is none."""

import importlib

import mlx.core as mx
import pytest
from helpers.fusing import visible_adapter
from helpers.matrix import FEW
from helpers.tiny_configs import tiny_base

import mlx_adapters as ma

GATED_DELTA = ["qwen3_5", "qwen3_5_moe", "qwen3_next", "kimi_linear", "olmo_hybrid"]


@mx.custom_function
def _kernel(x: mx.array) -> mx.array:
    return x * 1.0


@_kernel.vjp
def _no_gradient(*_):
    raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")


@pytest.fixture(params=GATED_DELTA)
def on_metal(request, monkeypatch):
    """The model type, with a gated-delta kernel that computes what it does on a Mac, and has no gradient either."""
    name = {"qwen3_5_moe": "qwen3_5"}.get(request.param, request.param)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    plain, used = module.gated_delta_update, []

    def update(*arguments, use_kernel=True, **keywords):
        out, state = plain(*arguments, use_kernel=False, **keywords)
        used.append(use_kernel)
        return (_kernel(out) if use_kernel else out), state

    monkeypatch.setattr(module, "gated_delta_update", update)
    yield request.param
    assert True in used and False in used


def test_gated_delta_models_are_calibrated_without_the_kernel(on_metal, tmp_path):
    base = tiny_base(tmp_path / "base", on_metal)
    fused = ma.fuse(base, visible_adapter(base), tmp_path / "out", options=FEW)
    assert fused.method == "calibrated" or any("keeps more" in note for note in fused.notes)
    assert fused.fidelity.kl_mean < fused.fidelity.base_kl


def test_a_model_without_gradient_is_rounded_to_nearest_and_says_so(tmp_path, monkeypatch):
    from mlx_lm.models import rwkv7

    plain = rwkv7.Rwkv7TimeMixing.__call__

    def call(self, *arguments, **keywords):
        out, *rest = plain(self, *arguments, **keywords)
        return (_kernel(out), *rest)

    base = tiny_base(tmp_path / "base", "rwkv7")
    monkeypatch.setattr(rwkv7.Rwkv7TimeMixing, "__call__", call)
    events = []
    fused = ma.fuse(base, visible_adapter(base), tmp_path / "out", options=FEW, on_event=events.append)
    assert fused.method == "nearest"
    assert any("no gradient on this device" in note for note in fused.notes)
    assert any("no gradient on this device" in str(event) for event in events)
    with pytest.raises(ma.ModelError, match="no gradient on this device"):
        options = ma.FuseOptions(method="calibrated", calibration_rows=4, check_rows=2)
        ma.fuse(base, visible_adapter(base), tmp_path / "other", options=options)
