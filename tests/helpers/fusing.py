"""Adapters that visibly change a tiny model, and fuses of them that are compared by weights and logits."""

import mlx.core as mx
import numpy as np

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.training import LoraConfig
from mlx_adapters.fusion.fuse import fuse as fuse_and_check
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.layers import adaptable_layers, expected_shapes, resolve_target_modules
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources.bases import resolve_base

IDS = mx.array([[3, 9, 27, 81, 40, 7, 300, 12]])


DORA_LAYERS = ("q_proj", "o_proj", "qkv_proj", "c_attn", "lm_head")


def visible_adapter(folder, kind="lora", targets=None, seed=0, strength=0.1, rank=4):
    """A random adapter that visibly changes the model in `folder`."""
    base = resolve_base(folder)
    module, _ = load_module(base)
    layers = adaptable_layers(module)
    if targets is None:
        targets = "all"
        if kind == "dora":
            targets = tuple(name for name in DORA_LAYERS if any(name in path for path in layers))
    keys = resolve_target_modules(module, LoraConfig(rank=rank, target_modules=targets))
    config = AdapterConfig(rank, 2.0, keys, kind)
    rng, weights = np.random.default_rng(seed), {}
    for key in keys:
        for leaf, shape in expected_shapes(layers[key], config).items():
            noise = mx.array(rng.standard_normal(shape).astype(np.float32)) * strength
            if leaf == "m":
                noise = mx.linalg.norm(dense_weight(layers[key], mx.float32), axis=-1) * (1 + noise)
            weights[f"{key}.{leaf}"] = noise
    return Adapter(config, weights, {"base": base.record(), "name": "tiny"})


def fuse(*arguments, **keywords):
    """Round to nearest without a check, unless told otherwise: these tests compare weights and logits."""
    keywords.setdefault("options", FuseOptions(method="nearest", check=False))
    return fuse_and_check(*arguments, **keywords)


def logits(folder, adapter=None):
    return np.array(load_model(resolve_base(folder), adapter).logits(IDS))


def some_rows(seed=0, lengths=(9, 14, 20, 33, 12)):
    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        judged = np.zeros(n, bool)
        judged[n // 2 :] = True
        rows.append((rng.integers(0, 500, n).astype(np.int32), judged))
    return rows
