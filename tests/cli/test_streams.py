"""What the caller leaves of the standard streams, and what may be written to them."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest
from helpers.adapters import make_run
from helpers.serving import eventually

from mlx_adapters.cli import _output
from mlx_adapters.events import Note, Progress

PROGRAM = [sys.executable, "-m", "mlx_adapters"]
HOSTILE = "\x1b[2J\x1b]0;title\x07\x1b[31mred\rover\x9b2J\u202eab\x00"


def shell(redirections: str, *arguments: str, **options):
    """The program under `sh`, with these redirections."""
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **options)


@pytest.fixture
def adapters(tiny_model):
    base = tiny_model("llama")
    return [make_run(base, name) for name in ("sql", "chat")]


def test_closed_streams_are_as_empty_ones(adapters):
    kept = shell("<&-", "remove", "sql")
    assert kept.returncode == 2 and "pass --yes" in kept.stderr and "Traceback" not in kept.stderr
    for arguments in (("generate", "-", "--adapter", "sql"), ("generate", "-", "--base", "demo", "--json")):
        asked = shell("<&-", *arguments)
        assert asked.returncode == 2 and "nothing on standard input" in asked.stderr
    merged = shell("<&- >&- 2>&-", "merge", "sql", "chat", "--name", "both")
    assert merged.returncode == 0 and json.loads(shell("<&-", "show", "both", "--json").stdout)["name"] == "both"
    weights = (adapters[0].parent / "both" / "adapters.safetensors").read_bytes()
    assert weights[8:9] == b"{", "nothing printed went into a file that took a closed stream's number"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device")
def test_a_full_output_is_an_error_of_one_sentence(adapters):
    for arguments in (["list"], ["list", "--json"], ["show", "sql"]):
        ended = shell(">/dev/full", *arguments)
        assert (ended.returncode, ended.stderr) == (
            1,
            "Error: Standard output cannot be written: No space left on device.\n",
        )
    ended = shell(">/dev/full", "chat", "--adapter", "sql", "--max-tokens", "2", input="One?\nTwo?\nThree?\n")
    assert ended.returncode == 1 and ended.stderr.count("Standard output cannot be written") == 1
    ended = shell(">/dev/full", "--help")
    assert (ended.returncode, ended.stderr) == (1, "Error: The system refused: No space left on device.\n")
    assert shell(">/dev/full 2>&1", "list").returncode == 1
    assert shell("2>/dev/full", "list").returncode == 0, "talk that nobody hears stops nothing"
    assert shell("2>/dev/full", "show", "nobody").returncode == 1
    assert shell("2>&-", "tag", "sql", "fast").returncode == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_another_encoding_loses_signs_and_nothing_else(adapters, encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    metadata = adapters[0] / "adapter_metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"tags": ["größe-λ", "\ud800"]}))
    shown = shell("", "show", "sql", env=env)
    assert shown.returncode == 0 and "LAYERS" in shown.stdout and not shown.stderr
    document = json.loads(shell("", "show", "sql", "--json", env=env).stdout)
    assert document["metadata"]["tags"][0] == "größe-λ"
    refused = shell("", "show", "nöbödÿ-λ", env=env)
    assert refused.returncode and refused.stderr.startswith(("Error: ", "Usage: "))


def test_a_profiler_gets_its_turn_at_the_end():
    profiled = [sys.executable, "-m", "cProfile", "-m", "mlx_adapters", "--version"]
    assert "function calls" in subprocess.run(profiled, capture_output=True, text=True).stdout


def test_a_reader_that_left_ends_the_program_in_silence(adapters):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        for arguments in (["list"], ["list", "--json"], ["show", "sql", "--layers"]):
            ended = subprocess.run([*PROGRAM, *arguments], stdout=gone, stderr=subprocess.PIPE, text=True)
            assert (ended.returncode, ended.stderr) == (0, ""), arguments


def test_the_system_s_refusals_are_said_in_a_sentence(monkeypatch, capsys):
    from mlx_adapters import cli

    refusals = [
        (PermissionError(13, "Permission denied", "/x/y"), "Error: '/x/y': Permission denied.\n"),
        (OSError("odd"), "Error: The system refused: odd.\n"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "Error: A text is not valid Unicode"),
        (MemoryError(), "Error: There is not enough memory.\n"),
        (
            RuntimeError("filesystem error: temp_directory_path: No such file or directory"),
            "Error: MLX could not compile what the CPU computes: No such file or directory.\nHint: it does so",
        ),
        (
            RuntimeError(
                '[Compile::eval_cpu] Failed to compile function F: "g++ ..." 2>&1", the output is: '
                "/tmp/a.cpp:1: fatal error: error closing /tmp/cc.s: No space left on device\ncompilation terminated."
            ),
            "Error: MLX could not compile what the CPU computes: No space left on device.\n",
        ),
        (RuntimeError("[malloc] Unable to allocate 9 bytes."), "Error: There is not enough memory.\n"),
    ]
    for error, said in refusals:

        def fail(standalone_mode: bool, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cli.cli, "main", fail)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert capsys.readouterr().err.startswith(said)


def test_no_control_character_reaches_the_terminal(capsys, monkeypatch):
    on_event = _output.progress()
    for say in (_output.out, _output.note, _output.warn, _output.note_inline, _output.error, _output.show_live):
        say(f"a\tb {HOSTILE}")
    _output.error("message", f"hint {HOSTILE}")
    _output.table(["NAME", f"T{HOSTILE}"], [[f"x\nfake row{HOSTILE}", 1], ["y", 2]])
    on_event(Note(HOSTILE))
    on_event(Progress(f"reading {HOSTILE}", 1, 1, "row"))
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not set(text) & set("\x1b\r\x07\x00\x9b\u202e")
    assert "a\tb redover2Jab" in out and "title" not in out + err
    assert len(out.splitlines()) == 4, "a name with a line end is one row"
    _output.emit_json({"text": HOSTILE})
    document = capsys.readouterr().out
    assert json.loads(document)["text"] == HOSTILE and not set(document) & set("\x1b\x9b\u202e")


def test_the_time_left_is_that_of_the_whole_job(capsys, monkeypatch):
    """What is left of the stage by the pace of this run (a continued one began at 8), and what comes after it."""
    clock = iter((0.0, 20.0))
    monkeypatch.setattr(_output.time, "monotonic", lambda: next(clock))
    on_event = _output.progress()
    on_event(Progress("round", 8, 20, "layer", later=120.0))
    on_event(Progress("round", 10, 20, "layer", later=60.0))
    assert capsys.readouterr().err.splitlines()[-1] == "round: 10/20 layers, 0.1/s, 2 min 40 s left"


def test_our_own_colors_survive_on_a_terminal(adapters):
    master, slave = pty.openpty()
    env = os.environ | {"TERM": "xterm"}
    env.pop("NO_COLOR", None)
    code = (
        f"from mlx_adapters.cli import _output; _output.error({HOSTILE!r}); _output.out(_output.style('b', bold=True))"
    )
    subprocess.run([sys.executable, "-c", code], stdout=slave, stderr=slave, env=env)
    shown = b""
    while b"b\x1b[0m" not in shown[-12:]:
        shown += os.read(master, 4096)
    os.close(slave)  # not before: macOS forgets what nobody has read
    os.close(master)
    assert b"\x1b[31mError: \x1b[0mred over2Jab" in shown and b"\x1b[2J" not in shown
    assert b"\x1b[1mb\x1b[0m" in shown


SHOWS = """
import sys, time
from mlx_adapters.cli import _output
from mlx_adapters.events import Progress
on_event = _output.progress()
for done in (1, 2, 3):
    on_event(Progress("fuse", done, 3, "layer"))
    time.sleep(0.11)
on_event(Progress("next", 1, 2, "layer"))
_output.table(["NAME", "PATH"], [["a", "word " * 20]])
print("rich" in sys.modules)
"""


def on_a_terminal(code: str, **environment: str) -> str:
    """What a program shows on a terminal of 40 columns."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "40", **environment}
    with subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=env) as program:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal on Linux
            while more := os.read(master, 4096):
                shown += more
    os.close(master)
    assert program.returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_gets_bars_and_folded_tables_and_a_pipe_lines():
    shown = on_a_terminal(SHOWS, NO_COLOR="1")
    live = shown.replace("\x1b[K", "").split("\r")
    assert live[1].startswith("fuse ━") and live[1].endswith(" 1/3 layers") and len(live[1]) < 40
    assert live[3].startswith("fuse: 3/3 layers") and live[3].endswith("\n")
    assert live[4].startswith("next ━") and "NAME  PATH\n" in live[5], "what ended early leaves no bar"
    assert max(map(len, live[5].splitlines())) <= 40 and live[5].count("word") == 20
    piped = subprocess.run([sys.executable, "-c", SHOWS], capture_output=True, text=True, check=True)
    assert piped.stderr.splitlines()[0] == "fuse: 1/3 layers" and "\x1b" not in piped.stderr
    assert piped.stdout.splitlines() == ["NAME  PATH", f"a     {'word ' * 20}".rstrip(), "False"]


def test_a_terminal_is_told_what_takes_long_to_begin(monkeypatch):
    said = []
    monkeypatch.setattr(_output, "show_live", said.append)
    monkeypatch.setattr(_output, "live", lambda: True)
    monkeypatch.setattr(_output, "_said", False)
    with _output.never_silent("generate", seconds=0.01):
        assert eventually(lambda: said == ["generate: getting ready ..."])
    _output.note("Something.")
    with _output.never_silent("generate", seconds=0.01):
        assert not eventually(lambda: len(said) > 1, seconds=0.05)
