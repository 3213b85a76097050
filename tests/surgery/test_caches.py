"""Models that compute one thing of a whole text and another when they generate."""

import mlx.core as mx
import pytest
from helpers.matrix import IDS, close
from helpers.tiny_configs import make_model, tiny_base, tiny_config
from mlx_lm.models.cache import make_prompt_cache

from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery.caches import compute_as_generated, same_function
from mlx_adapters.surgery.calls import intercept, parts


def test_layers_that_share_keys_through_a_cache_compute_as_they_generate(tmp_path):
    module, _ = load_module(resolve_base(tiny_base(tmp_path / "base", "gemma3n")))
    for ids in (IDS, mx.concatenate([IDS, IDS + 1, IDS + 2], axis=1)):  # shorter than its window, and longer
        close(module(ids), module(ids, cache=make_prompt_cache(module)))


@pytest.mark.parametrize("name", ["llama", "gemma4", "qwen3_5", "mamba", "deepseek_v3"])
def test_other_models_are_called_as_before(name):
    module = make_model(tiny_config(name))
    kind = type(module)
    compute_as_generated(module)
    assert type(module) is kind


def test_a_model_is_traced_once_with_caches_and_once_without_and_what_does_not_fit_raises():
    module = make_model(tiny_config("llama"))
    passes = []
    undo = intercept(module, lambda original, *args, **keys: passes.append("cache" in keys) or original(*args, **keys))
    compute_as_generated(module)
    assert sorted(passes) == [False, True]
    undo()
    module.model.norm.weight = mx.zeros((5,))
    with pytest.raises(ValueError, match=r"shape|size"):
        compute_as_generated(module)


def test_parts_are_the_modules_that_mlx_names():
    for name in ("llama", "qwen3_moe", "gemma3n", "recurrent_gemma"):
        module = make_model(tiny_config(name))
        assert {path: id(part) for path, part in parts(module)} == {p: id(m) for p, m in module.named_modules()}


def test_nothing_is_the_same_as_a_nan_and_what_is_never_said_is_the_same_only_where_it_is_never_said():
    logits = mx.random.normal((3, 40), key=mx.random.key(0))
    some = mx.arange(40) < 2
    silent, broken = mx.where(some, -mx.inf, logits), mx.where(some, mx.nan, logits)
    assert same_function(silent + 1e-5, silent)
    pairs = [(broken, broken), (broken, logits), (logits, broken), (logits, silent), (silent, logits)]
    for one, other in [*pairs, (mx.where(some, mx.inf, logits), silent), (mx.full((3, 40), mx.nan), logits)]:
        assert not same_function(one, other)


def test_the_same_function_but_for_noise():
    logits = mx.random.normal((1, 5, 100), key=mx.random.key(0))
    other = mx.random.normal((1, 5, 100), key=mx.random.key(1))
    assert same_function(logits + 1e-5, logits)
    assert not same_function(logits + 0.1 * other, logits)
    half = logits.astype(mx.bfloat16)
    assert same_function(half + (0.02 * other).astype(mx.bfloat16), half)
    assert not same_function(other.astype(mx.bfloat16), half)
