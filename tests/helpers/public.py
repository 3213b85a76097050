"""What is public: names in Python, commands and their examples."""

import importlib.machinery
import importlib.util
import re
import shlex
from pathlib import Path

import click
import yaml

import mlx_adapters as ma

ROOT = Path(__file__).parents[2]
NAMES = [name for name in ma.__all__ if name != "__version__"]
WITHOUT_JSON = {f"mlx-adapters {name}" for name in ("completion", "chat", "serve")}  # for a shell, a person, clients


def load_script(name: str):
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


HELP = load_script("help_snapshot")
COMMANDS = {name: (command, context) for name, command, context in HELP.all_commands()}
LEAVES = {name: command for name, (command, _) in COMMANDS.items() if not isinstance(command, click.Group)}


def example_lines():
    for name, command in LEAVES.items():
        for line in command.help.splitlines():
            if line.strip().startswith("mlx-adapters "):
                yield name, line.split("#")[0].strip()


def pages() -> dict[str, str]:
    """The pages for people, by their name: the README, then the site's in its order."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    names = [name for entry in nav for name in names_in(entry)]
    return {name: (ROOT / name).read_text() for name in ["README.md", *(f"docs/{name}" for name in names)]}


def names_in(entry) -> list[str]:
    """The files of an entry of the site's contents: a file, a title with its file, or a title with entries."""
    if isinstance(entry, str):
        return [entry]
    return [
        name
        for below in entry.values()
        for part in ([below] if isinstance(below, str) else below)
        for name in names_in(part)
    ]


PAGES = pages()


def commands() -> list[list[str]]:
    """What of this program stands after a `$` on the pages, in their order."""
    blocks = re.findall(r"```console\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ mlx-adapters ")]
    return [shlex.split(line) for line in lines]


DOCUMENT = (ROOT / "docs" / "json.md").read_text()


def documented(line: str) -> set[str]:
    """The fields that docs/json.md lists for a line's command, by the longest name of its row that fits."""
    rows = re.findall(r"^\| `([^`]+)` \|(.*?)\|", DOCUMENT, re.M)
    fitting = [(name, fields) for name, fields in rows if set(name.split()) <= set(line.split())]
    return set(re.findall(r"`([a-z0-9_]+)`", max(fitting, key=lambda row: len(row[0]))[1]))


def command_of(line: str) -> str:
    words = line.split()
    return " ".join(words[:2]) if words[0] == "data" else words[0]
