"""Rows from Python: trained on, resumed, judged and fused by as if a file held them."""

import json
from pathlib import Path

import pytest
from helpers.training_tools import cut_after, outcome, write_data

from mlx_adapters import (
    ConfigError,
    EvaluationConfig,
    FuseOptions,
    IncompatibleError,
    LoraConfig,
    TrainConfig,
    check_data,
    evaluate,
    fuse,
    fuse_again,
    train,
)
from mlx_adapters.errors import NotFoundError
from mlx_adapters.events import Note
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage.files import read_json

SETTINGS = TrainConfig(iterations=6, batch_size=2, eval_every=3, save_every=2, learning_rate=0.01)
LORA = LoraConfig(rank=2)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "rows", rows=9, valid=3)


@pytest.fixture
def rows(folder):
    return {name: lines(folder / f"{name}.jsonl") for name in ("train", "valid")}


def weights(name: str) -> dict:
    return {key: value for key, value in outcome(adapter_folder(name)).items() if key.startswith("checkpoints")}


def test_rows_are_trained_on_like_a_file_of_them_and_kept_for_a_resume(tiny_model, folder, rows):
    train(tiny_model(), folder, name="file", lora=LORA, training=SETTINGS)
    given = {name: (dict(row) for row in part) for name, part in rows.items()}
    with cut_after(4):
        train(tiny_model(), given, name="rows", lora=LORA, training=SETTINGS)
    train(name="rows", resume=True)
    assert weights("rows") == weights("file")
    kept = adapter_folder("rows") / "rows"
    assert {path.name: lines(path) for path in kept.iterdir()} == {f"{name}.jsonl": part for name, part in rows.items()}
    recipe = read_json(adapter_folder("rows") / "recipe.json")
    assert recipe["data"]["source"] == "Python" and recipe["data"]["splits"]["train"]["rows"] == 9
    more = TrainConfig(**{**vars(SETTINGS), "iterations": 8})
    train(data=rows, name="rows", resume=True, training=more)
    with pytest.raises(IncompatibleError, match="the data"):
        rows["train"][0]["prompt"] = "Another."
        train(data=rows, name="rows", resume=True, training=TrainConfig(**{**vars(SETTINGS), "iterations": 10}))


def test_kept_rows_that_are_gone_are_asked_for(tiny_model, rows):
    run = train(tiny_model(), rows["train"], name="run", lora=LORA, training=SETTINGS)
    (run.folder / "rows" / "train.jsonl").unlink()
    (run.folder / "rows").rmdir()
    with pytest.raises(NotFoundError, match="came from Python") as error:
        train(name="run", resume=True, training=TrainConfig(**{**vars(SETTINGS), "iterations": 8}))
    assert error.value.hint == "give them again."


def test_a_share_is_held_out_and_rows_of_weight_zero_are_said(tiny_model, rows):
    notes = []
    part = [*rows["train"], {**rows["train"][0], "weight": 0}]
    training = TrainConfig(**{**vars(SETTINGS), "valid_fraction": 0.25})
    on_event = lambda event: notes.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    run = train(tiny_model(), part, name="run", lora=LORA, training=training, on_event=on_event)
    assert len(run.validation_losses) == 3 and "1 row of train left out: their weight is 0." in notes
    splits = read_json(run.folder / "recipe.json")["data"]["splits"]
    assert {name: split["rows"] for name, split in splits.items()} == {"train": 7, "valid": 2}
    with pytest.raises(ConfigError, match="has validation rows"):
        train(tiny_model(), rows, name="more", lora=LORA, training=training)


def test_a_fuse_calibrates_on_the_rows_that_are_kept_and_on_rows_that_are_given(tiny_model, rows, tmp_path):
    named = TrainConfig(**{**vars(SETTINGS), "prompt_column": "q", "completion_column": "a"})
    other = [{"q": row["prompt"] * 3, "a": row["completion"] * 3} for row in rows["train"] * 4]
    other = [{**row, "a": f"{row['a']} {i}"} for i, row in enumerate(other)]
    train(tiny_model(bits=4, group_size=32), other, name="run", lora=LORA, training=named)
    own = fuse(tiny_model(bits=4, group_size=32), "run", tmp_path / "own")
    assert own.text["source"] == "Python" and own.text["calibration_rows"] > 10
    given = FuseOptions(calibration=iter(other))
    again = fuse(tiny_model(bits=4, group_size=32), "run", tmp_path / "given", options=given)
    assert again.text["sha256"] == own.text["sha256"]
    assert read_json(tmp_path / "given" / "fuse_recipe.json")["options"]["calibration"] == "Python"
    with pytest.raises(NotFoundError, match="came from Python"):
        fuse_again(tmp_path / "given", tmp_path / "more")
    assert fuse_again(tmp_path / "own", tmp_path / "more").identical


def test_rows_are_checked_and_judged(tiny_model, rows, folder):
    named = {"prompt_column": "prompt", "completion_column": "completion"}
    report = check_data(rows, tiny_model(), TrainConfig(mask_prompt=True, **named))
    assert report.source == "Python" and report.splits["valid"].rows == 3
    settings = EvaluationConfig(split="valid", score="exact", max_tokens=2, **named)
    reports = [evaluate([str(tiny_model())], data, config=settings) for data in (rows, folder)]
    assert reports[0].evaluations[0].loss == reports[1].evaluations[0].loss is not None
    assert [report.data["source"] for report in reports] == ["Python", str(folder)]
    with pytest.raises(NotFoundError, match=r"no \.sqlite files"):
        evaluate([str(tiny_model())], rows, config=EvaluationConfig(score="sqlite"))
