"""Notebooks hold to what their readers have: public names, an installed package, outputs of the code above them."""

import ast
import json
import re
import sys

import pytest
from helpers.public import NAMES, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
INSTALLED = {"matplotlib", "pandas", "huggingface_hub"}  # besides Python's own: what the extra `notebooks` brings
LOCAL_PATH = re.compile(r"/(?:home|Users|root|tmp|private|var)/[\w.-]+")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_public_names_only(path):
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    froms = [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = [alias.name for node in imports for alias in node.names] + froms
    allowed = INSTALLED | sys.stdlib_module_names
    assert [m for m in modules if m.partition(".")[0] not in allowed] == ["mlx_adapters"], "import mlx_adapters as ma"
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ma"
    }
    assert used and used <= set(NAMES)
    assert not re.search(r"\bsys\.path\b|__file__|\.\./", path.read_text()), "it runs wherever it lies"


def cells(source: str) -> list[str]:
    """The code cells of a script."""
    parts = [part.partition("\n") for part in re.split(r"^# %%", source, flags=re.M)[1:]]
    return [body.strip() for head, _, body in parts if "[markdown]" not in head]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_a_whole_run_of_its_script(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]) for cell in code] == cells(path.read_text()), "run scripts/notebooks"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"] and len(outputs) > 4
    assert not LOCAL_PATH.search(json.dumps([o for o in outputs if "image/png" not in o.get("data", {})]))
