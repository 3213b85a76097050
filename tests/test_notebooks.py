"""Notebooks hold to what their readers have: the public names and an installed package."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from helpers.public import NAMES, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*"))
INSTALLED = {"matplotlib", "pandas", "huggingface_hub"}  # besides Python's own: what the extra `notebooks` brings


def code_of(path: Path) -> str:
    """The code of a script, or of the notebook that is made of it."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_imports_public_names_only(path):
    tree = ast.parse(code_of(path))
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
    assert not re.search(r"\bsys\.path\b|__file__|\.\./", code_of(path)), "it runs wherever it lies"
