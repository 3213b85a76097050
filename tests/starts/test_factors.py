"""Starts on a base that stays: PiSSA, of which the adapter is the difference, and LoftQ, what a quantization lost."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.training_tools import write_data

import mlx_adapters as ma
from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.errors import ConfigError
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.layers import adaptable_layers
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.low_rank import principal
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.starts.begin import begin
from mlx_adapters.storage import files
from mlx_adapters.training.setup import adapted_layers, add_layers

LORA = ma.LoraConfig(rank=3, scale=2.0, target_modules=("q_proj", "down_proj"), ranks={"down_proj": 2}, init="pissa")
IDS = mx.array([[3, 9, 27, 81, 40, 7, 300, 12]])


@pytest.mark.parametrize("bits", [None, 4])
def test_it_starts_as_the_base_with_the_principal_part_to_train(tiny_model, bits):
    folder = tiny_model("llama", bits=bits)
    base, model = load_model(resolve_base(folder)), load_model(resolve_base(folder))
    config = add_layers(model, LORA, seed=0)
    assert config.rank == 6
    assert mx.abs(model.logits(IDS) - base.logits(IDS)).max().item() < 1e-5
    layers = adaptable_layers(base.module)
    for key, rank in (("model.layers.0.self_attn.q_proj", 3), ("model.layers.1.mlp.down_proj", 2)):
        *_, layer = (layer for path, layer in model.module.named_modules() if path == key)
        u, s, vt = np.linalg.svd(np.array(dense_weight(layers[key], mx.float32)))
        nearest = (u[:, :rank] * s[:rank]) @ vt[:rank]
        trained, kept = slice(0, rank), slice(rank, 2 * rank)
        for part, sign in ((trained, 1), (kept, -1)):
            update = np.array(LORA.scale * layer.lora_a[:, part] @ layer.lora_b[part]).T
            np.testing.assert_allclose(update, sign * nearest, atol=1e-5)
        assert not mx.any(layer.lora_a[:, 2 * rank :]) and not mx.any(layer.lora_b[2 * rank :])


def test_what_is_not_trained_stays_to_the_bit(tiny_model, tmp_path):
    folder, data = tiny_model("llama"), write_data(tmp_path / "data")
    start = add_layers_of(folder)
    training = ma.TrainConfig(iterations=3, batch_size=2, learning_rate=0.01, weight_decay=0.5, max_grad_norm=0.1)
    ma.train(folder, data, name="p", lora=LORA, training=training)
    adapter = ma.load_adapter("p")
    assert adapter.config.rank == 6
    for key in adapter.config.keys:
        (a, b, _), (a0, b0), rank = adapter.factors(key), start[key], 2 if "down" in key else 3
        assert mx.array_equal(a[:, rank:], a0[:, rank:]) and mx.array_equal(b[rank:], b0[rank:])
        assert not mx.allclose(a[:, :rank], a0[:, :rank], rtol=1e-4) and not mx.allclose(b[:rank], b0[:rank], rtol=1e-4)
    export_peft(adapter, tmp_path / "peft", base=folder)
    config = files.read_json(tmp_path / "peft" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 12, True)


def add_layers_of(folder):
    model = load_model(resolve_base(folder), gradients=True)
    config = add_layers(model, LORA, seed=0)
    layers = dict(model.module.named_modules())
    return {key: (layers[key].lora_a, layers[key].lora_b) for key in config.keys}


def test_a_large_matrix_is_cut_as_well(monkeypatch):
    rng = np.random.default_rng(0)
    weight = (
        rng.standard_normal((90, 6)) @ rng.standard_normal((6, 70)) + 0.01 * rng.standard_normal((90, 70))
    ).astype(np.float32)
    exact = principal(weight, 4)
    monkeypatch.setattr("mlx_adapters.models.low_rank.EXACT", 16)
    factors = principal(weight, 4)
    np.testing.assert_allclose(factors[0] @ factors[1], exact[0] @ exact[1], atol=1e-3)


def test_what_pissa_does_not_go_with_is_refused(tiny_model):
    for wrong in ({"dropout": 0.1}, {"scale": -1.0}, {"type": "dora"}):
        with pytest.raises(ConfigError, match="PiSSA"):
            ma.LoraConfig(init="pissa", **wrong)
    with pytest.raises(ConfigError, match="PiSSA is for linear layers"):
        add_layers(load_model(resolve_base(tiny_model("qwen3_moe"))), ma.LoraConfig(rank=2, init="pissa"), seed=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loftq_starts_as_what_the_quantization_lost(tiny_model, kind):
    original, packed = tiny_model("llama"), tiny_model("llama", bits=4)
    lora = ma.LoraConfig(rank=5, scale=2.0, type=kind, init="loftq", original=str(original))
    model = load_model(resolve_base(packed))
    config = add_layers(model, lora, seed=0)
    layers = adapted_layers(model.module, config)
    begin(layers, lora, dict.fromkeys(layers, 5), model.module, [], ma.TrainConfig(), lambda _: None)
    wanted, stored = (adaptable_layers(load_model(resolve_base(folder)).module) for folder in (original, packed))
    for key, layer in layers.items():
        before, weight = (np.array(dense_weight(every[key], mx.float32)) for every in (wanted, stored))
        u, s, vt = np.linalg.svd(before - weight)
        update = np.array(2.0 * layer.lora_a @ layer.lora_b).T
        np.testing.assert_allclose(update, (u[:, :5] * s[:5]) @ vt[:5], atol=1e-5)
    logits = {n: load_model(resolve_base(folder)).logits(IDS) for n, folder in (("o", original), ("q", packed))}
    there, base = (mx.square(computed - logits["o"]).sum().item() for computed in (model.logits(IDS), logits["q"]))
    assert there < 0.95 * base


def test_loftq_of_experts_and_embeddings_is_expert_by_expert(tiny_model):
    original, packed = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", bits=4)
    names = ("switch_mlp.up_proj", "embed_tokens")
    lora = ma.LoraConfig(rank=3, scale=0.5, target_modules=names, init="loftq", original=str(original))
    model = load_model(resolve_base(packed))
    layers = adapted_layers(model.module, add_layers(model, lora, seed=0))
    begin(layers, lora, dict.fromkeys(layers, 3), model.module, [], ma.TrainConfig(), lambda _: None)
    wanted, stored = (adaptable_layers(load_model(resolve_base(folder)).module) for folder in (original, packed))
    for key, layer in layers.items():
        lost = np.array(dense_weight(wanted[key], mx.float32) - dense_weight(stored[key], mx.float32))
        left, right = (layer.lora_b, layer.lora_a) if lost.ndim == 3 else (layer.lora_a, layer.lora_b)
        u, s, vt = np.linalg.svd(lost)
        nearest = (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]
        np.testing.assert_allclose(np.array(0.5 * left @ right), nearest, atol=1e-5)


def test_what_loftq_does_not_go_with_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="needs the model that the base was made of"):
        ma.LoraConfig(init="loftq")
    with pytest.raises(ConfigError, match="Only LoftQ"):
        ma.LoraConfig(original="demo")
    packed = tiny_model("llama", bits=4)
    others = ((packed, "has the weights of the original"), (tiny_model("llama", seed=1), "differs by"))
    for other, reason in (*others, (tiny_model("qwen3_moe"), "The original model has no layer")):
        lora = ma.LoraConfig(rank=2, init="loftq", original=str(other))
        model = load_model(resolve_base(packed))
        layers = adapted_layers(model.module, add_layers(model, lora, seed=0))
        with pytest.raises(ConfigError, match=reason):
            begin(layers, lora, dict.fromkeys(layers, 2), model.module, [], ma.TrainConfig(), lambda _: None)
