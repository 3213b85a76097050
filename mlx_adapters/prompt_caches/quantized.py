"""Keys and values in few bits, where a model's layers take them so. Tried, since few of mlx-lm's caches can be."""

from dataclasses import replace
from typing import Any

from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.errors import IncompatibleError, refusals
from mlx_adapters.system.door import attention, make_prompt_cache, mx, nn
from mlx_adapters.system.machine import on_cuda


def new_layers(module: nn.Module, how: CacheQuantization | None) -> list[Any]:
    """An empty cache of the model's; in few bits where that begins with the first token."""
    cache = make_prompt_cache(module)
    return cache if how is None or how.kv_bits is None or how.quantized_kv_start else quantized(cache, how)


def forms(module: nn.Module, how: CacheQuantization | None) -> list[list[Any]]:
    """The empty caches that the model's may be like."""
    plain = make_prompt_cache(module)
    return [plain] if how is None else [plain, quantized(make_prompt_cache(module), how)]


def reaching(how: CacheQuantization | None, length: int) -> CacheQuantization | None:
    """In few bits from the first token on, or not at all: as a text needs it that may have `length` tokens."""
    return None if how is None or length < how.quantized_kv_start else replace(how, quantized_kv_start=0)


def quantized(cache: list[Any], how: CacheQuantization) -> list[Any]:
    """An empty cache that keeps keys and values in few bits from the first token on; states stay as they are.

    Raises what mlx-lm raises for a layer that cannot.
    """
    return [_quantized(layer, how) for layer in cache]


def _quantized(layer: Any, how: CacheQuantization) -> Any:
    if hasattr(layer, "to_quantized"):
        return layer.to_quantized(group_size=how.kv_group_size, bits=how.kv_bits)
    if hasattr(layer, "keys_and_values") or hasattr(layer, "caches"):
        raise NotImplementedError(f"{type(layer).__name__} keeps what it is given")
    return layer


def require_quantizable(module: nn.Module, how: CacheQuantization, kind: str) -> None:
    """Raise IncompatibleError unless the model computes with such a cache; `kind` is its architecture."""

    def refused(why: str) -> IncompatibleError:
        return IncompatibleError(f"A {kind} model's cache cannot be quantized to that: {why}.", "leave --kv-bits out.")

    with refusals(refused):
        fresh = make_prompt_cache(module)
        cache = quantized(fresh, how)
        if not any(hasattr(layer, "to_quantized") for layer in fresh):
            raise NotImplementedError("it keeps no keys and values")
        for tokens in ([5, 6], [7]):
            mx.eval(module(mx.array([tokens]), cache=cache))


attend = attention.quantized_scaled_dot_product_attention  # mlx-lm's own


def attend_to_quantized(
    queries: mx.array,
    q_keys: tuple[mx.array, ...],
    q_values: tuple[mx.array, ...],
    scale: float,
    mask: Any,
    group_size: int = 64,
    bits: int = 8,
) -> mx.array:
    """Attention over keys and values in few bits, in mlx-lm's place; queries (rows, heads, tokens, width).

    MLX 0.32.4's CUDA build has no such product for queries as models lay them out, nor for heads that share keys:
    there keys and values are unpacked, those of one layer at a time.
    """
    if not on_cuda():
        return attend(queries, q_keys, q_values, scale, mask, group_size=group_size, bits=bits)
    keys, values = (mx.dequantize(*packed, group_size=group_size, bits=bits) for packed in (q_keys, q_values))
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


attention.quantized_scaled_dot_product_attention = attend_to_quantized
