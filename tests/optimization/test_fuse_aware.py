"""Training through the rounding: the step computes with the weights that `fuse` then writes, to the bit."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_models import VOCABULARY
from helpers.training_tools import make_updates_visible, write_data

from mlx_adapters import estimate
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import ConfigError
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.layers import named_layers, updated_weight
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.optimization import through_rounding
from mlx_adapters.optimization.feed import draw_of
from mlx_adapters.optimization.log_probabilities import LossPlan
from mlx_adapters.optimization.step import TrainStep, shares_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.training import setup

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 20)).astype(np.int32)
ROWS = tuple(Row(tokens, np.arange(20) > 0, "here", 20) for tokens in TOKENS)
BATCH = make_batch([[row] for row in ROWS])


def run(folder, planned: Quantization, kind: str = "lora", targets="all", strength: float = 0.05):
    """(TrainStep, adapter) of a run that will be fused to `planned`, and has learned something."""
    model = load_model(resolve_base(folder), dtype="float32")
    config = setup.add_layers(model, LoraConfig(rank=4, scale=2.0, type=kind, target_modules=targets), 0)
    weights = make_updates_visible(model.module, strength)
    layers = dict(named_layers(model.module))
    training = TrainConfig(fuse_aware=planned, batch_size=3)
    train_step = setup.prepare(model, training, ROWS, (), {key: layers[key] for key in config.keys}).train_step
    return train_step, Adapter(config, weights, {"base": resolve_base(folder).record(), "name": "tiny"})


def fused(folder, adapter: Adapter, planned: Quantization, out):
    fuse(folder, adapter, out, quantization=planned, options=FuseOptions(method="nearest", check=False))
    return load_model(resolve_base(out), dense=True, dtype="float32")


def same_but_for_ties(rounded: mx.array, written: mx.array) -> bool:
    """Equal to the bit on a CPU. `fuse` adds updates to some rows at a time, and a GPU's products of another height
    may differ in their last bit, which decides where two codes are equally near."""
    assert rounded.shape == written.shape
    return mx.mean(rounded != written).item() <= (0.01 if on_gpu() else 0)


PLANS = {
    "3 bits": Quantization(3, 32),
    "4 bits": Quantization(4, 32),
    "8 bits": Quantization(8, 32),
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "nvfp4": Quantization(4, 16, "nvfp4"),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_step_has_the_weights_that_fuse_writes(plan, dtype, tiny_model, tmp_path):
    """Unquantized and quantized bases of every type: the scales are stored in the base's own, as `fuse` stores them."""
    planned = PLANS[plan]
    for bits in (None, 4):
        folder = tiny_model("qwen3", bits=bits, dtype=dtype)
        train_step, adapter = run(folder, planned)
        written = dict(named_layers(fused(folder, adapter, planned, tmp_path / f"{bits}").module))
        for path, layer in train_step.adapted.items():
            a, b = (train_step.weights[f"{path}.{leaf}"] for leaf in ("lora_a", "lora_b"))
            own = updated_weight(dense_weight(layer.linear), a, b, None, layer.scale)
            assert same_but_for_ties(train_step.rounding.stored(path, own), written[path].weight), path
        through_rounding.round_frozen(train_step.module, train_step.adapted, train_step.rounding)
        for path, layer in named_layers(train_step.module):
            if path not in train_step.adapted and "weight" in layer:
                held = dense_weight(layer)  # on a GPU quantized where it is not rounded anew
                assert mx.array_equal(held, written[path].weight.astype(held.dtype)).item(), path


@pytest.mark.parametrize("architecture", ["qwen3", "mixtral", "gemma4_text"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_loss_is_that_of_the_fused_model(kind, architecture, tiny_model, tmp_path):
    targets = "all" if kind == "lora" else ("q_proj", "o_proj")
    planned, folder = Quantization(2, 32), tiny_model(architecture, dtype="bfloat16")
    train_step, adapter = run(folder, planned, kind, targets)
    without, through = (train_step.evaluate(draw_of(BATCH), rounding=rounding)[0] for rounding in (False, True))
    model = fused(folder, adapter, planned, tmp_path / "fused")
    expected = TrainStep(model.module, {}, TrainConfig(), LossPlan(None, 64)).evaluate(draw_of(BATCH))[0]
    assert through == pytest.approx(expected, rel=1e-3 if on_gpu() else 1e-5)  # ties, see above
    assert abs(through - without) > 1e-2


def test_layers_that_a_model_keeps_finer_are_trained_through_that(tiny_model, tmp_path, monkeypatch):
    """Some models name a precision of their own for some layers; the fuse follows it, so does the training."""
    from mlx_lm.models import qwen3

    def predicate(path, layer):
        return {"bits": 8, "group_size": 64} if path.endswith("v_proj") else not path.endswith("o_proj")

    monkeypatch.setattr(qwen3.Model, "quant_predicate", property(lambda self: predicate), raising=False)
    planned, folder = Quantization(2, 32), tiny_model("qwen3", dtype="bfloat16")
    train_step, adapter = run(folder, planned)
    targets = {path.rpartition(".")[2]: target for path, target in train_step.rounding.targets.items()}
    assert targets["v_proj"] == Quantization(8, 64) and targets["q_proj"] == planned and targets["o_proj"] is None
    written = dict(named_layers(fused(folder, adapter, planned, tmp_path / "fused").module))
    for path, layer in train_step.adapted.items():
        a, b = (train_step.weights[f"{path}.{leaf}"] for leaf in ("lora_a", "lora_b"))
        own = updated_weight(layer.linear.weight, a, b, None, layer.scale)
        assert same_but_for_ties(train_step.rounding.stored(path, own), written[path].weight), path


@pytest.mark.parametrize("dense", [True, False])
def test_other_layers_are_rounded_unless_the_base_has_that_precision(dense, tiny_model):
    """Also where they stay quantized in memory, as on a GPU."""
    for bits, expected in ((None, True), (8, True), (2, False)):
        folder, keys = tiny_model("qwen3", bits=bits), ("model.layers.0.self_attn.q_proj",)
        rounding = through_rounding.plan_rounding(load_module(resolve_base(folder))[0], keys, Quantization(2, 32))
        module = load_model(resolve_base(folder), dense=dense).module
        path = "model.layers.0.mlp.up_proj"
        before = dense_weight(dict(named_layers(module))[path])
        through_rounding.round_frozen(module, dict.fromkeys(keys), rounding)
        after = dense_weight(dict(named_layers(module))[path])
        assert mx.array_equal(before, after).item() is not expected
        if expected:
            assert mx.array_equal(after, rounding.stored(path, before)).item()


def test_experts_learn_through_the_rounding(tiny_model):
    train_step, _ = run(tiny_model("mixtral"), Quantization(2, 32), targets=("up_proj",))
    shares = shares_of(draw_of(BATCH))
    rounded, _, gradients = train_step.gradient(BATCH, shares, rounding=True)
    assert abs(rounded.item() - train_step.gradient(BATCH, shares)[0].item()) > 1e-3
    assert all(mx.any(g != 0).item() for g in gradients.values())


@pytest.mark.parametrize("forecast", [False, True])
def test_what_cannot_be_rounded_is_refused_before_anything_else(forecast, tiny_model, tmp_path, run_train):
    odd = tiny_model(hidden_size=80, num_attention_heads=4, num_key_value_heads=2, head_dim=20)
    data = write_data(tmp_path / "data", rows=8)
    for folder, targets, match in ((odd, ("q_proj",), "80 inputs"), (tiny_model(), ("embed_tokens",), "cannot round")):
        lora, training = LoraConfig(rank=4, target_modules=targets), TrainConfig(fuse_aware=Quantization(4, 32))
        with pytest.raises(ConfigError, match=match):
            run_train(folder, data, lora, training, forecast)
        with pytest.raises(ConfigError, match=match):
            estimate(folder, data, lora=lora, training=training)


@pytest.fixture
def run_train():
    from mlx_adapters import train

    return lambda folder, data, lora, training, forecast: train(
        folder, data, name="n", lora=lora, training=training, forecast=forecast
    )
