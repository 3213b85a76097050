"""What a model cannot read: tokens it has no row for, and more of them than its context holds."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.tiny_models import build_model
from helpers.training_tools import write_data

from mlx_adapters import LoraConfig, TrainConfig, estimate, train
from mlx_adapters.cli import cli
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.data.checking import check_data
from mlx_adapters.errors import ModelError
from mlx_adapters.evaluation.evaluate import EvaluationConfig, evaluate
from mlx_adapters.evaluation.scores import greedy_answers
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.generation.live import load_model
from mlx_adapters.models.base import context_of
from mlx_adapters.sources.bases import resolve_base

LORA, TRAINING = LoraConfig(rank=4), TrainConfig(iterations=1, batch_size=2)


@pytest.fixture
def small(tiny_model):
    """A model of 300 rows whose tokenizer has 512 tokens."""
    return tiny_model("llama", vocab_size=300)


def test_tokens_without_a_row_are_refused_everywhere(small, tiny_model, tmp_path):
    """They would read memory that is not the model's: plausible losses, NaN, or a crash."""
    data = write_data(tmp_path / "data", rows=40, valid=20)
    run = train(tiny_model(), data, name="run", lora=LORA, training=TRAINING)
    work = {
        "train": lambda: train(small, data, name="other", lora=LORA, training=TRAINING),
        "estimate": lambda: estimate(small, data, lora=LORA, training=TRAINING),
        "generate": lambda: load_model(small).generate("List the titles of all courses."),
        "batch": lambda: load_model(small).generate_batch([("List the titles of all courses.", None)]),
        "logits": lambda: load_model(small).logits([3, 511]),
    }
    for name, refused in work.items():
        with pytest.raises(ModelError, match=r"has no token \d+, its ids end at 299"):
            refused()
            pytest.fail(f"{name} read it")
    report = check_data(data, small)  # which lists them instead
    assert len(report.splits["train"].outside_model) == 40 and len(report.splits["valid"].outside_model) == 20
    (judged,) = evaluate([str(small)], data, config=EvaluationConfig(split="valid")).evaluations
    assert run.final and "has no token" in judged.error
    other = train(small, _raw(tmp_path / "raw"), name="other", lora=LORA, training=TRAINING)
    options = FuseOptions(method="calibrated", calibration=str(data))
    with pytest.raises(ModelError, match="has no token"):
        fuse(small, "other", tmp_path / "fused", quantization=4, options=options)
    assert other.final and not (tmp_path / "fused").exists()


def _raw(folder):
    """Rows of bytes that stay single tokens, all of them within the first 300."""
    folder.mkdir()
    lines = [{"text": "~!@ #$% ^&*"[i % 5 :]} for i in range(6)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_an_answer_ends_where_the_context_does(tiny_model):
    folder = tiny_model("llama", max_position_embeddings=40)
    model = load_model(folder)
    model.tokenizer._eos_token_ids = set()  # random weights: whatever it says, it goes on
    answer = model.generate([5] * 30, max_tokens=100)
    assert (len(answer.token_ids), answer.finish_reason) == (11, "context")
    assert model.generate([5] * 30, max_tokens=11).finish_reason == "length"
    for refused in (
        lambda: model.generate([5] * 41, max_tokens=1),
        lambda: model.generate_batch([([5] * 41, None)]),
        lambda: greedy_answers(model, [[5] * 41]),
    ):
        with pytest.raises(ModelError, match="41 tokens; the model's context has 40"):
            refused()
    assert np.isfinite(np.array(model.logits([5] * 60))).all()  # judging a text is another thing


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    "scaling, reached",
    [
        (YARN, 160),  # as Qwen's cards say to add it
        (YARN | {"original_max_position_embeddings": 5}, 40),  # the limit is the stretched one already
        ({"type": "linear", "factor": 4.0}, 40),  # Gemma 3's limit is, too
        (YARN | {"factor": "four"}, 40),
        (YARN | {"factor": None}, 40),
        (YARN | {"factor": float("inf")}, 40),
        ("yarn", 40),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_stretched_positions_reach_further_than_the_configs_limit(key, scaling, reached):
    for config in ({key: scaling}, {"text_config": {key: scaling, "max_position_embeddings": 40}}):
        limit = {} if "text_config" in config else {"max_position_embeddings": 40}
        assert context_of(config | limit) == reached


def test_a_model_answers_where_its_positions_are_stretched(tmp_path):
    model = load_model(build_model(tmp_path / "base", "llama", max_position_embeddings=40, rope_scaling=YARN))
    model.tokenizer._eos_token_ids = set()
    answer = model.generate([5] * 100, max_tokens=100)
    assert (len(answer.token_ids), answer.finish_reason) == (61, "context")
    with pytest.raises(ModelError, match="161 tokens; the model's context has 160"):
        model.generate([5] * 161, max_tokens=1)


def test_generate_and_chat_tell_that_the_context_is_full(tiny_model, monkeypatch):
    folder = tiny_model("llama", max_position_embeddings=40)
    short = CliRunner().invoke(cli, ["generate", "List", "--base", str(folder), "--raw", "--max-tokens", "500"])
    assert short.exit_code == 0 and "context of 40 tokens" in short.stderr
    long = CliRunner().invoke(cli, ["generate", "~" * 60, "--base", str(folder), "--raw"])
    assert "context has 40" in str(long.exception) and long.stdout == ""
    talk = CliRunner().invoke(cli, ["chat", "--base", str(folder), "--max-tokens", "500"], input="List\n~\n")
    assert talk.exit_code == 0 and "/reset begins a new conversation" in talk.stderr


def test_a_config_that_does_not_tell_the_vocabulary_is_no_way_around(tmp_path):
    """Vision-language configs leave it to a default; the model that mlx-lm makes of them knows."""
    folder = build_model(tmp_path / "base", "gemma3", vocab_size=300)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["vocab_size"]
    with_top = json.dumps(config)
    del config["vocab_size"]
    base = resolve_base(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert base.vocabulary == 262208  # mlx-lm's default
    (folder / "config.json").write_text(with_top)
    assert resolve_base(folder).vocabulary == 300
