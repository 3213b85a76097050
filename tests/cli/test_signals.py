"""Ctrl-C and other signals, from the first moment of the program to its last."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mlx_adapters import cli
from mlx_adapters.cli import _output
from mlx_adapters.cli import chat as chat_module
from mlx_adapters.system.interrupt import STOPS, Terminated


@pytest.fixture
def handlers():
    """The program sets some; they are put back."""
    before = {number: signal.getsignal(number) for number in STOPS}, sys.unraisablehook
    yield
    for number, handler in before[0].items():
        signal.signal(number, handler)
    sys.unraisablehook = before[1]


def program(before: str, *arguments: str) -> subprocess.CompletedProcess:
    """The program after these statements of Python."""
    code = f"import os, signal, sys; sys.argv = ['mlx-adapters', *{arguments!r}]\n{before}\n"
    code += "from mlx_adapters.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("told", ["Interrupted.\n", ""], ids=["heard", "nobody hears"])
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_while_the_program_is_loaded_ends_it_in_a_word(number, told):
    found = f"lambda name, *_: os.kill(os.getpid(), {number:d}) if name == 'click' else None"
    before = f"sys.meta_path.insert(0, type('Finder', (), {{'find_spec': {found}}}))"
    handled = f"signal.signal({number:d}, signal.SIG_DFL if {number:d} != 2 else signal.default_int_handler)"
    ended = program(f"{handled}; {before}" + ("" if told else "; os.close(2)"), "list")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", told)


def test_a_signal_after_the_work_is_done_changes_nothing():
    late = "import atexit; [atexit.register(os.kill, os.getpid(), n) for n in (1, 2, 15)]"
    ended = program(late, "--version")
    assert ended.returncode == 0 and ended.stdout.startswith("mlx-adapters") and ended.stderr == ""


def test_the_program_ends_before_python_clears_up():
    """Threads in MLX that are still there would abort the process; what was to be done at the end is done."""
    busy = "import atexit, threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    cleared = "sys.kept = type('Kept', (), {'__del__': lambda self: os.write(1, b'cleared')})()"
    ended = program(f"{busy}; {cleared}; atexit.register(print, 'at the end')", "--nonsense")
    assert ended.returncode == 2 and ended.stdout == "at the end\n" and "--nonsense" in ended.stderr


WAITS = {
    "a lock": "lock.acquire()",
    "a future": "concurrent.futures.Future().result()",
    "a queue": "queue.SimpleQueue().get()",
    "a thread": "thread.join()",
    "a condition": "threading.Event().wait()",
}


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_signal_that_does_not_reach_the_main_thread_ends_its_wait(wait, number):
    """As one that comes just before it begins to wait: Python has taken it, and looks at it when the wait ends."""
    code = f"""
import concurrent.futures, os, queue, signal, threading, time
from mlx_adapters.system.interrupt import raising
signal.signal(signal.SIGHUP, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler), raising()
lock = threading.Lock()
lock.acquire()
signal.pthread_sigmask(signal.SIG_BLOCK, [{number:d}])
thread = threading.Thread(target=lock.acquire, daemon=True)
thread.start()
def send():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [{number:d}])
    time.sleep(0.2)  # the main thread waits by now
    signal.pthread_kill(threading.get_ident(), {number:d})
threading.Thread(target=send, daemon=True).start()
try:
    {wait}
except KeyboardInterrupt as error:
    os.write(1, type(error).__name__.encode())
os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    told = "KeyboardInterrupt" if number == signal.SIGINT else "Terminated"
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, told, "")


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_comes_while_a_library_clears_up_is_not_lost(number, handlers, monkeypatch):
    class Cleared:
        def __del__(self):
            signal.raise_signal(number)

    def work(**_):
        Cleared()
        time.sleep(5)

    def left():
        raise SystemExit(130)

    monkeypatch.setattr(cli.cli, "main", work)
    monkeypatch.setattr(_output, "leave_interrupted", left)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


def test_a_chat_ends_by_a_signal_that_is_no_ctrl_c(monkeypatch):
    def read(_):
        raise Terminated

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(chat_module, "Prompt", lambda: SimpleNamespace(read=read))
    monkeypatch.setattr(chat_module, "_who", lambda _: "base")
    with pytest.raises(Terminated):
        chat_module._talk(None, False, {})
