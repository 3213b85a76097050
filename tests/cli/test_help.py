"""Help in two lengths, commands by what one wants, and what mlx-lm's users type."""

import argparse
import importlib

import click
import pytest
from click.testing import CliRunner
from helpers.public import HELP, LEAVES

from mlx_adapters.calibration.fidelity import Fidelity
from mlx_adapters.cli import cli
from mlx_adapters.cli._habits import HABITS, PROGRAMS, in_our_words
from mlx_adapters.cli._help import ALIASES, COMMANDS, COMMON, GROUPS, LongCommand

OURS = {name.removeprefix("mlx-adapters "): command for name, command in LEAVES.items()}
LONG = {name: command for name, command in OURS.items() if isinstance(command, LongCommand)}


def run(*arguments):
    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, result.output


def test_every_command_stands_in_one_group():
    assert len(COMMANDS) == sum(map(len, GROUPS.values()))
    _, text = run("--help")
    assert [line[:-1] for line in text.splitlines() if line[:-1] in GROUPS] == list(GROUPS)
    assert max(map(len, text.splitlines())) <= 80


def test_commands_of_many_options_have_a_short_help():
    assert set(LONG) == set(COMMON) == {name for name, command in OURS.items() if len(command.params) > 20}
    for name, command in LONG.items():
        unknown = set(COMMON[name].split()) - {parameter.name for parameter in command.params}
        assert not unknown, f"{name}: {unknown}"


@pytest.mark.parametrize("name", LONG)
def test_help_is_short_and_help_all_is_whole(name):
    short, whole = run(name, "--help")[1], run(name, "--help-all")[1]
    options = [max(p.opts, key=len) for p in LONG[name].params if isinstance(p, click.Option)]
    assert all(option in whole for option in options) and "--help-all" in short and "-h, --help" in short
    assert short.count("  --") < whole.count("  --") and len(short.splitlines()) < 65


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_other_names_of_commands(alias, name):
    assert run(alias, "--help")[1].partition("\n\n")[2] == run(name, "--help")[1].partition("\n\n")[2]


PARSERS = {"train": "lora", "fuse": "fuse", "generate": "generate", "chat": "chat", "serve": "server"}


class Caught(Exception):
    """Carries a parser out of the program that made it."""


@pytest.fixture
def mlx_lms_options(monkeypatch):
    """What mlx-lm's own program of a command takes."""

    def caught(parser, *_):
        raise Caught(parser)

    def options(command):
        program = importlib.import_module(f"mlx_lm.{PARSERS[command]}")
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(Caught) as raised:
            program.main()
        actions = raised.value.args[0]._actions
        return {max(a.option_strings, key=len) for a in actions if a.option_strings and a.dest != "help"}

    return options


@pytest.mark.parametrize("command", PARSERS)
def test_every_option_of_mlx_lms_is_ours_or_has_its_words(command, mlx_lms_options):
    theirs, ours = mlx_lms_options(command), {o for p in OURS[command].params for o in p.opts}
    assert len(theirs) > 6
    assert not theirs - ours - set(HABITS[command]), "neither an option here nor in cli/_habits"


@pytest.mark.parametrize("command", HABITS)
def test_what_stands_for_mlx_lms_options_are_options_here(command):
    known = {o for p in OURS[command].params for o in [*p.opts, *p.secondary_opts]}
    for told in HABITS[command].values():
        assert told[:1] in ("", "<", "{") or told[:1].isupper() or told.split()[0] in known, told


def test_a_line_of_mlx_lms_is_answered_by_the_line_to_type():
    code, text = run("train", "--model", "demo", "--train", "--data", "rows", "--iters=100", "--adapter-path", "./out")
    assert code == 2 and "mlx-adapters train demo --data rows --iterations 100 --name ./out" in text
    assert run("lora", "--train")[1].rstrip().endswith("Did you mean 'train'?")
    assert set(PROGRAMS.values()) <= set(COMMANDS)
    said = in_our_words("generate", ["--model", "demo", "--prompt", "Who is it?", "-m", "9"])
    assert said == "mlx-adapters generate 'Who is it?' --base demo --max-tokens 9"
    assert in_our_words("fuse", ["--save-path", "out", "--adapter-path", "sql"]) == "mlx-adapters fuse sql out"
    assert in_our_words("train", ["demo", "--frob"]) is None


def test_a_slip_is_not_called_mlx_lms():
    text = run("train", "--modle", "demo", "--iters", "5")[1]
    assert "No such option '--modle'" in text and "mlx-lm" not in text


def test_one_missing_thing_is_named_by_itself():
    assert "Give --name (or --resume NAME)." in run("train", "demo", "--data", "rows")[1]
    assert "Give BASE, --data and --name (or" in run("train")[1]


def test_the_page_for_mlx_lms_users_is_made_of_the_table():
    assert HELP.HABITS_PAGE.read_text() == HELP.habits_tables(), "run scripts/help_snapshot --write"


def test_mlx_lms_minus_one_and_sixteen_bits(tmp_path):
    code, text = run("train", "demo", "--data", "x", "--name", "y", "--num-layers", "-1", "--print-config")
    assert code == 0 and "num_layers: all" in text
    context = OURS["fuse"].make_context("fuse", ["a", "out", "--bits", "16"], help_option_names=["-h", "--help"])
    assert context.params["bits"] == "none"


@pytest.mark.parametrize(("same", "like"), [(0.998, "like"), (0.97, "nearly like"), (0.8, "otherwise than")])
def test_a_fuse_ends_in_a_verdict(same, like):
    fidelity = Fidelity(8, 900, 0.00041, 0.0, 0.01, same, 0.05, 0.05, 3.0, 2.734, 0.4)
    assert fidelity.verdict == f"Answers {like} the adapter: same token {same:.1%}, KL 0.00041 (base 2.73)."
