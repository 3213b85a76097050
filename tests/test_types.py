"""What a type checker sees of the public face: every name with its class and signature, and no other name."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.public import NAMES

import mlx_adapters as ma

ROOT = Path(__file__).parent.parent
WRONG = {
    "ma.nothing": "attr-defined",
    "ma.fuse('base', 'sql', 'out', bits=4)": "call-arg",
    "ma.train + 1": "operator",
    "ma.load_model('base').generate(1).text": "arg-type",
    "ma.TrainConfig(iterations='many')": "arg-type",
}


def check(page: Path, text: str) -> list[str]:
    """mypy's notes and errors on a page as a user would write it."""
    page.write_text(text)
    cache = page.parent / "cache"
    command = [sys.executable, "-m", "mypy", str(page), "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--no-error-summary", "--cache-dir", str(cache)]  # apart: it leaves 1.5 million objects behind
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return [line.partition(": ")[2] for line in done.stdout.splitlines()]


def python_blocks() -> str:
    """The README's examples of this package, then each public name's own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    parts = [block for block in blocks if "import mlx_adapters as ma" in block]
    assert parts
    for name in NAMES:
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(ma, name)) or "")
        lines = "".join(example.source for example in examples)
        parts.append(f"def {name}() -> None:\n" + "".join(f"    {line}\n" for line in ["pass", *lines.splitlines()]))
    return "\n".join(parts)


@pytest.fixture(scope="module")
def revealed(tmp_path_factory) -> list[str]:
    """What mypy says of all public names, of the examples and of some mistakes, line by line of one page."""
    names = [f"reveal_type(ma.{name})" for name in NAMES]
    text = "\n".join(["import mlx_adapters as ma", *names, *WRONG, python_blocks()])
    return check(tmp_path_factory.mktemp("types") / "page.py", text)


def test_the_imports_for_type_checkers_are_the_table():
    tree = ast.parse((ROOT / "mlx_adapters" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names:
            assert alias.asname == alias.name, "`as` marks a name as public to type checkers"
            imported[alias.name] = node.module.removeprefix("mlx_adapters.")
    assert imported == ma._PUBLIC and (ROOT / "mlx_adapters" / "py.typed").exists()


@pytest.mark.parametrize("name", NAMES)
def test_mypy_sees_the_signature(name, revealed):
    thing = getattr(ma, name)
    (seen,) = [line for line in revealed[NAMES.index(name) :][:1] if "Revealed type is" in line]
    signature, _, result = re.sub(r"-> def \(.*", "-> Callable", seen.partition('"')[2].rstrip('"')).rpartition(" -> ")
    returned = f"{thing.__module__}.{name}" if inspect.isclass(thing) else result
    assert result == returned and not {"Any", "object"} & {result}
    positions = [signature.find(f"{parameter}: ") for parameter in inspect.signature(thing).parameters]
    assert -1 not in positions and positions == sorted(positions), f"{name}: {signature}"
    for parameter in inspect.signature(thing).parameters.values():
        optional = re.search(rf"\b{parameter.name}: [^=]*? =[,)]", signature)
        assert bool(optional) or parameter.default is parameter.empty, f"{name}: the default of {parameter.name}"


def test_mypy_finds_mistakes_and_none_in_the_examples(revealed):
    errors = [line for line in revealed if line.startswith("error: ")]
    assert [re.search(r"\[([\w-]+)\]$", line)[1] for line in errors] == list(WRONG.values()), errors
