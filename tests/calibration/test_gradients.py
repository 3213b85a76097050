"""Models whose kernels have no gradient on some device: calibration takes another path, or says that there is none. And
one whose gradient was NaN where its numbers are numbers."""

import importlib
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.fusing import visible_adapter
from helpers.matrix import FEW, LORA, PLAIN, TEXTS
from helpers.tiny_configs import tiny_base
from mlx_lm.models import recurrent_gemma

import mlx_adapters as ma
from mlx_adapters.system.gpu_kernels import bounded_sqrt

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


@pytest.fixture
def forgets_nothing(tmp_path):
    """A RecurrentGemma with channels whose decay is 1, so that no input gets in: the square root of 1 - a² is of 0."""
    base = tiny_base(tmp_path / "base", "recurrent_gemma")
    weights = mx.load(str(base / "model.safetensors"))
    mx.eval(weights)
    (name,) = [name for name in weights if name.endswith("recurrent_param")]
    weights[name][:3] = -30.0
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    return base


def test_a_decay_of_one_has_a_gradient(forgets_nothing, tmp_path):
    rows = [{"text": text} for text in TEXTS]
    run = ma.train(forgets_nothing, {"train": rows, "valid": rows}, name="a", lora=LORA, training=PLAIN)
    assert run.final.iteration == 2
    fused = ma.fuse(forgets_nothing, visible_adapter(forgets_nothing), tmp_path / "out", quantization=4, options=FEW)
    assert fused.fidelity.kl_mean < fused.fidelity.base_kl


def test_a_root_is_as_steep_as_it_is_up_to_a_bound():
    x = mx.array([0.0, 1e-8, 1e-4, 0.25, 1.0])
    assert mx.array_equal(bounded_sqrt(x), mx.sqrt(x))
    slope, plain = (
        mx.grad(lambda x, f=f: (f(x) * mx.array([1.0, 1, 1, 1, 0])).sum())(x) for f in (bounded_sqrt, mx.sqrt)
    )
    assert slope.tolist() == pytest.approx([1000, 1000, 50, 1, 0]) and mx.allclose(slope[2:], plain[2:])
    assert mx.grad(lambda x: (0 * bounded_sqrt(x)).sum())(x).tolist() == [0] * 5


def test_a_gradient_that_is_nan_is_told_as_one(forgets_nothing, tmp_path, monkeypatch):
    monkeypatch.setattr(recurrent_gemma, "mx", mx)  # as mlx-lm has it
    with pytest.raises(ma.FormatError, match="gradient is NaN or Inf on the calibration text"):
        ma.fuse(forgets_nothing, visible_adapter(forgets_nothing), tmp_path / "out", quantization=4, options=FEW)
    options = replace(FEW, method="nearest")
    ma.fuse(forgets_nothing, visible_adapter(forgets_nothing), tmp_path / "out", quantization=4, options=options)
