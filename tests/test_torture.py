"""Short forms of torture: kills, full disks, pairs of processes, mutated inputs. The long form: scripts/torture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_adapters.system.machine import on_gpu

PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


# What drives a GPU survives no fork, so that each command is a new interpreter there: parts, for several workers.
PARTS = {"kill disk": 12, "pairs": 4} if on_gpu() else {"kill disk": 2}
COUNTS = {"kill disk": 1, "pairs": 1, "inputs": 5, "inputs:base": 50}
SHARES = [(only, f"{part}/{PARTS.get(only, 1)}") for only in COUNTS for part in range(1, PARTS.get(only, 1) + 1)]


@pytest.mark.parametrize("only, share", SHARES)
def test_torture_finds_nothing(only, share):
    asked = ["--only", *only.split(), "--count", str(COUNTS[only]), "--share", share, "--seconds", "1000"]
    command = [sys.executable, "-m", "helpers.torture", *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PATH})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1].split()[1].replace(",", "")) >= COUNTS[only], done.stdout
