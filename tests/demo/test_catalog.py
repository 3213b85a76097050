"""The embedded data: what it promises about splits, templates and gold queries."""

import json
import re
import sqlite3
from itertools import combinations

import pytest

from mlx_adapters.demo.catalog import DATABASE_FILE, ROWS, SCHEMA_PROMPT, build_catalog, demo_questions, write_demo_data
from mlx_adapters.demo.questions import PATTERNS
from mlx_adapters.errors import ExistsError
from mlx_adapters.evaluation.sqlite import Database, is_correct


@pytest.fixture(scope="module")
def questions():
    return demo_questions()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_demo_data(tmp_path_factory.mktemp("data") / "catalog")


def test_sizes(questions):
    assert {split: len(drawn) for split, drawn in questions.items()} == {"train": 600, "valid": 80, "test": 80}


def test_rows_and_templates_are_disjoint(questions):
    for one, other in combinations(questions.values(), 2):
        for field in ("text", "template"):
            assert not {getattr(q, field) for q in one} & {getattr(q, field) for q in other}
    for drawn in questions.values():
        assert len({q.text for q in drawn}) == len(drawn)


def test_test_rows_hold_patterns_that_training_never_shows(questions):
    shown = {q.pattern for q in questions["train"]}
    new = [q for q in questions["test"] if q.pattern not in shown]
    assert 0 < len(new) < len(questions["test"]) / 4


def test_every_kind_of_query_is_there(questions):
    for split, drawn in questions.items():
        for kind in ("JOIN", "GROUP BY", "ORDER BY", "NOT IN", "<>", "HAVING", "LIMIT", "COUNT", "AVG"):
            assert any(kind in q.sql for q in drawn), (split, kind)
        assert len({q.template for q in drawn}) >= len(PATTERNS) * 0.85


def test_every_gold_query_runs_and_answers_something(data, questions):
    database = Database(data / DATABASE_FILE)
    for drawn in questions.values():
        for q in drawn:
            rows = database.rows(q.sql)
            assert rows and rows != [(0,)] and len(rows) <= 40, q
            assert is_correct(q.sql, q.sql, database)


def test_no_slot_is_left_open(questions):
    assert not [q for drawn in questions.values() for q in drawn if re.search(r"[{}]", q.text + q.sql)]


def test_files(data, questions):
    assert {p.name for p in data.iterdir()} == {"train.jsonl", "valid.jsonl", "test.jsonl", DATABASE_FILE}
    for split, drawn in questions.items():
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == ROWS[split]
        for row, question in zip(rows, drawn, strict=True):
            assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
            assert [turn["content"] for turn in row["messages"]] == [question.text, question.sql]


def test_the_schema_prompt_describes_the_catalog(data):
    with sqlite3.connect(data / DATABASE_FILE) as connection:
        for table, columns in re.findall(r"(\w+)\(([\w ]+)\)", SCHEMA_PROMPT):
            actual = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            assert actual == columns.split()
    connection.close()


def test_names_in_the_catalog_belong_together():
    catalog = build_catalog()
    assert catalog.execute("PRAGMA foreign_key_check").fetchall() == []
    unordered = "SELECT COUNT(*) FROM prerequisites WHERE course = requires"
    assert catalog.execute(unordered).fetchone() == (0,)
    assert catalog.execute("SELECT COUNT(DISTINCT seats), COUNT(*) FROM courses").fetchone() == (40, 40)


def test_made_twice_it_is_the_same_to_the_byte(data, tmp_path):
    again = write_demo_data(tmp_path / "again")
    for path in data.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ExistsError):
        write_demo_data(again)
