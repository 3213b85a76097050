"""A step's gradient on whole models against that of mlx-lm's layers and code."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_models import ARCHITECTURES, VOCABULARY
from helpers.training_tools import make_updates_visible

from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.batches import Batch, make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.models.layers import named_layers
from mlx_adapters.models.loading import load_model
from mlx_adapters.optimization import log_probabilities
from mlx_adapters.optimization.feed import draw_of
from mlx_adapters.optimization.log_probabilities import Arrays, LossPlan, device_batch
from mlx_adapters.optimization.step import MemoryPlan, TrainStep, shares_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery import calls
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.training import setup

Gradient = dict[str, mx.array]


def batch(seed: int, lengths=(40, 25)) -> Batch:
    random = np.random.default_rng(seed)
    rows = [Row(random.integers(0, VOCABULARY, n).astype(np.int32), np.arange(n) > n // 4, "here", n) for n in lengths]
    return make_batch([[row] for row in rows])


def step_on(folder, dtype: str, again="nothing", **lora) -> TrainStep:
    """A TrainStep of layers whose lora_b is not zero."""
    model = load_model(resolve_base(folder), dtype=dtype)
    keys = setup.add_layers(model, LoraConfig(**{"rank": 8, "scale": 2.0, **lora}), 0).keys
    make_updates_visible(model.module)
    layers = dict(named_layers(model.module))
    adapted = {key: layers[key] for key in keys}
    return TrainStep(model.module, adapted, TrainConfig(), LossPlan(None, 64), memory=MemoryPlan(again))


def ours(made: TrainStep, given: Batch) -> Gradient:
    mx.random.seed(3)
    gradient = made.gradient(given, shares_of(draw_of(given)))[2]
    mx.eval(gradient)
    return gradient


def mlx_lms(made: TrainStep, given: Batch) -> Gradient:
    """With nothing of ours between the layers of the same model."""
    mx.random.seed(3)
    made.module.train()
    arrays = Arrays(**device_batch(given))

    def loss(weights: Gradient) -> mx.array:
        log_probabilities.set_weights(made.module, weights)
        return -(log_probabilities.plain(made.module, arrays) * arrays.weights).sum() / arrays.weights.sum()

    gradient = mx.grad(loss)(made.weights)
    mx.eval(gradient)
    log_probabilities.set_weights(made.module, made.weights)
    return gradient


def off(actual: Gradient, expected: Gradient) -> float:
    """The relative difference over all tensors, in the Frobenius norm."""
    lost = sum(mx.square(actual[name] - expected[name]).sum() for name in expected)
    return mx.sqrt(lost / sum(mx.square(gradient).sum() for gradient in expected.values())).item()


@pytest.mark.parametrize("again", ["nothing", "mlp", "blocks"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_in_float32_they_are_equal(architecture, again, tiny_model):
    made = step_on(tiny_model(architecture), "float32", again)
    assert off(ours(made, batch(0)), mlx_lms(made, batch(0))) <= (1e-5 if not on_gpu() else 1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_also_with_dropout(architecture, tiny_model):
    made = step_on(tiny_model(architecture), "float32", dropout=0.3)
    after = []
    actual, expected = ours(made, batch(0)), None
    after.append(calls.random_key())
    expected = mlx_lms(made, batch(0))
    after.append(calls.random_key())
    assert mx.array_equal(*after)
    assert off(actual, expected) <= (1e-5 if not on_gpu() else 1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_in_bfloat16_they_are_as_near_to_float32s(kind, tiny_model):
    """Of one gradient either may be nearer, by chance; of twelve the mean tells."""
    ratios = []
    for architecture in ("llama", "qwen3"):
        folder = tiny_model(architecture, num_hidden_layers=4, hidden_size=128, intermediate_size=256)
        wide, narrow = (step_on(folder, dtype, type=kind) for dtype in ("float32", "bfloat16"))
        for seed in range(6):
            given = batch(seed, (70, 50, 60))
            exact = mlx_lms(wide, given)
            ratios.append(off(ours(narrow, given), exact) / off(mlx_lms(narrow, given), exact))
    assert np.mean(ratios) <= 1.01, ratios
