"""Every class of settings there is, found in the source."""

import ast
import importlib
from pathlib import Path

import mlx_adapters

PACKAGE = Path(mlx_adapters.__file__).parent


def classes() -> list[type]:
    """Every class that is decorated with `settings`."""
    decorated = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and "settings" in map(ast.unparse, node.decorator_list):
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                decorated.append(getattr(importlib.import_module(module), node.name))
    return decorated


CLASSES = classes()
