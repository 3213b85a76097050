"""`data check` and `data split`: counts that can be added up by hand."""

import json

import pytest
from click.testing import CliRunner

from mlx_adapters import check_data, split_data
from mlx_adapters.cli import cli
from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.checking import histogram
from mlx_adapters.data.datasets import read_data
from mlx_adapters.errors import ConfigError, ExistsError, FormatError, NotFoundError


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(prompt: str, completion: str) -> dict:
    return {"prompt": prompt, "completion": completion}


def test_check_counts_what_is_there(tiny_model, tmp_path):
    rows = [pair("a", "SELECT 1"), pair("b", "  "), pair("a", "SELECT 1"), pair("c d " * 60, "SELECT title")]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "valid.jsonl", [pair("a", "SELECT 1"), pair("z", "x")])
    report = check_data(tmp_path, tiny_model(), TrainConfig(mask_prompt=True, max_seq_length=80))
    train = report.splits["train"]
    assert (train.rows, train.duplicates, train.truncated) == (4, 1, 1)
    assert len(train.dropped) == 1 and train.dropped[0].endswith("line 4")
    assert len(train.empty_answers) == 1 and train.empty_answers[0].endswith("line 2")
    assert report.overlaps == {"valid": 1}
    assert train.formats == {"completion": 4} and train.longest > 80 >= train.median_length
    trained = "".join(text for text, counted in report.first_row if counted)
    assert trained == "SELECT 1<|im_end|>"
    whole = "".join(text for text, _ in report.first_row)
    assert whole == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nSELECT 1<|im_end|>\n"


def test_histogram_covers_every_length():
    assert histogram([1, 16, 17, 32, 33, 100]) == ((1, 16, 2), (17, 32, 2), (33, 64, 1), (65, 128, 1))
    assert histogram([40]) == ((33, 64, 1),)


def test_split_keeps_every_row_once_and_equal_rows_together(tmp_path):
    rows = [pair(str(i % 15), "x") for i in range(30)]  # every row twice
    write(tmp_path / "all.jsonl", rows)
    counts = split_data(tmp_path / "all.jsonl", tmp_path / "out", valid=0.2, test=0.1, seed=3)
    assert counts == {"train": 20, "valid": 6, "test": 4}
    parts = read_data(tmp_path / "out")
    keys = {name: {row.key() for row in parts.rows(name)} for name in parts.splits}
    assert not keys["train"] & keys["valid"] and not keys["train"] & keys["test"] and not keys["valid"] & keys["test"]
    together = [dict(row.values) for name in parts.splits for row in parts.rows(name)]
    assert sorted(map(str, together)) == sorted(map(str, rows))
    split_data(tmp_path / "all.jsonl", tmp_path / "same", valid=0.2, test=0.1, seed=3)
    split_data(tmp_path / "all.jsonl", tmp_path / "other", valid=0.2, test=0.1, seed=4)
    text = [(tmp_path / name / "valid.jsonl").read_text() for name in ("out", "same", "other")]
    assert text[0] == text[1] != text[2]


def test_split_refuses_what_cannot_work(tmp_path):
    write(tmp_path / "one.jsonl", [pair("a", "b")])
    with pytest.raises(ConfigError, match="too few different rows"):
        split_data(tmp_path / "one.jsonl", tmp_path / "out")
    with pytest.raises(ConfigError, match="leave a rest"):
        split_data(tmp_path / "one.jsonl", tmp_path / "out", valid=0.6, test=0.4)
    with pytest.raises(NotFoundError):
        split_data(tmp_path / "none.jsonl", tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{\n')
    with pytest.raises(FormatError, match="line 2"):
        split_data(tmp_path / "bad.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(tmp_path / "many.jsonl", [pair(str(i), "b") for i in range(9)])
    split_data(tmp_path / "many.jsonl", tmp_path / "out")
    with pytest.raises(ExistsError):
        split_data(tmp_path / "many.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    "row, how",
    [
        ({"prompt": "a", "completion": "b"}, " --mask-prompt"),
        ({"text": "a"}, ""),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, " --objective dpo --mask-prompt"),
        ({"Frage": "a", "Antwort": "b"}, " --prompt-column COLUMN --completion-column COLUMN --mask-prompt"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_told_after_a_split_suits_its_rows(tmp_path, row, how):
    write(tmp_path / "all.jsonl", [{key: f"{value} {i}" for key, value in row.items()} for i in range(10)])
    said = CliRunner().invoke(cli, ["data", "split", str(tmp_path / "all.jsonl"), str(tmp_path / "out")]).stderr
    check, train = said.splitlines()[-2:]
    assert check.endswith(f"/out{how}") and train.endswith(f" --name NAME{how}")
