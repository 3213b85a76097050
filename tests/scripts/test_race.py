"""The race's bookkeeping: parts, ratios, the saved file and the page's table. The race itself takes minutes."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
import race

MACHINE = {"device_name": "chip", "cores": 2, "system": "Linux", "versions": {"mlx": "1", "mlx-lm": "2"}}
VALUES = {
    "fuse": {
        "seconds": {"ours": {0: [1.0], 1: [2.0], 2: [1.5]}, "mlx-lm": {0: [2.0], 1: [4.0], 2: [3.0]}},
        "peak_memory_bytes": {"ours": {0: [4e7]}, "mlx-lm": {0: [1.6e8]}},
    },
    "publish": {"seconds": {"ours": {0: [0.5]}}},
}


def test_disciplines_share_a_process_only_where_they_may():
    assert race.parts_of(list(race.race_legs.DISCIPLINES)) == [
        ("cli",),
        ("load", "decode", "swap"),
        ("train",),
        ("fuse",),
        ("publish",),
    ]
    assert race.parts_of(["swap", "train"]) == [("swap",), ("train",)]


def test_rows_hold_ratios_with_intervals():
    fuse, peak, publish = race.rows_of(VALUES)
    assert fuse["ratio"]["value"] == pytest.approx(0.5) and fuse["ratio"]["low"] == pytest.approx(0.5)
    assert race.line_of(fuse) == ("fuse", "seconds", "1.5 s", "3 s", "0.5 [0.5, 0.5]")
    assert race.line_of(peak) == ("fuse", "peak memory", "40 MB", "160 MB", "0.25")
    assert race.line_of(publish) == ("publish", "seconds of a dry run", "0.5 s", "-", "-")


def test_the_table_stands_between_its_markers_and_a_part_can_be_run_anew(tmp_path):
    readme, file = tmp_path / "README.md", tmp_path / "race.json"
    readme.write_text(f"before\n{race.START}\nold\n{race.END}\nafter\n")
    part = {"settings": {"base": "demo", "rounds": "3"}, "notes": ["busy"], "rows": race.rows_of(VALUES)}
    saved = {"machine": MACHINE, "parts": {"fuse": part}}
    race.save(saved, argparse.Namespace(json=file, readme=readme))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "chip, 2 cores, Linux; mlx 1, mlx-lm 2; base demo, 3 rounds" in text and "| fuse | seconds |" in text
    assert race.earlier(file, json.loads(file.read_text())["machine"]) == json.loads(file.read_text())["parts"]
    assert race.earlier(file, MACHINE | {"cores": 8}) == {} == race.earlier(tmp_path / "none", MACHINE)
