"""Adapters on a base whose output layer is its input embedding.

PEFT adapts each end by itself, unless `ensure_weight_tying` makes the head repeat the embedding's update. In
mlx-lm a tied embedding is one layer, and its adapter acts at both ends.
"""

from collections.abc import Mapping

import mlx.core as mx

from mlx_adapters.models.layers import nn, tied
from mlx_adapters.peft_format.reading import PeftAdapter, PeftModule
from mlx_adapters.storage.hf_names import EMBEDDINGS, HEADS, POSITIONS
from mlx_adapters.storage.tensor_names import WEIGHT, split


def is_head(path: str) -> bool:
    """Whether a module path of transformers is that of an output layer."""
    return path.rpartition(".")[2] in HEADS


def repeated_head(peft: PeftAdapter, layers: Mapping[str, nn.Module]) -> PeftModule | None:
    """The lm_head update that only repeats the tied embedding's (PEFT's ensure_weight_tying), if there is one."""
    strength = peft.settings.strength
    heads = [module for path, module in peft.modules.items() if is_head(path)] if tied(layers) else []
    for head in heads:
        for other in peft.modules.values():
            same = other.embedding and mx.array_equal(head.a, other.b.T) and mx.array_equal(head.b, other.a.T)
            if same and strength(head.path) == strength(other.path):
                return head
    return None


def one_ended(peft: PeftAdapter, layers: Mapping[str, nn.Module]) -> list[PeftModule]:
    """Updates of only the input or only the output of a base that has one matrix for both."""
    if not tied(layers) or repeated_head(peft, layers) is not None:
        return []
    modules = peft.modules.items()
    return [m for path, m in modules if is_head(path) or (m.embedding and path.rpartition(".")[2] not in POSITIONS)]


def replaced_ends(peft: PeftAdapter) -> list[str]:
    """Names of whole weights of embeddings and output layers (modules_to_save)."""
    paths = {name: path for name in peft.dense for path, leaf in [split(name)] if leaf == WEIGHT}
    return [name for name, path in paths.items() if path.rpartition(".")[2] in EMBEDDINGS + HEADS]


def needs_untying(peft: PeftAdapter, layers: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT's model has two different ends where the base has one matrix."""
    ends = replaced_ends(peft) if tied(layers) else []
    alike = len(ends) == 2 and mx.array_equal(*(peft.dense[name] for name in ends)).item()
    return bool(one_ended(peft, layers)) or (bool(ends) and not alike)
