"""What a GPU takes for the linear layers of one token, by ways to add an adapter: a chain of all of a model's, without
attention and norms, as one graph, by the GPU's own clock (CUDA).

Random weights in 4 bits in groups of 64, bfloat16, one adapter of rank 8 on all linear layers. "fused" is each layer by
itself, as a fused model has them; in all others q, k, v and gate, up are one product each. Ways take turns.

    python scripts/benchmarks/products.py [--shape 4b] [--rounds 20] [--only "one kernel" ...]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ |= {"MLX_MAX_OPS_PER_BUFFER": "4000", "MLX_MAX_MB_PER_BUFFER": "100000"}  # one graph; MLX reads it once

import mlx_adapters  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
from decode import CLOCK, RANK, SHAPES, stamped

from mlx_adapters.runtime import kernel
from mlx_adapters.runtime.product_kernel import SHARES, product_and_update
from mlx_adapters.system.gpu_kernels import build_quickly

PACKED = {"group_size": 64, "bits": 4}


class Layers:
    """Random layers on one input, one below the other, and their adapter."""

    def __init__(self, width: int, widths: tuple[int, ...]) -> None:
        out, self.widths = sum(widths), widths
        scales = mx.random.uniform(shape=(out, width // 64)) * 0.2 * width**-0.5
        self.packed = {
            "weight": mx.random.randint(0, 2**31 - 1, (out, width // 8)).astype(mx.uint32),
            "scales": scales.astype(mx.bfloat16),
            "biases": (-7.5 * scales).astype(mx.bfloat16),
        }
        self.a = (mx.random.normal((1, len(widths), RANK, width)) * width**-0.5).astype(mx.bfloat16)
        self.b = (mx.random.normal((1, out, RANK)) * 0.05).astype(mx.bfloat16)
        self.ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        mx.eval(self.packed, self.a, self.b)

    def split(self, y: mx.array) -> list[mx.array]:
        """(..., Σ widths) -> (..., width) for each."""
        return mx.split(y, self.ends, axis=-1) if self.ends else [y]

    def product(self, x: mx.array) -> mx.array:
        """The base's outputs."""
        return mx.quantized_matmul(x, *self.packed.values(), transpose=True, **PACKED)


def fused(layers: Layers, x: mx.array) -> list[mx.array]:
    """Each layer by itself."""
    parts = zip(*(layers.split(array.T) for array in layers.packed.values()), strict=True)
    return [mx.quantized_matmul(x, *(array.T for array in part), transpose=True, **PACKED) for part in parts]


def without(layers: Layers, x: mx.array) -> list[mx.array]:
    """As groups, without an adapter."""
    return layers.split(layers.product(x))


def two_products(layers: Layers, x: mx.array, adds: bool = False) -> list[mx.array]:
    """y + (x aᵀ) bᵀ, for each layer."""
    lows = mx.split(x @ layers.a[0].reshape(-1, x.shape[-1]).T, len(layers.widths), axis=-1)
    parts = zip(layers.split(layers.product(x)), lows, layers.split(layers.b[0].T), strict=True)
    return [mx.addmm(y, low, high) if adds else y + low @ high for y, low, high in parts]


def by_kernels(layers: Layers, x: mx.array, apart: bool) -> list[mx.array]:
    """The product, and a kernel that adds the update; or a x beside it, and a kernel that adds b z."""
    given = layers.product(x), x, layers.a, layers.b, layers.widths, kernel.first(x)
    return layers.split(kernel.add_update(*given, apart=apart))


def one_kernel(layers: Layers, x: mx.array, share: tuple[int, int] | None = None) -> list[mx.array]:
    """Product and update by one kernel."""
    return product_and_update(x, layers.packed, PACKED, layers.a, layers.b, layers.widths, share=share)


WAYS: dict[str, Callable[[Layers, mx.array], list[mx.array]]] = {
    "fused": fused,
    "groups, no adapter": without,
    "y + (x a) b": two_products,
    "addmm(y, x a, b)": partial(two_products, adds=True),
    "a kernel after it": partial(by_kernels, apart=False),
    "a x beside it, and a kernel after both": partial(by_kernels, apart=True),
    "one kernel": one_kernel,
}
WAYS |= {
    f"one kernel, {16 * share[0]} rows and {share[1]} warps a block": partial(one_kernel, share=share)
    for share in SHARES
}


def token(blocks: list[dict[str, Layers]], way: Callable, stamp: Callable, x: mx.array) -> tuple[mx.array, mx.array]:
    """When the chain began and ended on the GPU."""
    x, began = stamped(stamp, x)
    for block in blocks:
        q, k, v = way(block["q, k, v"], x)
        x = x + way(block["o"], q + k[..., :1] * v[..., :1])[0]
        gate, up = way(block["gate, up"], x)
        x = mx.fast.rms_norm(x + way(block["down"], gate * mx.sigmoid(gate) * up)[0], None, 1e-6)
    return began, stamped(stamp, x)[1]


def nanoseconds(when: mx.array) -> int:
    """Of two words."""
    low, high = when.tolist()
    return low + (high << 32)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help="some of the ways")
    parser.add_argument("--budget", type=float, default=60, help="seconds")
    options = parser.parse_args()
    config, start = SHAPES[options.shape][1], time.perf_counter()
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim", hidden // heads)
    q, kv = heads * width, config["num_key_value_heads"] * width
    sizes = {"q, k, v": (hidden, (q, kv, kv)), "o": (q, (hidden,))}
    sizes |= {"gate, up": (hidden, (inner, inner)), "down": (inner, (hidden,))}
    blocks = [{name: Layers(*size) for name, size in sizes.items()} for _ in range(config["num_hidden_layers"])]
    stamp = build_quickly("stamp", ["x"], ["same", "when"], CLOCK.replace("x_shape[0]", "x_shape[x_ndim - 1]"), "")
    x = mx.random.normal((1, 1, hidden)).astype(mx.bfloat16)
    names = [name for name in WAYS if name in (options.only or WAYS)]
    compiled = {name: mx.compile(partial(token, blocks, WAYS[name], stamp)) for name in names}
    mx.eval([step(x) for step in compiled.values()])
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names if time.perf_counter() - start < options.budget else ():
            began, ended = compiled[name](x)
            mx.eval(began, ended)
            taken[name].append((nanoseconds(ended) - nanoseconds(began)) * 1e-6)
    print(f"{options.shape}, {len(blocks)} blocks, {mx.device_info().get('device_name')}, mlx {mx.__version__}")
    print("| | ms | of fused's speed |\n| --- | --- | --- |")
    for name, times in taken.items():
        middle = statistics.median(times)
        ratio = statistics.median(taken[names[0]]) / middle if middle else 0.0
        print(f"| {name} | {middle:.3f} ({min(times):.3f} to {max(times):.3f}) | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
