"""A model that mlx-lm has loaded answers with our adapters as one that we load."""

import mlx_lm
import pytest
from helpers.adapters import random_adapter

import mlx_adapters as ma
from mlx_adapters.errors import ConfigError, IncompatibleError, NotFoundError


def test_it_answers_as_one_that_is_loaded_here(tiny_model, tmp_path):
    folder = tiny_model("llama")
    module, tokenizer = mlx_lm.load(str(folder))
    ours, theirs = ma.load_model(folder), ma.wrap_model(module, tokenizer, folder)
    adapter = random_adapter(ours, seed=1)
    for model in (ours, theirs):
        model.attach(adapter, name="a")
    answers = [model.generate([5, 9, 2], max_tokens=8).token_ids for model in (ours, theirs)]
    assert answers[0] == answers[1]
    theirs.detach()
    assert (
        theirs.generate([5, 9, 2], max_tokens=4).token_ids
        == ma.load_model(folder).generate([5, 9, 2], max_tokens=4).token_ids
    )
    raw = ma.wrap_model(module, tokenizer._tokenizer, folder)
    assert raw.generate("hello", max_tokens=2).prompt_tokens > 0


def test_what_cannot_be_wrapped_is_told(tiny_model, tmp_path):
    folder = tiny_model("llama")
    path = ma.write_adapter(random_adapter(ma.load_model(folder), seed=1), tmp_path / "a")
    module, tokenizer = mlx_lm.load(str(folder), adapter_path=str(path))
    with pytest.raises(IncompatibleError, match="has an adapter on it"):
        ma.wrap_model(module, tokenizer, folder)
    plain, _ = mlx_lm.load(str(folder))
    with pytest.raises(NotFoundError):
        ma.wrap_model(plain, tokenizer, "./none")
    with pytest.raises(ConfigError, match="no model of mlx-lm"):
        ma.wrap_model("model", tokenizer, folder)
