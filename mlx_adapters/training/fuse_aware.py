"""Training through the rounding that a later fuse to few bits will do.

The forward pass uses Q(W + ΔW), the fused and quantized weight; the backward pass takes the rounding for the
identity (straight-through estimator, arXiv 1308.3432). With D = Q(W + ΔW) - (W + ΔW), held constant, the
layer becomes y = adapted(x) + x Dᵀ: its gradient to x is that of the rounded weight, the gradient to the
adapter that of the unrounded one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from mlx_adapters.config import Quantization
from mlx_adapters.door import DoRALinear, LoRALinear, LoRASwitchLinear, SwitchLinear, mx, nn
from mlx_adapters.errors import ConfigError
from mlx_adapters.layers import dense_weight, named_layers, updated_weight
from mlx_adapters.training.graph import call_as


def round_trip(weight: mx.array, planned: Quantization) -> mx.array:
    """The weight as it will be after quantization, in float32."""
    options = {"group_size": planned.group_size, "bits": planned.bits, "mode": planned.mode}
    codes, scales, *biases = mx.quantize(weight, **options)
    return mx.dequantize(codes, scales, *biases, **options).astype(mx.float32)


def check(adapted: dict[str, nn.Module], planned: Quantization) -> None:
    """Raise ConfigError for an adapted layer whose rounding cannot be trained through."""
    for path, layer in adapted.items():
        if not isinstance(layer, LoRALinear | DoRALinear | LoRASwitchLinear):
            raise ConfigError(f"fuse-aware training cannot round '{path}'.", "leave embeddings out of the targets.")
        if dense_weight(layer.linear).shape[-1] % planned.group_size:
            raise ConfigError(
                f"'{path}' has inputs that are no multiple of group size {planned.group_size}.",
                "choose another group size.",
            )


@contextlib.contextmanager
def rounded(adapted: dict[str, nn.Module], planned: Quantization) -> Iterator[None]:
    """Within the block, every adapted layer computes with its fused and quantized weight."""
    with contextlib.ExitStack() as stack:
        for layer in adapted.values():
            stack.enter_context(call_as(layer, _through_rounding(layer, planned)))
        yield


def _through_rounding(layer: nn.Module, planned: Quantization) -> Callable[..., mx.array]:
    def call(original: Callable[..., mx.array], x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        fused = updated_weight(
            dense_weight(layer.linear, mx.float32), layer.lora_a, layer.lora_b, layer.get("m"), layer.scale
        )
        error = mx.stop_gradient(round_trip(fused, planned) - fused).astype(x.dtype).swapaxes(-1, -2)
        if not isinstance(layer, LoRASwitchLinear):
            return original(x, *args, **kwargs) + x @ error
        y = original(x, *args, **kwargs)
        indices = args[0] if args else kwargs["indices"]
        ordered = kwargs.get("sorted_indices", args[1] if len(args) > 1 else False)
        return y + mx.gather_mm(x, error, rhs_indices=indices, sorted_indices=ordered)

    return call


def round_frozen(module: nn.Module, adapted: dict[str, nn.Module], planned: Quantization) -> None:
    """Give the layers without an adapter the weights that the fused model will have, in place.

    For a base that is not quantized as planned: there the fuse rounds every layer that can be rounded.
    """
    for path, layer in named_layers(module):
        if path in adapted or not isinstance(layer, nn.Linear | nn.Embedding | SwitchLinear):
            continue
        if layer.weight.shape[-1] % planned.group_size == 0:
            layer.weight = round_trip(layer.weight, planned).astype(layer.weight.dtype)
            mx.eval(layer.weight)
