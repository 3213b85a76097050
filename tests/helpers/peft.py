"""The fixtures that the real peft made: bases, adapters and PEFT's logits."""

from pathlib import Path

import mlx.core as mx

from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.layers import adaptable_layers, expected_shapes
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage.tensor_names import join

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
ADAPTERS = sorted(p.parent for p in FIXTURES.glob("*/*/adapter_config.json"))
ADAPTERS += [FIXTURES / "llama" / "subfolder"]
REFUSED = sorted(p.parent for p in FIXTURES.glob("*/refused/*/adapter_config.json"))
TIED = [folder for folder in ADAPTERS if folder.name == "tied-embedding"]


def case(folder: Path) -> str:
    return "/".join(folder.relative_to(FIXTURES).parts)


def base_of(folder: Path) -> Path:
    return FIXTURES / folder.relative_to(FIXTURES).parts[0] / "base"


def picked_adapter(base: Path, keys, kind: str = "lora", scale: float = 0.7 / 3, dtype=mx.float32) -> Adapter:
    """An adapter with random weights for the layers that `keys(path)` picks."""
    model = load_model(resolve_base(base))
    layers = {key: layer for key, layer in adaptable_layers(model.module).items() if keys(key)}
    config = AdapterConfig(3, scale, tuple(layers), kind, dropout=0.05)
    weights = {
        join(key, leaf): (mx.abs(mx.random.normal(shape)) + 1).astype(dtype)
        for key, layer in layers.items()
        for leaf, shape in expected_shapes(layer, config).items()
    }
    return Adapter(config, weights, {"base": model.base.record()})
