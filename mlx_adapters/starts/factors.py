"""A start in factors: what a fresh adapter layer is told to begin with.

The base stays as it is, so whatever a start adds to the base's function is in the adapter's file, and every program
that reads the adapter computes the same.
"""

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.layers import base_layer, nn
from mlx_adapters.models.low_rank import Matrix, principal
from mlx_adapters.storage.tensor_files import as_numpy
from mlx_adapters.storage.tensor_names import LORA_A, LORA_B, MAGNITUDE
from mlx_adapters.system.door import LoRAEmbedding, LoRALinear, LoRASwitchLinear


def weight_of(layer: nn.Module) -> Matrix:
    """The weight below an adapter layer, float32: (out, in), experts (experts, out, in), embeddings (vocab, dim)."""
    return as_numpy(dense_weight(base_layer(layer), mx.float32))


def set_factors(layer: nn.Module, left: Matrix, right: Matrix) -> None:
    """Let the first components of a layer's update be left (..., out, r) · right (..., r, in), and the others nothing.

    Raises ConfigError for an update of more components than the layer has.
    """
    room = layer.lora_b.shape[-1] if isinstance(layer, LoRASwitchLinear) else layer.lora_a.shape[-1]
    require(right.shape[-2] <= room, f"A start of rank {right.shape[-2]} has no room in a layer of rank {room}.")
    none = (0, room - right.shape[-2])
    if isinstance(layer, LoRASwitchLinear):
        a, b = np.pad(right, [(0, 0), none, (0, 0)]), np.pad(left, [(0, 0), (0, 0), none])
    elif isinstance(layer, LoRAEmbedding):
        a, b = np.pad(left, [(0, 0), none]), np.pad(right, [none, (0, 0)])
    else:
        a, b = np.pad(right.T, [(0, 0), none]), np.pad(left.T, [none, (0, 0)])
    for leaf, factor in ((LORA_A, a), (LORA_B, b)):
        layer[leaf] = mx.array(factor).astype(layer[leaf].dtype)


def start_from_principal(adapted: Mapping[str, nn.Module], ranks: Mapping[str, int], scale: float) -> None:
    """PiSSA (arXiv 2404.02948): W = (W - scale · B₀ A₀) + scale · B A, where B and A start as B₀ and A₀, the weight's
    principal part.

    W - scale · B₀ A₀ is an update of the base, too: beside B and A lie -B₀ and A₀, which are not trained (`kept_from`:
    from which component on). Raises ConfigError for what is no linear layer.
    """
    for path, layer in adapted.items():
        hint = "leave it out of --target-modules, or take --init zero."
        require(isinstance(layer, LoRALinear), f"PiSSA is for linear layers, not for '{path}'.", hint)
        weight, rank = weight_of(layer), ranks[path]
        require(min(weight.shape) >= rank, f"'{path}' has {min(weight.shape)} singular values, fewer than {rank}.")
        left, right = _nearest(weight, rank, scale)
        set_factors(layer, np.concatenate([left, -left], axis=1), np.concatenate([right, right]))
        layer.kept_from = rank


FAR = 0.5  # of a weight's norm: what a quantization to 2 bits may move it by


def start_from_residual(
    adapted: Mapping[str, nn.Module], original: Mapping[str, nn.Module], ranks: Mapping[str, int], scale: float
) -> None:
    """LoftQ (arXiv 2310.08659) on a base Q that stays: scale · B A starts as the best approximation of W - Q, W being
    the weights that were quantized, so that training starts from a model closer to the `original`.

    That is the paper's algorithm with one step, T = 1. Its further steps quantize W - B A anew, which would make
    another base, for this adapter alone. A DoRA magnitude starts as the norms of what then is the weight. Raises
    ConfigError if `original` lacks a layer, or is not what the base was made of.
    """
    lost = 0.0
    for path, layer in adapted.items():
        weight = weight_of(layer)
        require(
            path in original, f"The original model has no layer '{path}'.", "give the one that the base was made of."
        )
        wanted = as_numpy(dense_weight(original[path], mx.float32))
        same = f"'{path}' is {wanted.shape} in the original model, {weight.shape} in the base."
        require(wanted.shape == weight.shape, same, "give the one that the base was made of.")
        residual = wanted - weight
        share = float(np.linalg.norm(residual)) / max(float(np.linalg.norm(wanted)), 1e-30)
        far = f"'{path}' of the base differs by {share:.0%} from that of the original model."
        require(share < FAR, far, "give the model that the base was made of.")
        lost = max(lost, share)
        left, right = _nearest(residual, min(ranks[path], *weight.shape[-2:]), scale)
        set_factors(layer, left, right)
        if MAGNITUDE in layer:
            layer[MAGNITUDE] = mx.array(np.linalg.norm(weight + scale * (left @ right), axis=-1)).astype(layer.m.dtype)
    hint = "LoftQ makes up for what a quantization lost; this base has lost nothing."
    require(lost > 1e-6, "The base has the weights of the original model.", hint)


def _nearest(matrices: Matrix, rank: int, scale: float) -> tuple[Matrix, Matrix]:
    """left (..., out, r) and right (..., r, in) of the best approximation of each, less the scale."""
    *lead, out, inputs = matrices.shape
    factors = [principal(matrix, rank) for matrix in matrices.reshape(-1, out, inputs)]
    left, right = ((np.stack(sides) / math.sqrt(scale)).astype(np.float32) for sides in zip(*factors, strict=True))
    return left.reshape(*lead, out, rank), right.reshape(*lead, rank, inputs)
