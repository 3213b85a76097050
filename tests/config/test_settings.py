"""Settings are spelled once, and each has an effect: options, checks, pages and printed configs are made of them."""

import ast
import dataclasses
import re
from functools import cache
from typing import Literal

import click
import pytest
import yaml
from click.testing import CliRunner
from helpers.public import HELP, LEAVES
from helpers.settings_classes import CLASSES, PACKAGE
from hypothesis import given
from hypothesis import strategies as st

from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.cli._settings import option, options
from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.evaluating import EvaluationConfig
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.mapping import from_mapping, to_mapping
from mlx_adapters.config.merging import MergeSettings
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting, Sampling
from mlx_adapters.config.settings import check, commented, setting, settings, settings_of
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.errors import ConfigError
from mlx_adapters.serving.settings import ServeSettings


@settings
@dataclasses.dataclass(frozen=True)
class Kiln:
    """A kiln for pots.

    Raises ConfigError for a value out of range.
    """

    hours: int = setting(8, "How long to fire", more="By the clock.", at_least=1, below=100)
    heat: float = setting(1000.0, "Degrees", above=0)
    share: float = setting(0.5, "Share of clay", above=0, at_most=1)
    glaze: Literal["matt", "clear"] = setting("matt", "What goes on top", means="matt: no gloss")
    shelves: int | Literal["all"] = setting("all", "Shelves to fill", at_least=1)
    pots: tuple[str, ...] = setting((), "Which pots", metavar="NAMES")
    vent: bool = setting(False, "Open with `glaze`")
    stack: bool = setting(True, "Stack them", off="spread")
    potter: str | None = setting(None, "Who made them", means="nobody")
    marks: dict[str, int] = setting(dict, "Marks by pot")

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class Told:
    """What a module says, each with the class that it is said in, and whether in one of its methods but its checks."""

    annotations: list[tuple[str, str, str, bool]]  # annotation, name
    values: list[tuple[str, str, str, bool]]  # value, name that it is given
    reads: list[tuple[str, str, str, bool]]  # last name of the object, attribute


def last(node: ast.AST) -> str:
    """The last name of `a.b`, or what else there is."""
    return ast.unparse(node).rpartition(".")[2]


@cache
def told() -> dict[str, list[Told]]:
    """{room: what its modules say}, of all rooms but config/ and cli/; read once."""
    rooms = (path for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("config", "cli"))
    return {room.name: [told_by(ast.parse(path.read_text())) for path in room.glob("*.py")] for room in rooms}


def told_by(tree: ast.Module) -> Told:
    said = Told([], [], [])
    for top in tree.body:
        parts = [(top, "", True)]
        if isinstance(top, ast.ClassDef):
            methods = [isinstance(node, ast.FunctionDef) and node.name != "__post_init__" for node in top.body]
            parts = [(node, top.name, kept) for node, kept in zip(top.body, methods, strict=True)]
        for part, owner, kept in parts:
            for node in ast.walk(part):
                if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
                    name = node.arg if isinstance(node, ast.arg) else last(node.target)
                    said.annotations.append((ast.unparse(node.annotation), name, owner, kept))
                elif isinstance(node, ast.Assign):
                    value = ast.unparse(node.value)
                    said.values.extend((value, last(target), owner, kept) for target in node.targets)
                elif isinstance(node, ast.Attribute):
                    said.reads.append((last(node.value), node.attr, owner, kept))
    return said


@cache
def read(cls: type) -> set[str]:
    """The settings of the class that are read outside config/ and cli/, and not by its own declaration or checks."""
    names, own = set(), cls.__name__
    for modules in told().values():
        holders = {
            name
            for module in modules
            for text, name, owner, kept in module.annotations
            if (owner != own or kept) and re.search(rf"\b{own}\b", text)
        }
        for module in modules:
            holders |= {
                name for text, name, *where in module.values if where != [own, False] and text.startswith(f"{own}(")
            }
        for module in modules:
            for holder, attribute, owner, kept in module.reads:
                if (owner != own and holder in holders) or (owner == own and kept and holder in holders | {"self"}):
                    names.add(attribute)
    return names


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_is_read_by_what_it_is_for(cls):
    known = set().union(*(read(each) for each in cls.__mro__ if dataclasses.is_dataclass(each)))
    known |= {"name"}  # of an objective, which it says in records
    assert settings_of(cls).keys() <= known, settings_of(cls).keys() - known


def test_a_setting_that_nothing_reads_would_be_found():
    assert read(Kiln) == set()


def option_names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}


@pytest.mark.parametrize(
    ("command", "cls", "apart"),
    [
        ("train", LoraConfig, {"ranks"}),
        ("train", TrainConfig, {"chat_template_args"}),
        ("estimate", TrainConfig, {"chat_template_args", "memory"}),
        ("data check", DataConfig, {"chat_template_args"}),
        ("fuse", FuseOptions, {"seed", "program"}),  # --for PROGRAM
        ("merge", MergeSettings, {"method"}),
        ("eval", EvaluationConfig, {"chat_template_args"}),
        ("benchmark", BenchmarkConfig, {"warmup_tokens", "cold_load"}),
        ("generate", Sampling, set()),
        ("chat", Sampling, set()),
        ("ab", Sampling, set()),
        ("ab", Drafting, set()),
        ("generate", CacheQuantization, set()),
        ("chat", CacheQuantization, set()),
        ("serve", CacheQuantization, {"quantized_kv_start"}),  # from the first token on
        ("generate", Drafting, set()),
        ("chat", Drafting, set()),
        ("serve", Drafting, set()),
        (
            "serve",
            ServeSettings,
            {
                "api_keys",
                "splits",
                "max_adapter_bytes",
                "prompt_cache_bytes",
                "max_body_bytes",
                "write_seconds",
                "header_seconds",
            }
            | {"allowed_hosts", "cors_origins"},  # --allow-host and --cors-origin, each again and again,
        ),
    ],
)
def test_every_setting_has_an_option_in_its_words(command, cls, apart):
    parameters = {parameter.name: parameter for parameter in LEAVES[f"mlx-adapters {command}"].params}
    for name, one in settings_of(cls).items():
        assert name in apart or f"--{name.replace('_', '-')}" in option_names(LEAVES[f"mlx-adapters {command}"]), name
        if name in parameters and name not in apart and "`" not in one.help:
            assert parameters[name].help.startswith(one.help)


def made(*decorators) -> click.Command:
    command = lambda **given: click.echo(repr(given))  # noqa: E731
    for decorate in reversed(decorators):
        command = decorate(command)
    return click.command()(command)


def test_options_are_made_of_the_fields():
    command = made(options(Kiln, without="marks pots"))
    text = click.Context(command, info_name="kiln", terminal_width=200, max_content_width=200)
    lines = [re.sub(r" {2,}", "  ", line.strip()) for line in command.get_help(text).splitlines()[3:]]
    assert lines[:-1] == [
        "--hours INTEGER RANGE  How long to fire.  [default: 8; 1<=x<100]",
        "--heat FLOAT RANGE  Degrees.  [default: 1000.0; x>0]",
        "--share FLOAT RANGE  Share of clay.  [default: 0.5; 0<x<=1]",
        "--glaze [matt|clear]  What goes on top; matt: no gloss.  [default: matt]",
        "--shelves INTEGER  Shelves to fill.  [default: all]",
        "--vent  Open with --glaze.",
        "--stack / --spread  Stack them.",
        "--potter TEXT  Who made them [nobody].",
    ]
    given = CliRunner().invoke(command, ["--shelves", "3", "--spread"]).stdout
    assert "'shelves': 3" in given and "'stack': False" in given and "'vent': False" in given
    assert CliRunner().invoke(command, ["--share", "0"]).exit_code == 2


def test_options_over_a_file_are_none_unless_typed_and_show_their_defaults():
    command = made(options(Kiln, "hours heat glaze pots vent stack", over_file=True))
    helps = {parameter.name: parameter.help for parameter in command.params}
    assert helps["hours"] == "How long to fire [8]." and helps["heat"] == "Degrees [1000]."
    assert helps["glaze"] == "What goes on top [matt: no gloss]." and helps["vent"] == "Open with --glaze."
    assert set(eval(CliRunner().invoke(command, []).stdout).values()) == {None}
    given = eval(CliRunner().invoke(command, ["--pots", "a, b", "--vent", "--spread"]).stdout)
    assert given["pots"] == ("a", "b") and given["vent"] is True and given["stack"] is False


def test_an_option_may_say_something_else_than_its_setting():
    command = made(option(Kiln, "potter", flag="--by", help="Another."))
    assert "--by TEXT  Another." in command.get_help(click.Context(command))


@pytest.mark.parametrize(
    ("wrong", "message", "hint"),
    [
        ({"hours": 0}, "hours must be at least 1, not 0.", None),
        ({"hours": 100}, "hours must be below 100, not 100.", None),
        ({"heat": 0}, "heat must be a number above 0, not 0.0.", None),
        ({"heat": float("inf")}, "heat must be a number, not inf.", None),
        ({"share": float("nan")}, "share must be a number, not nan.", None),
        ({"share": 1.5}, "share must be at most 1, not 1.5.", None),
        ({"glaze": "mat"}, "glaze cannot be 'mat'.", "did you mean 'matt'? there are: matt, clear."),
        ({"shelves": 0}, "shelves must be at least 1, not 0.", None),
    ],
)
def test_errors_are_made_of_the_fields(wrong, message, hint):
    with pytest.raises(ConfigError) as caught:
        Kiln(**wrong)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_the_docstring_tells_all_settings():
    assert Kiln.__doc__.startswith("A kiln for pots.\n\n    Args:\n        hours: How long to fire. By the clock.\n")
    assert "glaze: What goes on top (matt, clear); matt: no gloss." in Kiln.__doc__
    assert "potter: Who made them; None: nobody.\n" in Kiln.__doc__
    assert Kiln.__doc__.rstrip().endswith("Raises ConfigError for a value out of range.")


@given(
    st.builds(
        Kiln,
        hours=st.integers(1, 99),
        pots=st.lists(st.text(), max_size=3).map(tuple),
        potter=st.none() | st.text(),
        marks=st.dictionaries(st.text(), st.integers(), max_size=3),
    )
)
def test_a_printed_config_reads_back_as_it_was(kiln):
    assert from_mapping(Kiln, yaml.safe_load(commented(kiln))) == kiln
    assert yaml.safe_load(commented(kiln, ["hours"])) == {"hours": kiln.hours}


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.__module__.startswith("mlx_adapters.config")])
def test_every_settings_class_is_told_as_it_is(cls):
    assert (
        from_mapping(cls, yaml.safe_load(commented(cls()))) == cls()
        and to_mapping(cls()).keys() == settings_of(cls).keys()
    )
    assert all(one.help and not one.help.endswith(".") for one in settings_of(cls).values())


def test_the_page_of_settings_shows_the_fields_as_they_are():
    assert HELP.SETTINGS_PAGE.read_text() == HELP.settings_tables(), "run scripts/help_snapshot --write"
    parts = {base for cls in CLASSES for base in cls.__mro__[1:]}  # what stands in the table of a larger class
    assert all(f"## {cls.__name__}\n" in HELP.settings_tables() for cls in CLASSES if cls not in parts)
    assert "| `learning_rate` | 0.0001 | above 0 | Step size. |" in HELP.settings_tables()


def test_every_command_reads_all_its_parameters():
    for path in (PACKAGE / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_command") and node.decorator_list:
                taken = [*node.args.args, *filter(None, [node.args.kwarg])]
                names = {inner.id for part in node.body for inner in ast.walk(part) if isinstance(inner, ast.Name)}
                assert {argument.arg for argument in taken} <= names, f"{path.name}: {node.name}"
