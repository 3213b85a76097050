"""A model goes on with the adapter that a name means now, not with the one that it meant when it was attached."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import make_adapter

import mlx_adapters as ma
from mlx_adapters.sources import registry

TOKENS = [1, 2, 3, 4]


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


def put(base, seed, name="sql"):
    return registry.register(make_adapter(base, seed=seed), name, overwrite=True)


def expected(base, adapter):
    model = ma.load_model(base, adapter)
    return np.array(model.logits(TOKENS))


@pytest.mark.parametrize("way", ["using", "use", "mixture"])
def test_an_adapter_replaced_since_is_read_anew_and_that_is_said(base, caplog, way):
    put(base, 1)
    model = ma.load_model(base, "sql")
    first = np.array(model.logits(TOKENS))
    wanted = expected(base, put(base, 2))
    if way == "using":
        with model.using("sql"):
            logits = np.array(model.logits(TOKENS))
    else:
        model.use("sql" if way == "use" else {"sql": 1.0})
        logits = np.array(model.logits(TOKENS))
    np.testing.assert_array_equal(logits, wanted)
    assert not np.array_equal(first, wanted)
    assert "'sql' was replaced since it was attached: its new weights are read." in caplog.text
    caplog.clear()
    with model.using("sql"):
        pass
    assert not caplog.records  # once is enough


def test_after_a_new_training_under_the_name(base, tmp_path, caplog):
    (tmp_path / "train.jsonl").write_text('{"text": "The cat sat on the mat."}\n' * 4)
    settings = ma.TrainConfig(iterations=2, batch_size=2, learning_rate=0.1, warmup=0)
    lora = ma.LoraConfig(rank=2, num_layers=1)
    for seed in (0, 1):
        training = ma.TrainConfig(**vars(settings) | {"seed": seed})
        run = ma.train(base, tmp_path, name="t", lora=lora, training=training, overwrite=seed > 0)
        if seed == 0:
            model = ma.load_model(base)
            model.attach("t")
    with model.using("t"):
        np.testing.assert_array_equal(np.array(model.logits(TOKENS)), expected(base, str(run.final)))


def test_one_given_in_memory_stays_what_it_is(base, caplog):
    first = put(base, 1)
    model = ma.load_model(base)
    assert model.attach(first) == "sql"
    before = np.array(model.logits(TOKENS))
    put(base, 2)
    with model.using("sql"):
        np.testing.assert_array_equal(np.array(model.logits(TOKENS)), before)
    assert not caplog.records


def test_one_whose_folder_is_gone_or_of_another_base_goes_on(base, tiny_model, caplog):
    put(base, 1)
    model = ma.load_model(base, "sql")
    before = np.array(model.logits(TOKENS))
    put(tiny_model("llama", seed=5), 2)
    with model.using("sql"):
        np.testing.assert_array_equal(np.array(model.logits(TOKENS)), before)
    assert "'sql' goes on with the weights that were attached." in caplog.text
    shutil.rmtree(registry.adapter_folder("sql"))
    with model.using("sql"):
        np.testing.assert_array_equal(np.array(model.logits(TOKENS)), before)
    assert "No adapter named 'sql'" in caplog.text


def test_the_same_bytes_again_are_no_news(base, caplog):
    adapter = put(base, 1)
    model = ma.load_model(base, "sql")
    registry.register(adapter, "sql", overwrite=True)
    with model.using("sql"):
        assert mx.isfinite(model.logits(TOKENS)).all().item()
    assert not caplog.records
