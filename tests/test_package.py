"""What is installed runs alone: the wheel and the source archive, outside the checkout."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.public import ROOT

import mlx_adapters as ma

SOURCES = {str(p.relative_to(ROOT)) for p in (ROOT / "mlx_adapters").rglob("*") if p.is_file() and p.suffix != ".pyc"}


def build(folder: Path, out: Path, *kinds: str) -> list[Path]:
    """What hatchling makes of the project in `folder`."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *(word for k in kinds for word in ("-t", k))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[Path]:
    return build(ROOT, tmp_path_factory.mktemp("dist"), "sdist", "wheel")


def test_the_wheel_runs_alone_outside_the_checkout(built, tmp_path):
    wheel = next(path for path in built if path.suffix == ".whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    inside = {
        str(p.relative_to(tmp_path / "site")) for p in (tmp_path / "site" / "mlx_adapters").rglob("*") if p.is_file()
    }
    assert inside == SOURCES
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "MLX_ADAPTERS_HOME": str(tmp_path / "home")}
    for arguments, said in ((["--version"], ma.__version__), (["list"], "mlx-adapters train")):
        command = [sys.executable, "-m", "mlx_adapters", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout + done.stderr, done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import mlx_adapters; print(mlx_adapters.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout
    assert where.startswith(str(tmp_path))


def test_the_source_archive_makes_the_same_wheel(built, tmp_path):
    with tarfile.open(next(path for path in built if path.name.endswith(".tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    wheel, again = next(p for p in built if p.suffix == ".whl"), build(folder, tmp_path / "again", "wheel")[0]
    names = [sorted(zipfile.ZipFile(path).namelist()) for path in (wheel, again)]
    assert names[0] == names[1] and wheel.name == again.name


def test_one_version():
    assert f"version: {ma.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(ma.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
