"""What is for few rows: how many passes a run is, and what it would do, before it does it."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers.training_tools import write_data

from mlx_adapters.cli import cli
from mlx_adapters.errors import ConfigError


@pytest.fixture
def run(tiny_model, tmp_path):
    data = write_data(tmp_path / "data", rows=6, valid=2)
    given = ["train", str(tiny_model()), "--data", str(data), "--name", "run", "--batch-size", "2"]
    return lambda *more, new=True: CliRunner().invoke(cli, [*(given if new else ["train"]), *more])


def test_a_dry_run_says_what_would_run_and_keeps_nothing(run, home, tmp_path):
    said = run("--dry-run", "--epochs", "2", "--rank", "2")
    assert said.exit_code == 0, said.output
    assert "6 iterations, 2 x 6 rows" in said.stdout and "every 1" in said.stdout
    assert "6 iterations = 2 passes over 6 rows." in said.stderr and "Predicted peak memory" in said.stderr
    assert json.loads(run("--dry-run", "--json").stdout)["iterations"] == 100
    assert not list(home.glob("adapters/*")) and not (tmp_path / "run").exists()
    refused = run("--dry-run", "--batch-size", "9")
    assert isinstance(refused.exception, ConfigError) and "larger than the 6 rows" in str(refused.exception)
    ignored = run("--dry-run", "--log", "log.jsonl")
    assert ignored.exit_code == 2 and "--log does not go with --dry-run" in ignored.stderr


def test_epochs_and_iterations_are_one_setting(run, tmp_path):
    both = run("--epochs", "2", "--iterations", "9")
    assert isinstance(both.exception, ConfigError) and "say the same" in str(both.exception)
    Path(tmp_path, "c.yaml").write_text("training: {epochs: 3}")
    config = ("--config", str(tmp_path / "c.yaml"), "--print-config")
    for typed, epochs, iterations in (
        ((), 3.0, None),
        (("--iterations", "9"), None, 9),
        (("--epochs", "1"), 1.0, None),
    ):
        shown = yaml.safe_load(run(*config, *typed).stdout)["training"]
        assert (shown["epochs"], shown["iterations"]) == (epochs, iterations)
    printed = tmp_path / "printed.yaml"
    printed.write_text(run("--print-config").stdout)
    assert yaml.safe_load(run("--config", str(printed), "--print-config").stdout) == yaml.safe_load(printed.read_text())
    assert run("--epochs", "1", "--rank", "2", "--json").exit_code == 0
    further = json.loads(run("--resume", "run", "--epochs", "2", "--dry-run", "--json", new=False).stdout)
    assert (further["iteration"], further["iterations"]) == (3, 6)


def test_the_demo_writes_its_data_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["demo", "--data-only", "data/sql"])
    assert done.exit_code == 0 and done.stdout.startswith("Rows in data/sql: 600 train, "), done.output
    assert "mlx-adapters train demo --data data/sql" in done.stderr
    assert {path.name for path in Path("data/sql").iterdir()} >= {"train.jsonl", "test.jsonl", "catalog.sqlite"}
    again = CliRunner().invoke(cli, ["demo", "--data-only", "data/sql"])
    assert "already exists" in str(again.exception)
    assert CliRunner().invoke(cli, ["demo", "--data-only", "data/sql", "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(cli, ["demo", "--data-only", "x", "--quick"]).exit_code == 2
