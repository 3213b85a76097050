"""Training through the rounding that a later fuse to few bits will do.

The forward pass uses Q(W + ΔW), the fused and quantized weight; the backward pass takes the rounding for the
identity (straight-through estimator, arXiv 1308.3432). With D = Q(W + ΔW) - (W + ΔW), held constant, the
layer becomes y = adapted(x) + x Dᵀ: its gradient to x is that of the rounded weight, the gradient to the
adapter that of the unrounded one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_unflatten

from mlx_adapters.assembly.plan import plan_layers
from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.config.quantization import Precision, Quantization
from mlx_adapters.errors import ConfigError
from mlx_adapters.models.dense import dense_layer, dense_weight, is_quantized, weight_shape
from mlx_adapters.models.layers import EMBEDDING, named_layers, updated_weight
from mlx_adapters.rounding.packed import dequantize, to_nearest
from mlx_adapters.surgery.calls import call_as
from mlx_adapters.system.door import LoRASwitchLinear, mx, nn


@dataclass(frozen=True)
class Rounding:
    """What the fuse to come will write anew: each such layer's precision (None: unquantized) by its path, and the
    type of its scales and unquantized weights."""

    targets: dict[str, Quantization | None]
    dtype: mx.Dtype

    def stored(self, path: str, weight: mx.array) -> mx.array:
        """The float32 `weight` (..., out, in) as the fused model will hold it, in float32."""
        target = self.targets[path]
        if target is None:
            return weight.astype(self.dtype).astype(mx.float32)
        return dequantize(to_nearest(weight, target, self.dtype))


def plan_rounding(module: nn.Module, keys: Sequence[str], asked: Quantization) -> Rounding:
    """What `fuse` to `asked` will do to the base `module`, as its folder holds it, with an adapter at `keys`.

    Raises ConfigError for an adapted layer whose rounding cannot be trained through.
    """
    source = BaseWeights.of(module)
    for key in keys:
        if isinstance(source.layers[key], EMBEDDING):
            raise ConfigError(f"fuse-aware training cannot round '{key}'.", "leave embeddings out of the targets.")
        width = weight_shape(source.layers[key])[-1]
        if width % asked.group_size:
            raise ConfigError(
                f"'{key}' has {width} inputs, no multiple of the group size {asked.group_size}.",
                "choose another --fuse-aware-group-size, or leave it out of --target-modules.",
            )
    plans = plan_layers(source, set(keys), Precision.of(asked))
    return Rounding({plan.path: plan.target for plan in plans if not plan.copied}, source.dtype)


@contextlib.contextmanager
def rounded(adapted: dict[str, nn.Module], rounding: Rounding) -> Iterator[None]:
    """Within the block, every adapted layer computes with its fused and quantized weight."""
    with contextlib.ExitStack() as stack:
        for path, layer in adapted.items():
            stack.enter_context(call_as(layer, _through_rounding(path, layer, rounding)))
        yield


def _through_rounding(path: str, layer: nn.Module, rounding: Rounding) -> Callable[..., mx.array]:
    def call(original: Callable[..., mx.array], x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        fused = updated_weight(
            dense_weight(layer.linear, mx.float32), layer.lora_a, layer.lora_b, layer.get("m"), layer.scale
        )
        error = mx.stop_gradient(rounding.stored(path, fused) - fused).astype(x.dtype).swapaxes(-1, -2)
        if not isinstance(layer, LoRASwitchLinear):
            return original(x, *args, **kwargs) + x @ error
        y = original(x, *args, **kwargs)
        indices = args[0] if args else kwargs["indices"]
        ordered = kwargs.get("sorted_indices", args[1] if len(args) > 1 else False)
        return y + mx.gather_mm(x, error, rhs_indices=indices, sorted_indices=ordered)

    return call


def round_frozen(module: nn.Module, adapted: dict[str, nn.Module], rounding: Rounding) -> None:
    """Give the layers without an adapter the weights that the fused model will have, in place."""
    layers = dict(named_layers(module))
    for path in rounding.targets.keys() - adapted.keys():
        layer = layers[path]
        weight = rounding.stored(path, dense_weight(layer, mx.float32))
        if is_quantized(layer):
            layer = dense_layer(layer, weight.astype(rounding.dtype))
            module.update_modules(tree_unflatten([(path, layer)]))
        else:
            layer.weight = weight.astype(layer.weight.dtype)
        mx.eval(layer.weight)
