"""Rows from Python: what people have in a notebook means the same as a file of it."""

import datetime
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow
import pytest

from mlx_adapters.data.datasets import read_data
from mlx_adapters.errors import FormatError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Frame(SimpleNamespace):
    """What a frame of pandas shows of itself."""

    def iterrows(self):
        raise AssertionError("it converts a row to one type")

    def to_dict(self, how):
        assert how == "records"
        return [dict(row) for row in self.records]


class Torch:
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return ROWS[i]


SAME = {
    "list": ROWS,
    "generator": (row for row in ROWS),
    "frame": Frame(records=ROWS),
    "two columns": Frame(records=[{"q": r["prompt"], "a": r["completion"]} for r in ROWS]),
    "known names in another order": Frame(
        records=[{"completion": r["completion"], "prompt": r["prompt"]} for r in ROWS]
    ),
    "known names with capitals": Frame(records=[{"Answer ": r["completion"], "QUESTION": r["prompt"]} for r in ROWS]),
    "polars": SimpleNamespace(to_dicts=lambda: ROWS),
    "Arrow": pyarrow.Table.from_pylist(ROWS),
    "columns": {"prompt": ["a", "c"], "completion": np.array(["b", "d"])},
    "splits": {"train": ROWS, "validation": ROWS[:1]},
    "torch": Torch(),
    "tuple": tuple(ROWS),
}


@pytest.mark.parametrize("data", SAME.values(), ids=SAME)
def test_python_has_rows_in_many_forms(data):
    read = read_data(data)
    assert [(row.prompt, row.completion) for row in read.rows("train")] == [("a", "b"), ("c", "d")]
    assert len(read.splits["train"].sha256) == 64 and read.source == "Python"


def test_cells_may_be_arrays_numbers_and_missing_ones():
    row = {"messages": np.array([*CHAT, {"role": "assistant", "content": "no", "weight": np.int64(0)}], object)}
    row |= {"prompt": float("nan"), "completion": None, "when": datetime.datetime.now(), "n": np.float32(1)}
    (raw,) = read_data(Frame(records=[row])).rows("train")
    assert raw.messages == [*CHAT, {"role": "assistant", "content": "no"}] and raw.weights == (1, 1, 0)


def test_a_data_set_in_parts_has_its_splits():
    read = read_data({"train": ROWS, "dev": iter(ROWS[:1]), "test_sft": [{"text": "x"}]})
    assert {name: len(split.rows) for name, split in read.splits.items()} == {"train": 2, "valid": 1, "test": 1}
    assert read.rows("valid")[0].where == "valid row 1"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x", "The data is bytes, not rows"),
        (3, "The data is a number, not rows"),
        (["text"], "row 1 is text"),
        ([ROWS[0], None], "row 2 is null"),
        ([], "has no training row"),
        ({"prompt": "a", "completion": "b"}, "one object, not rows"),
        ([{"text": "half \ud83d"}], "row 1: the text holds half"),
        ([{"prompt": datetime.date.today(), "completion": "b"}], "row 1: 'prompt' must be text or a list of messages"),
        ({"train": ROWS, "valid": ROWS, "val": ROWS}, "several splits to validate by: val, valid"),
    ],
    ids=str,
)
def test_what_holds_no_rows_is_refused(data, message):
    with pytest.raises(FormatError, match=message):
        read_data(data)


def test_a_row_that_holds_itself_is_refused():
    row = {"text": "a"}
    row["self"] = row
    with pytest.raises(FormatError, match="row 1 is nested too deeply, or holds itself"):
        read_data([row])


def test_a_frame_with_two_columns_of_one_name_is_refused():
    frame = pandas.DataFrame([["a", "b", "c"]], columns=["prompt", "completion", "completion"])
    with pytest.raises(FormatError, match="The frame has two columns of one name"):
        read_data(frame)
