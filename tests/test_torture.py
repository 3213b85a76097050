"""Short forms of torture: kills, full disks, pairs of processes, mutated inputs. The long form: scripts/torture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


@pytest.mark.parametrize(
    "count, only", [(1, ["kill"]), (1, ["disk"]), (1, ["pairs"]), (5, ["inputs"]), (50, ["inputs:base"])], ids=str
)
def test_torture_finds_nothing(count, only):
    command = [sys.executable, "-m", "helpers.torture", "--only", *only, "--count", str(count), "--seconds", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PATH})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1].split()[1].replace(",", "")) >= count, done.stdout
