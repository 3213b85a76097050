"""The kernel that multiplies and adds an update: when it is used, and what happens where it is wrong.

What it computes is compared with products wherever it is first used (`product_kernel.is_right`).
"""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_adapters.models import quantized_check
from mlx_adapters.runtime import additions, kernel, product_kernel
from mlx_adapters.runtime.factors import Factors
from mlx_adapters.runtime.sites import Concatenated

WIDTHS, INPUTS = [40, 24], 64


def honest(x, packed, options, a, b, widths, gain=None, shift=None, share=None):
    """Of products."""
    f = {name: array if array.dtype == mx.uint32 else array.astype(mx.float32) for name, array in packed.items()}
    y = x.astype(mx.float32) @ mx.dequantize(f["weight"], f["scales"], f["biases"], **options).T + f.get("bias", 0)
    y = (y if gain is None else y * gain) + (0 if shift is None else shift)
    z = x.astype(mx.float32).flatten() @ a[0].swapaxes(-1, -2)  # (layers, r)
    return [
        (part + (high @ low).reshape(part.shape)).astype(x.dtype)
        for part, low, high in zip(
            additions.split(y, widths), z, mx.split(b[0], [widths[0]] if len(widths) > 1 else []), strict=True
        )
    ]


@pytest.fixture
def cuda(monkeypatch):
    """What is said to be CUDA, whose kernel computes what `product_and_update` is set to."""
    monkeypatch.setattr(product_kernel, "on_cuda", lambda: True)
    monkeypatch.setattr(product_kernel, "_has_cores", lambda: True)
    monkeypatch.setattr(kernel, "on_gpu", lambda: False)
    monkeypatch.setattr(quantized_check, "remembered", lambda kind, measure: measure())
    product_kernel.is_right.cache_clear()
    yield monkeypatch
    product_kernel.is_right.cache_clear()


def outputs(bits=4, bias=True, dora=True, mode="affine", tokens=1, dtype=mx.bfloat16, bias_dtype=None, rank=4):
    """(what is computed for a token of random layers with a random update, what is right)."""
    keys = iter(mx.random.split(mx.random.key(3), 9))
    layers = [nn.Linear(INPUTS, width, bias=bias) for width in WIDTHS]
    for layer in layers:
        for name, array in dict(layer.parameters()).items():
            layer[name] = mx.random.normal(array.shape, key=next(keys)).astype(dtype)
        if bias:
            layer.bias = layer.bias.astype(bias_dtype or dtype)
    layers = [layer.to_quantized(32, bits, mode=mode) for layer in layers]
    shapes = [(2, rank, INPUTS), (64, rank), (64,), (64,)]
    a, b, gain, shift = (mx.random.normal(shape, key=next(keys)).astype(dtype) for shape in shapes)
    update = additions.ForAll(Factors(a, b, *((gain, shift) if dora else ())))
    x, product = mx.random.normal((1, tokens, INPUTS), key=next(keys)).astype(dtype), Concatenated(layers)
    right = mx.concatenate(update.linears(product(x), x, WIDTHS), axis=-1)
    return mx.concatenate(update.of_few(product, x, WIDTHS), axis=-1), right


@pytest.mark.parametrize("options", [{}, {"bias": False, "dtype": mx.float16}, {"dora": False}], ids=str)
def test_a_token_is_computed_by_the_kernel(cuda, options):
    made = []
    cuda.setattr(product_kernel, "product_and_update", lambda *given: made.append(given) or honest(*given))
    got, right = outputs(**options)
    assert mx.abs(got - right).max() < 3e-2 * mx.abs(right).max()
    assert len(made) == 4 and made[-1][0].size == INPUTS  # tried before, in all shares


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"bits": 8},
        {"mode": "mxfp4"},
        {"tokens": 2},
        {"dtype": mx.float32},
        {"bias_dtype": mx.float32},
        {"rank": 65},
    ],
    ids=str,
)
def test_what_it_is_not_made_for_is_computed_as_before(cuda, options):
    cuda.setattr(product_kernel, "product_and_update", None)
    if "mode" in options:
        options |= {"bias": False}
    got, right = outputs(**options)
    assert got.dtype == right.dtype and mx.allclose(got, right, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("wrong", ["lies", "raises"])
def test_where_it_is_wrong_it_is_not_used(cuda, wrong):
    def lying(*given):
        if wrong == "raises":
            raise ValueError("no such kernel")
        return [2 * part for part in honest(*given)]

    cuda.setattr(product_kernel, "product_and_update", lying)
    got, right = outputs()
    assert mx.array_equal(got, right) and not product_kernel.is_right(mx.bfloat16, 32)


def test_each_size_of_groups_is_built_in_the_first_way_that_is_right_for_it(cuda):
    first, other = (lambda *given: None for _ in range(2))
    first.__name__, other.__name__ = "first", "other"
    cuda.setattr(quantized_check, "ways", lambda: [first, other])
    cuda.setattr(product_kernel, "_built", {})
    right = {64: [first, other], 32: [other], 128: []}

    def error(dtype, group_size):
        return 0.0 if product_kernel._built[dtype, group_size] in right[group_size] else 1.0

    cuda.setattr(product_kernel, "_error", error)
    assert [product_kernel.is_right(mx.float16, size) for size in right] == [True, True, False]
    assert product_kernel._built == {(mx.float16, 64): first, (mx.float16, 32): other}


@pytest.mark.parametrize(("major", "there"), [(7, False), (8, True), (12, True)])
def test_for_a_chip_without_its_tensor_cores_nothing_is_compiled(monkeypatch, major, there):
    tried = []
    monkeypatch.setattr(product_kernel, "on_cuda", lambda: True)
    monkeypatch.setattr(product_kernel.mx, "device_info", lambda: {"compute_capability_major": major})
    monkeypatch.setattr(product_kernel, "is_right", lambda *given: tried.append(given) or True)
    product_kernel._has_cores.cache_clear()
    x, scales = mx.zeros((1, 1, 64), mx.bfloat16), mx.zeros((8, 2), mx.bfloat16)
    options = {"mode": "affine", "bits": 4, "group_size": 32}
    assert product_kernel.serves(x, {"scales": scales}, options, scales) == there == bool(tried)
    product_kernel._has_cores.cache_clear()


def test_its_text_has_a_place_for_each_layer_and_only_the_terms_that_are_there():
    one, three = (
        product_kernel.source(mx.float16, n, terms) for n, terms in ((1, []), (3, list(product_kernel.TERMS)))
    )
    assert "T* out = out_0;" in one and "T* out = part == 2 ? out_2 : (part == 1 ? out_1 : (out_0));" in three
    for term in product_kernel.TERMS.values():
        assert term in three and term not in one
    bounds, blocks = product_kernel._blocks((33, 8), 16)
    assert bounds.tolist()[:3] == [0, 33, 41] and blocks == 3 + 1
    assert [product_kernel.share_of(widths) for widths in ((2560,), (4096, 1024), (9728, 9728))] == [
        *product_kernel.SHARES
    ]
