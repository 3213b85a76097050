"""What a person types in a chat."""

import json
import os
import pty
import select
import subprocess
import sys
import time

from mlx_adapters.cli._prompt import typed


def talk(command, keys, environment, seconds=60.0):
    """What a terminal shows of a command in which each of `keys` is typed once a prompt stands there."""
    main, side = pty.openpty()
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment, close_fds=True)
    os.close(side)
    said, since, until, keys = b"", 0, time.monotonic() + seconds, list(keys)
    while time.monotonic() < until:
        if select.select([main], [], [], 0.3)[0]:
            try:
                more = os.read(main, 65536)
            except OSError:
                more = b""
            if not more:  # the program ended
                break
            said += more
            if b"\x1b[6n" in said[-200:]:  # asks where the cursor is
                os.write(main, b"\x1b[1;1R")
        elif keys and b"base>" in said[since:]:
            since = len(said)
            os.write(main, keys.pop(0))
    process.kill()
    os.close(main)
    return said.decode(errors="replace"), process.wait()


def test_a_terminal_edits_remembers_and_takes_pasted_lines_as_one(tiny_model, tmp_path):
    home, row = tmp_path / "home", tmp_path / "row.jsonl"
    environment = os.environ | {"MLX_ADAPTERS_HOME": str(home), "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "mlx_adapters", "chat", "--base", str(tiny_model("llama")), "--max-tokens", "2"]
    pasted = b"\x1b[200~List all\ncourses.\x1b[201~\r"
    keys = [b"/system Be brietf\x7f\x7ff.\r", b"let go\x03", b"/nope\r", pasted, f"/save {row}\r".encode(), b"/quit\r"]
    said, _ = talk(command, keys, environment)
    messages = json.loads(row.read_text())["messages"] if row.exists() else said
    assert messages[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "List all\ncourses."},
    ], said
    assert "Ctrl-D ends the chat." in said and "Error" not in said and "'/nope' is nothing" in said
    assert list(typed(home / "chat_history"))[:3] == ["/system Be brief.", "/nope", "List all\ncourses."]


def test_a_history_holds_texts_alone(tmp_path):
    file = tmp_path / "chat_history"
    file.write_bytes(b'"one"\n{"no": 1}\nrubbish \xff\n"two\\nlines"\n')
    assert list(typed(file)) == ["one", "two\nlines"] and list(typed(tmp_path / "none")) == []
