"""A model's tensors as llama.cpp has them: its names for mlx-lm's, and what becomes of the numbers on the way.

Most keep both. Rows of queries and keys change places where the two programs rotate different pairs of them, heads
where they are grouped otherwise, norms that multiply by one plus their weight get the one added, and a few states of
recurrences are stored computed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ConfigError
from mlx_adapters.gguf_format.architectures import CONVERTER, Architecture, Config, text_model
from mlx_adapters.gguf_format.blocks import package
from mlx_adapters.gguf_format.hyperparameters import NAMES, Rope, hyperparameters, rope_factors, ropes
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.storage import tensor_names
from mlx_adapters.system.door import mx, nn

ROTATED = re.compile(r"blk\.\d+\.attn_([qk])(_norm)?\.(weight|bias)")
# What stays float32: llama.cpp computes with it so, and it is small.
EXACT = ("ffn_gate_inp", "ssm_", "shortconv.conv", "exp_probs_b", "attn_sinks", "position_embd", "rope_f")

BARE = ("A_log", "D")  # parameters that llama.cpp does not call weights either


@dataclass(frozen=True)
class Place:
    """Where (a part of) a tensor goes: llama.cpp's name, and which of its rows or columns, in their order there."""

    name: str
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True)
class Layout:
    """Where each of a model's tensors goes in a GGUF file. Raises ConfigError for a model that llama.cpp has not."""

    architecture: Architecture
    module: nn.Module
    config: Config

    @cached_property
    def values(self) -> dict[str, Any]:
        """The hyperparameters."""
        return hyperparameters(self.architecture, text_model(self.module), self.config, self._shapes())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """llama.cpp's name -> shape of our weight there, unpacked."""
        shapes = {}
        for path, layer in self.module.named_modules():
            if "weight" in layer and (known := self._known(tensor_names.join(path, tensor_names.WEIGHT))):
                shapes[known] = weight_shape(layer)
        return dict(sorted(shapes.items(), key=lambda item: tensor_names.natural_order(item[0])))

    @cached_property
    def _table(self) -> Any:
        gguf = package()
        numbers = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        arch = self.architecture.name
        blocks = int(next(self.config[key] for key in NAMES["block_count"] if key in self.config))
        require(arch in numbers, f"This version of the package 'gguf' does not know '{arch}'.", "update 'gguf'.")
        return gguf.get_tensor_name_map(numbers[arch], blocks)

    def _known(self, name: str) -> str | None:
        """llama.cpp's name of a tensor of mlx-lm's, by its own tables."""
        for spelled in tensor_names.gguf_spellings(name):
            known = self._table.get_name(spelled, try_suffixes=(".weight", ".bias"))
            if known is not None:
                return str(known) + _ending(name, known)
        return None

    def check(self) -> None:
        """Raise ConfigError unless each tensor has a place of its own, and blocks that must be alike are."""
        ours = [name for name, _ in tree_flatten(self.module.parameters())]
        beside = (*tensor_names.QUANTIZED_LEAVES[1:], "global_scale")
        made = [p.name for name in ours if tensor_names.split(name)[1] not in beside for p in self.places(name)]
        twice = {name for name in made if made.count(name) > 1}
        require(not twice, f"Several tensors of this model would be '{min(twice, default='')}' in GGUF.", CONVERTER)
        inner = [re.fullmatch(r"blk\.(\d+)\.(.+)", name) for name in made]
        blocks = [{m[2] for m in inner if m and m[1] == str(i)} for i in range(self.values["block_count"])]
        alike = self.architecture.mixed or all(block == blocks[0] for block in blocks)
        require(alike, "llama.cpp wants the same tensors in all blocks of this model, and some have others.", CONVERTER)
        self.more()

    def places(self, name: str) -> list[Place]:
        """Where a tensor of ours goes."""
        known = self._known(name)
        if self.architecture.places is not None:
            special = self.architecture.places(name, known, self.config)
            if special is not None:
                return [Place(*one) for one in special]
        if known is None:
            raise ConfigError(f"llama.cpp has no place for the tensor '{name}' of this model.", CONVERTER)
        if ROTATED.fullmatch(known) and self._rope and self._rope.neighbours != self.architecture.neighbours:
            return [Place(known, self._pairs(name))]
        return [Place(known)]

    @cached_property
    def _rope(self) -> Rope | None:
        return next(iter(ropes(text_model(self.module))), None)

    @cached_property
    def _vectors(self) -> dict[str, nn.Module]:
        return dict(self.module.named_modules())

    def _pairs(self, name: str) -> np.ndarray:
        """The rows of all heads with the halves of each rotated part interleaved, or apart again."""
        path, leaf = tensor_names.split(name)
        rows = self._vectors[path][leaf].shape[0]
        dim, rotated = self.values["attention.key_length"], self._rope.dims  # type: ignore[union-attr]
        order = np.arange(dim)
        shape = (2, -1) if self.architecture.neighbours else (-1, 2)
        order[:rotated] = np.arange(rotated).reshape(shape).T.ravel()
        return (np.arange(0, rows, dim)[:, None] + order).ravel()

    def _change(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        path, leaf = tensor_names.split(name)
        if leaf == tensor_names.WEIGHT and self._adds_one(path):
            return lambda values: values + 1
        if leaf == "A_log":
            return lambda values: -np.exp(values)
        return lambda values: values

    def shape(self, made: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of ours in the file: a convolution's kernel, (channels, width, 1), loses an axis."""
        return (shape[0], int(np.prod(shape[1:]))) if "conv" in made and len(shape) > 1 else shape

    def _adds_one(self, path: str) -> bool:
        """Whether the module at `path` is a norm that multiplies by 1 + weight: a vector of mean 0 tells."""
        layer = self._vectors.get(path)
        weight = None if layer is None or layer.children() else layer.get("weight")
        if layer is None or weight is None or weight.ndim != 1 or weight.shape[0] % 2:
            return False
        sign = mx.array([1.0, -1.0] * (weight.shape[0] // 2))
        scale = layer(sign[None])[0] * sign - layer.get("bias", mx.zeros(1)) * sign
        return bool(mx.allclose(scale, 1 + weight, atol=1e-3)) and not bool(mx.allclose(scale, weight, atol=1e-3))

    def parting(self, name: str) -> Callable[[np.ndarray], list[np.ndarray]]:
        """What makes of a tensor's numbers those that go to each of its places."""
        places, change = self.places(name), self._change(name)

        def parts(values: np.ndarray) -> list[np.ndarray]:
            values = change(values.reshape(self.shape(places[0].name, values.shape)))
            rows = [values if place.rows is None else values[place.rows] for place in places]
            return [v if p.columns is None else v[..., p.columns] for v, p in zip(rows, places, strict=True)]

        return parts

    def more(self) -> dict[str, np.ndarray]:
        """Tensors that the file has and the model has not: what llama.cpp divides the rotary frequencies by."""
        factors = rope_factors(text_model(self.module), self.values)
        if factors is None:
            return {}
        require(
            bool(self.architecture.factors), "This model's rotary scaling has no place in its GGUF file.", CONVERTER
        )
        return {f"{name}.weight": factors for name in self.architecture.factors}


def _ending(name: str, known: str) -> str:
    """What is missing in a name that the table has for a bare parameter."""
    if known.endswith((".weight", ".bias")) or tensor_names.split(name)[1] in BARE:
        return ""
    return ".bias" if name.endswith("bias") else ".weight"
