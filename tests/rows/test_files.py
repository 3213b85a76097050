"""Files of rows: every format gives the same rows, and whatever is wrong with one is said with its line."""

import codecs
import csv
import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_adapters.data.datasets import read_data
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.rows.files import read_file
from mlx_adapters.rows.row import RawRow
from mlx_adapters.rows.values import parsed

ROWS = [
    {"prompt": 'Say "a, b".', "completion": "a,\nb"},
    {"prompt": "ä 😀 \u2028 x", "completion": ""},
    {"prompt": "x" * 200_000, "completion": "long"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(path, rows=ROWS, mark=","):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes((json.dumps(rows) if path.suffix == ".json" else LINES).encode())
    return path


def values(path):
    return [values for values, _ in read_file(path)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    assert values(write(tmp_path / name, mark="\t" if name.endswith("tsv") else ",")) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_compressed_files_are_read_and_a_part_of_one_is_refused(tmp_path, name):
    path = tmp_path / f"{name}.gz"
    data = gzip.compress(write(tmp_path / name).read_bytes())
    path.write_bytes(data)
    (tmp_path / name).write_bytes(data)  # compressed by whoever served it
    assert values(path) == values(tmp_path / name) == ROWS
    for broken in (data[:-20], data[:40], b"no gzip"):
        path.write_bytes(broken)
        with pytest.raises(FormatError, match="not a whole gzip file"):
            read_file(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_marks_of_encodings_and_windows_line_ends(tmp_path, encoding, ends):
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    (tmp_path / "a.jsonl").write_bytes(mark + (LINES.replace("\n", ends) + ends + ends).encode(encoding))
    assert values(tmp_path / "a.jsonl") == ROWS


def test_json_may_hold_lines_and_jsonl_a_list(tmp_path):
    (tmp_path / "a.json").write_text(LINES, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps(ROWS[0]), encoding="utf-8")
    assert values(tmp_path / "a.json") == values(tmp_path / "b.jsonl") == values(tmp_path / "c.json") == ROWS
    assert values(tmp_path / "d.json") == ROWS[:1]


def test_csv_of_other_marks_and_with_lines_in_fields(tmp_path):
    assert values(write(tmp_path / "a.csv", mark=";")) == ROWS
    rows = read_file(write(tmp_path / "b.csv"))
    assert [where.rpartition(" ")[2] for _, where in rows] == ["2", "4", "5"]  # the first row has two lines


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_any_text_comes_back_from_csv_and_jsonl(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "a.jsonl").write_bytes(lines.encode())
    assert values(folder / "a.jsonl") == rows
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list("abc"), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert values(folder / "a.csv") == rows


BAD = {
    "bytes": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8 text"),
    "half a character, spelled": ("a.jsonl", b'{"text": "a"}\n{"text": "\\uD83d"}', "line 2: the text holds half"),
    "half a character, in bytes": ("a.jsonl", b'{"text": "\xed\xa0\xbd"}', "line 1: not UTF-8 text"),
    "in a key": ("a.json", b'[{"\\udc00": 1}]', "row 1: the text holds half"),
    "twice a key": ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: not a JSON object \\(the key 'text' stands"),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not a JSON object"),
    "zeros": ("a.jsonl", b"\0" * 64, "line 1: not a JSON object"),
    "columns of pandas": ("a.json", b'{"text": {"0": "a"}, "more": {}}', "'text' must be text, not an object"),
    "a list of texts": ("a.json", b'["a"]', "not a list of rows"),
    "cut": ("a.json", b'[{"text": "a"},', "is not JSON"),
    "an open quote": ("a.jsonl", b'{"a', r"line 1: not a JSON object \(Unterminated string starting at character 2\)"),
    "a missing quote": ("a.csv", b'prompt,completion\n"a,b\n', "not CSV"),
    "a stray quote": ("a.csv", b'prompt,completion\n"a"b,c\n', "line 2: not CSV"),
    "too many fields": ("a.csv", b"prompt,completion\na,b,c\n", "line 2: 3 fields, where the first line names 2"),
    "a column twice": ("a.csv", b"prompt,prompt\na,b\n", "two columns named 'prompt'"),
    "no Parquet": ("a.parquet", b"PAR1", "not a readable Parquet"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name, data, message):
    from mlx_adapters.data.datasets import read_data

    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_data(tmp_path / name)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null")], ids=["pipe", "device"])
def test_what_is_neither_a_file_nor_a_folder_is_not_read(tmp_path, make):
    from mlx_adapters.data.datasets import read_data

    make(tmp_path / "rows.jsonl")
    with pytest.raises(FormatError, match=r"rows.jsonl' is neither a file nor a folder"):
        read_data(tmp_path / "rows.jsonl")


def test_columns_of_parquet_that_python_cannot_hold_are_no_error(tmp_path):
    table = pyarrow.table(
        {
            "prompt": ["a", "b"],
            "completion": ["c", "d"],
            "nanoseconds": pyarrow.array([1, None], pyarrow.timestamp("ns")),
            "far": pyarrow.array([1 << 60, 2], pyarrow.timestamp("us")),
            "day": pyarrow.array([1 << 30, 2], pyarrow.date32()),
            "map": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
            "inner": [{"when": [None, {"x": None}]}, None],
            "bytes": [b"\xff", None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [(row["prompt"], row["completion"]) for row in values(tmp_path / "a.parquet")] == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize("levels", [98, 101, 600, 5000])
@pytest.mark.parametrize("quoted", [False, True])
def test_a_row_that_is_nested_without_end_is_refused_or_text(tmp_path, levels, quoted):
    """Below what Python's stack takes, too; JSON in a text that goes so deep is a text."""
    deep = "[" * levels + "]" * levels
    (tmp_path / "a.jsonl").write_text('{"text": "x", "deep": ' + (json.dumps(deep) if quoted else deep) + "}\n")
    if levels == 98 or quoted:
        (row,) = read_file(tmp_path / "a.jsonl")
        assert RawRow(*row).key() and (parsed(row[0]["deep"]) == deep) is (quoted and levels > 98)
    else:
        with pytest.raises(FormatError, match=r"line 1: .*nested too deeply"):
            read_file(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train.jsonl.zst", "unpack it"),
        ("data.ARROW", "'datasets' or pyarrow"),
        ("a.xlsx", "as CSV"),
        ("b.txt", "rows of"),
    ],
)
def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path, name, hint):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError, match=r"is none of \.jsonl") as refused:
        read_file(tmp_path / name)
    with pytest.raises(NotFoundError, match=r"has no train\.jsonl") as missing:
        read_data(tmp_path)
    assert hint in refused.value.hint and hint in missing.value.hint and name in missing.value.hint


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_what_git_lfs_has_not_fetched_is_told(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(FormatError, match="stands in for a large file that Git LFS has not fetched") as refused:
        read_data(tmp_path)
    assert refused.value.hint == "git lfs pull."
