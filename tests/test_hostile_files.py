"""YAML, recipes and rows from elsewhere that are not what they say are refused in a sentence."""

import json
import time

import pytest
from click.testing import CliRunner
from helpers.adapters import make_run
from helpers.odd_values import every_change

from mlx_adapters.cli import cli
from mlx_adapters.config.mapping import from_mapping, read_yaml
from mlx_adapters.config.training import LoraConfig
from mlx_adapters.data.checking import split_data
from mlx_adapters.data.datasets import read_split
from mlx_adapters.errors import AdapterError, ConfigError, FormatError
from mlx_adapters.fusion.recipe import read_recipe
from mlx_adapters.publishing.cards import parse_front
from mlx_adapters.rows import row as row_module
from mlx_adapters.storage.tensor_names import FUSE_RECIPE_FILE

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "- 1",
        "1",
        "x",
        "[" * 5000,
        "{" * 5000,
        "a: 2026-13-45",
        "a: !!python/object:os.system x",
        "\x00",
        "a: " + "9" * 5000,
        "? [1]\n: 2",
        "a: b: c",
        "&a : *a",
        "%YAML 9",
        "y" * 2_000_000,
        "<<: 1",
        "a: !!int x",
    ],
    ids=range(18),
)
def test_hostile_yaml_is_refused_or_read_soon(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    begun = time.monotonic()
    try:
        assert isinstance(read_yaml(path), dict)
    except ConfigError as error:
        assert len(error.message) < 1000
    assert time.monotonic() - begun < 20
    assert isinstance(parse_front(f"---\n{text}\n---\n"), dict)
    ended = CliRunner().invoke(cli, ["train", "--config", str(path), "--print-config"])
    assert ended.exception is None or isinstance(ended.exception, SystemExit | AdapterError), ended.exception


@pytest.mark.parametrize(
    "text, why",
    [
        ("name: 2026-01-01", "'name' in the config file must be text"),
        ("base: [1]", "'base' in the config file"),
        ("data: {a: 1}", "'data' in the config file"),
        ("training: {fuse_aware: four}", "fuse_aware"),
        ("training: 3", "must hold 'key: value' lines"),
        ("lora: {rank: 1.5}", "'rank' in the lora settings"),
        ("lora: {scale: 1" + "0" * 400 + "}", "a number of 1,329 bits"),
        ("lora: {type: [lora]}", "'lora' or 'dora'"),
        ("training: {fuse_aware: {bits: [4]}}", "'bits' in fuse_aware"),
        ("lora: {ranks: [1]}", "'ranks'"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(tmp_path, text, why):
    path = tmp_path / "config.yaml"
    path.write_text("base: demo\n" * (not text.startswith("base")) + text)
    ended = CliRunner().invoke(cli, ["train", "--config", str(path), "--print-config"])
    assert isinstance(ended.exception, ConfigError), ended.exception
    assert why in f"{ended.exception.message} {ended.exception.hint}"


@pytest.mark.parametrize(
    "text", [BOMB, BOMB + "base: demo\nlora: {rank: *h}", "a: &a [*a]"], ids=["deep", "used", "endless"]
)
def test_a_value_that_would_fill_the_memory_is_refused_as_it_is_read(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="holds more than 100,000 values"):
        read_yaml(tmp_path / "config.yaml")


def test_numbers_of_a_config_keep_their_values():
    assert from_mapping(LoraConfig, {"scale": 10**30}).scale == 1e30
    with pytest.raises(ConfigError, match=r"cannot be \['x', 'x'"):
        from_mapping(LoraConfig, {"rank": ["x"] * 1000})


def test_a_damaged_fuse_recipe_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tiny_model("llama"), "sql")
    arguments = ["--bits", "8", "--group-size", "32", "--no-check", "--method", "nearest"]
    assert CliRunner().invoke(cli, ["fuse", "sql", "out", *arguments]).exit_code == 0
    recipe = json.loads((tmp_path / "out" / FUSE_RECIPE_FILE).read_text())
    refused = 0
    for change in every_change(recipe):
        (tmp_path / "recipe.json").write_text(json.dumps(change))
        ended = CliRunner().invoke(cli, ["fuse", "--again", "recipe.json", "again", "--overwrite"])
        assert ended.exit_code == 0 or isinstance(ended.exception, SystemExit | AdapterError), (change, ended.exception)
        refused += ended.exit_code != 0
    assert refused > 20
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"adapters": 1}))
    with pytest.raises(FormatError, match=r"recipe.json' is damaged: adapters missing"):
        read_recipe(tmp_path / "recipe.json")


def test_a_damaged_recipe_of_a_run_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "How many students are there?"}\n' * 4)
    settings = ["--iterations", "1", "--batch-size", "1", "--max-seq-length", "32", "--rank", "2"]
    arguments = ["train", str(tiny_model("llama")), "--data", "train.jsonl", "--name", "./run", *settings]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    path = next((tmp_path / "run").rglob("*recipe*.json"))
    recipe = json.loads(path.read_text())
    for change in every_change(recipe):
        path.write_text(json.dumps(change))
        ended = CliRunner().invoke(cli, ["train", "--resume", "./run"])
        assert ended.exit_code == 0 or isinstance(ended.exception, SystemExit | AdapterError), (change, ended.exception)


@pytest.mark.parametrize(
    "values",
    [
        {"text": "x" * 51},
        {"prompt": "x" * 30, "completion": "y" * 30},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 50}]},
        {"prompt": "x", "chosen": "y", "rejected": "z" * 51},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_row_that_no_memory_holds_in_tokens_is_refused(monkeypatch, values):
    monkeypatch.setattr(row_module, "LONGEST_TEXT", 50)
    row = row_module.RawRow(values | {"picture": "z" * 1000}, "line 7")
    with pytest.raises(FormatError, match=r"line 7: the row has \d\d characters, more than the 50"):
        assert row.canonical and row.rejected.canonical


def test_half_characters_and_odd_columns_of_data(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "ok \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    for read in (read_split, lambda path: split_data(path, tmp_path / "out")):
        with pytest.raises(FormatError, match=r"rows.jsonl, line 2: the text holds half of a surrogate pair"):
            read(rows)
    rows.write_text('{"text": "ok \\ud83d\\ude00", "path": "C:\\\\udder"}\n')
    assert read_split(rows).rows[0].values["text"] == "ok \U0001f600"
    table = {"text": ["a", "b"], "when": [datetime.datetime(2026, 1, 1)] * 2, "raw": [b"\xff", None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    parsed_rows = read_split(tmp_path / "train.parquet").rows
    assert parsed_rows[0].record["when"] == "2026-01-01T00:00:00" and json.loads(parsed_rows[1].key())["text"] == "b"
