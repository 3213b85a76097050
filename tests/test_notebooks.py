"""Notebooks hold to what their readers have: the public names and an installed package."""

import ast
import re
import sys

import pytest
from helpers.public import NAMES, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
INSTALLED = {"matplotlib", "pandas", "huggingface_hub"}  # besides Python's own: what the extra `notebooks` brings


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
