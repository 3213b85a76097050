"""README and docs tell the truth: their commands run, in their order, as written, and their links lead somewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.adapters import make_run
from helpers.public import PAGES, ROOT, commands, load_script
from helpers.training_tools import write_preferences, write_tool_calls

from mlx_adapters.cli import COMMANDS, cli
from mlx_adapters.demo.catalog import write_demo_data
from mlx_adapters.sources.demo_base import MODEL_CARD

pytest_plugins = ["helpers.hub_fixtures"]


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory) -> Path:
    """A folder with some of the demo's data, and a home in which a tiny model stands for the embedded one."""
    folder = tmp_path_factory.mktemp("readme")
    for path in write_demo_data(folder / "data" / "sql").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))
    write_preferences(folder / "data" / "preferences")
    write_tool_calls(folder / "data" / "tools")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(tiny_model("llama", bits=4), folder / "home" / "bases" / "demo")
    (folder / "home" / "bases" / "demo" / "README.md").write_text(MODEL_CARD)
    (folder / "questions.txt").write_text("List the Physics courses.\nHow many courses are there?\n")
    return folder


def test_every_command_of_the_pages_runs(place, hub, monkeypatch, measured_here):
    shown = commands()
    assert len(shown) > 30
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(place / "home"))
    for program, *arguments in shown:
        assert program == "mlx-adapters"
        result = CliRunner().invoke(cli, arguments)
        error = getattr(result.exception, "message", result.exception)
        assert result.exit_code == 0, f"mlx-adapters {shlex.join(arguments)}\n{result.output}\n{error}"


def test_the_python_of_the_readme_runs(place, monkeypatch):
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(place / "home"))
    if not (place / "home" / "adapters" / "sql").is_dir():  # the commands may run in another process
        make_run("demo", "sql")
    blocks = [b for b in re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL) if "ma." in b]
    assert blocks
    environment = os.environ | {"MLX_ADAPTERS_HOME": str(place / "home")}
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_every_command_has_its_place_on_a_page():
    text = "".join(text for name, text in PAGES.items() if name != "docs/commands.md")
    missing = [name for name in COMMANDS if f"mlx-adapters {name}" not in text]
    assert not missing


def anchors(text: str) -> set[str]:
    """The names that a page's headings have in links."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_link_leads_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(
        r"\]\((?!https?:|#)([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    ):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path
        assert file.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{name}: {target}"


def test_every_page_is_in_the_sites_contents():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(PAGES)


def test_the_readme_is_read_in_a_minute():
    assert 100 <= len(PAGES["README.md"].splitlines()) <= 200


def test_the_chart_is_made_of_the_committed_figures():
    made = load_script("pictures").fuse_chart()
    assert made == (ROOT / "docs" / "pictures" / "fuse.svg").read_text(), "run scripts/pictures chart"
    measured = PAGES["docs/measured.md"]
    for row in json.loads((ROOT / "benchmarks" / "fuse_cpu.json").read_text())["rows"]:
        assert f"{row['kl']:g}" in made and f"{row['kl']:g}" in measured
