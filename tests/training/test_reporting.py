"""Watching a run never stops it, whatever the service does that watches; what goes wrong is one warning."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import types

import pytest
from click.testing import CliRunner
from helpers.training_tools import write_data

from mlx_adapters.cli import cli


class Wordless(Exception):
    """An error that cannot be told."""

    def __str__(self):
        raise RuntimeError("no words")


def never(*_, **__):
    threading.Event().wait()


BAD = {
    "an asyncio error": asyncio.CancelledError("gone"),
    "no words": Wordless(),
    "prints": lambda *_, **__: print("noise"),
    "closes stdout": lambda *_, **__: sys.stdout.close(),
    "never answers": never,
}


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("how", BAD)
def test_whatever_a_service_does_the_run_is_the_same(how, where, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_adapters.training.reporting.SECONDS", 0.2)

    def call(name):
        if name == where and isinstance(BAD[how], BaseException):
            raise BAD[how]
        if name == where:
            BAD[how]()

    fake = types.SimpleNamespace(
        init=lambda **_: call("init"), log=lambda *_, **__: call("log"), finish=lambda: call("finish")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    data = write_data(tmp_path / "data", rows=4, valid=2)
    settings = ["--iterations", "2", "--batch-size", "2", "--report-every", "1", "--rank", "2"]
    command = ["train", tiny_model(), "--data", data, "--name", "run", *settings, "--report-to", "wandb", "--json"]
    done = CliRunner().invoke(cli, [str(word) for word in command])
    assert done.exit_code == 0 and json.loads(done.stdout)["final"]["iteration"] == 2, done.output
    assert done.stderr.count("The report to wandb failed") == (how not in ("prints", "closes stdout"))


def test_a_service_that_cannot_be_imported_hinders_only_who_asks_for_it(tmp_path):
    """mlx-lm's trainer imports it, too."""
    (tmp_path / "wandb.py").write_text("raise RuntimeError('built for another Python')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = "import mlx_adapters.system.door, sys; assert 'wandb' not in sys.modules; import wandb"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.strip().endswith("RuntimeError: built for another Python")
    assert "door" not in done.stderr
