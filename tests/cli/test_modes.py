"""No command ignores an option that was given: every mode of every command, with every other option."""

import re

import click
import pytest
from click.testing import CliRunner

from mlx_adapters.cli import COMMANDS, cli
from mlx_adapters.cli._options import Reads


def commands():
    """(name, command) of the whole tree."""
    tree = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        inner = command.commands.items() if isinstance(command, click.Group) else []
        tree += [(f"{name} {sub}", each) for sub, each in inner] or [(name, command)]
    return dict(tree)


TREE = commands()
MODES = [
    (name, mode)
    for name, command in TREE.items()
    if (reads := getattr(command.callback, "reads", None))
    for mode in [*reads.modes, *reads.needs]
]


def typed(parameter: click.Parameter, tmp_path) -> list[str]:
    """How a parameter stands on a command line, with a value that parses."""
    kind = parameter.type
    if isinstance(kind, click.Choice):
        value = kind.choices[-1]
    elif isinstance(kind, click.Path):
        value = tmp_path / ("folder" if kind.dir_okay and not kind.file_okay else "file")
        value.mkdir(exist_ok=True) if value.name == "folder" else value.touch()
    else:
        value = {
            "integer": 3,
            "integer range": 3,
            "float": 0.5,
            "float range": 0.5,
            "percent": "5%",
            "ref": "sql",
            "numbers": "3",
            "rank": "3",
            "key=value": "key=1",
            "file": __file__,
        }.get(kind.name, "x")
    if isinstance(parameter, click.Argument):
        return [str(value)]
    return [parameter.opts[0]] if parameter.is_flag else [f"{max(parameter.opts, key=len)}={value}"]


def parsed(name: str, given: list[str], tmp_path) -> click.Context:
    """The command's context with these parameters, and what else it requires."""
    command = TREE[name]
    wanted = [p for p in command.params if p.name in given or (p.required and isinstance(p, click.Option))]
    words = [word for p in wanted if isinstance(p, click.Option) for word in typed(p, tmp_path)]
    words += [
        word
        for p in command.params
        if isinstance(p, click.Argument) and (p.required or p.name in given)
        for word in typed(p, tmp_path)
    ]
    # Under the program's own context: a command keeps the names of its help option from the first one.
    return command.make_context(name, words, parent=click.Context(cli, **cli.context_settings))


def refusal(name: str, given: list[str], tmp_path) -> str | None:
    with parsed(name, given, tmp_path) as context:
        try:
            TREE[name].callback.reads.check(context)
        except click.UsageError as error:
            return error.message
    return None


@pytest.mark.parametrize("name, mode", MODES)
def test_a_mode_refuses_what_it_does_not_read(name, mode, tmp_path):
    command = TREE[name]
    reads: Reads = command.callback.reads
    others = [p for p in command.params if p.name != mode]
    assert reads.modes.get(mode, set()) <= {p.name for p in command.params}, "a name of no parameter"
    if mode in reads.modes:
        refused = 0
        for other in others:
            said = refusal(name, [mode, str(other.name)], tmp_path)
            wrong = said is not None and "does not go with" in said
            required = other.required or other.name in reads.modes[mode]
            assert wrong == (other.name not in reads.modes[mode]), (other.name, said)
            refused += wrong and not required
        assert refused, "a mode that reads everything is none"
    if mode in reads.needs:
        assert f"{typed_name(name, mode)} needs" in str(refusal(name, [mode], tmp_path))
        for other in reads.needs[mode]:
            assert "needs" not in str(refusal(name, [mode, other], tmp_path))


def typed_name(name: str, parameter: str) -> str:
    (option,) = (p for p in TREE[name].params if p.name == parameter)
    return max(option.opts, key=len)


def test_an_option_that_another_brings_says_so_and_is_refused_alone():
    """`With --x: ...` in a help text is a promise of the table as well."""
    for name, command in TREE.items():
        for option in command.params:
            brought = re.match(r"With (--[a-z-]+)(?: and --[a-z-]+)?:", getattr(option, "help", None) or "")
            if brought and name.partition(" ")[0] not in ("train", "estimate", "data"):  # settings: checked as such
                reads = command.callback.reads
                others = {typed_name(name, other) for other in reads.needs.get(option.name, ())}
                alone = option.name in reads.modes or any(option.name in read for read in reads.modes.values())
                assert brought[1] in others or alone, (name, option.name)


@pytest.mark.parametrize(
    "arguments, why",
    [
        (
            "fuse --again out/a out/b --bits 8 --method calibrated --weight 3 --base nonsense",
            "--bits does not go with --again",
        ),
        ("fuse --check-only m --adapter a --overwrite", "--overwrite does not go with --check-only"),
        ("fuse --check-only m --adapter a --bits 4", "--bits does not go with --check-only"),
        ("fuse --from-peft p --base b out --weight 2", "--weight does not go with --from-peft"),
        ("fuse --from-peft p --again r out", "--from-peft does not go with --again"),
        ("fuse a out --adapter b", "--adapter needs --check-only"),
        ("fuse a out --force", "--force needs --max-kl"),
        ("fuse a out --no-check --check-rows 4", "--check-rows does not go with --no-check"),
        ("fuse a out --method nearest --quick", "--quick does not go with --method nearest"),
        ("fuse a out --bits 8 --calibration-rows 4", "--calibration-rows does not go with --bits 8 without --method"),
        ("fuse a out --bits none --no-check --calibration d", "--calibration does not go with --bits none"),
        ("fuse a out --method nearest --thorough", "--thorough does not go with --method nearest"),
        ("fuse --again m out --quick", "--quick does not go with --again"),
        ("fuse a out --bits none --method calibrated", "--method does not go with --bits none"),
        ("train --resume sql --name x", "--name does not go with --resume"),
        ("train --resume sql --print-config", "does not go with"),
        ("train demo --print-config --overwrite", "--overwrite does not go with --print-config"),
        ("eval base --data d --tasks t", "does not go with"),
        ("eval base --data d --max-tokens 5", "--max-tokens needs --score"),
        ("eval base --tasks t --score exact", "--score does not go with --tasks"),
        ("estimate demo --data d --context 5", "--context does not go with --data"),
        ("estimate demo --rank 4", "--rank needs --config or --data"),
        ("estimate demo --batch-size 4", "--batch-size needs --config or --data"),
        ("advise sql --report FILE --bits 4", "--bits does not go with --report"),
        ("interpolate a b --name x --base demo", "--base needs --data"),
        ("compare a b --base demo", "--base needs --data"),
        ("benchmark base --fail-over 5%", "--fail-over needs --against"),
        ("generate hi --base demo --any-base", "--any-base needs --adapter"),
    ],
)
def test_the_refusal_names_both(tmp_path, arguments, why):
    (tmp_path / "FILE").write_text("{}")
    words = [str(tmp_path / word) if word == "FILE" else word for word in arguments.split()]
    ended = CliRunner().invoke(cli, words)
    assert ended.exit_code == 2 and why in ended.output, ended.output


@pytest.mark.parametrize(
    "line, told",
    [
        ("generate hi --adapter a --adapter b", "--adapter is given 2 times"),
        ("train demo --data a --data b --name n", "--data is given 2 times"),
        ("fuse a out --calibration a --calibration b", "--calibration is given 2 times"),
        ("data check a --base b --base c --base d", "--base is given 3 times"),
        ("train demo --target-modules q_proj --target-modules v_proj", "--target-modules is given 2 times"),
        ("train demo --rank 4 --rank 8 --type lora --type dora --packing --no-packing --seed 1", ""),
        ("chat --adapter a --adapter b --base nowhere", ""),
    ],
)
def test_what_is_named_twice_and_counts_once_is_told(line, told):
    """Numbers, choices and flags are said again where a script adds to its defaults."""
    output = CliRunner().invoke(cli, line.split()).output
    assert (f"Warning: {told}, and takes one: the last.\n" in output) if told else "times" not in output


@pytest.mark.parametrize("line", ["chat --base nowhere", "generate --base nowhere hello", "ab nowhere.txt base sql"])
def test_sampling_that_cannot_be_is_refused_before_anything_is_loaded(line):
    result = CliRunner().invoke(cli, [*line.split(), "--min-tokens", "9", "--max-tokens", "8"])
    assert str(result.exception) == "'min_tokens' is 9, and 8 may be written."
