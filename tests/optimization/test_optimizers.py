"""Small tensors that the optimizer has side by side: what comes of them is what comes of each alone."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.models.layers import add_adapter_layers, named_layers, resolve_target_modules
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.optimization import optimizers
from mlx_adapters.optimization.feed import draw_of
from mlx_adapters.optimization.log_probabilities import LossPlan
from mlx_adapters.optimization.optimizers import ALIGNED, Optimizer, Packing
from mlx_adapters.optimization.step import TrainStep
from mlx_adapters.sources.bases import resolve_base

SHAPES = {"a.lora_a": (7, 3), "a.lora_b": (3, 64), "experts.lora_a": (2, 3, 5), "wide.weight": (40, 50), "a.m": (64,)}


def random(seed: int) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    return {name: mx.random.normal(shape, key=key) for (name, shape), key in zip(SHAPES.items(), keys, strict=True)}


def packs(monkeypatch, size: int = 1000) -> None:
    monkeypatch.setattr(optimizers, "small_size", lambda: size)


def test_what_is_packed_comes_out_again_and_starts_where_kernels_can_read_it():
    packing = Packing(SHAPES, {"one": ("a.m", "a.lora_a"), "other": ("experts.lora_a", "a.lora_b")})
    given = random(0)
    packed = packing.pack(given)
    assert set(packed) == {"one", "other", "wide.weight"} and packed["one"].size == 2 * ALIGNED
    assert mx.array_equal(packed["one"][ALIGNED : ALIGNED + 21], given["a.lora_a"].flatten())
    assert not packed["one"][ALIGNED + 21 :].any()
    back = packing.unpack(packed)
    assert list(back) == list(SHAPES) and all(mx.array_equal(back[name], given[name]) for name in SHAPES)
    assert all(mx.array_equal(x, given[name]) for name, x in Packing(SHAPES).unpack(given).items())


@pytest.mark.parametrize(
    ("settings", "vectors"),
    [
        ({"optimizer": "adamw", "weight_decay": 0.1}, 1),
        ({"optimizer": "adam", "max_grad_norm": 0.5}, 1),
        ({"optimizer": "sgd", "lora_plus_ratio": 4.0}, 1),
        ({"optimizer": "muon"}, 1),
        ({"optimizer": "adafactor"}, 0),
    ],
)
def test_packed_updates_are_those_of_each_tensor(settings, vectors, monkeypatch):
    """To the bit, but for the gradient's norm, which is summed in another order; and a state saved by one is taken by
    the other."""
    config, weights = TrainConfig(**settings), random(0)
    packs(monkeypatch, 0)  # on a GPU, too
    made = {"alone": Optimizer(config, weights)}
    packs(monkeypatch)
    made["packed"] = Optimizer(config, weights)
    assert len(made["packed"].packing.vectors) == vectors and not made["alone"].packing.vectors

    def after(optimizer: Optimizer, weights: dict, seeds: range) -> dict:
        packed = optimizer.packing.pack(weights)
        for seed in seeds:
            packed, gradient_norm, weight_norm = optimizer.apply(packed, optimizer.packing.pack(random(seed)), 0.01)
        norms = {"gradient": gradient_norm, "weight": weight_norm}
        return optimizer.packing.unpack(packed) | norms | optimizer.arrays()

    plain = after(made["alone"], weights, range(1, 4))
    packed = after(made["packed"], weights, range(1, 4))
    assert plain.keys() == packed.keys()
    for name, expected in plain.items():
        assert np.allclose(packed[name], expected, rtol=1e-6, atol=1e-7), name
    ends = []
    for other in ("alone", "packed"):
        saved = {name: mx.array(np.array(array)) for name, array in packed.items()}
        made[other].restore(saved)
        ends.append(after(made[other], {name: saved[name] for name in SHAPES}, range(4, 6)))
    assert all(np.allclose(ends[0][name], array, rtol=1e-6, atol=1e-7) for name, array in ends[1].items())


@pytest.mark.parametrize("kept_from", [None, 2])
def test_a_step_with_packed_weights_is_the_step(kept_from, tiny_model, monkeypatch):
    """Components that are kept stay as they were, among others that lie in the same vector."""

    def trained() -> tuple[dict, dict, str]:
        module = load_model(resolve_base(tiny_model())).module
        module.freeze()
        keys = resolve_target_modules(module, LoraConfig(target_modules=("q_proj", "up_proj"), num_layers=1))
        mx.random.seed(0)
        add_adapter_layers(module, AdapterConfig(4, 2.0, keys))
        adapted = {key: dict(named_layers(module))[key] for key in keys}
        if kept_from is not None:
            adapted[keys[0]].kept_from = kept_from
        step = TrainStep(module, adapted, TrainConfig(batch_size=1), LossPlan(None, 64))
        row = Row(np.arange(3, 15, dtype=np.int32), np.ones(12, bool), "here", 12)
        before = step.weights
        for _ in range(2):
            step.take(draw_of(make_batch([[row]])), 0.01)
        return before, step.weights, keys[0]

    before, plain, first = trained()
    packs(monkeypatch)
    _, packed, _ = trained()
    for name, weight in plain.items():
        assert np.allclose(packed[name], weight, rtol=1e-5, atol=1e-6), name
    stayed = {name for name in plain if mx.array_equal(packed[name].T[2:], before[name].T[2:])}
    assert stayed == (set() if kept_from is None else {f"{first}.lora_a"})
    assert not any(mx.array_equal(packed[name].T[:2], before[name].T[:2]) for name in plain)
