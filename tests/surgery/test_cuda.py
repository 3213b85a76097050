"""What stands in for MLX's functions on CUDA, held against them here on the CPU."""

import contextlib
import math

import mlx.core as mx
import pytest

from mlx_adapters.drafting.batch import Batch
from mlx_adapters.generation.live import load_model
from mlx_adapters.surgery import cuda
from mlx_adapters.surgery.caches import Text
from mlx_adapters.system.door import make_prompt_cache

packed_by_mlx = cuda.packed
LENGTH, HEADS, SHARED, WIDTH = 7, 4, 2, 8


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize(
    "shape", [(3, 64), (1, 5, 64), (3, 1, 64), (2, 5, 64), (3, 2, 2, 64), (2, 129, 64), (1, 300, 64)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_matrix_is_read_once_for_all_rows(shape, bits, monkeypatch):
    packed = mx.quantize(normal(32, 64), group_size=32, bits=bits)
    kind = {"group_size": 32, "bits": bits, "mode": "affine"}
    read = []

    def original(x, *args, **options):
        read.append(x.shape)
        return packed_by_mlx(x, *args, **options)

    x = normal(*shape, seed=1)
    expected, flat = packed_by_mlx(x, *packed, transpose=True, **kind), (x.size // 64, 64)
    monkeypatch.setattr(cuda, "packed", original)
    monkeypatch.setattr(cuda, "on_cuda", lambda: True)
    for reading in (False, True):  # in training a matrix that was unpacked would be kept
        read.clear()
        with cuda.generating() if reading else contextlib.nullcontext():
            y = cuda.quantized_matmul(x, packed[0], scales=packed[1], biases=packed[2], transpose=True, **kind)
        assert mx.allclose(y, expected, atol=1e-4)
        many = reading and x.size // 64 > cuda.MANY_TOKENS
        assert read == ([] if many else [shape if len(shape) < 3 or shape[0] == 1 else flat])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lead", [(2,), (1, 3), (4, 1), (7, 1), (8, 1), (1, 7)], ids=str)
def test_of_some_tokens_a_large_matrix_is_multiplied_as_of_eight(lead, bits, monkeypatch):
    packed, read = mx.quantize(normal(32, 64), group_size=32, bits=bits), []
    x, tokens = normal(*lead, 64, seed=1), math.prod(lead)
    expected = packed_by_mlx(x, *packed, bits=bits, group_size=32)
    monkeypatch.setattr(
        cuda, "packed", lambda x, *rest, **more: read.append(x.shape) or packed_by_mlx(x, *rest, **more)
    )
    for large in (32 * 64, 32 * 64 + 1):
        monkeypatch.setattr(cuda, "LARGE", large)
        y = cuda.quantized_matmul(x, *packed, bits=bits, group_size=32)
        assert y.shape == expected.shape and mx.allclose(y, expected, atol=1e-4)
    first, second = read
    assert first == ((8, 64) if 4 <= tokens <= 8 and lead != (8,) else x.shape) and math.prod(second[:-1]) == tokens


def test_other_products_are_left_alone():
    several = mx.quantize(normal(2, 32, 64), group_size=32, bits=4)
    x = normal(2, 3, 64, seed=1)
    kind = {"group_size": 32, "bits": 4}
    expected = packed_by_mlx(x, *several, **kind)
    assert mx.array_equal(cuda.quantized_matmul(x, *several, **kind), expected)
    across = mx.quantize(normal(300, 64), group_size=32, bits=4)
    x = normal(2, 3, 300, seed=1)
    expected = packed_by_mlx(x, *across, transpose=False, **kind)
    assert mx.allclose(cuda.quantized_matmul(x, *across, transpose=False, **kind), expected, atol=1e-4)


def masks(rows, tokens):
    seen = mx.arange(LENGTH - tokens, LENGTH)[:, None] >= mx.arange(LENGTH)
    padded = seen & (mx.array([0, 2])[:rows, None, None, None] <= mx.arange(LENGTH))
    return [None, "causal", seen, padded, normal(rows, HEADS, tokens, LENGTH).astype(mx.float16)]


@pytest.mark.parametrize("tokens", [2, LENGTH])
def test_attention_by_products_is_attention(tokens):
    q, k, v = (
        normal(2, n, t, w, seed=t) for n, t, w in ((HEADS, tokens, WIDTH), (SHARED, LENGTH, WIDTH), (SHARED, LENGTH, 5))
    )
    for mask in masks(2, tokens):
        expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
        halves = (x.astype(mx.float16) for x in (q, k, v))
        made = cuda.by_products(None, *halves, scale=0.3, mask=mask)
        assert made.dtype == mx.float16 and mx.allclose(made, expected, atol=1e-2)


@pytest.mark.parametrize("how", ["one token", "many scores", "sinks", "float32"])
def test_other_attention_is_mlxs(how, monkeypatch):
    monkeypatch.setattr(cuda, "MOST_SCORES", 2 * HEADS * 3 * LENGTH - (how == "many scores"))
    q, k = normal(2, HEADS, 1 if how == "one token" else 3, WIDTH), normal(2, SHARED, LENGTH, WIDTH)
    if how != "float32":
        q = q.astype(mx.float16)
    sinks = {"sinks": mx.zeros((HEADS,))} if how == "sinks" else {}
    assert cuda.by_products(lambda *args, **options: (len(args), *options), q, k, k, scale=1.0, **sinks)[0] == 3


def test_it_holds_within_the_block_and_on_cuda_alone(monkeypatch):
    q, calls = normal(2, HEADS, 3, WIDTH), []
    monkeypatch.setattr(
        cuda, "by_products", lambda original, *args, **options: calls.append(original(*args, **options))
    )
    for on in (False, True):
        monkeypatch.setattr(cuda, "on_cuda", lambda on=on: on)
        with cuda.generating():
            mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)
        assert len(calls) == on


def test_work_is_handed_over_layer_by_layer(tiny_model, monkeypatch):
    """So that the device's graphs have one form for all layers, whatever rows come and go."""
    module, begun = load_model(tiny_model("llama")).module, []
    monkeypatch.setattr(cuda, "on_cuda", lambda: True)
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: begun.append(arrays))
    count, caches = len(module.layers), []
    for tokens in ([5, 6, 7], [8, 9]):
        caches.append(make_prompt_cache(module))
        with cuda.generating():
            module(mx.array([tokens]), cache=caches[-1])
        assert len(begun) == count
        begun.clear()
    batch, texts = Batch(module), [Text(cache) for cache in caches]
    for change in (lambda: batch.join(texts[:1]), lambda: batch.join(texts[1:]), lambda: batch.keep([1])):
        change()
        assert len(begun) == count
        begun.clear()
