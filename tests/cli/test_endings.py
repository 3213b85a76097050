"""How commands end: with a verdict and lines that can be typed next; a long one with a notification on macOS."""

import shlex
import shutil
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from helpers.adapters import make_run
from helpers.benchmarks import synthetic
from helpers.public import LEAVES

from mlx_adapters.benchmarking import run
from mlx_adapters.cli import _notify, _output, cli, publish
from mlx_adapters.demo.catalog import write_demo_data
from mlx_adapters.publishing import uploads
from mlx_adapters.system import machine

# What is typed, and what the verdict says. They run one after the other, in one place.
LINES = {
    "demo --data-only rows": "600 train",
    "models": "of memory can be used now",
    "data split data/train.jsonl halves": "halves: 16 train",
    "data check halves --base base": "nothing stands out",
    "data check halves --base base --mask-prompt --max-seq-length=300 --objective sft": "16 rows train",
    "data check data/train.jsonl --base base": "there are no validation rows",
    "estimate base": "fits: as stored",
    "estimate base --data data": "It fits",
    "estimate base --data data --rank 4 --rank v_proj=2 --memory-limit 9GB --batch-size 1": "It fits",
    "estimate base --data data --rank 4 --memory 2.5": "It fits",
    "train base --data data --name new --iterations 1 --batch-size 1": "kept in home/adapters/new",
    "train base --data data --name never --epochs 1 --dry-run": "WOULD BE",
    "pack sql sql.tar.gz": "sql.tar.gz: ",
    "add sql.tar.gz --name copy": "Added the adapter as 'copy'",
    "init project": "It trains on the rows in project/data",
    "merge sql copy --name both": "both: rank",
    "interpolate sql copy --steps 2 --data data --base ./base": "The lowest loss is",
    "eval base sql --data data --max-rows 2 --base ./base": "sql",
    "export-peft sql peft --base-model user/name": "peft: ",
    "import-peft peft --base base --name back": "Imported 'back'",
    "fuse sql full --bits none": "full: unquantized",
    "card full --write --license mit": "README.md",
}
# How the line that is told next ends: with what was typed and decides what it does.
CARRIED = {
    "data check data/train.jsonl --base base": "train base --data data/train/split --name NAME",
    "data check halves --base base": " --name NAME",
    "data check halves --base base --mask-prompt --max-seq-length=300 --objective sft": (
        " --name NAME --mask-prompt --max-seq-length 300 --objective sft"
    ),
    "estimate base --data data --rank 4 --rank v_proj=2 --memory-limit 9GB --batch-size 1": (
        " --name NAME --rank 4 --rank v_proj=2 --memory-limit 9GB --batch-size 1"
    ),
    "estimate base --data data --rank 4 --memory 2.5": " --name NAME --rank 4 --memory-limit 2.5GB",
    "interpolate sql copy --steps 2 --data data --base ./base": (
        "interpolate sql copy --steps 2 --data data --base ./base --name NAME --best"
    ),
    "eval base sql --data data --max-rows 2 --base ./base": " --quality data --max-rows 2 --base ./base",
    "card full --write --license mit": "publish full USER/REPO --license mit",
}


def next_lines(talk: str) -> list[str]:
    """The commands after "Next: "."""
    _, found, after = talk.partition("Next: ")
    lines = [line.strip() for line in after.splitlines()] if found else []
    return [line.partition(", with")[0] for line in lines if line.startswith("mlx-adapters ")]


def parse(line: str) -> None:
    """Raise a usage error unless it is a command of ours with options that it has."""
    _, *words = shlex.split(line)
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    command, rest = LEAVES[f"mlx-adapters {name}"], words[len(name.split()) :]
    program = click.Context(cli, info_name="mlx-adapters", help_option_names=["-h", "--help"])
    command.make_context(name, rest, parent=program)


def test_every_ending_has_a_verdict_and_a_line_to_type(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "usable_memory_bytes", lambda: 10**12)
    shutil.copytree(tiny_model(), "base")
    for path in write_demo_data(tmp_path / "data").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    make_run("base", "sql", losses=[(100, 2.0), (200, 1.0)])
    for line, verdict in LINES.items():
        done = CliRunner().invoke(cli, line.split())
        assert done.exit_code == 0 and verdict in done.stdout, f"{line}\n{done.output}\n{done.exception}"
        assert str(tmp_path) not in done.output, f"{line}\n{done.output}"  # paths are told from here
        told = next_lines(done.stderr)
        assert told or "Next" in done.stderr, f"{line}\n{done.output}"
        for typed in told:
            parse(typed)
        assert (told or [""])[-1].endswith(CARRIED.get(line, "")), done.stderr


def test_what_was_typed_goes_into_the_next_line_as_a_shell_takes_it(tmp_path, monkeypatch):
    """Of `card`, of `benchmark` (but for the files it wrote), and of a dry run of `publish`, which is typed again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.json").touch()
    file = SimpleNamespace(path="README.md", size_bytes=1, change="new")
    done = SimpleNamespace(files=[file], left_out={}, private=False, kind="model", repo="u/r", card="the card")
    monkeypatch.setattr(uploads, "publish", lambda *_, **__: done)
    monkeypatch.setattr(uploads, "write_card", lambda *_, **__: tmp_path / "README.md")
    monkeypatch.setattr(publish, "_answers", lambda *_: {})
    monkeypatch.setattr(run, "benchmark", lambda *_, **__: synthetic({"base": 10.0}))
    for typed, told in (
        (
            "card sql --write --repo u/r --ask 'Who?' --ask='' --benchmark b.json",
            "publish sql u/r --ask 'Who?' --ask '' --benchmark b.json",
        ),
        (
            "benchmark base --base ./b --no-cold --markdown m.md",
            "benchmark base --base ./b --no-cold --quality DATA --html report.html",
        ),
        ("benchmark base --quality 'my rows' --html r.html", "benchmark base --quality 'my rows' --html report.html"),
    ):
        assert next_lines(CliRunner().invoke(cli, shlex.split(typed)).stderr) == [f"mlx-adapters {told}"]
    assert (
        "Written: m.md, r.html.\n"
        in CliRunner().invoke(cli, ["benchmark", "base", "--markdown", "m.md", "--html", "r.html"]).stderr
    )
    typed = "publish sql u/r --exclude *.svg --revision draft --public --dry-run"
    assert CliRunner().invoke(cli, typed.split()).stderr.endswith("Next: the same line without --dry-run\n")


def test_only_what_is_absolute_is_a_path_to_be_told_shorter(monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/me")
    names = ("demo", "mlx-community/Qwen3-0.6B-4bit", "./out", "/home/me/out")
    assert [_output.place(name, home=True) for name in names] == [*names[:3], "~/out"]


@pytest.mark.parametrize(
    ("system", "terminal", "setting", "seconds", "shown"),
    [
        ("darwin", True, None, 61, True),
        ("darwin", True, "off", 61, False),
        ("darwin", False, None, 61, False),
        ("darwin", True, None, 59, False),
        ("linux", True, None, 61, False),
    ],
)
def test_a_notification_comes_after_a_minute_at_a_mac_s_terminal(
    system, terminal, setting, seconds, shown, monkeypatch
):
    calls, clock = [], iter([0.0, float(seconds)])
    monkeypatch.setattr(machine, "tool", lambda *command: calls.append(command))
    monkeypatch.setattr(_notify.sys, "platform", system)
    monkeypatch.setattr(_notify.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(_output, "heard", lambda: terminal)
    monkeypatch.setenv(_notify.SETTING, setting or "")
    with pytest.raises(ValueError), _notify.notifying(lambda: "train"):
        raise ValueError
    assert bool(calls) == shown
    if shown:
        assert calls[0][0] == "osascript" and calls[0][-2:] == ("mlx-adapters train", "stopped after 1 min 1 s")
        assert "on run {title, said}" in calls[0]


@pytest.mark.parametrize(
    ("typed", "error", "shown"),
    [
        ("train", None, ["done"]),
        ("train", ValueError, ["stopped"]),
        ("list", None, []),
        ("list", ValueError, []),
    ],
)
def test_a_notification_says_how_the_command_ended_with_any_click(typed, error, shown, monkeypatch):
    """click before 8.2 closes what a context holds without telling it of the exception."""

    def run():
        if error:
            raise error

    def leave(context, *exception):
        context.close()
        return left(context, *exception)

    left, said = click.Context.__exit__, []
    monkeypatch.setattr(click.Context, "__exit__", leave)
    monkeypatch.setattr(type(cli), "get_command", lambda _, context, name: click.Command(name, callback=run))
    monkeypatch.setattr(_notify, "AFTER_SECONDS", 0)
    monkeypatch.setattr(_notify, "_wanted", lambda: True)
    monkeypatch.setattr(_notify, "notify", lambda title, how: said.append((title, how.split()[0])))
    done = CliRunner().invoke(cli, [typed])
    assert isinstance(done.exception, error or type(None))
    assert said == [(f"mlx-adapters {typed}", how) for how in shown]
