"""Weights laid in a line are updated as each would be by itself."""

import pytest

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.models.adapter import Weights
from mlx_adapters.optimization.optimizers import ALIGNED, Optimizer
from mlx_adapters.system.door import mx

SHAPES = {"a.lora_a": (16, 8), "a.lora_b": (8, 24), "b.lora_a": (16, 4), "c.lora_a": (5, 3), "d.m": (ALIGNED,)}
WAYS = {
    "adam": {"optimizer": "adam"},
    "adamw, LoRA+": {"optimizer": "adamw", "weight_decay": 0.1, "lora_plus_ratio": 4.0},
    "sgd": {"optimizer": "sgd", "weight_decay": 0.1},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
}


def drawn(seed: int) -> Weights:
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    return {name: mx.random.normal(shape, key=key) for (name, shape), key in zip(SHAPES.items(), keys, strict=True)}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)


@pytest.mark.parametrize("way", WAYS)
def test_a_line_of_weights_is_updated_as_each_by_itself(way):
    config = TrainConfig(batch_size=1, **WAYS[way])
    alone, line = (Optimizer(config, drawn(0), together) for together in (False, True))
    assert same(alone.arrays(), line.arrays())
    weights = in_line = drawn(0)
    for step in range(3):
        weights, gradient_norm, weight_norm = alone.apply(weights, drawn(step + 1), 1e-2)
        in_line, *norms = line.apply(in_line, drawn(step + 1), 1e-2)
        assert list(in_line) == list(SHAPES) and same(weights, in_line) and same(alone.arrays(), line.arrays())
        assert mx.allclose(mx.stack(norms), mx.stack([gradient_norm, weight_norm]), rtol=1e-6).item()
    restored = Optimizer(config, drawn(0), True)
    restored.restore(alone.arrays())
    assert same(restored.apply(weights, drawn(9), 1e-2)[0], alone.apply(weights, drawn(9), 1e-2)[0])


def test_weights_that_were_changed_since_are_the_ones_that_count():
    """As where a part of them is not trained: the dictionary is the same one, its arrays are others."""
    config = TrainConfig(batch_size=1, optimizer="sgd")
    alone, line = (Optimizer(config, drawn(0), together) for together in (False, True))
    given = [optimizer.apply(drawn(0), drawn(1), 0.1)[0] for optimizer in (alone, line)]
    for weights in given:
        weights["a.lora_a"] = mx.zeros((16, 8))
    new = [o.apply(weights, drawn(2), 0.1)[0] for o, weights in zip((alone, line), given, strict=True)]
    assert same(*new)


def test_large_weights_and_odd_ones_are_not_laid_together(monkeypatch):
    monkeypatch.setattr("mlx_adapters.optimization.optimizers.SMALL", 150)
    config = TrainConfig(batch_size=1, optimizer="adam")
    (group,) = Optimizer(config, drawn(0), True)._groups
    assert [name for name, _ in group.line] == ["a.lora_a", "b.lora_a", "d.m"]
