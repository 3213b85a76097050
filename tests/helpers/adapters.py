"""Adapters for tests: random ones that fit a model, and folders as training leaves them."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_adapters.config.training import LoraConfig
from mlx_adapters.models import layers
from mlx_adapters.models.adapter import Adapter, write_adapter_files
from mlx_adapters.models.layers import adaptable_layers, expected_shapes
from mlx_adapters.models.loading import load_module
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources import registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, tensor_files

LLAMA = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens")
MOE = ("model.layers.0.mlp.switch_mlp.up_proj", "model.layers.1.self_attn.v_proj")


def make_adapter(
    base, keys=LLAMA[:2], *, rank=4, factor=2.0, seed=0, type="lora", dtype=mx.float32, name="a"
) -> Adapter:
    """A random adapter that fits the model folder `base`."""
    its_base = resolve_base(base)
    layers = adaptable_layers(load_module(its_base)[0])
    config = AdapterConfig(rank, factor, tuple(keys), type)
    rng = np.random.default_rng([seed, rank])
    weights = {
        f"{key}.{leaf}": mx.array(rng.standard_normal(shape, dtype=np.float32) * 0.2).astype(dtype)
        for key in keys
        for leaf, shape in expected_shapes(layers[key], config).items()
    }
    return Adapter(config, weights, {"name": name, "base": its_base.record()})


def random_adapter(model, kind="lora", rank=4, targets="all", scale=2.0, seed=0, num_layers="all", name=None):
    """An adapter with seeded random weights on the target modules (experts left out for DoRA)."""
    adaptable = layers.adaptable_layers(model.module)
    lora = LoraConfig(rank=rank, scale=scale, type=kind, target_modules=targets, num_layers=num_layers)
    keys = layers.resolve_target_modules(model.module, lora)
    if kind == "dora":
        keys = tuple(key for key in keys if not isinstance(adaptable[key], layers.SWITCH))
    config, random, weights = AdapterConfig(rank, scale, keys, kind), np.random.default_rng(seed), {}
    for key in keys:
        for leaf, shape in layers.expected_shapes(adaptable[key], config).items():
            values = random.normal(size=shape, scale=0.1 if len(shape) > 1 else 0.3)
            weights[f"{key}.{leaf}"] = mx.array((values + (1.5 if leaf == "m" else 0)).astype(np.float32))
    return Adapter(config, weights, {"name": name or f"random{seed}", "base": model.base.record()})


def distance(one, other):
    return mx.abs(one - other).max().item()


def make_run(base, name="sql", losses=((100, 2.0), (200, 1.0), (300, 1.5)), **options) -> Path:
    """A registered adapter as a finished training run leaves it: checkpoints, their states and losses."""
    folder = registry.adapter_folder(name)
    best = min(losses, key=lambda point: point[1])[0]
    metadata = {
        "validation_losses": losses,
        "train_losses": losses,
        "iteration": best,
        "status": "finished",
        "best_validation_loss": min(loss for _, loss in losses),
        "date": "2026-01-31T12:00:00+00:00",
        "data": {"name": "sql", "sha256": "ab" * 32, "rows": {"train": 600}},
        "seed": 0,
    }
    for iteration, _ in losses:
        adapter = make_adapter(base, seed=iteration, name=name, **options)
        target = folder / "checkpoints" / f"{iteration:07d}"
        tensor_files.write_safetensors(target / "adapters.safetensors", adapter.weights)
        tensor_files.write_safetensors(target / "optimizer.safetensors", adapter.weights)
        files.copy_file(target / "adapters.safetensors", folder / f"{iteration:07d}_adapters.safetensors")
        if iteration == best:
            chosen = Adapter(adapter.config, adapter.weights, adapter.metadata | metadata)
    write_adapter_files(chosen, folder)
    files.copy_file(folder / f"{best:07d}_adapters.safetensors", folder / "adapters.safetensors")
    return folder


def make_mlx_lm_folder(base, folder: Path, iterations=(100, 200)) -> Path:
    """An adapter folder as plain `mlx_lm.lora` leaves it: relative keys, its own settings, no metadata."""
    folder.mkdir(parents=True)
    for iteration in iterations:
        adapter = make_adapter(base, keys=("model.layers.1.self_attn.q_proj",), seed=iteration)
        mx.save_safetensors(str(folder / f"{iteration:07d}_adapters.safetensors"), adapter.weights)
    mx.save_safetensors(str(folder / "adapters.safetensors"), adapter.weights)
    config = {
        "model": str(base),
        "fine_tune_type": "lora",
        "num_layers": 1,
        "iters": 200,
        "learning_rate": 1e-5,
        "data": "data/sql",
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
