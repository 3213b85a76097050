"""Processes that work for another one end with it, however that ended."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_adapters
from mlx_adapters.system.machine import child_environment

PACKAGE = Path(mlx_adapters.__file__).parent
CHILD = """
import time
from mlx_adapters.system.interrupt import end_with_parent

{}
print("at work", flush=True)
time.sleep({})
"""
PARENT = """
import subprocess, sys
from mlx_adapters.system.machine import child_environment

subprocess.run([sys.executable, "-c", sys.argv[1]], env=child_environment())
"""


@pytest.mark.parametrize("call, seconds, ends", [("end_with_parent()", 600, True), ("", 3, False)])
def test_a_process_ends_when_the_one_that_started_it_is_killed(call, seconds, ends):
    command = [sys.executable, "-c", PARENT, CHILD.format(call, seconds) + 'print("done")']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) as parent:
        assert parent.stdout.readline() == "at work\n"
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ("" if ends else "done\n")  # all that have the pipe have ended


def test_every_module_that_is_a_program_of_its_own_does():
    sources = {path.name: path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"}
    programs = {name: text for name, text in sources.items() if '__name__ == "__main__"' in text}
    assert len(programs) >= 3
    for name, text in programs.items():
        assert re.search(r'__name__ == "__main__":\n    end_with_parent\(\)\n', text), name
