"""The public face: names, docstrings and annotations in Python; help, examples and JSON on the command line."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.shell_completion import ShellComplete
from helpers.adapters import make_run
from helpers.public import COMMANDS, HELP, LEAVES, NAMES, ROOT, WITHOUT_JSON, example_lines

import mlx_adapters as ma
from mlx_adapters.cli import _output
from mlx_adapters.events import Progress
from mlx_adapters.sources import registry

# -- Python ----------------------------------------------------------------------------------------


def test_all_is_the_table_of_public_names():
    assert ma.__all__ == [*sorted(ma._PUBLIC), "__version__"] and dir(ma) == sorted(ma.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ma.nothing  # noqa: B018


def test_every_line_of_the_table_is_written_once():
    """A merge of two branches can leave a name twice in a dict; Python would not say so."""
    for path in ("mlx_adapters/__init__.py", "mlx_adapters/cli/__init__.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                assert len(keys) == len(set(keys)), path


@pytest.mark.parametrize("name", NAMES)
def test_public_name(name):
    thing = getattr(ma, name)
    assert thing.__name__ == name and len(inspect.getdoc(thing) or "") > 15
    if inspect.isfunction(thing):
        parameters = inspect.signature(thing).parameters.values()
        assert all(p.annotation is not p.empty for p in parameters), "an argument without annotation"
        assert all(p.kind is not p.VAR_KEYWORD for p in parameters), "**kwargs in the public surface"
        assert inspect.signature(thing).return_annotation is not inspect.Signature.empty
    elif not issubclass(thing, Exception):
        methods = {n: m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")}
        for method_name, method in methods.items():
            annotated = set(typing.get_type_hints(method)) | {"self"}
            assert set(inspect.signature(method).parameters) <= annotated, f"{method_name} lacks an annotation"
            assert inspect.getdoc(method), f"{method_name} lacks a docstring"


def test_importing_loads_nothing_heavy():
    heavy = ("mlx", "mlx_lm", "numpy", "huggingface_hub", "transformers", "rich", "yaml")
    code = f"import sys, mlx_adapters, mlx_adapters.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEAVES)
def test_command_has_help_an_example_and_json(name):
    command = LEAVES[name]
    assert "Example:" in command.help and re.search(rf"^ +{name}( |$)", command.help, re.M), "no example"
    assert all(p.help for p in command.params if isinstance(p, click.Option)), "an option without help"
    has_json = any("--json" in p.opts for p in command.params)
    assert has_json != (name in WITHOUT_JSON)


@pytest.mark.parametrize(("name", "line"), list(example_lines()))
def test_the_examples_in_the_help_parse(name, line):
    """Every example is a valid command: known options, right types, nothing missing."""
    import shlex

    words = [word for word in shlex.split(line.partition(" > ")[0].partition(" >> ")[0].partition(" | ")[0])][1:]
    command, _ = COMMANDS["mlx-adapters"]
    rest = command.make_context("mlx-adapters", list(words), resilient_parsing=False)
    while isinstance(rest.command, click.Group) and (left := [*rest._protected_args, *rest.args]):
        inner = rest.command.get_command(rest, left[0])
        rest = inner.make_context(left[0], left[1:], parent=rest)
    assert rest.command_path == name


def test_the_page_of_commands_shows_the_help_as_it_is():
    assert HELP.PAGE.read_text() == HELP.snapshot(), "run scripts/help_snapshot --write"
    assert f"mlx-adapters {next(iter(LEAVES)).split()[1]}" in HELP.snapshot()


def test_global_options_and_mistakes():
    def run(*arguments, **environment):
        command = [sys.executable, "-m", "mlx_adapters", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})

    assert run("--version").stdout.strip().endswith(ma.__version__)
    near = run("trian")
    assert near.returncode == 2 and "train" in near.stderr
    assert "\x1b" not in run("list").stdout + run("show", "nobody").stderr


# -- completion ------------------------------------------------------------------------------------


def complete(shell: str, words: str, index: int) -> str:
    environment = {**os.environ, "_MLX_ADAPTERS_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
    environment |= {"COMP_CWORD": str(index) if shell != "fish" else words.split(" ")[-1]}
    environment |= {"COMP_LINE": words, "COMP_PIECE": words.split(" ")[-1]}
    code = "import sys; sys.argv[0] = 'mlx-adapters'; from mlx_adapters.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_completion(shell, home):
    for name in ("sql", "sql-dora", "chat"):
        (registry.adapter_folder(name)).mkdir(parents=True)
    script = subprocess.run(
        [sys.executable, "-m", "mlx_adapters", "completion", shell], capture_output=True, text=True, check=True
    ).stdout
    assert f"_MLX_ADAPTERS_COMPLETE={shell}_complete" in script and "mlx-adapters" in script
    completions = complete(shell, "mlx-adapters show sq", 2)
    assert set(re.findall(r"sql(?:-dora)?|chat", completions)) == {"sql", "sql-dora"}
    assert "publish" in complete(shell, "mlx-adapters pub", 1)


NAMED = ("show", "fuse", "benchmark base", "eval", "pack", "publish", "ab q.txt", "train --resume", "serve x --adapter")


def test_names_are_completed_wherever_an_adapter_is_named(home):
    registry.adapter_folder("sql").mkdir(parents=True)
    root, _ = COMMANDS["mlx-adapters"]
    for words in NAMED:
        completions = ShellComplete(root, {}, "mlx-adapters", "X").get_completions(words.split(), "s")
        assert [item.value for item in completions] == ["sql"], words
    assert [item.type for item in ShellComplete(root, {}, "m", "X").get_completions(["fuse"], "out/")] == ["file"]


def test_checkpoints_are_completed(tiny_model):
    make_run(tiny_model("llama"), "sql")
    completions = ShellComplete(COMMANDS["mlx-adapters"][0], {}, "m", "X").get_completions(["use"], "sql@")
    assert [item.value for item in completions] == ["sql@100", "sql@200", "sql@300"]


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_words_with_a_sign_in_them_are_completed_whole(shell, home):
    registry.adapter_folder("sql").mkdir(parents=True)
    for word, whole in (("--resume=sq", "--resume=sql"), ("--init-from=s", "--init-from=sql")):
        completions = complete(shell, f"mlx-adapters train {word}", 2)
        assert re.search(rf"(?:^|,|\n){whole}(?:\s|$)", completions), completions


def test_references_are_completed_after_a_name(tiny_model):
    make_run(tiny_model("llama"), "sql")
    for typed, expected in (("chat=s", ["chat=sql"]), ("chat=sql@1", ["chat=sql@100"]), ("s", ["sql"])):
        completions = ShellComplete(COMMANDS["mlx-adapters"][0], {}, "m", "X").get_completions(
            ["serve", "demo", "--adapter"], typed
        )
        assert [item.value for item in completions] == expected


def test_bash_gets_back_the_piece_that_it_replaces(tiny_model, tmp_path):
    """bash cuts words at "@" and "=" and replaces the last piece only, which begins with the "@"."""
    make_run(tiny_model("llama"), "sql")
    program = tmp_path / "mlx-adapters"
    program.write_text(
        f"#!{sys.executable}\nimport sys; sys.argv[0] = 'mlx-adapters'\n"
        f"sys.path.insert(0, {str(Path(ma.__file__).parent.parent)!r})\n"
        "from mlx_adapters.cli import main; main()\n"
    )
    program.chmod(0o755)
    script = subprocess.run([program, "completion", "bash"], capture_output=True, text=True, check=True).stdout
    lines = {
        "use sql@1": ("@1", "@100"),
        "serve demo --adapter chat=s": ("s", "sql"),
        "show s": ("s", "sql"),
        "serve demo --adapter=chat=sql@2": ("@2", "@200"),
        "pub": ("pub", "publish"),
    }
    for line, (piece, expected) in lines.items():
        call = f"""{script}
            COMP_LINE="mlx-adapters {line}"; COMP_POINT=${{#COMP_LINE}}
            _mlx_adapters_completion "{program}" "{piece}"; printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "--norc", "-c", call], capture_output=True, text=True)
        assert done.stdout.splitlines() == [expected], (line, done)


@pytest.mark.parametrize("version", ["3.2", "5.2"])
def test_bash_of_a_mac_completes_too(version, tmp_path):
    """3.2 knows neither compopt nor `-o nosort`; it is told to complete files where nothing else fits."""
    program = tmp_path / "mlx-adapters"
    program.write_text("#!/bin/sh\necho plain,publish\necho file,\n")
    program.chmod(0o755)
    script = completion_script("bash")
    old = """
        compopt() { echo "compopt: command not found" >&2; return 127; }
        complete() {
            case "$*" in *nosort*) echo "complete: nosort: invalid option name" >&2; return 1 ;; esac
            builtin complete "$@"
        }
    """
    call = f"""{old if version == "3.2" else ""}
        {script}
        compopt() {{ [ {version} != 3.2 ]; }}
        COMP_LINE="mlx-adapters pub"; COMP_POINT=${{#COMP_LINE}}
        _mlx_adapters_completion "{program}" pub; printf '%s\n' "${{COMPREPLY[@]}}"; complete -p mlx-adapters"""
    done = subprocess.run(["bash", "--norc", "-c", call], capture_output=True, text=True)
    option = "default" if version == "3.2" else "nosort"
    registered = f"complete -o {option} -F _mlx_adapters_completion mlx-adapters"
    assert done.stdout.splitlines() == ["publish", registered] and done.stderr == "", done


def completion_script(shell: str) -> str:
    command = [sys.executable, "-m", "mlx_adapters", "completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_zsh_sets_up_completion_before_it_uses_it():
    """On a Mac without a ~/.zshrc nobody has; where somebody has, it is not done again."""
    lines = completion_script("zsh").splitlines()
    assert lines[0] == "#compdef mlx-adapters"
    guard = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }"
    uses = [number for number, line in enumerate(lines) if line.strip().startswith("compdef ")]
    assert uses and lines.index(guard) < min(uses)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_zsh_takes_the_script_as_it_starts(tmp_path):
    (tmp_path / "c.zsh").write_text(completion_script("zsh"))
    call = f"source {tmp_path}/c.zsh && print $_comps[mlx-adapters]"
    done = subprocess.run(
        ["zsh", "-f", "-c", call], capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert done.stdout.strip() == "_mlx_adapters_completion", done.stderr


def test_bash_accepts_the_script(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "mlx_adapters", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "c.bash").write_text(script)
    checked = subprocess.run(["bash", "-n", str(tmp_path / "c.bash")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_a_dumb_terminal_gets_no_escapes(monkeypatch, capsys):
    """A terminal that cannot go back in its line (TERM=dumb, an editor's) gets lines; NO_COLOR takes colors only."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for term, no_color, expected in (("dumb", "", 0), ("xterm", "1", 1), ("xterm", "", 3)):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", no_color)
        _output.error("It does not work.")
        assert capsys.readouterr().err.count("\x1b") == expected
        assert _output.live() == (term == "xterm")


def test_json_output_is_one_document():
    done = subprocess.run([sys.executable, "-m", "mlx_adapters", "list", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"schema": "mlx_adapters/1", "adapters": []} and done.stderr == ""


def test_a_stage_that_comes_again_has_a_pace_of_its_own(monkeypatch, capsys):
    """As the answers of one variant after another: nine in 10 s and in 1 s."""
    clock = iter([0, 10, 100, 101])
    monkeypatch.setattr(_output, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    on_event = _output.progress()
    for done in (1, 10, 1, 10):
        on_event(Progress("answer", done, 10, "question"))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "10/10" in line] == [f"answer: 10/10 questions, {rate}/s" for rate in (0.9, 9)]
