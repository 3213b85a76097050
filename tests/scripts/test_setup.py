"""scripts/_setup.sh with stand-ins for the machine's programs: which Python is taken, and how .venv is made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "_setup.sh"
BASH = shutil.which("bash")
# A Python of this kind answers `-c`, and makes a .venv whose Python is of the same kind.
PYTHON = """#!{bash}
case "$1 $2 $3" in
  "-c "*platform.machine*) echo "{kind}" ;;
  "-c "*ensurepip*) exit {bare} ;;
  "-c "*) exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip --version") [ "${{0%/.venv/bin/python}}" != "$0" ] ;;
  "-m pip install") echo "pip install ${{*: -1}}" >>"$LOG" ;;
esac
"""
UV = """#!{bash}
echo "uv $*" >>"$LOG"
[ "$1" != venv ] && exit 0
case "$*" in *--clear*) echo "error: unexpected argument '--clear' found" >&2; exit 2 ;; esac
for last; do :; done
[ -e "$last" ] && {{ echo "error: $last exists" >&2; exit 2; }}
mkdir -p "$last/bin" && cp "{python}" "$last/bin/python"
"""
ARM, INTEL, OLD = "darwin arm64 True", "darwin x86_64 True", "darwin arm64 False"


class Machine:
    """A folder that is the whole PATH, and a project beside it."""

    def __init__(self, folder: Path, system: str = "Darwin") -> None:
        self.bin, self.project, self.log = folder / "bin", folder / "project", folder / "log"
        self.bin.mkdir()
        (self.project / "scripts").mkdir(parents=True)
        shutil.copy(SETUP, self.project / "scripts")
        (self.project / "pyproject.toml").write_text("")
        for tool in ("cat", "sed", "cksum", "grep", "touch", "rm", "mkdir", "cp", "dirname"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.program("sw_vers", f"#!{BASH}\necho 15.5\n")
        self.program("uname", f'#!{BASH}\ncase "$1" in -sm) echo "{system} arm64" ;; *) echo {system} ;; esac\n')

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, name: str, kind: str, bare: int = 0) -> Path:
        return self.program(name, PYTHON.format(bash=BASH, kind=kind, bare=bare))

    def set_up(self, **environment: str) -> subprocess.CompletedProcess:
        command = [BASH, "-euo", "pipefail", "-c", '. scripts/_setup.sh test; echo "$python"']
        environment |= {"PATH": str(self.bin), "LOG": str(self.log)}
        return subprocess.run(command, capture_output=True, text=True, cwd=self.project, env=environment)


@pytest.fixture
def mac(tmp_path):
    return Machine(tmp_path)


def test_the_newest_python_of_homebrew_is_found(mac):
    mac.python("python3", OLD)  # Apple's own, 3.9
    mac.python("python3.14", ARM)
    done = mac.set_up()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(mac.project / ".venv/bin/python")
    assert mac.log.read_text() == "pip install .[test]\n"


def test_an_intel_python_is_skipped_with_the_reason(mac):
    intel = mac.python("python3.12", INTEL)
    mac.python("python3.11", ARM)
    done = mac.set_up()
    assert done.returncode == 0 and f"Skipping {intel}: it runs as an Intel program" in done.stderr
    assert "arm64" in (mac.project / ".venv/bin/python").read_text()


def test_without_a_python_that_can_carry_mlx_nothing_is_made(mac):
    mac.python("python3.12", INTEL)
    mac.python("python3.13", ARM, bare=1)  # without ensurepip
    done = mac.set_up()
    assert done.returncode == 1 and "Error: Python 3.11 or newer" in done.stderr and "brew install" in done.stderr
    assert not (mac.project / ".venv").exists()


def test_a_macos_that_is_too_old_is_named(mac):
    mac.python("python3.13", ARM)
    mac.program("sw_vers", f"#!{BASH}\necho 13.7.1\n")
    done = mac.set_up()
    assert done.returncode == 1 and done.stderr == "Error: MLX needs macOS 14 or newer, and this is 13.7.1.\n"


def test_a_chosen_python_that_is_not_there_is_named(mac):
    mac.python("python3.13", ARM)
    done = mac.set_up(PYTHON="python3.12")
    assert done.returncode == 1 and "'python3.12' is none" in done.stderr


@pytest.mark.parametrize("old", [None, ARM, INTEL])
def test_uv_of_any_age_makes_the_environment(mac, old):
    """Before 0.8 there is no --clear; since 0.10 a folder that is there is refused without it."""
    python = mac.python("python3.13", ARM)
    mac.program("uv", UV.format(bash=BASH, python=python))
    if old:
        (mac.project / ".venv/bin").mkdir(parents=True)
        shutil.copy(mac.python("another", old), mac.project / ".venv/bin/python")
    done = mac.set_up()
    assert done.returncode == 0, done.stderr
    made = [line for line in mac.log.read_text().splitlines() if line.startswith("uv venv")]
    assert made == ([] if old == ARM else [f"uv venv --quiet --python {python} .venv"])


def test_uv_fetches_a_python_of_apple_silicon(mac):
    spare = mac.python("spare", ARM)
    mac.python("python3.13", INTEL)
    mac.program("uv", UV.format(bash=BASH, python=spare))
    done = mac.set_up()
    assert done.returncode == 0, done.stderr
    assert "uv venv --quiet --python cpython-3.13-macos-aarch64-none .venv" in mac.log.read_text()


def test_what_is_set_up_is_left_alone(mac):
    mac.python("python3.13", ARM)
    assert mac.set_up().returncode == 0 == mac.set_up().returncode
    assert mac.log.read_text().count("pip install") == 1
    assert os.access(mac.project / ".venv/.installed", os.R_OK)
