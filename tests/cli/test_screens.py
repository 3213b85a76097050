"""At a terminal of 80 and of 60 columns no line is wider, whatever a command prints."""

import re
import shutil
import sys

import pytest
from click.testing import CliRunner
from helpers.adapters import make_run

from mlx_adapters.cli import _output, cli
from mlx_adapters.cli.train import Watch
from mlx_adapters.demo.catalog import write_demo_data
from mlx_adapters.events import Progress, TrainReport
from mlx_adapters.generation.memory import known_models

LONG = "an-adapter-with-a-rather-long-name-for-a-terminal"
LINES = f"""\
list
show {LONG}
compare {LONG} sql
verify --all
estimate ./base --adapter {LONG}
estimate ./base --data data --num-layers 1
data check data --base ./base
models
env
eval base {LONG} sql --data data --max-rows 2 --base ./base
interpolate {LONG} sql --steps 2 --data data
train ./base --data data --name new --iterations 2 --batch-size 1 --report-every 1
train ./base --data data --name never --dry-run
prune {LONG} --dry-run
merge {LONG} sql --name both
doctor --base ./base --data data
"""
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with a home, a base, data and adapters of long names."""
    folder = tmp_path_factory.mktemp("screens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(folder / "home"))
        shutil.copytree(tiny_model(), folder / "base")
        for path in write_demo_data(folder / "data").glob("*.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
        for name in (LONG, "sql"):
            make_run(folder / "base", name, losses=[(100, 2.0), (200, 1.0)])
    return folder


@pytest.mark.parametrize("width", [80, 60])
def test_no_line_is_wider_than_the_terminal(width, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(place / "home"))
    monkeypatch.setattr(_output, "columns", lambda: width)
    runner, wide = CliRunner(), []
    with runner.isolation():
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    for line in LINES.splitlines():
        done = runner.invoke(cli, [*line.split(), *(["--overwrite"] if "--name" in line else [])])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"
        shown = [ESCAPE.sub("", text.rpartition("\r")[2]) for text in done.output.splitlines()]
        wide += [f"{line}: {text}" for text in shown if len(text) > width and not _stays(text)]
        for model in known_models() if line == "models" else ():
            assert re.search(rf"^{re.escape(model.id)}(\s|$)", "\n".join(shown), re.M), "an id is whole, to be copied"
    assert not wide, "\n".join(wide)


def _stays(text: str) -> bool:
    """Whether it is to be copied, a row of data, or one long word that stands alone."""
    return "mlx-adapters " in text or "<|im" in text or " " not in text.strip().partition(" ")[2].strip()


@pytest.mark.parametrize(("width", "shown"), [(90, True), (60, False)])
def test_the_live_line_of_a_training_has_its_last_losses(width, shown, monkeypatch, capsys):
    monkeypatch.setattr(_output, "columns", lambda: width)
    monkeypatch.setattr(_output, "_redraws", lambda: True)
    watch = Watch(None)
    for number, loss in enumerate((4.0, 3.0, 1.0), 1):
        watch(TrainReport(number, 9, loss, 1e-4, 100.0, 80.0, 10**9))
    watch(Progress("train", 3, 9, "iteration"))
    line = ESCAPE.sub("", capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2])
    assert ("train 1.000 █▆▁" in line) == shown and "3/9 iterations" in line and len(line) <= width
