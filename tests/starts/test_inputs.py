"""EVA: A starts where a layer's inputs vary most, as in PEFT, and the function of the base stays."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.peft import FIXTURES
from helpers.training_tools import write_data

import mlx_adapters as ma
from mlx_adapters.errors import ConfigError
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.starts.inputs import start_from_inputs
from mlx_adapters.training.setup import adapted_layers, add_layers

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_directions_and_ranks_are_those_of_peft(kind):
    expected = mx.load(str(FIXTURES / "eva.safetensors"))
    ids, mask = np.array(expected.pop("ids")), np.array(expected.pop("mask"))
    base = resolve_base(FIXTURES / "llama" / "base")
    model = load_model(base)
    config = add_layers(model, ma.LoraConfig(rank=4, target_modules=MODULES, type=kind, init="eva"), seed=0)
    assert config.rank == 8
    layers = adapted_layers(model.module, config)
    batch = ids, np.flatnonzero(mask)
    ranks = start_from_inputs(layers, model.module, [batch, batch], dict.fromkeys(layers, 4), seed=0)
    assert ranks == {path: vectors.shape[0] for path, vectors in expected.items()}
    for path, vectors in expected.items():
        a = np.array(layers[path].lora_a)
        cosines = np.abs(np.array(vectors) @ a[:, : len(vectors)])
        np.testing.assert_allclose(cosines, np.eye(len(vectors)), atol=2e-3)
        assert not a[:, len(vectors) :].any()
    plain = load_model(base)
    assert mx.abs(model.logits(ids) - plain.logits(ids)).max().item() < 1e-5


def test_a_training_starts_so_and_stays_within_its_ranks(tiny_model, tmp_path):
    folder, data = tiny_model("llama"), write_data(tmp_path / "data")
    lora = ma.LoraConfig(rank=2, target_modules=MODULES, init="eva")
    notes = []
    ma.train(folder, data, name="e", lora=lora, training=ma.TrainConfig(iterations=2), on_event=notes.append)
    assert any("EVA gave 14 layers ranks of 2 to 2" in getattr(event, "text", "") for event in notes)
    adapter = ma.load_adapter("e")
    assert adapter.config.rank == 4
    used = {key: int((np.array(adapter.factors(key)[0]) != 0).any(axis=0).sum()) for key in adapter.config.keys}
    assert set(used.values()) == {2}
    for key, rank in used.items():
        a, b, _ = adapter.factors(key)
        assert not mx.any(a[:, rank:]) and not mx.any(b[rank:]) and mx.any(b[:rank])


def test_experts_start_as_they_were(tiny_model, tmp_path):
    folder, data = tiny_model("qwen3_moe"), write_data(tmp_path / "data")
    lora = ma.LoraConfig(rank=2, init="eva", num_layers=1)
    ma.train(folder, data, name="e", lora=lora, training=ma.TrainConfig(iterations=1))
    adapter = ma.load_adapter("e")
    a = next(adapter.factors(key)[0] for key in adapter.config.keys if "switch_mlp" in key)
    assert mx.any(a[:, :2]) and not mx.any(a[:, 2:])


def test_a_run_has_one_start(tiny_model, tmp_path):
    folder, data = tiny_model("llama"), write_data(tmp_path / "data")
    lora = ma.LoraConfig(rank=2, target_modules=("q_proj",))
    ma.train(folder, data, name="first", lora=lora, training=ma.TrainConfig(iterations=1))
    eva = ma.LoraConfig(rank=2, target_modules=("q_proj",), init="eva")
    with pytest.raises(ConfigError, match="no other start"):
        ma.train(folder, data, name="e", lora=eva, init_from="first", training=ma.TrainConfig(iterations=1))
