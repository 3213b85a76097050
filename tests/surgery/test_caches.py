"""Models that compute one thing of a whole text and another when they generate."""

import mlx.core as mx
import pytest
from helpers.matrix import IDS, close
from helpers.tiny_configs import make_model, tiny_base, tiny_config
from mlx_lm.models.cache import make_prompt_cache

from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery.caches import compute_as_generated, same_function


def test_layers_that_share_keys_through_a_cache_compute_as_they_generate(tmp_path):
    module, _ = load_module(resolve_base(tiny_base(tmp_path / "base", "gemma3n")))
    close(module(IDS), module(IDS, cache=make_prompt_cache(module)))


@pytest.mark.parametrize("name", ["llama", "gemma4", "qwen3_5", "mamba", "deepseek_v3"])
def test_other_models_are_called_as_before(name):
    module = make_model(tiny_config(name))
    kind = type(module)
    compute_as_generated(module)
    assert type(module) is kind


def test_the_same_function_but_for_noise():
    logits = mx.random.normal((1, 5, 100), key=mx.random.key(0))
    other = mx.random.normal((1, 5, 100), key=mx.random.key(1))
    assert same_function(logits + 1e-5, logits)
    assert not same_function(logits + 0.1 * other, logits)
    half = logits.astype(mx.bfloat16)
    assert same_function(half + (0.02 * other).astype(mx.bfloat16), half)
    assert not same_function(other.astype(mx.bfloat16), half)
