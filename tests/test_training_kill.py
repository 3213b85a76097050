"""A real training process is killed with SIGKILL 30 times, half of them inside a save, and loses nothing."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_tools import outcome, write_data

from mlx_adapters.registry import adapter_folder
from mlx_adapters.training import state as states

KILLS = 30
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
TRAINING = {
    "iterations": 150, "batch_size": 2, "learning_rate": 0.01, "mask_prompt": True, "eval_every": 25,
    "save_every": 5, "report_every": 7, "keep": 3, "max_seq_length": 64,
}  # fmt: skip


class Trainer:
    """Starts training processes and kills them."""

    def __init__(self, request: dict) -> None:
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": str(here.parent)}
        self.server = subprocess.Popen(
            [sys.executable, str(here / "train_forks.py")], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.request = request

    def start(self, name: str) -> int:
        self.server.stdin.write(json.dumps(self.request | {"name": name}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline().split()[1])

    def exit_code(self) -> int:
        return int(self.server.stdout.readline().split()[1])

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture
def trainer(tiny_model, tmp_path):
    data = write_data(tmp_path / "data", rows=9, valid=3)
    made = Trainer({"base": str(tiny_model()), "data": str(data), "lora": LORA, "training": TRAINING})
    yield made
    made.close()


def wait_until(condition, seconds: float) -> None:
    """Until the condition holds or the time is over; fine enough to hit the middle of a save."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.0002)


def half_written(folder: Path) -> set[Path]:
    return set(folder.glob("checkpoints/.mlx-adapters-tmp-*/new/*"))


def kill_somewhere(pid: int, folder: Path, random_: random.Random, in_save: bool) -> None:
    before, stale = states.iterations(folder), half_written(folder)
    wait_until(lambda: states.iterations(folder) != before, 20)  # it makes some progress first
    time.sleep(random_.uniform(0, 0.15))
    if in_save:
        wait_until(lambda: half_written(folder) - stale, 2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_thirty_kills_and_not_one_bit_lost(trainer):
    trainer.start("whole")
    assert trainer.exit_code() == 0
    whole, random_ = outcome(adapter_folder("whole")), random.Random(1)
    kills = in_saves = runs = 0
    folder = adapter_folder("cut")
    while kills < KILLS or folder.exists():
        stale = half_written(folder)
        pid = trainer.start("cut")
        if kills < KILLS:
            kill_somewhere(pid, folder, random_, in_save=kills % 2 == 1)
        code = trainer.exit_code()
        assert code in (0, -signal.SIGKILL)
        if code != 0:
            kills += 1
            in_saves += bool(half_written(folder) - stale)
            continue
        cut = outcome(folder)
        cut["adapter_metadata.json"]["name"] = "whole"
        assert cut == whole
        shutil.rmtree(folder)
        runs += 1
    assert in_saves >= 5 and runs >= 1
