"""The second task of the fuse benchmark: rows that train, and one right answer to each."""

import json
import runpy
import sys
from datetime import date
from pathlib import Path

from mlx_adapters.data.datasets import read_data

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "appointments.py"


def test_every_row_holds_what_its_answer_says_and_splits_share_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["appointments.py", str(tmp_path), "--rows", "60", "20", "20"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    data, seen = read_data(tmp_path), set()
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        rows = data.rows(split)
        assert len(rows) == count
        for row in rows:
            _, question, answer = (turn["content"] for turn in row.values["messages"])
            said, day = json.loads(answer), date.fromisoformat(json.loads(answer)["date"])
            assert said["who"] in question and str(day.day) in question and str(day.year) in question
            minute = said["time"].split(":")[1]
            assert minute == "00" or f":{minute}" in question
            assert question not in seen
            seen.add(question)
