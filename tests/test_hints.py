"""Hints are written in the words of the command line, and end a traceback in those of Python."""

import ast
import dataclasses
import inspect
import re
import traceback

import click
import pytest
from helpers.adapters import make_adapter
from helpers.public import ROOT

import mlx_adapters as ma
from mlx_adapters.cli import cli
from mlx_adapters.errors import PYTHON_CALLS, PYTHON_COMMANDS, PYTHON_NAMES, in_python

# Rooms of commands that have no function, and files that write other programs' options.
ELSEWHERE = ("cli", "demo", "serving")
OTHERS = {"page.py", "demo_base.py", "card_examples.py", "errors.py"}
# What only a command has.
NO_PARAMETER = {"again", "output", "task_folder", "print_config"}


def texts():
    """All strings of the package, f-strings with X for what is put in; docstrings apart."""
    for path in sorted((ROOT / "mlx_adapters").rglob("*.py")):
        if path.parent.name in ELSEWHERE or path.name in OTHERS:
            continue
        tree = ast.parse(path.read_text())
        apart = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                apart |= {id(part) for part in node.values}
                yield "".join(part.value if isinstance(part, ast.Constant) else "7" for part in node.values)
        constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in apart)
        yield from (node.value for node in constants if isinstance(node.value, str))


def options(command, known):
    """Option -> whether it is a switch, of a command and all below it."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            known |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], bool(parameter.is_flag))
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            options(command.get_command(context, name), known)
    return known


def parameters():
    names = {"chat_template_args"}
    for thing in (getattr(ma, name) for name in ma.__all__):
        functions = [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]
        names |= {p for f in functions if inspect.isfunction(f) for p in inspect.signature(f).parameters}
        names |= {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    return names


# Rooms in which files of other people and programs are judged.
JUDGING = "adapters assembly checkpoints fusion models peft_format publishing sources storage system"


def test_an_error_about_somebodys_files_says_what_to_do():
    errors = {name for name, thing in vars(ma).items() if name.endswith("Error") and inspect.isclass(thing)}
    silent = list[str]()
    for path in sorted((ROOT / "mlx_adapters").rglob("*.py")):
        if path.parent.name in JUDGING.split():
            raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
            calls = [call for call in raised if isinstance(call, ast.Call) and ast.unparse(call.func) in errors]
            silent += [f"{path.name}: {ast.unparse(call)}" for call in calls if len(call.args) + len(call.keywords) < 2]
    assert not silent, "no hint:\n" + "\n".join(silent)


def test_every_option_in_a_hint_has_a_name_in_python():
    known, names = options(cli, {}), parameters()
    commands = re.compile(r"'[a-z-]+ [^']*--[^']*'|mlx-adapters .*")  # stay as they are, or are translated whole
    spoken = {
        option for text in texts() for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", commands.sub("", text))
    }
    spoken = {option for option in spoken if f"--{option}" in known}
    assert len(spoken) > 40
    for option in spoken - PYTHON_CALLS.keys():
        name = PYTHON_NAMES.get(option, option.replace("-", "_"))
        assert name in names | NO_PARAMETER, f"--{option} has no name in Python: add it to PYTHON_NAMES"
        assert name in NO_PARAMETER or not known[f"--{option}"], f"--{option} is a switch: add it to PYTHON_CALLS"
    for call in PYTHON_CALLS.values():
        if "=" in call:
            assert call.partition("=")[0] in names
    for call in PYTHON_COMMANDS.values():
        assert hasattr(ma, call.removeprefix("ma.").removesuffix("()"))


@pytest.mark.parametrize(
    "hint, expected",
    [
        (
            "choose another name, or pass --overwrite to replace it.",
            "choose another name, or pass overwrite=True to replace it.",
        ),
        ("leave out --no-check.", "leave out check=False."),
        ("'mlx-adapters list' shows all.", "ma.list_adapters() shows all."),
        ("pass --dtype bfloat16.", "pass dtype='bfloat16'."),
        ("say which one it is with --base-model user/name.", "say which one it is with base_model='user/name'."),
        ("for example --density 0.5.", "for example density=0.5."),
        ("use --max-seq-length 2048 or less.", "use max_seq_length=2048 or less."),
        ("give it with --base.", "give it with base."),
        ("'train --print-config' makes one.", "'train --print-config' makes one."),
        ("say how many bits with --bits: 8.", "say how many bits with quantization: 8."),
        ("Go on with: mlx-adapters train --resume sql.", "Go on with: ma.train(name='sql', resume=True)."),
        ("leave the file out with --exclude 'a b.txt'.", "leave the file out with exclude='a b.txt'."),
        ("a value of -1 is too small; see well-known --scale.", "a value of -1 is too small; see well-known scale."),
    ],
)
def test_words(hint, expected):
    assert in_python(hint) == expected


def test_a_traceback_ends_with_the_sentence_and_the_hint():
    with pytest.raises(ma.NotFoundError) as caught:
        ma.load_adapter("sqk")
    last = "".join(traceback.format_exception(caught.value)).rstrip().splitlines()[-2:]
    assert last == [
        "mlx_adapters.errors.NotFoundError: No adapter named 'sqk'.",
        "Hint: ma.list_adapters() shows all.",
    ]
    assert caught.value.hint == "'mlx-adapters list' shows all."  # what the command line shows


def test_overwriting_is_asked_for_in_pythons_words(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model("llama"))
    ma.write_adapter(adapter, tmp_path / "a")
    with pytest.raises(ma.ExistsError) as caught:
        ma.write_adapter(adapter, tmp_path / "a")
    assert "overwrite=True" in caught.value.__notes__[0] and "--" not in caught.value.__notes__[0]
    assert not hasattr(ma.AdapterError("No hint here."), "__notes__")
