"""What is computed again: the same numbers, and one part's arrays at a time."""

import contextlib
import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny_configs import tiny_base
from mlx.utils import tree_flatten

from mlx_adapters.models.layers import adaptable_layers, named_layers
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery import calls
from mlx_adapters.surgery.recomputation import (
    CHUNK,
    Part,
    checkpoint,
    find_parts,
    recompute,
    recompute_between,
    recurrences_in_chunks,
)
from mlx_adapters.system.door import gated_delta
from mlx_adapters.system.limits import as_little_memory_as_will_do


def inputs(tokens: int, vector: bool = False) -> list[mx.array]:
    """q, k, v, gate and beta of a small gated delta rule."""
    mx.random.seed(0)
    shape = (2, tokens)
    q, k = (0.3 * mx.random.normal((*shape, 2, 16)) for _ in range(2))
    gate = mx.sigmoid(mx.random.normal((*shape, 4, 16) if vector else (*shape, 4)) + 2)
    return [q, k, mx.random.normal((*shape, 4, 16)), gate, mx.sigmoid(mx.random.normal((*shape, 4)))]


def rule(*given: mx.array, state: mx.array | None = None, mask: mx.array | None = None):
    return gated_delta.gated_delta_ops(*given, state, mask)


@pytest.mark.parametrize("tokens", [1, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("vector", [False, True])
def test_a_recurrence_in_chunks_is_the_same(tokens, vector):
    given = inputs(tokens, vector)
    more = {"state": mx.random.normal((2, 4, 16, 16)), "mask": mx.random.uniform(shape=(2, tokens)) > 0.2}

    def loss(*given: mx.array) -> mx.array:
        y, state = rule(*given, **more)
        return mx.sin(y).sum() + mx.cos(state).sum()

    expected = mx.value_and_grad(loss, argnums=range(5))(*given)
    with recurrences_in_chunks():
        in_chunks = mx.value_and_grad(loss, argnums=range(5))(*given)
    for ours, theirs in zip((in_chunks[0], *in_chunks[1]), (expected[0], *expected[1]), strict=True):
        assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def peak_of(function, *given: mx.array) -> int:
    mx.eval(given)
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with as_little_memory_as_will_do():  # a GPU with room to spare holds the results of 300 operations
        mx.eval(function(*given))
    return mx.get_peak_memory() - before


def test_a_recurrence_in_chunks_holds_one_chunk():
    """512 tokens: the states of 64, and one for each of the 8 chunks."""

    def loss(*given: mx.array) -> mx.array:
        return mx.sin(rule(*given)[0]).sum()

    gradient = mx.grad(loss, argnums=range(5))
    whole = peak_of(gradient, *inputs(512))
    with recurrences_in_chunks():
        assert peak_of(gradient, *inputs(512)) < 0.25 * whole


def test_checkpoints_in_a_row_hold_one_at_a_time():
    """Also where the gradient of something else than the way back is asked for, and MLX would leave it for later."""
    weights = [mx.random.normal((64, 64)) / 8 for _ in range(12)]

    def part(weight: mx.array, x: mx.array) -> mx.array:
        for _ in range(8):
            x = mx.sin(x @ weight)
        return x

    def loss(weights: list[mx.array], x: mx.array, again) -> mx.array:
        for weight in weights:
            x = again(part)(weight, x)
        return x.sum()

    x = mx.random.normal((2_000, 64))
    kept = peak_of(lambda x: mx.grad(loss)(weights, x, lambda function: function), x)
    ours = peak_of(lambda x: mx.grad(loss)(weights, x, checkpoint), x)
    assert ours < 0.4 * kept
    for one, other in zip(
        mx.grad(loss)(weights, x, checkpoint), mx.grad(loss)(weights, x, lambda function: function), strict=True
    ):
        assert mx.array_equal(one, other)


def test_what_was_traced_goes_with_what_came_of_it():
    """A compiled step that is let go must take the model with it, else each forecast keeps its own on a GPU."""

    def double(x):
        return {"y": 2 * x}

    def gradient(call):
        return mx.grad(lambda x: mx.exp(call(x)["y"]).sum())(mx.zeros(3))

    gone = weakref.ref(double)
    traced = gradient(checkpoint(double))
    del double, traced
    gc.collect()
    assert gone() is None


def test_a_checkpoint_hands_on_what_it_is_given():
    """Nested arguments and results, whole numbers, words and None among them."""

    def function(given: dict, kind: str, mask: None, order: mx.array) -> tuple:
        x, (y, none) = given["x"], given["pair"]
        return (x * y)[order], {"kind": kind, "mask": mask, "none": none}, [x + 1, order]

    x, order = mx.arange(3.0), mx.array([2, 0, 1])
    given = {"x": x, "pair": (x + 1, None)}
    first, words, (second, same) = checkpoint(function)(given, "causal", None, order)
    assert mx.array_equal(first, (x * (x + 1))[order]) and mx.array_equal(second, x + 1)
    assert words == {"kind": "causal", "mask": None, "none": None} and mx.array_equal(same, order)
    gradient = mx.grad(lambda x: checkpoint(function)({"x": x, "pair": (2 * x, None)}, "", None, order)[0].sum())(x)
    assert mx.allclose(gradient, 4 * x)


@pytest.mark.parametrize(
    "architecture, parts", [("llama", 1), ("qwen3_moe", 1), ("gpt2", 1), ("gemma3_text", 1), ("phi3", 1)]
)
def test_feed_forward_parts_are_found(architecture, parts, tiny_model):
    module = load_model(resolve_base(tiny_model(architecture))).module
    layers = adaptable_layers(module)
    kinds = [part for part in find_parts(module, layers.values()) if not part.attends]
    assert len(kinds) == parts * len(module.layers)
    paths = {id(layer): path.rpartition(".")[2] for path, layer in layers.items()}
    names = [{paths[id(layer)] for layer in kind} for kind in (kinds[0].first, kinds[0].last, kinds[0].beside)]
    assert names[1] <= {"down_proj", "c_proj"} and names[2] <= names[0]
    assert not names[0] & names[1] and "gate" not in names[2]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt2", "gemma3_text", "phi3", "qwen3_next"])
def test_attention_is_found(architecture, tiny_model, tmp_path):
    """Its matrices alone are kept: norms of queries and keys lie between them. A recurrence is none."""
    folder = tiny_base(tmp_path / "next", architecture) if architecture == "qwen3_next" else tiny_model(architecture)
    module = load_model(resolve_base(folder)).module
    every = dict(named_layers(module))
    attentions = [part for part in find_parts(module, every.values()) if part.attends]
    paths = {id(layer): path.rpartition(".")[2] for path, layer in every.items()}
    assert len(attentions) == len([path for path in every if path.endswith(("attn.o_proj", "attn.c_proj"))])
    for part in attentions:
        assert {paths[id(layer)] for layer in part.last} <= {"o_proj", "c_proj"} and len(part.last) == 1
        assert {paths[id(layer)] for layer in part.first} <= {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"}
        assert part.first and not part.beside


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_attention_keeps_queries_keys_and_values_alone(on_cpu, architecture, tiny_model):
    """Each in whole pages of 16 kB, in which MLX's CUDA build gives memory, on a CPU as well."""
    module = load_model(resolve_base(tiny_model(architecture))).module
    module.train()
    attention = next(part for part in find_parts(module, dict(named_layers(module)).values()) if part.attends)
    x = mx.random.normal((16, 96, attention.first[0].weight.shape[-1]))

    def loss(x: mx.array) -> mx.array:
        return mx.sin(attention.module(x, "causal")).sum()

    def kept() -> tuple[int, mx.array]:
        """(bytes between the forward pass and the backward pass, the gradient)."""
        value, gradient = mx.value_and_grad(loss)(x)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.eval(value)
        gc.collect()
        mx.synchronize()
        return mx.get_active_memory() - before, gradient

    mx.eval(x, module.parameters())
    whole, expected = kept()
    with recompute_between(attention):
        between, gradient = kept()
    assert mx.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    assert between < 1.1 * sum(layer(x).nbytes for layer in attention.first) + x.nbytes < 0.8 * whole


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_a_gated_delta_model_trains_in_less_memory(on_cpu, name, tmp_path):
    """Told on a CPU: a GPU frees what it has done with at its own time."""
    module = load_model(resolve_base(tiny_base(tmp_path / name, name))).module
    module.train()
    tokens = mx.random.randint(3, 100, (1, 257))

    def through_the_model(scale: mx.array) -> mx.array:
        module.load_weights([(n, w * scale) for n, w in weights.items()], strict=False)
        value = mx.sin(module(tokens).astype(mx.float32)).sum()
        module.load_weights(list(weights.items()), strict=False)
        return value

    weights = {n: w for n, w in tree_flatten(module.parameters()) if "norm" in n}
    gradient = mx.grad(through_the_model)
    whole, expected = peak_of(gradient, mx.array(1.0)), gradient(mx.array(1.0))
    with recurrences_in_chunks():
        assert peak_of(gradient, mx.array(1.0)) < 0.75 * whole
        assert mx.allclose(gradient(mx.array(1.0)), expected, rtol=1e-3)


class Dropping(nn.Module):
    """A last layer that draws random numbers, as one of an adapter with dropout does."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 4), nn.Dropout(0.5)

    def __call__(self, x):
        return self.linear(self.dropout(x))


class FeedForward(nn.Module):
    """A feed-forward part."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), Dropping()

    def __call__(self, x):
        return self.down(nn.silu(self.up(x)))


@pytest.mark.parametrize("between", [False, True])
def test_a_layer_has_its_own_weights_again_and_random_numbers_go_on(between):
    part, x = FeedForward().train(), mx.arange(12.0).reshape(3, 4)
    own = dict(tree_flatten(part.parameters()))
    plan = Part(part, (part.up,), (part.down,), (part.up,))
    after = []
    for again in (contextlib.nullcontext(), recompute_between(plan) if between else recompute(part)):
        mx.random.seed(3)
        with again:
            y, gradient = mx.value_and_grad(lambda x: mx.sin(part(x)).sum())(x)
            mx.eval(y, gradient)
            assert all(array is own[name] for name, array in tree_flatten(part.parameters()))
        mx.random.seed(3)
        with recompute_between(plan) if between and after else contextlib.nullcontext():
            mx.eval(part(x))
        after.append((y.item(), gradient.tolist(), calls.random_key().tolist()))
    assert after[0] == after[1]
