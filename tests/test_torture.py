"""Short forms of torture: kills, full disks, pairs of processes, mutated inputs. The long form: scripts/torture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


@pytest.fixture(scope="module")
def surroundings() -> dict[str, str]:
    """Without an NVIDIA GPU in sight, if MLX computes there all the same: what is tried is the way to the disk, and
    a command is then a fork (`helpers.forked`), not a new interpreter. The long form lets the GPU compute."""
    environment = os.environ | {"PYTHONPATH": PATH}
    hidden = environment | {"CUDA_VISIBLE_DEVICES": ""}
    computes = "import mlx.core as mx; assert (mx.ones(3) + 1).sum().item() == 6"
    tried = subprocess.run([sys.executable, "-c", computes], env=hidden, capture_output=True)
    return hidden if tried.returncode == 0 else environment


@pytest.mark.parametrize(
    "count, only", [(1, ["kill"]), (1, ["disk"]), (1, ["pairs"]), (5, ["inputs"]), (50, ["inputs:base"])], ids=str
)
def test_torture_finds_nothing(count, only, surroundings):
    command = [sys.executable, "-m", "helpers.torture", "--only", *only, "--count", str(count), "--seconds", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1].split()[1].replace(",", "")) >= count, done.stdout
