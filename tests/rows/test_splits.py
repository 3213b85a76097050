"""Which files and which splits are meant: the usual names, parts, the Hub's spelling, and what helps if none fits."""

import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from mlx_adapters.calibration.texts import _read_asked
from mlx_adapters.data.checking import split_data
from mlx_adapters.data.datasets import hold_out, read_data
from mlx_adapters.errors import ConfigError, FormatError, NotFoundError
from mlx_adapters.fusion.recipe import read_recipe
from mlx_adapters.rows.hub import HubData, parse

ROW = '{"text": "a"}\n'


def sizes(source, **options):
    return {name: len(split.rows) for name, split in read_data(source, **options).splits.items()}


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text(ROW * rows)
    return folder


@pytest.mark.parametrize("odd", ["words " * 99, "~no-one-of-this-name/rows.jsonl"])
def test_text_that_is_no_path_is_told_as_such(odd, tmp_path):
    for read in (read_data, read_recipe, lambda file: split_data(file, tmp_path), lambda file: _read_asked(file, [])):
        with pytest.raises(NotFoundError, match="There can be no path"):
            read(odd)


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "Dev"])
def test_validation_rows_go_by_many_names(tmp_path, name):
    assert sizes(fill(tmp_path, train=3, **{name: 2}, test=1)) == {"train": 3, "valid": 2, "test": 1}


UNREAD = ["eval.jsonl", "train_2.jsonl", "valid-part.jsonl", "valid (1).jsonl", "data/valid.csv", "test.jsonl.zst"]


@pytest.mark.parametrize("name", UNREAD)
def test_rows_that_are_not_read_are_told(tmp_path, name):
    fill(tmp_path, train=3)
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text(ROW)
    for unsuspected in ("README.md", ".train.jsonl", "dataset_infos.json", "training.log", "data/notes"):
        (tmp_path / unsuspected).write_text("")
    assert sizes(tmp_path) == {"train": 3}
    assert read_data(tmp_path).notes == (f"Not read in '{tmp_path}': '{name}'.",)


def test_a_folder_without_rows_to_train_on_does_not_hide_its_data(tmp_path):
    fill(fill(tmp_path, test=1) / "data", train=3)
    assert sizes(tmp_path) == {"train": 3} and "'test.jsonl'" in read_data(tmp_path).notes[0]
    fill(tmp_path / "other" / "main", train=2)
    with pytest.raises(NotFoundError) as error:
        read_data(tmp_path / "other")
    assert error.value.hint == f"give one of its folders: {tmp_path / 'other' / 'main'}."


def test_parts_with_a_hash_behind_are_parts(tmp_path):
    for name in ("train_sft-00000-of-00002-a3ecf92756993583", "train_sft-00001-of-00002-0ea2c3c2cc6eb0ae"):
        fill(tmp_path / "data", **{name: 2})
    fill(tmp_path / "data", **{"test_sft-00000-of-00001-f7dfac4afe5b93f4": 1})
    assert sizes(tmp_path) == {"train": 4, "test": 1} and read_data(tmp_path).notes == ()
    fill(tmp_path / "data", **{"train_sft-00001-of-00002-0123456789abcdef": 2})
    with pytest.raises(FormatError, match="parts of two data sets as train"):
        read_data(tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path):
    with pytest.raises(FormatError, match="several splits to validate by: dev, val"):
        read_data(fill(tmp_path, train=1, val=1, dev=1))
    (tmp_path / "dev.jsonl").unlink()
    (tmp_path / "val.csv").write_text("text\na\n")
    with pytest.raises(FormatError, match=r"Both '.*val.csv' and '.*val.jsonl' exist"):
        read_data(tmp_path)


def test_what_is_named_like_a_split_and_is_no_file_is_not_passed_over(tmp_path):
    (fill(tmp_path, train=1) / "valid.jsonl").symlink_to("nowhere")
    with pytest.raises(FormatError, match=r"valid\.jsonl' is no file"):
        read_data(tmp_path)


@pytest.mark.parametrize("folder", [".", "data"])
def test_parts_of_parquet_are_read_in_their_order(tmp_path, folder):
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    for i in (1, 0, 2):
        table = pyarrow.Table.from_pylist([{"text": f"{i} {j}"} for j in range(2)])
        pyarrow.parquet.write_table(table, place / f"train_sft-0000{i}-of-00003.parquet")
    (tmp_path / "README.md").write_text("")
    read = read_data(tmp_path)
    assert [row.text for row in read.rows("train")] == ["0 0", "0 1", "1 0", "1 1", "2 0", "2 1"]
    assert read.rows("train")[-1].where.endswith("train_sft-00002-of-00003.parquet, row 2")
    digest = read.splits["train"].sha256
    (place / "train_sft-00001-of-00003.parquet").unlink()
    with pytest.raises(FormatError, match="Part 1 of train is missing"):
        read_data(tmp_path)
    assert len(digest) == 64


def test_a_folder_without_the_expected_files_says_what_lies_there(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(NotFoundError, match=r"has no train\.jsonl; it holds 'notes\.md', 'rows\.csv'") as error:
        read_data(tmp_path)
    assert f"mlx-adapters data split {tmp_path}/rows.csv" in error.value.hint
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(NotFoundError) as error:
        read_data(tmp_path)
    assert "load_from_disk" in error.value.hint


@pytest.mark.parametrize(
    ("spelling", "parts"),
    [
        ("hf:squad", HubData("squad")),
        ("hf:user/name", HubData("user/name")),
        ("hf:user/name/main", HubData("user/name", "main")),
        ("hf:user/name@v1.0", HubData("user/name", revision="v1.0")),
        ("hf:user/name/en-us[train[:10%]]", HubData("user/name", "en-us", None, "train[:10%]")),
        ("hf:user/name/en@refs/pr/1[train_sft]", HubData("user/name", "en", "refs/pr/1", "train_sft")),
        ("hf:", None),
        ("hf:a/b/c/d", None),
        ("hf:user/x y", None),
    ],
)
def test_the_spelling_of_the_hub(spelling, parts):
    if parts is not None:
        assert parse(spelling) == parts
        return
    with pytest.raises(ConfigError, match="does not name a data set"):
        parse(spelling)


@pytest.fixture
def hub(monkeypatch):
    """A package `datasets` that notes what it is asked for."""
    there = SimpleNamespace(asked=[], splits={})

    def load_dataset(name, config=None, revision=None, split=None):
        there.asked.append((name, config, revision, split))
        if name == "user/broken":
            raise RuntimeError("Config name is missing.\nPick one of ['a', 'b']")
        return there.splits if split is None else there.splits[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return there


def test_splits_of_the_hub(hub):
    rows = [{"text": "a"}] * 3
    hub.splits = {"train_sft": rows, "test_sft": rows[:1], "train_gen": rows * 2, "test_gen": rows}
    assert sizes("hf:user/name") == {"train": 3, "test": 1}
    assert sizes("hf:user/name/main@v1[train_gen]") == {"train": 6}
    assert hub.asked[-1] == ("user/name", "main", "v1", "train_gen")
    hub.splits = {"train_gen": rows, "train_prefs": rows}
    with pytest.raises(FormatError, match="several splits to train on: train_gen, train_prefs") as error:
        read_data("hf:user/name")
    assert "hf:user/name[SPLIT]" in error.value.hint
    hub.splits = {"everything": rows}
    with pytest.raises(NotFoundError, match="no split to train on; it has: everything"):
        read_data("hf:user/name")
    with pytest.raises(NotFoundError, match="Config name is missing") as error:
        read_data("hf:user/broken")
    assert "hf:user/broken/CONFIG" in error.value.hint


def test_rows_held_out_are_apart_and_always_the_same(tmp_path):
    rows = [{"prompt": str(i % 8), "completion": "x"} for i in range(16)]
    first, second = (hold_out(read_data(rows), 0.25, seed=1) for _ in range(2))
    assert [len(first.rows(name)) for name in ("train", "valid")] == [12, 4]
    assert not {row.key() for row in first.rows("train")} & {row.key() for row in first.rows("valid")}
    assert [row.where for row in first.rows("valid")] == [row.where for row in second.rows("valid")]
    with pytest.raises(ConfigError, match="has validation rows"):
        hold_out(first, 0.25, seed=1)
    with pytest.raises(ConfigError, match="too few different rows"):
        hold_out(read_data(rows[:1]), 0.25, seed=1)


def test_rows_of_weight_zero_are_left_out_and_counted():
    read = read_data([{"text": "a", "weight": 0}, {"text": "b", "weight": 1}, {"text": "c"}])
    assert [row.text for row in read.rows("train")] == ["b", "c"]
    assert read.notes == ("1 row of train left out: their weight is 0.",)
    own = read_data([{"text": "a", "weight": 0}, {"text": "b", "weight": 72.5}])
    assert len(own.rows("train")) == 2 and own.notes == ()
    with pytest.raises(FormatError, match="no training row"):
        read_data([{"text": "a", "weight": False}])


def test_one_line_says_how_rows_of_no_ordinary_shape_are_read():
    alpaca = {"instruction": "Add.", "input": "", "output": "5", "id": 1}
    assert read_data([alpaca]).notes == ("Rows of train are read as Alpaca; not used: 'id'.",)
    shared = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert read_data([alpaca, alpaca, shared]).notes == (
        "Rows of train are read as 2 as Alpaca, 1 as ShareGPT ('conversations'); not used: 'id'.",
    )
    assert read_data([{"text": "a", "id": 1}]).notes == ()


def test_columns_that_belong_to_a_conversation_and_are_not_used_are_told():
    pair = {"prompt": "a", "completion": "b", "id": 1, "label": True}
    for name in ("reasoning", "thinking", "input", "context", "history"):
        assert read_data([{**pair, name: "c"}]).notes == (
            f"Rows of train are read as 'prompt' and 'completion'; not used: 'id', '{name}'.",
        )
    for empty in (None, "", [], float("nan")):
        assert read_data([{**pair, "reasoning": empty}]).notes == ()
    asked = [{"role": role, "content": role} for role in ("system", "user")]
    sides = {name: [*asked, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    for values in ({"system": "s", **sides}, {"system": "s", "chosen": "a", "rejected": "b"}):  # one has its own
        assert read_data([values]).notes == ("Rows of train are read as preferences; not used: 'system'.",)
    assert read_data([{"system": "s", "prompt": "p", "chosen": "a", "rejected": "b"}]).notes == ()
