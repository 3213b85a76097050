"""The rank of each module: asked for, stored, trained.

mlx-lm has one rank for an adapter, so the file has the largest; smaller ones are padded with zeros. A start may need
more room than is trained.
"""

import math
from collections.abc import Iterable

from mlx_adapters.config.training import LoraConfig
from mlx_adapters.errors import ConfigError, did_you_mean
from mlx_adapters.models.layers import expected_shapes, nn
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.starts.inputs import SPREAD


def module_ranks(keys: Iterable[str], lora: LoraConfig) -> dict[str, int]:
    """The rank of each adapted module: that of the longest name in `ranks` that matches, else `rank`.

    Raises ConfigError for a name that matches none.
    """
    keys = tuple(keys)
    for name in lora.ranks:
        if not any(_matches(key, name) for key in keys):
            known = {key.rpartition(".")[2] for key in keys}
            raise ConfigError(
                f"The rank of '{name}' is for a module that is not adapted.",
                did_you_mean(name, known, f"adapted are: {', '.join(sorted(known))}."),
            )
    names = sorted(lora.ranks, key=len, reverse=True)
    return {key: next((lora.ranks[n] for n in names if _matches(key, n)), lora.rank) for key in keys}


def _matches(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


def stored_rank(keys: Iterable[str], lora: LoraConfig) -> int:
    """The rank of the file: PiSSA keeps what it began with beside what it trains, EVA may give a layer more."""
    return max(module_ranks(keys, lora).values()) * {"pissa": 2, "eva": SPREAD}.get(lora.init, 1)


def trained_parameters(module: nn.Module, lora: LoraConfig, keys: Iterable[str]) -> int:
    """How many numbers training changes."""
    layers, total = dict(module.named_modules()), 0
    for key, rank in module_ranks(keys, lora).items():
        shapes = expected_shapes(layers[key], AdapterConfig(rank, lora.scale, (key,), lora.type))
        total += sum(math.prod(shape) for shape in shapes.values())
    return total
