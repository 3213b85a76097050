"""One rule for what is typed as an adapter or a model: a path that is there wins, and nothing untrue is hinted."""

import logging
import os
import sys

import pytest
from click.testing import CliRunner
from helpers.adapters import make_adapter, make_run

from mlx_adapters.cli import _output, _places, cli
from mlx_adapters.errors import AdapterError
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.training.folder import place_of

NOTE = "'out/ad' is the folder ./out/ad here, not a repository of the Hub."


@pytest.fixture
def here(tiny_model, tmp_path, monkeypatch):
    base = tiny_model("llama")
    make_run(base, "sql")
    write_adapter(make_adapter(base), tmp_path / "out" / "ad")
    (tmp_path / "out" / "base").symlink_to(base)
    (tmp_path / "out" / "text.txt").write_text("x")
    (tmp_path / "rows").mkdir()
    (tmp_path / "hub" / "models--me--Away--4bit").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(line, fails=False):
    result = CliRunner().invoke(cli, line.split())
    said = result.stdout + result.stderr
    if isinstance(result.exception, AdapterError):
        said += result.exception.with_hint
    assert (result.exit_code != 0) == fails, said
    return said


SPELLINGS = ["out/ad", "out/ad/", "./out/ad", "out/ad/adapters.safetensors", "out/ad/adapter_config.json"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_command_takes_a_folder_however_it_is_spelled(here, spelling):
    assert "adapters.safetensors" in run(f"show {spelling}")
    assert "COSINE" in run(f"compare sql {spelling}")
    assert run(f"verify {spelling}")
    assert run(f"scale {spelling} 0.5 --name scaled --overwrite")
    assert "license" in run(f"card {spelling} --base-model user/name --license mit")
    assert "Added the adapter as 'again'" in run(f"add {spelling} --name again --overwrite")


def test_what_wins_is_said_once(here):
    assert run("show out/ad").count(NOTE) == 1
    assert NOTE not in run("show ./out/ad") and NOTE not in run("show out/ad/")


@pytest.mark.parametrize(
    ("line", "says", "hints"),
    [
        ("show out/text.txt", "'out/text.txt' is a file, not an adapter's folder.", "'mlx-adapters add' takes in"),
        ("show out/base", "'out/base' is a model, not an adapter.", "--base"),
        ("show out/nope/", "There is no folder 'out/nope/'", "'user/repo'"),
        ("show out/nope", "Cannot download 'out/nope'", "HF_HUB_OFFLINE is set"),
        ("generate x --base out/text.txt", "it is a file", "config.json"),
        ("generate x --base ./out/text.txt", "it is a file", "config.json"),
        ("generate x --base out/ad", "no config.json in it", "it is an adapter of"),
        ("generate x --base qwen3-0.6b", "There is no model 'qwen3-0.6b'", "mean 'mlx-community/Qwen3-0.6B-4bit'?"),
        ("generate x --base away", "There is no model 'away'", "mean 'me/Away--4bit'?"),
        ("serve sql", "There is no model 'sql'", "name it with --adapter"),
        ("show demo", "'demo' is a model, not an adapter.", "--base"),
        ("add rows", "'rows' is no adapter: it has no adapter_config.json", "is it the right folder?"),
        ("download out/ad", "Cannot download 'out/ad'", "'mlx-adapters add out/ad'"),
    ],
)
def test_an_error_hints_at_what_is_true(here, line, says, hints):
    said = _places.shortened(run(line, fails=True))
    assert says in said and hints in said


def test_a_run_is_never_on_the_hub(here):
    assert place_of("out/run") == place_of("./out/run")
    assert place_of("out/run")[1] == here / "out" / "run"


def test_texts_name_paths_as_they_are_typed(here, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = f"'{here}/out/ad' and {here}/x, line 3, /var{here}/y, {here}, {here}x/z, /home/me/data, '/home/me'."
    kept = f"/var{here}/y, {here}, {here}x/z"
    assert _places.shortened(text) == f"'out/ad' and x, line 3, {kept}, ~/data, '/home/me'."


@pytest.mark.parametrize("terminal", [True, False])
def test_a_program_that_reads_the_output_gets_no_paths_from_the_home(here, monkeypatch, capsys, terminal):
    """A shell expands no ~ in $(…)."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _output.say("Kept in /home/me/out.")
    _output.out(_output.place("/home/me/out"))
    home = "~" if terminal else "/home/me"
    assert capsys.readouterr().out == f"Kept in {home}/out.\n{home}/out\n"


def test_a_text_is_told_where_here_is_gone(here, monkeypatch):
    gone = here / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert _places.shortened(f"{here}/x") == f"{here}/x"


def test_a_folder_that_is_gone_is_told(here, monkeypatch):
    monkeypatch.setattr("os.getcwd", lambda: os.stat("/nowhere"))
    assert "The folder that you are in is gone." in run("list", fails=True)


def test_help_is_a_command_too(here):
    assert run("help").startswith("Usage:") and "COMMAND" in run("help")
    assert "scale [OPTIONS] REF FACTOR" in run("help scale")


def test_a_log_says_a_sentence_once_a_command(here, capsys):
    for _ in range(2):
        _output.configure(quiet=False, debug=False)
        for _ in range(3):
            logging.getLogger("mlx_adapters.events").info("one sentence")
    assert capsys.readouterr().err == "one sentence\none sentence\n"
