"""The main job, in small: every step runs on the real model and leaves what it says it leaves."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from helpers.public import documented

from mlx_adapters.demo import job
from mlx_adapters.demo.catalog import SCHEMA_PROMPT
from mlx_adapters.evaluation.scores import greedy_answers
from mlx_adapters.events import Note
from mlx_adapters.generation.live import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.registry import list_adapters

QUESTIONS = ["What is the capital of France?", "Name a color.", "How many days has a week? Answer in one word."]


@pytest.fixture
def home_with_base(home, demo_base):
    shutil.copytree(demo_base, home / "bases" / "demo")
    return home


def test_answers_in_a_batch_are_the_answers_one_by_one(demo_base):
    model = load_model(resolve_base(demo_base))
    together = greedy_answers(model, [model.encode(q) for q in QUESTIONS], max_tokens=12)
    alone = [model.generate(q, max_tokens=12).text for q in QUESTIONS]
    assert together == alone
    assert together[0] == "The capital of France is Paris."


def test_the_whole_way(home_with_base, monkeypatch, measured_here):
    """With fewer rows, questions and tokens than `--quick` has."""
    from mlx_adapters.cli import cli

    fewer = replace(job.QUICK, questions=1, fusing=replace(job.QUICK.fusing, check_rows=2))
    monkeypatch.setattr(job, "QUICK", fewer)
    monkeypatch.setattr(job, "MAX_TOKENS", 8)
    run_demo, made = job.run_demo, []

    def run_once(**options):
        made.extend([] if made else [run_demo(**options)])
        return made[0]

    monkeypatch.setattr(job, "run_demo", run_once)
    shown = CliRunner().invoke(cli, ["demo", "--quick", "--json"], catch_exceptions=False)
    assert shown.exit_code == 0
    result = json.loads(shown.stdout)
    assert result.keys() - {"schema"} == documented("demo")
    assert [v["label"] for v in result["variants"]] == [
        "base, told the schema",
        "adapter",
        "8 bits",
        "4 bits",
        "4 bits, nearest",
    ]
    assert all(v["questions"] == job.QUICK.questions and v["answer"] for v in result["variants"])
    assert [entry.name for entry in list_adapters(base="demo")] == ["demo-quick"]
    folders = {"8 bits": "8bit", "4 bits": "4bit", "4 bits, nearest": "4bit-nearest"}
    assert result["fused"].keys() == folders.keys()
    for label, fused in result["fused"].items():
        folder = home_with_base / "demo" / f"demo-quick-{folders[label]}"
        assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == int(label[0])
        assert fused["folder"] == str(folder)
    measured = {run["variant"] for run in result["report"]["runs"] if "error" not in run["result"]}
    assert measured == {v["label"] for v in result["variants"]}

    page = (home_with_base / "demo" / "benchmark.html").read_text()  # with the quality of the steps before
    drawn = page[page.index("<h1>") : page.index("<h2>Figures</h2>")]
    assert drawn.count("<svg") == 2 and "right answers" in drawn
    assert all(drawn.count(f">{v['label']}</text>") == 2 for v in result["variants"])
    judged = {e["variant"]: e for e in result["report"]["quality"]["evaluations"]}
    for v in result["variants"]:
        assert judged[v["label"]]["score"]["value"] == v["right"] / v["questions"]
    for label, fused in result["fused"].items():
        assert judged[label]["kl"]["value"] == fused["fidelity"]["kl_mean"]

    printed = CliRunner().invoke(cli, ["demo", "--quick"], catch_exceptions=False)
    assert printed.exit_code == 0
    for expected in (
        "demo-quick",
        "4 bits, nearest",
        "SAME TOKEN",
        "DECODE tok/s",
        result["gold"],
        result["data_folder"],
    ):
        assert expected in printed.stdout, expected

    notes = []
    monkeypatch.setattr(job, "train", lambda *_, **__: pytest.fail("trained again"))
    job._train(job.QUICK, home_with_base / "demo" / "catalog", False, notes.append)
    assert [n.text for n in notes if isinstance(n, Note)] == [
        "'demo-quick' is trained already; --retrain trains it anew."
    ]


def test_the_base_is_told_more_than_the_adapter():
    assert "SQLite" in SCHEMA_PROMPT and "courses(" in SCHEMA_PROMPT
