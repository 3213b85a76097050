"""How mlx-lm's adapter layers compute while they are trained: the same function, with less kept for the gradient.

mlx-lm's LoRA multiplies by float32 factors, so each layer makes a float32 copy of its input and keeps it for the
backward pass: q, k and v keep three of one array. Here the factors are multiplied in the input's type, from float32
masters, and of a layer the backward pass is left its input alone, which the layers that share it hold in common. It
draws the dropout's mask again from its key. Products in 16 bits sum in float32, as all of MLX's do.
DoRA (arXiv 2402.09353) gets ‖W + s B A‖ by rows from ‖W‖, W A and AᵀA, so that W is not unpacked for it in each step.

Embeddings and experts compute what mlx-lm's do. What goes back to a token's row, and to a token from its experts, is
added up in one order, where a GPU's scatter adds what comes first: a resumed run would end in other roundings.

On CUDA a packed matrix is unpacked for each product of many tokens, forward and backward, and forgotten again: MLX's
quantized product takes two to three times as long there (an H200, 9,728 x 2,560 in 4 bits and 2,048 tokens: 0.94 and
1.04 ms against 0.45 and 0.35, unpacking included).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.low_rank import filled
from mlx_adapters.storage.tensor_names import BIAS, LORA_A, LORA_B, join
from mlx_adapters.surgery import calls
from mlx_adapters.system.door import (
    DoRAEmbedding,
    DoRALinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
    mx,
    nn,
)
from mlx_adapters.system.machine import on_cuda, on_gpu

Call = Callable[..., mx.array]


def saving_calls(adapted: Iterable[nn.Module]) -> list[tuple[nn.Module, Call]]:
    """(adapter layer, what to `calls.intercept` its calls with) of each that computes as this file says."""
    kinds = {
        LoRALinear: _lora,
        DoRALinear: _dora,
        LoRASwitchLinear: _experts,
        SwitchLinear: _whole_experts,
        LoRAEmbedding: _embedding,
        DoRAEmbedding: _dora_embedding,
        nn.Embedding: _whole_embedding,
    }
    return [(layer, make(layer)) for layer in adapted for kind, make in kinds.items() if isinstance(layer, kind)]


def _lora(layer: nn.Module) -> Call:
    product = _low_rank(layer.scale, layer.dropout._p_1)

    def call(original: Call, x: mx.array) -> mx.array:
        return product(layer.linear(x), x, layer.lora_a, layer.lora_b, *_key(layer))

    return call


def _key(layer: nn.Module) -> list[mx.array]:
    """The random key of this call's dropout, if there is any."""
    drops = layer.training and layer.dropout._p_1 < 1
    return [calls.next_random_key()] if drops else []


def _dropped(x: mx.array, kept: float, key: list[mx.array] | tuple) -> mx.array:
    """`x` after the dropout of `key`: the numbers that mlx's own draws."""
    if not key:
        return x
    return (mx.random.bernoulli(kept, x.shape, key=key[0]) * x) * (1 / kept)


def _low_rank(scale: float, kept: float) -> Call:
    """y + scale · dropout(x) A B, in y's type: y (..., out), x (..., in), A (in, r), B (r, out)."""

    @mx.custom_function
    def product(y: mx.array, x: mx.array, a: mx.array, b: mx.array, *key: mx.array) -> mx.array:
        z = _dropped(x, kept, key) @ a.astype(x.dtype)
        return mx.addmm(y, z, (scale * b).astype(x.dtype))

    @product.vjp
    def backward(primals: tuple, dy: mx.array, output: mx.array) -> tuple:
        _, x, a, b, *key = primals
        d = _dropped(x, kept, key)
        own, wide = x.dtype, mx.float32 if x.dtype == mx.float16 else x.dtype  # float16 loses small gradients
        z, dz = d @ a.astype(own), dy.astype(wide) @ (scale * b).astype(wide).T  # (..., r)
        da, db = _summed(d.astype(wide), dz), scale * _summed(z.astype(wide), dy.astype(wide))
        dx = _dropped(dz.astype(own) @ a.astype(own).T, kept, key)
        dy, dx = mx.depends([dy, dx], [da, db])  # so that what these are made of goes at once
        return dy, dx, da, db, *map(mx.zeros_like, key)

    return product


def _summed(left: mx.array, right: mx.array) -> mx.array:
    """Σ over tokens of leftᵀ right, (n, m) float32: left (..., n), right (..., m). Every product sums in float32."""
    left, right = (x.reshape(-1, x.shape[-1]) for x in (left, right))
    return (left.T @ right).astype(mx.float32)


def _experts(layer: nn.Module) -> Call:
    def call(original: Call, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = layer.linear(x, indices, sorted_indices=sorted_indices)
        product = _of_experts(indices, sorted_indices, layer.scale, layer.dropout._p_1)
        return product(y, x, layer.lora_a, layer.lora_b, *_key(layer))

    return call


def _in_order(product: Call, x: mx.array, indices: mx.array) -> mx.array:
    """`product(x, indices)`, (..., 1, out), of x (..., 1, in) and indices (...) by entries that are sorted by expert:
    back through others MLX 0.32.4 has no kernel that starts on CUDA, and on Metal adds in any order."""
    shape = (*np.broadcast_shapes(x.shape[:-2], indices.shape), 1)
    chosen = mx.broadcast_to(indices, shape[:-1]).flatten()
    order = mx.argsort(chosen)
    x = mx.broadcast_to(x, (*shape, x.shape[-1])).reshape(-1, 1, x.shape[-1])[order]
    y = product(x, chosen[order])  # (entries, 1, out)
    return y[mx.argsort(order)].reshape(*shape, -1)


def _whole_experts(layer: nn.Module) -> Call:
    """Experts that are trained themselves."""

    def call(original: Call, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if sorted_indices or x.shape[-2] != 1 or not on_gpu():
            return original(x, indices, sorted_indices=sorted_indices)
        return _in_order(lambda x, chosen: original(x, chosen, sorted_indices=True), x, indices)

    return call


def apart_calls(module: nn.Module) -> list[tuple[nn.Module, Call]]:
    """(block of experts, what to `calls.intercept` its calls with), of a module's on a GPU."""
    blocks = [block for block in module.modules() if isinstance(block, SwitchGLU | SwitchMLP)]
    return [(block, _apart) for block in blocks] if on_gpu() else []


def _apart(original: Call, x: mx.array, indices: mx.array) -> mx.array:
    """`original(x, indices)`, (..., k, out) of x (..., in) and indices (..., k), by an input of its own for each of a
    token's experts: else MLX scatters what they give back. Two numbers have one sum in any order."""
    if indices.shape[-1] <= 2:
        return original(x, indices)
    each = mx.broadcast_to(x[..., None, :], (*indices.shape, x.shape[-1]))
    return original(each, indices[..., None]).squeeze(-2)


def _of_experts_in(indices: mx.array, ordered: bool, scale: float) -> Call:
    """d (..., 1, in), A and B -> what their products add, (..., 1, out)."""

    def added(d: mx.array, a: mx.array, b: mx.array) -> mx.array:
        a, b = filled(a, b)
        for factor in (a, scale * b):
            turned = factor.astype(d.dtype).swapaxes(-1, -2)  # (experts, in, r), (experts, r, out)
            d = mx.gather_mm(d, turned, rhs_indices=indices, sorted_indices=ordered)
        return d

    return added


def _of_experts(indices: mx.array, ordered: bool, scale: float, kept: float) -> Call:
    """`_low_rank` for y (..., 1, out), x (..., 1, in), A (experts, r, in) and B (experts, out, r), as `indices` say."""

    added = _of_experts_in(indices, ordered, scale)

    def added_in_order(d: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return _in_order(lambda d, chosen: _of_experts_in(chosen, True, scale)(d, a, b), d, indices)

    @mx.custom_function
    def product(y: mx.array, x: mx.array, a: mx.array, b: mx.array, *key: mx.array) -> mx.array:
        d = _dropped(x, kept, key)
        return y + added(d if on_gpu() else d.astype(mx.float32), a, b).astype(y.dtype)  # MLX's CPU has no other

    @product.vjp
    def backward(primals: tuple, dy: mx.array, output: mx.array) -> tuple:
        _, x, a, b, *key = primals
        given = [_dropped(x, kept, key).astype(mx.float32), a, b]
        sorts = on_gpu() and not ordered and x.shape[-2] == 1
        _, (dd, da, db) = mx.vjp(added_in_order if sorts else added, given, [dy.astype(mx.float32)])
        return dy, _dropped(dd, kept, key).astype(x.dtype), da, db, *map(mx.zeros_like, key)

    return product


def _dora(layer: nn.Module) -> Call:
    low_rank, magnified = _low_rank(layer.scale, layer.dropout._p_1), _magnified()
    bare = _without_bias(layer.linear)
    for each, product in unpacking_calls([bare]):
        calls.intercept(each, product)
    weight_norms = mx.square(mx.linalg.norm(layer._dequantized_weight().astype(mx.float32), axis=1))  # ‖W‖², (out,)
    mx.eval(weight_norms)

    def call(original: Call, x: mx.array) -> mx.array:
        a, b = layer.lora_a, layer.lora_b
        u = low_rank(bare(x), x, a, b, *_key(layer))
        y = magnified(u, layer.m, mx.stop_gradient(_norms(bare(a.T.astype(x.dtype)), weight_norms, a, layer.scale * b)))
        return y + layer.linear.bias if BIAS in layer.linear else y

    return call


def _without_bias(linear: nn.Module) -> nn.Module:
    kind: Any = type(linear)
    bare = kind.__new__(kind)
    nn.Module.__init__(bare)
    vars(bare).update({name: value for name, value in vars(linear).items() if not name.startswith("_")})
    dict.update(bare, {name: value for name, value in linear.items() if name != BIAS})
    return bare


def _norms(wa: mx.array, weight_norms: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """‖W + (A B)ᵀ‖ by rows, (out,) float32: ‖w‖² + 2 w·(A b) + ‖A b‖². `wa` (r, out): (W A)ᵀ; `weight_norms`: ‖w‖²."""
    return mx.sqrt(mx.maximum(weight_norms + ((2 * wa.astype(mx.float32) + (a.T @ a) @ b) * b).sum(axis=0), 0))


def _magnified() -> Call:
    """u · m / norm in u's type: u (..., out), m and norm (out,) float32. The backward pass has u from what came out."""

    @mx.custom_function
    def product(u: mx.array, m: mx.array, norm: mx.array) -> mx.array:
        return (m / norm).astype(u.dtype) * u

    @product.vjp
    def backward(primals: tuple, dy: mx.array, y: mx.array) -> tuple:
        u, m, norm = primals
        gain = (m / norm).astype(u.dtype)
        summed = (dy.astype(mx.float32) * y.astype(mx.float32)).reshape(-1, y.shape[-1]).sum(axis=0)
        by = gain.astype(mx.float32) * norm
        return gain * dy, mx.where(by == 0, 0, summed / by), mx.zeros_like(norm)

    return product


def _embedding(layer: nn.Module) -> Call:
    def call(original: Call, x: mx.array) -> mx.array:
        y, z = layer.embedding(x), rows_of(layer.lora_a, x) @ layer.lora_b
        return y + (layer.scale * layer.dropout(z)).astype(y.dtype)

    return call


def _dora_embedding(layer: nn.Module) -> Call:
    def call(original: Call, x: mx.array) -> mx.array:
        y, z = layer.embedding(x), layer.scale * rows_of(layer.lora_a, x) @ layer.lora_b
        norm = mx.stop_gradient(mx.linalg.norm(y + z, axis=-1))
        return (rows_of(layer.m, x) / norm)[..., None] * (y + layer.dropout(z).astype(y.dtype))

    return call


def _whole_embedding(layer: nn.Module) -> Call:
    """An embedding that is trained itself."""
    return lambda original, x: rows_of(layer.weight, x)


@mx.custom_function
def rows_of(table: mx.array, indices: mx.array) -> mx.array:
    """`table[indices]`, (*indices, ...) of (n, ...), whose gradient is the same to the bit each time."""
    return table[indices]


@rows_of.vjp
def _rows_back(primals: tuple, dy: mx.array, output: mx.array) -> tuple:
    table, indices = primals
    order = mx.argsort(indices.flatten())
    which = indices.flatten()[order]  # equal ones side by side
    sums = dy.reshape(which.size, -1)[order].astype(mx.float32)
    step = 1
    while step < which.size:  # then each holds the sum of the 2 · step entries up to it that are of its index
        alike = (which[step:] == which[:-step])[:, None]
        sums = mx.concatenate([sums[:step], sums[step:] + mx.where(alike, sums[:-step], 0)])
        step *= 2
    is_last = mx.concatenate([which[1:] != which[:-1], mx.array([True])])[:, None]
    sums = mx.where(is_last, sums, 0).reshape(-1, *table.shape[1:])
    return scattered(mx.zeros(table.shape, mx.float32), which, sums).astype(table.dtype), mx.zeros_like(indices)


def scattered(rows: mx.array, indices: mx.array, values: mx.array) -> mx.array:
    """`rows` with `values` added to those of `indices`, on a GPU in any order."""
    return rows.at[indices].add(values)


def kept_parts(path: str, layer: nn.Module) -> list[tuple[str, mx.array]]:
    """Where the factors of a layer are not trained: from component `kept_from` on, if it has one."""
    first = getattr(layer, "kept_from", None)
    if first is None:
        return []
    kept = mx.arange(layer.lora_a.shape[1]) >= first  # (rank,)
    return [(join(path, LORA_A), kept), (join(path, LORA_B), kept[:, None])]


MANY_TOKENS, LARGE = 256, 1 << 20  # predictions; weights of a matrix


def unpacking_calls(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, Call]]:
    """(packed linear layer, what to `calls.intercept` its calls with) of those that are faster unpacked."""
    if not on_cuda():
        return []
    packed = [layer for layer in layers if type(layer) is nn.QuantizedLinear and layer.mode == "affine"]
    return [(layer, unpacking(layer)) for layer in packed if math.prod(weight_shape(layer)) >= LARGE]


def unpacking(linear: nn.Module) -> Call:
    """`linear` as a dense product of its unpacked weight, which is never kept."""

    def weight(after: mx.array) -> mx.array:  # (out, in); made when `after` is there, not before
        packed = mx.depends([linear.weight], [after])[0]
        options = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        return mx.dequantize(packed, linear.scales, linear.get("biases"), **options, dtype=after.dtype)

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ weight(x).T

    @product.vjp
    def backward(x: mx.array, dy: mx.array, output: mx.array) -> mx.array:
        return dy @ weight(dy)

    def call(original: Call, x: mx.array) -> mx.array:
        if x.size < MANY_TOKENS * x.shape[-1] or linear.get("global_scale") is not None:
            return original(x)
        y = product(x)
        return y + linear.bias if BIAS in linear else y

    return call
