"""Gradient checkpointing: the same gradient to the bit, whatever else is in the step, and nothing left behind."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_configs import tiny_base
from helpers.tiny_models import ARCHITECTURES, VOCABULARY
from helpers.training_tools import make_updates_visible
from mlx.utils import tree_flatten

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.batches import Batch, make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import ConfigError, ModelError
from mlx_adapters.models.layers import named_layers
from mlx_adapters.models.loading import load_model
from mlx_adapters.optimization import step as engines
from mlx_adapters.optimization.feed import draw_of
from mlx_adapters.optimization.log_probabilities import LossPlan
from mlx_adapters.optimization.probe import settle_recomputing
from mlx_adapters.optimization.step import MemoryPlan, TrainStep, shares_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery import calls
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.training import setup


def row(length: int, seed: int) -> Row:
    random = np.random.default_rng(seed)
    trained = random.random(length) < 0.6
    trained[0], trained[-1] = False, True
    return Row(random.integers(0, VOCABULARY, length).astype(np.int32), trained, "here", length)


ROWS = [row(12, 1), row(25, 2)]
BATCH = make_batch([[r] for r in ROWS])


def train_step(folder, training: TrainConfig, **lora) -> TrainStep:
    """A TrainStep whose lora_b is not zero, so that every tensor has a gradient."""
    model = load_model(resolve_base(folder))
    keys = setup.add_layers(model, LoraConfig(**{"rank": 4, "scale": 2.0, **lora}), 0).keys
    make_updates_visible(model.module)
    layers = dict(named_layers(model.module))
    again = "blocks" if training.grad_checkpoint else "nothing"
    return TrainStep(
        model.module, {key: layers[key] for key in keys}, training, LossPlan(None, 64), memory=MemoryPlan(again)
    )


def gradients(made: TrainStep, batch: Batch = BATCH, rounding: bool = False) -> tuple[float, dict[str, mx.array]]:
    mx.random.seed(7)
    loss, _, by_name = made.gradient(batch, shares_of(draw_of(batch)), rounding)
    return loss.item(), by_name


PLAIN = TrainConfig()


def both(folder, training: TrainConfig = PLAIN, batch: Batch = BATCH, **lora) -> None:
    rounding = training.fuse_aware is not None
    plain = gradients(train_step(folder, training, **lora), batch, rounding)
    again = gradients(train_step(folder, replace(training, grad_checkpoint=True), **lora), batch, rounding)
    assert plain[0] == pytest.approx(again[0], rel=1e-6 if on_gpu() else 0)
    for name, gradient in plain[1].items():
        assert mx.any(gradient != 0).item(), name
        assert same_but_for_order(gradient, again[1][name]), name


def same_but_for_order(gradient: mx.array, again: mx.array) -> bool:
    """Equal to the bit on a CPU; on a GPU the two are compiled, and a kernel of other operations rounds otherwise."""
    off = mx.linalg.norm(gradient - again) / mx.linalg.norm(gradient)
    return off.item() <= (1e-5 if on_gpu() else 0)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_gradient_is_the_same_to_the_bit(architecture, tiny_model):
    both(tiny_model(architecture))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "gpt_oss", "cohere2"])
def test_so_it_is_of_rows_longer_than_a_window_also_where_layers_share_keys(name, tmp_path):
    made = train_step(tiny_base(tmp_path / "base", name), PLAIN)
    kept, again = (made.gradient_of(BATCH, way, in_float32=False) for way in (None, "nothing"))
    assert made.parts
    for tensor, gradient in kept.items():
        off = mx.linalg.norm(again[tensor] - gradient).item()
        assert off <= 1e-5 * mx.linalg.norm(gradient).item(), tensor


def test_also_with_dropout(tiny_model):
    both(tiny_model(), dropout=0.3)


def test_also_with_rows_packed(tiny_model):
    both(tiny_model("gemma4_text"), TrainConfig(packing=True), make_batch([ROWS], packed=True))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_also_through_the_rounding(kind, tiny_model):
    both(tiny_model("qwen3"), TrainConfig(fuse_aware=Quantization(2, 32)), type=kind)


def test_the_random_numbers_go_on_as_without_it(tiny_model):
    after = []
    for checkpoint in (False, True):
        gradients(train_step(tiny_model(), TrainConfig(grad_checkpoint=checkpoint), dropout=0.3))
        after.append(calls.random_key())
    assert mx.array_equal(*after).item()


def test_an_architecture_that_hides_a_gradient_is_refused(tiny_model, monkeypatch):
    """What reaches a block neither as its weight nor as its argument has no gradient; the run must not begin."""
    made = train_step(tiny_model(), TrainConfig(grad_checkpoint=True))
    assert settle_recomputing(made, BATCH)
    first, second = made.module.layers
    kind, hidden = type(first), []

    class Sharing(kind):
        def __call__(self, x, *args, **kwargs):
            y = super().__call__(x, *args, **kwargs)
            if self is first:
                hidden[:] = [y]
            return y if self is first else y + mx.sin(hidden[0])

    first.__class__ = second.__class__ = Sharing
    assert not settle_recomputing(made, BATCH)
    monkeypatch.setattr(setup, "settle_recomputing", lambda *_: False)
    for asked, way in (
        ({"grad_checkpoint": True}, "train without --grad-checkpoint, with --memory mlp."),
        ({"memory": "blocks"}, "train with --memory mlp."),
    ):
        with pytest.raises(ConfigError) as caught:
            prepared(tiny_model(), TrainConfig(batch_size=2, **asked))
        assert caught.value.hint == way


def prepared(folder, training: TrainConfig, targets="all") -> setup.Prepared:
    model = load_model(resolve_base(folder))
    keys = setup.add_layers(model, LoraConfig(rank=4, target_modules=targets), 0).keys
    layers = dict(named_layers(model.module))
    return setup.prepare(model, training, tuple(ROWS), (), {key: layers[key] for key in keys})


def test_what_cannot_be_differentiated_is_told_before_the_run(tiny_model, monkeypatch):
    """Some models look into a layer's weight, or index by what has a gradient: MLX's error is no user's. By default a
    layer that is looked into is left out."""
    kind = type(load_model(resolve_base(tiny_model())).module.layers[0].mlp)

    def indexing(self, x):
        y = self.down_proj(self.gate_proj(x))
        return mx.take_along_axis(y, mx.abs(y).astype(mx.uint32) % y.shape[-1], axis=-1)

    for broken in (lambda self, x: self.down_proj(x @ self.gate_proj.weight.T), indexing):
        monkeypatch.setattr(kind, "__call__", broken)
        with pytest.raises(ModelError, match="cannot be trained"):
            prepared(tiny_model(), TrainConfig(batch_size=2), ("gate_proj",))


def test_the_module_holds_no_array_of_a_trace(tiny_model, monkeypatch):
    """Compiled or not, the step lends the module its weights and takes them back: what stays there is zeros."""
    monkeypatch.setattr(
        engines, "compiled", lambda function, state=None: mx.compile(function, inputs=state, outputs=state)
    )
    monkeypatch.setattr(engines, "compiles", lambda: True)
    training = TrainConfig(grad_checkpoint=True, fuse_aware=Quantization(2, 32))
    made = train_step(tiny_model("qwen3"), training)
    kinds = [type(module) for module in made.module.modules()]
    made.weights = {name: w + 1 for name, w in made.weights.items()}
    made.gradient(BATCH, shares_of(draw_of(BATCH)), rounding=True)
    made.evaluate(draw_of(BATCH), rounding=True)
    for name, array in tree_flatten(made.module.trainable_parameters()):
        assert np.array_equal(np.array(array), np.zeros(made.weights[name].shape)), name
    assert [type(module) for module in made.module.modules()] == kinds
