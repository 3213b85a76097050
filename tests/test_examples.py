"""The examples run as written, on a tiny model: those in the help that the pages' test does not run, and those in
the docstrings."""

import contextlib
import doctest
import inspect
import io
import shlex
import shutil

import pytest
from click.testing import CliRunner
from helpers.adapters import make_run
from helpers.public import NAMES, commands, example_lines, load_script

import mlx_adapters as ma
from mlx_adapters.adapters.keeping import tag
from mlx_adapters.cli import cli
from mlx_adapters.demo.catalog import write_demo_data
from mlx_adapters.sources.demo_base import MODEL_CARD

pytest_plugins = ["helpers.hub_fixtures"]

ELSEWHERE = {  # what needs more than a command line, and the test that runs it
    "train --resume": "test_training_resume",
    "chat": "test_runtime_chat",
    "serve": "test_serving",
    "completion": "test_public_api",
    "demo": "test_demo_job",
    "doctor": "cli/test_doctor: it asks other machines",
    "fuse --from-peft": "test_peft_fuse",
    "eval": "test_evaluation: --tasks needs the extra",
    "advise": "test_advice",
    "env --check": "demo/test_selftest: in these very words",
}


def covers(words: list[str], others: list[str]) -> bool:
    """Whether a command line has all options of another one of the same command."""
    options, needed = ({word for word in line if word.startswith("--")} for line in (words, others))
    return words[1] == others[1] and needed <= options


def examples() -> list[str]:
    lines = [line.partition(" > ")[0].partition(" >> ")[0] for _, line in example_lines()]
    own = [line for line in lines if not any(line.startswith(f"mlx-adapters {name}") for name in ELSEWHERE)]
    return [line for line in own if not any(covers(words, shlex.split(line)) for words in commands())]


@pytest.fixture(scope="module")
def template(tiny_model, tmp_path_factory):
    """A folder with a home, data, a fused model and questions, as the examples take them for granted."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(folder / "home"))
        shutil.copytree(tiny_model("llama", bits=4), folder / "home" / "bases" / "demo")
        (folder / "home" / "bases" / "demo" / "README.md").write_text(MODEL_CARD)
        for path in write_demo_data(folder / "data" / "sql").glob("*.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
        shutil.copy(folder / "data" / "sql" / "train.jsonl", folder / "rows.jsonl")
        shutil.copy(folder / "data" / "sql" / "train.jsonl", folder / "chats.jsonl")
        make_run("demo", "sql", losses=[(200, 2.0), (400, 1.0), (500, 1.1), (600, 1.5)])
        make_run("demo", "chat", losses=[(100, 2.0), (200, 1.0)])
        tag("sql", ["candidate"])
        options = ma.FuseOptions(method="nearest", check=False)
        ma.fuse(None, "sql", folder / "out" / "sql-4bit", quantization=4, options=options)
    return folder


@pytest.fixture
def place(template, hub, tmp_path, monkeypatch, measured_here):
    """A copy of the folder, to change."""
    place = shutil.copytree(template, tmp_path / "place")
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(place / "home"))
    monkeypatch.chdir(place)


@pytest.mark.parametrize("line", examples())
def test_the_example_runs(line, place):
    words = shlex.split(line.replace("mlx-community/Qwen3-0.6B-4bit", "demo").replace("me/", "user/"))
    result = CliRunner().invoke(cli, words[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{getattr(result.exception, 'message', result.exception)}"


def python_examples() -> list[str]:
    """The public names with an example that needs nothing that is not here."""
    parser = doctest.DocTestParser()
    parts_of = {name: parser.get_examples(inspect.getdoc(getattr(ma, name)) or "") for name in NAMES}
    return [name for name, parts in parts_of.items() if parts and not any(doctest.SKIP in p.options for p in parts)]


@pytest.mark.parametrize("name", python_examples())
def test_the_example_in_the_docstring_runs(name, place):
    """What an example promises must come; what it prints beside that is free."""
    test = doctest.DocTestFinder(recurse=False).find(getattr(ma, name), name, globs={"ma": ma})[0]
    check = doctest.OutputChecker().check_output
    for example in test.examples:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(example.source, name, "single"), test.globs)
        if example.want:
            assert check(example.want, out.getvalue(), doctest.ELLIPSIS), f"{example.source}{out.getvalue()}"


def test_the_ten_tasks_run_one_after_the_other(place):
    there = {"ma": ma}
    for ours, *_ in load_script("python_docs").tasks().values():
        with contextlib.redirect_stdout(io.StringIO()):
            exec(ours, there)
    assert there["run"].final.iteration == 6 and there["answer"] and there["result"].folder.exists()
    assert {one.variant for one in there["report"].evaluations} == {"base", "sql"} and there["both"].config.rank == 8


def test_no_test_of_examples_is_forgotten():
    assert len(examples()) > 10 and len(commands()) > 30 and len(python_examples()) > 45
