"""What a file holds, and what of it is trained."""

import pytest

import mlx_adapters as ma
from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.starts.ranks import stored_rank, trained_parameters


@pytest.mark.parametrize("init, stored", [("zero", 3), ("pissa", 6), ("eva", 6)])
def test_a_start_stores_more_than_it_trains(tiny_model, init, stored):
    module, _ = load_module(resolve_base(tiny_model("llama")))
    lora = ma.LoraConfig(rank=3, target_modules=("q_proj", "up_proj"), ranks={"up_proj": 2}, init=init)
    keys = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]
    layers = dict(module.named_modules())
    sides = [3 * sum(layers[k].weight.shape) if "q_proj" in k else 2 * sum(layers[k].weight.shape) for k in keys]
    assert stored_rank(keys, lora) == stored and trained_parameters(module, lora, keys) == sum(sides)
