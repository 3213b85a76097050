"""A real training process is killed with SIGKILL, twice in every way to train, once inside a save: nothing is lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.training_table import WAYS
from helpers.training_tools import outcome, write_rows_of_each_kind

from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.training import state as states

KILLS = 2  # of each way to train


class Trainer:
    """Starts training processes and kills them."""

    def __init__(self) -> None:
        here = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
        self.server = subprocess.Popen(
            [sys.executable, str(here / "helpers" / "train_forks.py")],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, request: dict, name: str) -> int:
        self.server.stdin.write(json.dumps(request | {"name": name}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline().split()[1])

    def exit_code(self) -> int:
        return int(self.server.stdout.readline().split()[1])

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture(scope="module")
def trainer():
    made = Trainer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows_of_each_kind(tmp_path_factory.mktemp("rows"))


def wait_until(condition, seconds: float) -> None:
    """Until the condition holds or the time is over; fine enough to hit the middle of a save."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.0002)


def half_written(folder: Path) -> set[Path]:
    with contextlib.suppress(FileNotFoundError):  # it is renamed while we look
        return set(folder.glob("checkpoints/.mlx-adapters-tmp-*/*/*"))
    return set()


def kill_somewhere(pid: int, folder: Path, random_: random.Random, in_save: bool) -> None:
    before, stale = states.iterations(folder), half_written(folder)
    wait_until(lambda: states.iterations(folder) != before or gone(pid), 20)  # it makes some progress first
    time.sleep(random_.uniform(0, 0.05))
    if in_save:
        wait_until(lambda: half_written(folder) - stale or gone(pid), 2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether the process has ended (its parent may not have taken notice yet)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return sys.platform == "linux"


@pytest.mark.parametrize("way", WAYS)
def test_kills_in_every_way_to_train_and_not_one_bit_lost(way, trainer, data, tiny_model, home):
    (base, lora, training), data = WAYS[way].made(tiny_model), WAYS[way].data_in(data)
    request = {"base": str(base), "data": str(data), "lora": to_mapping(lora), "training": to_mapping(training)}
    request["home"] = str(home)
    if WAYS[way].init_from or WAYS[way].reference:
        trainer.start(request, "first")
        assert trainer.exit_code() == 0
        request["init_from" if WAYS[way].init_from else "reference"] = "first"
    trainer.start(request, "whole")
    assert trainer.exit_code() == 0
    random_, folder, kills, code = random.Random(way), adapter_folder("cut"), 0, None
    while code != 0:
        pid = trainer.start(request, "cut")
        if kills < KILLS:
            kill_somewhere(pid, folder, random_, in_save=kills % 2 == 1)
        code = trainer.exit_code()
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    resumed = outcome(folder)
    resumed["adapter_metadata.json"]["name"] = "whole"
    assert resumed == outcome(adapter_folder("whole"))
    assert kills > 0
