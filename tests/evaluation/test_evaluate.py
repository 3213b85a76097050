"""Evaluation: figures against NumPy on whole logits, batched answers against single ones, scores, differences."""

import json
import math
import re
import sqlite3
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.benchmarks import registered_adapter

from mlx_adapters.benchmarking.run import check_data
from mlx_adapters.cli import cli
from mlx_adapters.data.datasets import RawRow, read_data
from mlx_adapters.errors import AdapterError, ConfigError, FormatError, ModelError, NotFoundError
from mlx_adapters.evaluation import reports
from mlx_adapters.evaluation.evaluate import EvaluationConfig, choose_rows, evaluate, save
from mlx_adapters.evaluation.harness import TaskEvaluation, TaskReport, TaskResult, results, run_tasks
from mlx_adapters.evaluation.scores import greedy_answers, parse_score, questions
from mlx_adapters.evaluation.tokens import Batches, judge, judged_rows
from mlx_adapters.events import Note
from mlx_adapters.generation.live import load_model
from mlx_adapters.sources import registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter

ROWS = [
    ("How many students are there?", "SELECT COUNT(*) FROM students;"),
    ("List the titles.", "SELECT title FROM courses ORDER BY title;"),
    ("What is the capital of France?", "Paris."),
    ("Say it", "It was a small model that wanted to learn a new skill, and it learned it well."),
    ("", "x"),
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in ROWS]
    (folder / "train.jsonl").write_text(lines[0] + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_figures_equal_those_of_whole_logits(tiny_model, data):
    folder = tiny_model("llama")
    adapter = registered_adapter(folder)
    base, adapted = load_model(resolve_base(folder)), load_model(resolve_base(folder), adapter)
    rows = judged_rows(read_data(data).rows("test"), base, 2048)
    figures = judge(base, Batches(rows, adapted))
    assert len(figures.tokens) == len(ROWS)
    for i, row in enumerate(rows):
        q, p = (log_softmax(np.array(m.logits(row.tokens.tolist()), np.float64))[:-1] for m in (base, adapted))
        judged, targets = row.trained[1:], row.tokens[1:]
        assert figures.tokens[i] == judged.sum() > 0
        loss = -q[np.arange(len(targets)), targets][judged].sum()
        assert figures.loss[i] == pytest.approx(loss, rel=1e-4)
        assert figures.kl[i] == pytest.approx((np.exp(p) * (p - q)).sum(-1)[judged].sum(), rel=1e-3, abs=1e-6)
        assert figures.same_top[i] == (p.argmax(-1) == q.argmax(-1))[judged].sum()


def test_reference_is_recomputed_when_memory_is_short(tiny_model, data, monkeypatch):
    folder = tiny_model("llama")
    base, adapted = load_model(resolve_base(folder)), load_model(resolve_base(folder), registered_adapter(folder))
    rows = judged_rows(read_data(data).rows("test"), base, 2048)
    kept = judge(base, Batches(rows, adapted))
    monkeypatch.setattr("mlx_adapters.evaluation.tokens.memory_bytes", lambda: 0)
    again = judge(base, Batches(rows, adapted))
    assert np.array_equal(kept.kl, again.kl) and np.array_equal(kept.loss, again.loss)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_batched_answers_equal_single_ones(tiny_model, data, architecture):
    model = load_model(resolve_base(tiny_model(architecture)))
    asked = questions(read_data(data).rows("test"), model)
    together = greedy_answers(model, [q.prompt for q in asked], max_tokens=12, batch_size=3)
    alone = [model.tokenizer.decode(model.generate(list(q.prompt), max_tokens=12).token_ids) for q in asked]
    assert together == alone and [q.expected for q in asked] == [answer for _, answer in ROWS]


def test_answers_end_with_learned_positions(tiny_model):
    model = load_model(resolve_base(tiny_model("gpt2")))
    asked = [[5] * 508, [5] * 12]
    alone = [model.tokenizer.decode(model.generate(prompt, max_tokens=20).token_ids) for prompt in asked]
    assert greedy_answers(model, asked, max_tokens=20) == alone
    with pytest.raises(ModelError, match="512 positions"):
        greedy_answers(model, [[5] * 513], max_tokens=1)
    long = RawRow({"prompt": "word " * 600, "completion": "end"}, "line 1")
    for most, way in ((2048, "shorten the row."), (16, "raise --max-seq-length, or shorten the row.")):
        with pytest.raises(FormatError, match="no token of the answer fits") as caught:
            judged_rows([long], model, most)
        assert caught.value.hint == way
    (row,) = judged_rows([RawRow({"text": "word " * 600}, "line 1")], model, 2048)
    assert len(row.tokens) == 512


def test_evaluate_compares_row_by_row(tiny_model, data):
    folder = tiny_model("llama")
    registered_adapter(folder)
    report = evaluate(["base", "sql", "sq", "sql"], data, config=EvaluationConfig(score="exact", max_tokens=4))
    base, sql, missing, twin = report.evaluations
    assert report.reference == "sql" and missing.error and report.data["split"] == "test"
    assert base.kl.value > 0 and sql.kl.value == 0 and sql.same_top.value == 1
    assert sql.perplexity == pytest.approx(math.exp(sql.loss.value)) and len(sql.answers) == len(ROWS)
    assert twin.loss == sql.loss and [d.variant for d in report.differences] == ["sql", "sql (2)"]
    difference = report.differences[0].loss
    assert difference.value == pytest.approx(sql.loss.value - base.loss.value, rel=1e-6)
    words = "\n".join(reports.sentences(report))
    assert "sql against base, loss:" in words and "exact: the same within noise" in words
    assert {len(line) for line in reports.table(report)[1]} == {len(reports.table(report)[0])}


def test_adapters_of_two_bases_are_told(tiny_model, data):
    """Their rows are compared, each on its own base."""
    one, other = tiny_model("llama"), tiny_model("llama", bits=4)
    registered_adapter(one)
    registered_adapter(other, name="far")
    events: list[Note] = []
    evaluate(["base", "sql", "far", str(other)], data, on_event=events.append)
    warned = [event.text for event in events if getattr(event, "level", "") == "warning"]
    assert warned == [f"'far' stands on '{other}', 'sql' on '{one}'."]


def test_figures_are_kept_with_the_adapter(tiny_model, data):
    registered_adapter(tiny_model("llama"))
    for _ in range(2):
        report = evaluate(["sql"], data)
        assert save(report, ["sql", "sql"]) == ["sql"]
    (kept,) = load_adapter("sql").metadata["evaluations"]
    assert kept["metrics"]["loss"] == report.evaluations[0].loss.value and kept["rows"] == len(ROWS)
    other = evaluate(["sql"], data, config=EvaluationConfig(max_rows=2))
    save(other, ["sql"])
    assert len(load_adapter("sql").metadata["evaluations"]) == 2


def test_a_folder_with_test_rows_alone_can_be_judged_but_not_trained_on(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "One row."}\n')
    rows, record = choose_rows(tmp_path, EvaluationConfig())
    assert len(rows) == 1 and record["split"] == "test"
    check_data(str(tmp_path), tmp_path, None)
    with pytest.raises(NotFoundError, match=r"no train\.jsonl"):
        read_data(tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(FormatError, match="has no row"):
        choose_rows(tmp_path, EvaluationConfig())
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(NotFoundError, match="has no rows"):
        choose_rows(tmp_path, EvaluationConfig())


def test_rows_are_chosen_evenly(data):
    rows, record = choose_rows(data, EvaluationConfig(max_rows=2))
    assert [row.where.rpartition(" ")[2] for row in rows] == ["1", "3"] and record["rows"] == 2
    with pytest.raises(NotFoundError, match="no rows of 'valid'"):
        choose_rows(data, EvaluationConfig(split="valid"))


def test_other_tokenizers_are_refused(tiny_model, data, tmp_path):
    folder = tiny_model("llama")
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    registered_adapter(folder)
    report = evaluate(["sql", str(other)], data)
    assert "different tokenizers" in report.evaluations[1].error and report.evaluations[0].error is None


def test_nan_weights_are_an_error(tiny_model, data):
    model = load_model(resolve_base(tiny_model("llama")))
    model.module.model.norm.weight = mx.full(model.module.model.norm.weight.shape, float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        judge(model, Batches(judged_rows(read_data(data).rows("test"), model, 2048)))


# -- scores -------------------------------------------------------------------------------------------


def test_exact_and_regex(tmp_path):
    exact, number = parse_score("exact", tmp_path), parse_score(r"regex:answer: (\d+)", tmp_path)
    assert exact(" a  b\n", "a b", {}) == 1 and exact("a b c", "a b", {}) == 0
    assert number("so the answer: 42.", "answer: 42", {}) == 1 and number("answer: 4", "answer: 42", {}) == 0
    assert number("no idea", "no idea", {}) == 0


def test_sqlite_takes_the_folders_database(tmp_path):
    with pytest.raises(NotFoundError, match="has no"):
        parse_score("sqlite", tmp_path)
    connection = sqlite3.connect(tmp_path / "shop.sqlite")
    connection.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1), (2);")
    connection.close()
    score = parse_score("sqlite", tmp_path)
    assert score("SELECT a FROM t WHERE a > 1", "SELECT max(a) FROM t", {}) == 1 and score("DROP", "SELECT 1", {}) == 0


def command(folder: Path, body: str) -> str:
    script = folder / "grade.py"
    script.write_text(f"import json, sys\nq = json.load(sys.stdin)\n{body}\n")
    return f"command:{sys.executable} {script}"


def test_command_prints_a_number_or_exits(tmp_path):
    half = parse_score(command(tmp_path, "print('note'); print(0.5 if q['answer'] == 'a' else 0)"), tmp_path)
    assert half("a", "b", {"k": 1}) == 0.5 and half("b", "b", {}) == 0
    status = parse_score(command(tmp_path, "sys.exit(q['answer'] != q['expected'])"), tmp_path)
    assert status("a", "a", {}) == 1 and status("a", "b", {}) == 0
    wrong = parse_score(command(tmp_path, "print('seven')"), tmp_path)
    with pytest.raises(FormatError, match="not a number"):
        wrong("a", "a", {})
    with pytest.raises(NotFoundError):
        parse_score("command:/no/such/program", tmp_path)("a", "a", {})


@pytest.mark.parametrize("wrong", ["exactly", "regex:", "regex:(", "command:", "exact:x", "command:'"])
def test_misspelled_scores(wrong, tmp_path):
    with pytest.raises(ConfigError):
        parse_score(wrong, tmp_path)


def test_text_rows_ask_nothing(tiny_model, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "Once upon a time"}\n')
    report = evaluate([str(tiny_model("llama"))], tmp_path)
    assert report.evaluations[0].loss.value > 0
    scored = evaluate([str(tiny_model("llama"))], tmp_path, config=EvaluationConfig(score="exact"))
    assert "asks nothing" in scored.evaluations[0].error


def test_command_line(tiny_model, data, tmp_path):
    registered_adapter(tiny_model("llama"))
    arguments = ["eval", "base", "sql", "--data", str(data), "--score", "exact", "--max-tokens", "2"]
    shown = CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / "out.json")])
    assert shown.exit_code == 0, shown.output
    assert "PERPLEXITY" in shown.stdout and "5 test rows" in shown.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["evaluations"][0]["answers"]) == len(ROWS)
    as_json = CliRunner().invoke(cli, [*arguments, "--json", "--no-save"])
    assert json.loads(as_json.stdout)["evaluations"][1]["kl"]["value"] == 0
    (tmp_path / "file").touch()
    with registry.training_lock(registry.adapter_folder("sql")):  # neither a busy adapter nor a bad path hides figures
        shown = CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / "file" / "out.json")])
    assert "PERPLEXITY" in shown.stdout and isinstance(shown.exception, AdapterError)
    assert "not kept with 'sql': 'sql' is being trained" in shown.stderr


def test_one_variant_that_fails_fails_the_command_after_the_others(tiny_model, data, tmp_path):
    folder = str(tiny_model("llama"))
    for option in ([], ["--json"]):
        done = CliRunner().invoke(cli, ["eval", folder, "nosuch", "--data", str(data), *option])
        assert done.exit_code == 1 and done.stderr.count("'nosuch'") == 4
        assert "Error: 'nosuch' failed: No adapter or model named 'nosuch'. Hint: " in done.stderr
        if not option:
            assert re.search(rf"^{Path(folder).name} +\d", done.stdout, re.M) and re.search(
                "^nosuch +failed", done.stdout, re.M
            )
        else:
            fine, failed = json.loads(done.stdout)["evaluations"]
            assert fine["variant"] == folder and fine["loss"] and failed["error"]


# -- public tasks ----------------------------------------------------------------------------------

HARNESS = {  # as lm-eval 0.4.13 gives it
    "results": {
        "capitals": {"alias": "capitals", "acc,none": 0.5, "acc_stderr,none": 0.29},
        "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A", "sample_len": 4},
    },
    "n-samples": {"capitals": {"original": 8, "effective": 4}},
}


def test_the_harness_results_become_figures_with_errors():
    assert results(HARNESS) == [
        TaskResult("capitals", "acc", 0.5, 0.29, 4),
        TaskResult("gsm8k", "exact_match (strict-match)", 0.25, None, None),
    ]
    fine, broken = TaskEvaluation("sql", tuple(results(HARNESS))), TaskEvaluation("x", error="no such model")
    _, lines = TaskReport("", ("capitals", "gsm8k"), "0.4.13", 4, (fine, broken)).table()
    assert lines[0] == ("sql", "capitals", "acc", "4", "0.5 ± 0.29") and lines[2][-1] == "no such model"


def test_public_tasks_need_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="lm-evaluation-harness is missing") as raised:
        run_tasks(["base"], ["arc_easy"], base="demo")
    assert "mlx_adapters[eval]" in raised.value.hint
    ignored = (
        ["--tasks", "y", "--score", "exact"],
        ["--tasks", "y", "--no-save"],
        ["--data", "x", "--task-folder", "."],
    )
    for wrong in ([], ["--data", "x", "--tasks", "y"], *ignored):
        assert CliRunner().invoke(cli, ["eval", "base", *wrong]).exit_code == 2
