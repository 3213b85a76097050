"""The judge's task: rows that train, each answered by what its table and its question hold."""

import re
import runpy
import sys
from pathlib import Path

from mlx_adapters.data.datasets import read_data

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "tables.py"


def test_answers_ask_columns_of_their_table_for_values_of_their_question(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path), "--rows", "60", "20", "20"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    data, seen = read_data(tmp_path), set()
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        assert len(data.rows(split)) == count
        for row in data.rows(split):
            prompt, answer = (row.values[key] for key in ("prompt", "completion"))
            header, question = re.fullmatch(r"Table columns: (.*)\nQuestion: (.*)\?", prompt).groups()
            asked, conditions = re.fullmatch(r"SELECT (.*) FROM table WHERE (.*)", answer).groups()
            asked = re.sub(r"^[A-Z]+\((.*)\)$", r"\1", asked)
            found = re.findall(r"(?:^| AND )([^<>=]+) ([<>=]) (?:'([^']*)'|(\d+))", conditions)
            assert asked in header.split(", ") and asked.lower() in question.lower() and found
            for column, _, text, amount in found:
                assert column in header.split(", ") and (text or amount) in question
            assert prompt not in seen
            seen.add(prompt)
