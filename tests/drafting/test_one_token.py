"""A step that is compiled gives the model's own numbers, and the cache is as it would be; else the model is called.

Here plain operations compute its attention, and nothing is compiled; the kernel is held against plain operations where
it is first used (`attention.is_right`).
"""

import contextlib
from functools import partial

import mlx.core as mx
import pytest
from helpers.adapters import distance, random_adapter
from mlx_lm.models.cache import make_prompt_cache

from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.drafting import attention, one_token
from mlx_adapters.drafting.one_token import KEPT, OneToken, forget
from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.runtime.pool import AdapterPool

PROMPT = mx.array([[5, 9, 2, 77, 31]])
COUNT = 2 * attention.RECENT + 9  # tokens: what lies beside the cache goes into it twice


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    """On CUDA, too: its kernel is for wider heads than these models have. And no step but where a test asks for it."""
    monkeypatch.setattr(attention, "on_cuda", lambda: False)
    monkeypatch.setattr(one_token, "serves", lambda: False)
    attention.is_right.cache_clear()
    yield
    attention.is_right.cache_clear()


@pytest.fixture
def model(tiny_model):
    live = load_model(tiny_model("llama"))
    live.pool = AdapterPool(live.module, group=True)
    return live


@pytest.fixture
def made():
    """Functions that were given to be compiled."""
    return []


def counted(module, made, after=0):
    return OneToken(module, lambda function: made.append(function) or function, after)


def answer(module, called, count=COUNT):
    """(logits of each step, the cache afterwards)."""
    cache, logits = make_prompt_cache(module), []
    with called if isinstance(called, OneToken) else contextlib.nullcontext():
        called(PROMPT, cache=cache)
        for i in range(count):
            logits.append(called(mx.array([[3 + i % 11]]), cache=cache)[0])
            mx.eval(logits)
    return mx.concatenate(logits), cache


def same(one, other):
    (logits, cache), (expected, wanted) = one, other
    assert distance(logits, expected) < 1e-4 * mx.abs(expected).max().item()
    for layer, its in zip(cache, wanted, strict=True):
        assert layer.offset == its.offset
        for mine, own in zip(layer.state[:2], its.state[:2], strict=True):
            assert distance(mine[..., : layer.offset, :], own[..., : its.offset, :]) < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "gpt2", "mixtral", "qwen3_moe"])
def test_a_step_is_the_models_and_the_cache_gets_its_tokens(tiny_model, made, architecture):
    module = load_model(tiny_model(architecture)).module
    same(answer(module, counted(module, made, after=2)), answer(module, module))
    assert len(made) == 1 and vars(module)[KEPT].right


@pytest.mark.parametrize("architecture", ["gemma3_text", "deepseek_v3", "mamba", "rwkv7"])
def test_a_model_that_asks_more_of_its_cache_is_called_as_it_is(tiny_model, made, architecture):
    module = load_model(tiny_model(architecture)).module
    logits, _ = answer(module, counted(module, made), 3)
    assert mx.array_equal(logits, answer(module, module, 3)[0])
    assert not vars(module)[KEPT].right


def test_each_adapter_has_its_step(model, made):
    model.attach(random_adapter(model, "dora"), name="one")
    model.attach(random_adapter(model, seed=1), name="two")
    module, results = model.module, {}
    for name in ("one", "two", None, "one"):
        model.use(name)
        result = answer(module, counted(module, made), 3)
        same(result, answer(module, module, 3))
        results[name] = result[0]
    assert len(made) == 3  # the first one is still there
    assert distance(results["one"], results["two"]) > 1e-2 and distance(results["two"], results[None]) > 1e-2


def test_an_adapter_that_comes_amid_an_answer_is_heard(model, made):
    model.attach(random_adapter(model), name="one")
    model.use(None)

    def taken(called):
        cache = make_prompt_cache(model.module)
        called(PROMPT, cache=cache)
        before = called(mx.array([[7]]), cache=cache)
        with model.using("one"):
            return before, called(mx.array([[8]]), cache=cache)

    for mine, own in zip(taken(counted(model.module, made)), taken(model.module), strict=True):
        assert distance(mine[0], own[0]) < 1e-4
    assert len(made) == 2


def test_weights_put_in_place_since_are_heard_by_the_next_answer(model, made):
    module = model.module
    first = answer(module, counted(module, made), 2)[0]
    module.model.norm.weight = 2 * module.model.norm.weight
    same(answer(module, counted(module, made), 2), answer(module, module, 2))
    assert len(made) == 2 and distance(first, answer(module, module, 2)[0]) > 1e-2
    forget(module)
    answer(module, counted(module, made), 2)
    assert len(made) == 3


def test_an_adapter_that_leaves_takes_its_step_along(tiny_model, made):
    model = load_model(tiny_model("llama"))
    model.attach(random_adapter(model), name="one")
    answer(model.module, counted(model.module, made), 2)
    assert vars(model.module)[KEPT].steps
    model.detach("one")
    assert not vars(model.module)[KEPT].steps and vars(model.module)[KEPT].right


def test_a_step_that_is_wrong_is_not_taken(model, made, monkeypatch):
    true = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, *rest: true(q + 1, *rest))
    result = answer(model.module, counted(model.module, made), 4)
    assert mx.array_equal(result[0], answer(model.module, model.module, 4)[0])
    assert vars(model.module)[KEPT].right is False and len(made) == 1


def test_generation_writes_the_same_and_goes_on_from_its_cache(model, monkeypatch):
    model.attach(random_adapter(model), name="one")
    wanted = [model.generate([5, 9, 2], max_tokens=n, temperature=0).token_ids for n in (40, 6)]
    monkeypatch.setattr(one_token, "serves", lambda: True)
    monkeypatch.setattr(one_token, "OneToken", partial(OneToken, compile=lambda function: function, after=1))
    assert [model.generate([5, 9, 2], max_tokens=n, temperature=0).token_ids for n in (40, 6)] == wanted
    assert vars(model.module)[KEPT].right
    forget(model.module)
    model.kv = CacheQuantization(8)
    assert model.generate([5, 9, 2], max_tokens=6, temperature=0).token_ids
    assert not vars(model.module)[KEPT].steps


def test_a_row_of_a_batch_is_computed_so_while_it_is_alone(model, monkeypatch, made):
    model.attach(random_adapter(model), name="one")
    model.use(None)

    def served():
        batcher = Batcher(model.module, model.pool, max_batch=3, cache_bytes=1 << 24)
        adapter = model.pool.get("one")
        requests = [Request([5 + i, 9, 2, 77], adapter, max_tokens=n) for i, n in enumerate((45, 6, 9))]
        batcher.submit(requests[0])
        told = [token for _ in range(38) for token in batcher.step()]  # one flush of what lies beside the cache
        batcher.submit(requests[1])
        told += [token for _ in range(12) for token in batcher.step()]
        batcher.submit(requests[2])
        while not batcher.idle:
            told += batcher.step()
        again = Request(
            [*requests[0].prompt, *(t.id for t in told if t.request is requests[0]), 3], adapter, max_tokens=4
        )
        batcher.submit(again)
        while not batcher.idle:
            told += batcher.step()
        return [[token.id for token in told if token.request is request] for request in (*requests, again)]

    wanted = served()
    monkeypatch.setattr(one_token, "serves", lambda: True)
    monkeypatch.setattr(one_token, "OneToken", lambda module, after: counted(module, made, after))
    assert served() == wanted and [len(each) for each in wanted] == [45, 6, 9, 4]
    assert made and vars(model.module)[KEPT].right


def test_what_a_step_is_told_is_no_array_that_the_host_writes(model, made, monkeypatch):
    """How many lie in the cache and beside it, as one sequence of one shape, also where both are alike."""
    step = counted(model.module, made)
    monkeypatch.setattr(mx, "array", None)
    for cached, beside in ((200, 0), (200, 1), (3, 3), (3, 7)):
        step._beside = beside
        counts = step._counts(cached)
        assert counts[:2].tolist() == [cached, beside] and counts.nbytes > 8 and counts.shape == (16,)
