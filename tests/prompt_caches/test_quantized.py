"""Keys and values in few bits: the same however a text is read, cut and kept; refused where a model cannot have it."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.tiny_configs import make_model, tiny_base, tiny_config
from mlx_lm.models import base as attention
from mlx_lm.models.cache import QuantizedKVCache

from mlx_adapters.cli import cli
from mlx_adapters.config.evaluating import EvaluationConfig
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.errors import ConfigError, IncompatibleError
from mlx_adapters.evaluation.scores import greedy_answers
from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.prompt_caches import quantized
from mlx_adapters.prompt_caches.probing import comes_back
from mlx_adapters.prompt_caches.quantized import new_layers, require_quantizable

AT_ONCE = CacheQuantization(8, 32, 0)
LATER = CacheQuantization(4, 32, 20)


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama", head_dim=64)


def tokens_of(model, prompt, cache=None, count=6):
    return [step.token for step in model.stream(prompt, cache=cache, max_tokens=count)]


@pytest.mark.parametrize("kv", [AT_ONCE, LATER])
def test_it_goes_on_from_a_cache_of_few_bits(base, kv, tmp_path):
    model, plain = load_model(base, kv=kv), load_model(base)
    prompt = np.random.default_rng(0).integers(5, 200, 30).tolist()
    cache, whole = model.new_cache(), plain.new_cache()
    written = tokens_of(model, prompt, cache)
    tokens_of(plain, prompt, whole)
    assert hasattr(cache.layers[0], "bits") and not hasattr(whole.layers[0], "bits")
    assert sum(layer.nbytes for layer in cache.layers) < 0.4 * sum(layer.nbytes for layer in whole.layers)
    model.save_cache(cache, tmp_path / "kept")
    with pytest.raises(IncompatibleError, match="other --kv-bits"):
        plain.load_cache(tmp_path / "kept")
    following = [*prompt, *written, 7, 8, 9]
    for kept in (model.load_cache(tmp_path / "kept"), cache):
        again, rest = model.going_on(kept, following)
        assert rest == [7, 8, 9]
        ids = tokens_of(model, rest, again)
    assert len(ids) == 6
    short, rest = model.going_on(model.load_cache(tmp_path / "kept"), [*prompt[:25], 3, 4])
    assert len(rest) == (2 if kv is AT_ONCE else 27)  # cut only where what is left was computed so, too
    if kv is AT_ONCE:
        assert tokens_of(model, rest, short) == tokens_of(model, [*prompt[:25], 3, 4])
        prompts = [(prompt, None), (following, None)]
        assert model.generate_batch(prompts, max_tokens=4) == [model.generate(p, max_tokens=4).text for p, _ in prompts]


def test_answers_that_are_scored_are_written_with_them(base):
    plain, few = load_model(base), load_model(base, kv=CacheQuantization(2, 32, 0))
    prompts = [np.random.default_rng(i).integers(5, 200, 30).tolist() for i in range(3)]
    answers = []
    for bits, model in ((None, plain), (2, few)):
        kv = CacheQuantization(bits, 32, 0)
        answers.append(greedy_answers(plain, prompts, kv=kv, max_tokens=6))
        written = [model.generate(prompt, max_tokens=6).token_ids for prompt in prompts]
        assert answers[-1] == [model.tokenizer.decode(tokens) for tokens in written]
    assert answers[0] != answers[1]
    with pytest.raises(ConfigError):
        EvaluationConfig(kv_bits=1)


def test_a_server_keeps_few_bits_and_gives_what_a_cold_one_gives(base):
    model = load_model(base, kv=AT_ONCE)
    warm, cold = (
        Batcher(model.module, model.pool, 4, prefill=8, cache_bytes=n, make=model.new_layers) for n in (1 << 30, 0)
    )
    assert not warm.can_batch and warm.reader.known.limit  # mlx-lm has no batches of them
    prompt = np.random.default_rng(1).integers(5, 200, 30).tolist()
    for asked, known in ((prompt, 0), (prompt, 29), ([*prompt[:20], 4, 5], 20), ([*prompt, 6, 7], 30)):
        answers, logprobs = [], []
        for batcher in (warm, cold):
            request = Request(asked, None, 5, top_logprobs=0)
            batcher.submit(request)
            told = []
            while not batcher.idle:
                told += batcher.step()
            answers.append([token.id for token in told])
            logprobs.append([token.logprob for token in told])
            assert request.cached_tokens == (known if batcher is warm else 0)
        assert answers[0] == answers[1] and np.allclose(*logprobs, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3_text", "llama4", "deepseek_v3", "mamba2", "falcon_h1", "llama"])
def test_what_cannot_be_is_refused_by_name(name, tmp_path):
    folder = tiny_base(tmp_path / name, name)  # llama here: keys of 16 numbers, and no groups of so few
    with pytest.raises(IncompatibleError, match=f"A {name} model's cache cannot be quantized"):
        load_model(folder, kv=AT_ONCE)
    result = CliRunner().invoke(cli, ["generate", "a", "--base", str(folder), "--kv-bits", "8"])
    assert isinstance(result.exception, IncompatibleError) and "leave --kv-bits out" in result.exception.hint
    with pytest.raises(ConfigError, match="kv_bits is one of 2, 3"):
        CacheQuantization(7)


def test_recurrent_states_stay_as_they_are_beside_it():
    config = tiny_config("qwen3_5")
    config["text_config"]["head_dim"] = 64
    module = make_model(config)
    require_quantizable(module, AT_ONCE, "qwen3_5")
    assert {hasattr(layer, "bits") for layer in new_layers(module, AT_ONCE)} == {True, False}
    assert comes_back(module, partial(new_layers, module, AT_ONCE), together=False)


@pytest.mark.parametrize(("heads", "width", "group"), [(4, 64, 32), (2, 96, 32), (4, 128, 128)])
@pytest.mark.parametrize(("before", "tokens"), [(0, 7), (9, 1), (9, 6)])
def test_where_there_is_no_such_product_keys_and_values_are_unpacked(
    on_cpu, heads, width, group, before, tokens, monkeypatch
):
    """As on CUDA, which has no such products: the same numbers, of rows laid out as models lay them, heads that share
    keys and either mask."""
    mx.random.seed(0)
    cache = QuantizedKVCache(group_size=group, bits=8)
    q, k, v = (mx.random.normal((2, before + tokens, n, width)).swapaxes(1, 2) for n in (heads, 2, 2))
    if before:
        cache.update_and_fetch(k[..., :before, :], v[..., :before, :])
    held = cache.update_and_fetch(k[..., before:, :], v[..., before:, :])
    seen = mx.arange(before + tokens)[None] <= mx.arange(before, before + tokens)[:, None]
    for mask in (None,) if tokens == 1 else ("causal", seen, mx.where(seen, 0.0, -1e9)):
        outputs = []
        for cuda in (False, True):
            monkeypatch.setattr(quantized, "on_cuda", lambda cuda=cuda: cuda)
            given = (q[..., before:, :], *held, 0.1, mask)
            outputs.append(attention.quantized_scaled_dot_product_attention(*given, group_size=group, bits=8))
        assert mx.allclose(*outputs, atol=1e-5) and not mx.array_equal(*outputs)
