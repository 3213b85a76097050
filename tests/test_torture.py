"""Short forms of torture: kills, full disks, pairs of processes, mutated inputs. The long form: scripts/torture."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import forked, torture_place

from mlx_adapters.system.machine import on_gpu

PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


# What drives a GPU survives no fork, so that each command is a new interpreter there: parts, for several workers.
PARTS = 48 if on_gpu() else 2
TRIALS = ("kill=1", "disk=1", "pairs=1", "inputs=5", "inputs:base=50")


@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_torture_finds_nothing(part):
    asked = ["--only", *TRIALS, "--share", f"{part}/{PARTS}", "--seconds", "1000"]
    command = [sys.executable, "-m", "helpers.torture", *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PATH})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    tried = {line.split()[0] for line in done.stdout.splitlines()} & {"kill", "disk", "pairs", "inputs"}
    assert len(tried) == 4 or (tried and on_gpu()), done.stdout


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="tells when a process has ended, and lets it be")
def test_a_command_that_ended_before_the_next_began_is_waited_for(tmp_path, monkeypatch):
    """Each is a new program, as on a GPU."""
    monkeypatch.setattr(forked, "on_gpu", lambda: True)
    monkeypatch.setenv("PYTHONPATH", PATH)
    first = forked.Command(["--version"], tmp_path, forked.Trap())
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    second = forked.Command(["no-such-command"], tmp_path)
    ended, refused = first.finish(), second.finish()
    assert (ended.status, refused.status) == (0, 2) and "mlx-adapters" in ended.out and "no-such-command" in refused.err


def test_a_kernel_cut_short_is_told_and_a_whole_one_is_not(tmp_path):
    """An ELF file of 64 bytes' header, 100 of code, one segment and two sections; what was there before is compared."""
    place = torture_place.Place(tmp_path)
    kernel = place.folder / "home" / "kernels" / "add_sm90_13.0.cubin"
    kernel.parent.mkdir(parents=True)
    head = b"\x7fELF\x02\x01".ljust(0x20, b"\0") + struct.pack(
        "<QQI6H", 64 + 100 + 2 * 64, 64 + 100, 0, 64, 56, 1, 64, 2, 1
    )
    whole = head + bytes(100 + 2 * 64 + 56)
    kernel.write_bytes(whole)
    assert place.state() == {} and place.rubbish() == []
    for cut in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + whole):
        kernel.write_bytes(cut)
        assert list(place.state()) == ["home/kernels/add_sm90_13.0.cubin"]
    kernel.rename(kernel.with_name(f"{torture_place.DRAFT}1"))
    assert [path.name for path in place.rubbish()] == [f"{torture_place.DRAFT}1"]
