"""Preferences judged: pairs, and answers with a label, against NumPy on the answers' own log-probabilities."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.benchmarks import registered_adapter
from helpers.training_tools import write_preferences

from mlx_adapters import EvaluationConfig, TrainConfig, evaluate
from mlx_adapters.cli import cli
from mlx_adapters.config.training import DPO, KTO
from mlx_adapters.data.datasets import read_data
from mlx_adapters.data.preferences import tokenize_preference
from mlx_adapters.errors import ConfigError
from mlx_adapters.evaluation import reports
from mlx_adapters.evaluation.statistics import mean, share_interval
from mlx_adapters.evaluation.tokens import Batches, judge
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base


@pytest.fixture
def variants(tiny_model):
    """A base, and an adapter of it, by name and as models."""
    folder = tiny_model("llama")
    adapter = registered_adapter(folder)
    return (
        folder,
        adapter.name,
        {
            "base": load_model(resolve_base(folder)),
            adapter.name: load_model(resolve_base(folder), adapter),
        },
    )


def likelihoods(models, rows, objective):
    """(log-probability, tokens) of each answer by variant; of pairs of all chosen, then all rejected ones."""
    values = {}
    for name, model in models.items():
        config = TrainConfig(objective=objective, mask_prompt=True)
        made = [row for raw in rows for row in tokenize_preference(raw, model.tokenizer, config)]
        sequences = [row.sequences[i] for i in range(len(made[0].sequences)) for row in made]
        figures = judge(model, Batches(sequences))
        values[name] = (-figures.loss, figures.tokens)
    return values


def evaluated(folder, names, data, **settings):
    return evaluate(names, data, base=str(folder), config=EvaluationConfig(split="valid", **settings))


@pytest.mark.parametrize("score", ["preference", "reward"])
def test_pairs_are_scored_by_the_likelier_answer_or_the_one_that_gained(variants, tmp_path, score):
    folder, name, models = variants
    data = write_preferences(tmp_path / "pairs", valid=9)
    logs = likelihoods(models, read_data(data).rows("valid"), DPO())
    report = evaluated(folder, ["base", name], data, score=score)
    for evaluation in report.evaluations:
        (own, tokens), (before, _) = logs[evaluation.variant], logs["base"]
        values = own / tokens if score == "preference" else own - before
        lead = np.sign(np.round(values[:9] - values[9:], 9))
        assert list(evaluation.row_scores) == (0.5 + lead / 2).tolist()
    assert report.data["preferences"] == "pairs"
    assert any("of 9 pairs" in line for line in reports.sentences(report))


def test_answers_with_a_label_are_compared_across_prompts(variants, tmp_path):
    """The area under the ROC curve, its error after DeLong et al., by loops over all good and bad answers."""
    folder, name, models = variants
    data = write_preferences(tmp_path / "labeled", valid=11, labeled=True)
    rows = read_data(data).rows("valid")
    logs = likelihoods(models, rows, KTO())
    report = evaluated(folder, [name, "base"], data)
    assert report.score == "preference" and report.data["preferences"] == "labeled"
    placements = {}
    for evaluation in report.evaluations:
        own, tokens = logs[evaluation.variant]
        good, bad = ([v for v, row in zip(own / tokens, rows, strict=True) if row.label is k] for k in (True, False))
        wins = np.array([[0.5 + np.sign(one - other) / 2 for other in bad] for one in good])  # (good, bad)
        error = math.sqrt(wins.mean(1).var(ddof=1) / len(good) + wins.mean(0).var(ddof=1) / len(bad))
        assert evaluation.score.value == pytest.approx(wins.mean())
        assert evaluation.score.error == pytest.approx(error)
        assert evaluation.score.count == min(len(good), len(bad)) == 4
        placements[evaluation.variant] = wins
    (difference,) = report.differences
    apart = placements["base"] - placements[name]
    assert difference.score.value == pytest.approx(apart.mean())
    assert difference.score.error == pytest.approx(
        math.sqrt(apart.mean(1).var(ddof=1) / 7 + apart.mean(0).var(ddof=1) / 4)
    )
    low, high = share_interval(report.evaluations[0].score.value, 4)
    assert f"[{low:.2f}, {high:.2f}] of 11 answers" in reports.sentences(report)[0]


def test_answers_with_a_label_gain_or_lose_on_the_base(variants, tmp_path):
    folder, name, models = variants
    data = write_preferences(tmp_path / "labeled", valid=11, labeled=True)
    rows = read_data(data).rows("valid")
    logs = likelihoods(models, rows, KTO())
    gained = (logs[name][0] - logs["base"][0]) * [1 if row.label else -1 for row in rows]
    base, own = evaluated(folder, ["base", name], data, score="reward").evaluations
    assert set(base.row_scores) == {0.5} and list(own.row_scores) == (0.5 + np.sign(gained) / 2).tolist()
    assert own.score == mean(own.row_scores)


def labeled(*labels: object) -> list[dict]:
    return [{"prompt": f"Say {i}", "completion": "It is.", "label": label} for i, label in enumerate(labels)]


def test_what_cannot_be_compared_is_not(variants):
    folder, _, _ = variants
    config = EvaluationConfig(score="preference")
    with pytest.raises(ConfigError, match="needs good answers and bad ones"):
        evaluate(["base"], labeled(True, True), base=str(folder), config=config)
    with pytest.raises(ConfigError, match="needs pairs, or answers with a label"):
        evaluate(["base"], labeled("spam", "ham"), base=str(folder), config=config)
    for rows in (labeled(True, True), labeled("spam", "ham"), labeled(True, None), labeled(1, 0)):
        report = evaluate(["base"], rows, base=str(folder))
        assert report.score is None and report.evaluations[0].loss is not None and "preferences" not in report.data
    (one,) = evaluate(["base"], labeled(True, "false"), base=str(folder)).evaluations
    assert one.score.count == 1 and one.score.error is None and one.row_scores in ((1, 1), (0.5, 0.5), (0, 0))


def test_whole_texts_are_judged_from_where_they_part(variants):
    folder, _, models = variants
    beginning = "Human: What is the capital of France? And of Italy? Assistant: It is "
    rows = [
        {"chosen": f"{beginning}{good}", "rejected": f"{beginning}{bad}"}
        for good, bad in (("Paris.", "Rome, I think."), ("Bern", "No"))
    ]
    own, tokens = likelihoods(models, read_data(rows).rows("train"), DPO())["base"]
    (judged,) = evaluate(["base"], rows, base=str(folder)).evaluations
    assert judged.tokens == tokens[:2].sum() < 20
    lead = np.sign((own / tokens)[:2] - (own / tokens)[2:])
    assert list(judged.row_scores) == (0.5 + lead / 2).tolist()


def test_the_command_tells_the_share_with_its_interval(variants, tmp_path):
    folder, name, _ = variants
    data = write_preferences(tmp_path / "labeled", labeled=True)
    asked = ["eval", "base", name, "--data", str(data), "--base", str(folder), "--score", "reward", "--json"]
    result = CliRunner().invoke(cli, asked, catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.stdout)["data"]["preferences"] == "labeled"
    shown = CliRunner().invoke(cli, asked[:-1], catch_exceptions=False).stdout
    assert f"{name}, reward: " in shown and "of 5 answers" in shown and "gained on 'base' if good" in shown
