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


def test_models_are_marked_by_what_fits(monkeypatch):
    from mlx_adapters.system import machine

    def marks(memory: float) -> dict[str, list[str]]:
        monkeypatch.setattr(machine, "usable_memory_bytes", lambda: int(memory))
        lines = [line.split() for line in CliRunner().invoke(cli, ["models"]).stdout.splitlines()]
        return {words[0]: words[-2:] for words in lines[1:-1]}

    assert {fit for fits in marks(1e12).values() for fit in fits} == {"yes"}
    assert {fit for fits in marks(1e8).values() for fit in fits} == {"no"}
    fits = marks(2e9)
    assert fits["demo"] == ["yes", "yes"] and ["no", "no"] in fits.values()
    said = CliRunner().invoke(cli, ["models"])
    largest = [name for name in fits if f"'{name}' is the largest of them that trains in it" in said.stdout]
    assert [fits[name][1] for name in largest] == ["yes"]  # on a CPU demo's: weights have float32 there
    assert f"mlx-adapters estimate {largest[0]} --data my-data" in said.stderr


def test_the_parameters_of_the_listed_models_are_those_of_their_shapes():
    """What each block has besides: queries' width, biases and norms."""
    import json
    from importlib.resources import files

    known = json.loads((files("mlx_adapters.sources") / "known_models.json").read_text())
    heads = {"0.6B": 2048, "1.7B": 2048, "3-4B": 4096, "3-8B": 4096, "14B": 5120, "32B": 8192, "gemma": 1024}
    for m in known:
        h, kv = m["hidden"], m["kv_width"]
        queries = next((width for name, width in heads.items() if name in m["id"]), h)
        norms = {"Qwen3": 2 * h + 256, "gemma": 4 * h + 512, "Qwen2.5": 2 * h + h + 2 * kv}
        more = next((count for name, count in norms.items() if name in m["id"]), 2 * h)
        block = 2 * h * queries + 2 * h * kv + 3 * h * m["intermediate"] + more
        ends = 2 if m["parameters"] > 5e9 else 1
        assert ends * m["vocabulary"] * h + m["layers"] * block + h == m["parameters"], m["id"]
        assert m["source"].startswith("https://huggingface.co/") and len(m["id"]) <= 40
