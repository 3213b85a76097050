"""`train` on the command line: flags, config file, resume, log, reports and errors."""

import json
import sys
import types

import pytest
import yaml
from click.testing import CliRunner
from training_tools import write_data

from mlx_adapters import files
from mlx_adapters.cli import cli
from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.registry import adapter_folder


@pytest.fixture
def run(tiny_model, tmp_path):
    data = write_data(tmp_path / "data")

    def run(*arguments: str, new: bool = True):
        start = [str(tiny_model()), "--data", str(data), "--name", "run", "--batch-size", "2"] if new else []
        return CliRunner().invoke(cli, ["train", *start, *arguments], catch_exceptions=True)

    run.data = data
    return run


def test_train_then_resume_with_more_iterations(run, tmp_path):
    log = tmp_path / "log.jsonl"
    done = run("--iterations", "4", "--rank", "4", "--rank", "v_proj=2", "--alpha", "8", "--rslora", "--log", str(log))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("run@4, validation loss") and "Predicted peak memory" in done.stderr
    config = files.read_json(adapter_folder("run") / "adapter_config.json")
    assert config["lora_parameters"]["rank"] == 4 and config["lora_parameters"]["scale"] == 4.0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"TrainReport", "ValidationReport", "CheckpointSaved"} <= {e["event"] for e in events}
    assert files.read_json(adapter_folder("run") / "adapter_metadata.json")["command"].startswith("mlx-adapters")
    again = run("--resume", "run", "--iterations", "6", "--json", new=False)
    assert json.loads(again.stdout)["final"]["iteration"] == 6
    finished = run("--resume", "run", new=False)
    assert isinstance(finished.exception, AdapterError) and "has finished" in finished.exception.message


def test_a_flag_wins_over_the_config_file(run, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("lora: {rank: 3, scale: 1.5}\ntraining: {iterations: 9, learning_rate: 1e-3, mask_prompt: true}\n")
    shown = yaml.safe_load(run("--config", str(file), "--iterations", "5", "--print-config").stdout)
    assert shown["lora"]["rank"] == 3 and shown["lora"]["scale"] == 1.5
    assert shown["training"]["iterations"] == 5 and shown["training"]["learning_rate"] == 1e-3
    assert shown["training"]["mask_prompt"] is True and shown["name"] == "run"
    file.write_text(yaml.safe_dump(shown))
    assert yaml.safe_load(run("--config", str(file), "--print-config", new=False).stdout) == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "x"], "neither a number nor NAME=NUMBER"),
        (["--num-layers", "some"], "neither a number nor 'all'"),
        (["--alpha", "8", "--scale", "1"], "not both"),
        (["--rslora"], "--rslora needs --alpha"),
        (["--fuse-aware-mode", "affine"], "need --fuse-aware"),
        (["--fuse-aware", "7"], "has no 7 bits"),
        (["--learning-rate", "-1"], "learning_rate must be a number above 0"),
        (["--optimizer", "adam", "--weight-decay", "1"], "adam has no weight decay"),
        (["--last-turn-only"], "needs mask_prompt"),
        (["--warmup", "700"], "warmup must be shorter"),
    ],
)
def test_wrong_settings_are_config_errors_and_leave_nothing(run, arguments, message):
    done = run(*arguments)
    assert isinstance(done.exception, ConfigError) and message in done.exception.message
    assert not adapter_folder("run").exists()


def test_unknown_keys_in_the_config_file_are_named(run, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("trainig: {}\n")
    done = run("--config", str(file))
    assert "Unknown setting 'trainig'" in done.exception.message and "training" in done.exception.hint
    file.write_text("training: {iteration: 3}\n")
    assert "Unknown setting 'iteration'" in run("--config", str(file)).exception.message


def test_reports_go_where_they_are_asked_to(run, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(
        init=lambda **k: seen.append(k["name"]), log=lambda values, step: seen.append((step, *values)),
        finish=lambda: seen.append("finished"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert run("--iterations", "2", "--report-every", "1", "--report-to", "trackio").exit_code == 0
    assert seen[0] == "run" and (0, "validation_loss") in seen and seen[-1] == "finished"
    assert [s[0] for s in seen if "train_loss" in s] == [1, 2]
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = run("--overwrite", "--report-to", "wandb")
    assert "needs the package 'wandb'" in done.exception.message


def test_a_run_that_will_hardly_fit_says_so(run, monkeypatch):
    from mlx_adapters.training import memory

    monkeypatch.setattr(memory, "usable_memory_bytes", lambda: 1000)
    done = run("--iterations", "1")
    assert done.exit_code == 0 and "This will hardly fit" in done.stderr


def test_data_commands(run, tiny_model, tmp_path):
    check = CliRunner().invoke(cli, ["data", "check", str(run.data), "--base", str(tiny_model()), "--mask-prompt"])
    assert check.exit_code == 0 and "[[SELECT title" in check.stdout and "IN TRAIN TOO" in check.stdout
    long = tmp_path / "long.jsonl"
    turns = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant") * 10]
    long.write_text(json.dumps({"messages": turns}) + "\n")
    check = CliRunner().invoke(cli, ["data", "check", str(long), "--base", str(tiny_model()), "--mask-prompt",
                                     "--max-seq-length", "100000"])  # fmt: skip
    assert len(check.stdout) < 9000 and "characters more …" in check.stdout and "parts more …" in check.stdout
    assert check.stdout.count("[[") == check.stdout.count("]]") > 5
    split = ["data", "split", str(run.data / "train.jsonl"), str(tmp_path / "out"), "--json"]
    counts = json.loads(CliRunner().invoke(cli, split).stdout)
    assert counts["train"] + counts["valid"] + counts["test"] == 13
