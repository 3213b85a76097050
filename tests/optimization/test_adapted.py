"""Adapter layers as they are trained: mlx-lm's function and gradients, with less kept."""

import gc
from contextlib import ExitStack

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_adapters.models import low_rank
from mlx_adapters.optimization import adapted
from mlx_adapters.optimization.adapted import saving_calls, unpacking
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
    nn,
)
from mlx_adapters.system.machine import on_gpu

KINDS = {"lora": LoRALinear, "dora": DoRALinear, "experts": LoRASwitchLinear}
INPUTS, OUTPUTS, EXPERTS = 64, 96, 4


def layer(kind: str, *, dropout: float = 0.0, bits: int | None = None, dtype: mx.Dtype = mx.float32, bias=True):
    """An adapter layer whose factors are all other than zero."""
    mx.random.seed(0)
    experts = kind == "experts"
    base = SwitchLinear(INPUTS, OUTPUTS, EXPERTS, bias) if experts else nn.Linear(INPUTS, OUTPUTS, bias)
    if bits is not None:
        base = base.to_quantized(32, bits)
    base.set_dtype(dtype)
    made = KINDS[kind].from_base(base, r=4, dropout=dropout, scale=2.0)
    base.freeze()
    made.lora_b = 0.3 * mx.random.normal(made.lora_b.shape)
    if "m" in made:
        made.m = made.m * (1 + 0.1 * mx.random.normal(made.m.shape))
    return made


def call_of(made: nn.Module, rows: int = 40):
    """(weights and x -> a loss, x): a loss that weighs each output."""
    experts = isinstance(made, LoRASwitchLinear)
    shape = (rows, 1) if experts else (2, rows // 2)
    more = (mx.sort(mx.random.randint(0, EXPERTS, (rows,), key=mx.random.key(1))), True) if experts else ()
    weighed = mx.random.normal((*shape, OUTPUTS), key=mx.random.key(2))

    def loss(weights: dict, x: mx.array) -> mx.array:
        made.update(weights)
        return (made(x, *more).astype(mx.float32) * weighed).sum()

    return loss, mx.random.normal((*shape, INPUTS), key=mx.random.key(3))


def gradients(made: nn.Module, ours: bool, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """The loss, its gradients, and the random key afterwards."""
    made.train()
    loss, x = call_of(made)
    mx.random.seed(5)
    own = made.trainable_parameters()
    with ExitStack() as stack:
        for each, call in saving_calls([made]) if ours else ():
            stack.callback(calls.intercept(each, call))
        value, (by_weights, by_x) = mx.value_and_grad(loss, argnums=(0, 1))(own, x.astype(dtype))
    made.update(own)
    values = {"loss": value, "x": by_x, "key": calls.random_key()} | dict(tree_flatten(by_weights))
    mx.eval(values)
    return values


def off(actual: mx.array, expected: mx.array) -> float:
    """The relative difference in the Frobenius norm."""
    actual, expected = (x.astype(mx.float32).flatten() for x in (actual, expected))
    return (mx.linalg.norm(actual - expected) / mx.linalg.norm(expected)).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_mlx_lms(kind, dropout, bits, bias):
    """In float32, dropout's random numbers included."""
    made = layer(kind, dropout=dropout, bits=bits, bias=bias)
    theirs, ours = (gradients(made, mine) for mine in (False, True))
    assert mx.array_equal(ours.pop("key"), theirs.pop("key"))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert off(ours[name], expected) <= (1e-5 if not on_gpu() else 1e-4), name


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("rank", [1, 3, 6, 8])
def test_experts_of_any_rank_are_trained_on_cuda_too(rank, each, monkeypatch):
    """Where the tokens are not sorted, MLX 0.32.4 ends with "misaligned address" at some ranks, and has no gradient of
    wide factors. `each`: experts of a token."""
    monkeypatch.setattr(low_rank, "on_cuda", lambda: True)
    made = LoRASwitchLinear.from_base(SwitchLinear(INPUTS, OUTPUTS, EXPERTS, False), r=rank, scale=2.0)
    made.lora_b = mx.random.normal(made.lora_b.shape)
    made.train()
    made.freeze(keys=["linear"])
    given = {"lora_a": made.lora_a, "lora_b": made.lora_b, "x": mx.random.normal((5, 1, 1, INPUTS))}
    chosen = mx.array([[2, 1], [0, 3], [3, 0], [0, 1], [2, 0]], mx.uint32)[:, :each]
    weighed = mx.random.normal((5, each, 1, OUTPUTS))

    def ours(given: dict) -> mx.array:
        made.update({name: given[name] for name in ("lora_a", "lora_b")})
        return (made(given["x"], chosen) * weighed).sum()

    def dense(given: dict) -> mx.array:
        whole = made.linear.weight + 2 * given["lora_b"] @ given["lora_a"]  # (experts, out, in)
        return (given["x"] @ whole[chosen].swapaxes(-1, -2) * weighed).sum()

    expected = mx.grad(dense)(given)
    for each, call in saving_calls([made]):
        calls.intercept(each, call)
    for name, array in mx.grad(ours)(given).items():
        assert off(array, expected[name]) < 1e-5, name


@pytest.mark.parametrize(("tokens", "each"), [(1, 1), (1, 2), (5, 2)])
def test_experts_that_are_trained_themselves_take_few_tokens_in_order(tokens, each, monkeypatch):
    """mlx-lm sorts from 64 entries on; MLX 0.32.4 cannot start the gradient of fewer on CUDA."""
    monkeypatch.setattr(adapted, "on_gpu", lambda: True)
    made = SwitchLinear(INPUTS, OUTPUTS, EXPERTS, True)
    made.bias = mx.random.normal(made.bias.shape)
    given = made.trainable_parameters() | {"x": mx.random.normal((tokens, 1, 1, INPUTS))}
    chosen = mx.array([[2, 1], [0, 3], [3, 0], [0, 1], [2, 0]], mx.uint32)[:tokens, :each]
    weighed, plain, ordered = mx.random.normal((tokens, each, 1, OUTPUTS)), mx.gather_mm, []

    def ours(given: dict) -> mx.array:
        made.update({name: given[name] for name in ("weight", "bias")})
        return (made(given["x"], chosen) * weighed).sum()

    def dense(given: dict) -> mx.array:
        y = given["x"] @ given["weight"][chosen].swapaxes(-1, -2) + given["bias"][chosen][..., None, :]
        return (y * weighed).sum()

    def noting(*args, **kwargs):
        ordered.append(kwargs["sorted_indices"])
        return plain(*args, **kwargs)

    expected = mx.grad(dense)(given)
    for layer_, call in saving_calls([made]):
        calls.intercept(layer_, call)
    monkeypatch.setattr(mx, "gather_mm", noting)
    for name, array in mx.grad(ours)(given).items():
        assert off(array, expected[name]) < 1e-5, name
    assert ordered == [True]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_factors_gradients_are_float32_in_16_bits_too(kind, dtype):
    made = layer(kind, dtype=dtype, dropout=0.3)
    exact = gradients(layer(kind, dropout=0.3), ours=False)
    ours = gradients(made, True, dtype)
    for name in set(ours) - {"loss", "x", "key"}:
        assert ours[name].dtype == mx.float32
        assert off(ours[name], exact[name]) < 1e-2, name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_update_without_a_magnitude_has_no_gradient_of_nan(kind):
    made = layer(kind)
    if kind == "dora":
        made.m = mx.zeros_like(made.m)
    assert all(mx.all(mx.isfinite(x)).item() for x in gradients(made, True).values())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_layers_that_share_an_input_keep_it_once(kind):
    """Three layers on one large input: mlx-lm's keep a float32 copy of it each."""
    many = [layer(kind, dtype=mx.bfloat16, bias=False, dropout=0.2) for _ in range(3)]
    weights = [each.trainable_parameters() for each in many]
    for each in many:
        each.train()

    def loss(weights: list[dict], x: mx.array) -> mx.array:
        x = mx.sin(x)
        for each, own in zip(many, weights, strict=True):
            each.update(own)
        return mx.exp(sum(each(x) for each in many).astype(mx.float32).mean())

    x = mx.random.normal((20_000, INPUTS)).astype(mx.bfloat16)
    mx.eval(x, weights)

    def peak(ours: bool) -> int:
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with ExitStack() as stack:
            for each, call in saving_calls(many) if ours else ():
                stack.callback(calls.intercept(each, call))
            mx.eval(mx.value_and_grad(loss)(weights, x))
        for each, own in zip(many, weights, strict=True):
            each.update(own)
        return mx.get_peak_memory() - before

    assert peak(True) < 0.9 * peak(False)


@pytest.mark.parametrize("bits, group", [(4, 64), (8, 32), (3, 64)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_packed_matrix_may_be_unpacked_for_the_product(bits, group, dtype):
    """As on CUDA, where that is faster: the same product and gradient, and no dense weight stays."""
    linear = nn.Linear(512, 1024)
    linear.set_dtype(dtype)
    packed = nn.QuantizedLinear.from_linear(linear, group, bits)
    x = mx.random.normal((2, 200, 512)).astype(dtype)

    def product(x: mx.array) -> tuple[mx.array, mx.array]:
        (y,), (gradient,) = mx.vjp(packed, [x], [mx.sin(3 * x[..., :1] + mx.arange(1024)).astype(dtype)])
        return y, gradient

    expected = product(x), product(x[:, :4])
    undo = calls.intercept(packed, unpacking(packed))
    unpacked = product(x), product(x[:, :4])
    undo()
    for many_or_few in zip(unpacked, expected, strict=True):
        for ours, theirs in zip(*many_or_few, strict=True):
            assert ours.dtype == theirs.dtype == dtype
            assert off(ours, theirs) < (
                1e-5 if dtype == mx.float32 and not on_gpu() else 5e-2
            )  # MLX's CPU sums in 16 bits


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("tokens", [2, 30])
@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
def test_each_of_a_tokens_experts_has_an_input_of_its_own_on_a_gpu(kind, tokens, bits, monkeypatch):
    """What three experts give back would be scattered to the token in any order, with 64 entries or more and with
    fewer."""
    monkeypatch.setattr(adapted, "on_gpu", lambda: True)
    block = kind(INPUTS, OUTPUTS, 8)
    if bits is not None:
        nn.quantize(block, 32, bits)
    model = nn.Sequential(block)
    keys = mx.random.split(mx.random.key(0), 3)
    x, weighed = mx.random.normal((1, tokens, INPUTS), key=keys[0]), mx.random.normal((3, INPUTS), key=keys[1])
    chosen, seen = mx.argsort(mx.random.uniform(shape=(1, tokens, 8), key=keys[2]))[..., :3], []

    def noting(original, x, indices):
        seen.append((x.shape, indices.shape))
        return original(x, indices)

    def loss(x):
        return (block(x, chosen) * weighed).sum()

    expected = mx.value_and_grad(loss)(x)
    calls.intercept(block, noting)
    for each, call in adapted.apart_calls(model):
        calls.intercept(each, call)
    value, gradient = mx.value_and_grad(loss)(x)
    assert seen == [((1, tokens, 3, INPUTS), (1, tokens, 3, 1))]
    assert off(value, expected[0]) < 1e-4 and off(gradient, expected[1]) < 1e-5
    monkeypatch.setattr(adapted, "on_gpu", lambda: False)
    assert adapted.apart_calls(model) == []


# -- embeddings -------------------------------------------------------------------------------------------


TOKENS = mx.array([[3, 1, 3, 3, 0, 7, 3, 1], [1, 3, 5, 3, 3, 1, 7, 3]])  # token 3 eight times


def embedding(kind: str, dropout: float = 0.0, dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(0)
    base = nn.Embedding(9, INPUTS)
    if kind == "whole":
        return base
    base.set_dtype(dtype)
    made = {"lora": LoRAEmbedding, "dora": DoRAEmbedding}[kind].from_base(base, r=4, dropout=dropout, scale=2.0)
    base.freeze()
    made.lora_b = 0.3 * mx.random.normal(made.lora_b.shape)
    return made


def of_embedding(made: nn.Module, ours: bool, tokens: mx.array = TOKENS) -> dict[str, mx.array]:
    """The loss and its gradients, through the embedding at both of its ends."""
    weighed, head = (mx.random.normal((*tokens.shape, n), key=mx.random.key(n)) for n in (INPUTS, 9))
    own = made.trainable_parameters()
    mx.random.seed(5)

    def loss(weights: dict) -> mx.array:
        made.update(weights)
        x = made(tokens).astype(mx.float32)
        return (x * weighed).sum() + (made.as_linear(x) * head).sum()

    with ExitStack() as stack:
        for each, call in saving_calls([made]) if ours else ():
            stack.callback(calls.intercept(each, call))
        value, grads = mx.value_and_grad(loss)(own)
        values = {"loss": value} | dict(tree_flatten(grads))
        mx.eval(values)
    made.update(own)
    return values


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lora", "dora", "whole"])
def test_an_embeddings_value_and_gradients_are_mlx_lms(kind, dropout):
    made = embedding(kind, dropout)
    theirs, ours = (of_embedding(made, mine) for mine in (False, True))
    assert ours.keys() == theirs.keys() and ours["loss"].item() == theirs["loss"].item()
    for name, expected in theirs.items():
        assert off(ours[name], expected) <= 1e-5, name


def test_rows_of_16_bits_are_added_up_in_float32():
    table, tokens = mx.ones((3, 2), mx.bfloat16), mx.array([1] * 1001 + [2])
    gradient = mx.grad(lambda table: adapted.rows_of(table, tokens).sum())(table)
    assert gradient.dtype == mx.bfloat16 and gradient.tolist() == [[0, 0], [1000, 1000], [1, 1]]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 300])
@pytest.mark.parametrize("kind", ["lora", "dora", "whole"])
def test_an_embeddings_gradient_is_the_same_in_whatever_order_a_device_adds(kind, count, monkeypatch):
    """A GPU's scatter adds what comes first: here what is scattered comes in another order each time."""
    made, plain, order = embedding(kind), adapted.scattered, np.random.default_rng(0)
    tokens = mx.array(order.integers(0, 4, (1, count)))

    def in_any_order(rows: mx.array, indices: mx.array, values: mx.array) -> mx.array:
        mixed = mx.array(order.permutation(indices.size))
        return plain(rows, indices[mixed], values[mixed])

    expected = of_embedding(made, True, tokens)
    monkeypatch.setattr(adapted, "scattered", in_any_order)
    for _ in range(5):
        for name, gradient in of_embedding(made, True, tokens).items():
            assert mx.array_equal(gradient, expected[name]), name
