"""The page of `serve`: one question at a time, and an answer belongs to the conversation that asked for it."""

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

PAGE = files("mlx_adapters.serving").joinpath("page.html")
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def seen():
    """What a user sees who types too early, clears in the middle of an answer, and loses a connection."""
    played = subprocess.run([NODE, str(Path(__file__).with_name("page.js")), str(PAGE)], capture_output=True, text=True)
    assert played.returncode == 0, played.stderr
    return json.loads(played.stdout)


if NODE:  # (a browser plays the same in scripts/check_page.py)

    def test_enter_waits_as_send_does(seen):
        assert seen["requestsWhileBusy"] == 2 and seen["kept"] == "two"
        assert seen["enabledAfterwards"] and seen["second"] == ["one", "first", "two"]

    def test_clear_ends_the_answer_and_keeps_it_out_of_the_next_conversation(seen):
        assert seen["endedByClear"] == [True, True] and seen["enabledByClear"]
        assert seen["afterClear"] == [] and seen["note"] == ""
        assert seen["third"] == ["three"] and seen["disabledAgain"]
        assert seen["shown"] == ["user: three", "assistant: fresh"]

    def test_a_lost_connection_is_no_answer(seen):
        assert seen["lost"] == "error: The connection was lost."
        assert seen["fifth"] == [["three", "fresh", "five"], ["three", "fresh", "four", "whole", "five"]]


def test_every_way_to_ask_or_clear_heeds_the_running_answer():
    """Read from the script, where nothing can play it."""
    script = PAGE.read_text(encoding="utf-8").partition("<script>")[2]
    submit = script[script.index('addEventListener("submit"') :]
    assert 0 < submit.index("|| running) return") < submit.index("ask(pane")
    clear = script[script.index('field("clear")') :]
    assert clear.index("running.abort()") < clear.index("pane.messages = []")
    asking = script[script.index("async function ask(") : script.index("const form =")]
    assert asking.count("pane.messages") == 1, "the conversation is taken once, at the beginning"
