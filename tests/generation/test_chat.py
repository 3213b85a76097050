"""chat, ab and serve from the command line."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from click.testing import CliRunner
from helpers.adapters import random_adapter

import mlx_adapters.cli.chat as chat_module
import mlx_adapters.generation.decoding as decoding
import mlx_adapters.generation.live as live_module
from mlx_adapters.cli import cli
from mlx_adapters.errors import FormatError, ModelError, NotFoundError
from mlx_adapters.generation.chat import Chat, read_prompts
from mlx_adapters.generation.live import LiveModel, load_model
from mlx_adapters.prompt_caches.layers import count_of
from mlx_adapters.sources.registry import register

OPTIONS = ["--max-tokens", "6"]


@pytest.fixture
def model(tiny_model):
    """A llama with two registered adapters, one and two."""
    model = load_model(tiny_model("llama"))
    for i, name in enumerate(("one", "two")):
        register(random_adapter(model, seed=i + 1), name)
    return model


def answer(model, name, turns, **options):
    """What `name` answers to a conversation, read from its beginning."""
    ids = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    with model.using(name):
        return model.generate(list(ids), **options).text


def test_chat_switches_and_compares(model, tiny_model):
    typed = (
        "hello\n/use two\nhello\n/base\nhello\n/use three\n/compare one base\nhi\n/adapters\n/help\n/quit\nnot read\n"
    )
    base = str(tiny_model("llama"))
    result = CliRunner().invoke(cli, ["chat", "--adapter", "one", "--base", base, *OPTIONS], input=typed)
    assert result.exit_code == 0, result.output
    turns, wanted = [], []
    for name in ("one", "two", None):
        turns.append({"role": "user", "content": "hello"})
        wanted.append(answer(model, name, turns, max_tokens=6))
        turns.append({"role": "assistant", "content": wanted[-1]})
    turns.append({"role": "user", "content": "hi"})
    wanted += [
        f"{name}: {answer(model, key, turns, max_tokens=6).strip()}" for name, key in (("one", "one"), ("base", None))
    ]
    place = 0
    for text in wanted:
        place = result.stdout.index(text, place) + len(text)
    assert "No adapter named 'three'" in result.stderr and "/compare A B" in result.stderr
    assert "two  lora rank 4" in result.stderr and "not read" not in result.output


def test_a_conversation_is_read_once(model):
    model.attach("one")
    chat = Chat(model, system="Be short.")
    read = []
    stream = model.stream
    model.stream = lambda prompt, **options: read.append(len(prompt)) or stream(prompt, **options)
    turns = [{"role": "system", "content": "Be short."}]
    for text in ("List all students.", "And all courses?", "How many?"):
        turns.append({"role": "user", "content": text})
        got = "".join(chat.ask(text, max_tokens=8))
        model.stream = stream
        assert got == answer(model, "one", turns, max_tokens=8)
        model.stream = lambda prompt, **options: read.append(len(prompt)) or stream(prompt, **options)
        turns.append({"role": "assistant", "content": got})
    chat.reset()
    assert chat.messages == []


def test_ab(model, tiny_model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "List all."}, {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant"}]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    base = str(tiny_model("llama"))
    result = CliRunner().invoke(cli, ["ab", str(file), "one", "base", "--base", base, "--json", *OPTIONS])
    assert result.exit_code == 0, result.output
    answered = json.loads(result.stdout)
    assert [pair["prompt"] for pair in answered["pairs"]] == ["List all.", "How many?"]
    for pair in answered["pairs"]:
        turn = [{"role": "user", "content": pair["prompt"]}]
        assert pair["a"] == answer(model, "one", turn, max_tokens=6)
        assert pair["b"] == answer(model, None, turn, max_tokens=6)
    options = ["--base", base, "--draft-model", base, "--json", *OPTIONS]
    guessed = CliRunner().invoke(cli, ["ab", str(file), "one", "base", *options])
    assert json.loads(guessed.stdout) == answered
    shown = CliRunner().invoke(cli, ["ab", str(file), "one", "two", "--base", base, *OPTIONS])
    assert shown.stdout.count("\none: ") == 2 and shown.stdout.count("\ntwo: ") == 2


def test_a_system_message_comes_before_the_question(model, tiny_model, tmp_path):
    """In `generate` and in `ab`, as the conversation that it is."""
    base = str(tiny_model("llama"))
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}]
    wanted = model.generate(told, max_tokens=6).text
    options = ["--system", "Be brief.", "--max-tokens", "6", "--json"]
    answer = CliRunner().invoke(cli, ["generate", "Go.", "--base", base, *options])
    assert json.loads(answer.stdout)["text"] == wanted
    (tmp_path / "prompts.txt").write_text("Go.\n")
    pairs = CliRunner().invoke(cli, ["ab", str(tmp_path / "prompts.txt"), "base", "base", "--base", base, *options])
    assert json.loads(pairs.stdout)["pairs"][0]["a"] == wanted
    refused = CliRunner().invoke(cli, ["generate", "Go.", "--base", base, "--raw", *options])
    assert "chat template" in str(refused.exception)
    ended = CliRunner().invoke(cli, ["generate", "Go.", "--base", base, "--extra-eos", "nothing like it"])
    assert "no token of this model" in str(ended.exception)


def test_prompt_files(tmp_path):
    with pytest.raises(NotFoundError):
        read_prompts(tmp_path / "none.txt")
    for content in (
        '{"x": 1}',
        "[" * 9999,
        "[]",
        "3",
        '{"messages": []}',
        "{",
        '{"messages": [{"role": "user", "content": 3}]}',
    ):
        file = tmp_path / "bad.jsonl"
        file.write_text(content)
        with pytest.raises(FormatError):
            read_prompts(file)
    file = tmp_path / "marked.JSONL"
    file.write_text('{"prompt": "a"}', encoding="utf-8-sig")
    assert read_prompts(file) == ["a"]
    for content in (b"", b"\n\n", b"\xff\xfe\xff"):
        file = tmp_path / "bad.txt"
        file.write_bytes(content)
        with pytest.raises(FormatError):
            read_prompts(file)


def refused(address):
    """Whether the server takes no connections any more."""
    try:
        httpx.get(address + "/health")
    except httpx.TransportError:
        return True
    return False


def test_a_second_interrupt_drops_what_is_under_way(tiny_model):
    command = [sys.executable, "-m", "mlx_adapters", "serve", str(tiny_model("llama")), "--port", "0"]
    server = subprocess.Popen([*command, "--name", "base"], stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        server.stderr.readline()
        address = server.stderr.readline().split()[2]
        body = {"model": "base", "prompt": [5] * 8, "max_tokens": 2000, "stream": True, "temperature": 0}
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", address + "/v1/completions", json=body) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            while not refused(address):  # then the first one is handled
                pass
            server.send_signal(signal.SIGINT)
            list(lines)
        assert server.wait(10) == 130
        said = server.stderr.read().strip().splitlines()  # how to ask, and how it ended
        assert "curl" in said[0] and said[1:] == ["Finishing what is under way; Ctrl-C drops it.", "Interrupted."]
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_serve_listens_and_drains(model, tiny_model):
    command = [
        sys.executable,
        "-m",
        "mlx_adapters",
        "serve",
        str(tiny_model("llama")),
        "--port",
        "0",
        "--adapter",
        "one",
        "--adapter",
        "second=two@",
        "--drain-seconds",
        "600",
        "--name",
        "base",
    ]
    wrong = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert wrong.returncode == 2 and "second" not in wrong.stdout and "Error" in wrong.stderr
    command[command.index("second=two@")] = "second=two"
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        lines = [server.stderr.readline(), server.stderr.readline()]
        assert "base, one, second" in lines[0]
        address = lines[1].split()[2]
        body = {"model": "second", "prompt": "List", "max_tokens": 4}
        answer = httpx.post(address + "/v1/completions", json=body, timeout=120)  # a GPU compiles its kernels first
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        assert httpx.get(address + "/health/ready").json() == {"status": "ok"}
        server.send_signal(signal.SIGTERM)
        while (ready := httpx.get(address + "/health/ready")).status_code == 200:
            pass
        assert ready.status_code == 503 and ready.json() == {"status": "leaving"}
        assert httpx.get(address + "/health/live").status_code == httpx.get(address + "/health").status_code == 200
        assert httpx.post(address + "/v1/completions", json={"model": "one", "prompt": "List"}).status_code == 200
        server.send_signal(signal.SIGINT)  # it need not wait any longer
        assert server.wait(15) == 0
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys):
    class Slow:
        def ask(self, line, **_):
            yield "half"
            raise KeyboardInterrupt

    def talk():
        lines = iter(["x", None])
        monkeypatch.setattr(chat_module, "Prompt", lambda: SimpleNamespace(read=lambda _: next(lines)))
        chat_module._talk(Slow(), False, {})

    monkeypatch.setattr(chat_module, "_who", lambda _: "base")
    monkeypatch.setattr(chat_module.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    talk()
    said = capsys.readouterr()
    assert said.out == "half\n" and "Ctrl-D ends the chat" in said.err
    monkeypatch.setattr(chat_module.sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(KeyboardInterrupt):
        talk()


def test_what_was_read_of_a_stopped_answer_is_not_read_on(model):
    chat = Chat(model)
    stopped = chat.ask("Count to a hundred.", max_tokens=20)
    next(stopped)
    stopped.close()
    again, fresh = ("".join(one.ask("Hello", max_tokens=12)) for one in (chat, Chat(model)))
    assert chat.messages[0]["content"] == "Hello" and again == fresh


def test_no_generator_is_left_to_the_interpreter(model, monkeypatch):
    """Python 3.12.3 does not end what an ended generator was reading, while somebody keeps the ended one."""
    kept = []
    for owner, name in ((Chat, "_answer"), (LiveModel, "stream"), (live_module, "decode"), (decoding, "generate_step")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _make=make, **k: kept.append(_make(*a, **k)) or kept[-1])
    chat = Chat(model)
    stopped = chat.ask("Count to a hundred.", max_tokens=20)
    next(stopped)
    assert not chat.cache.tokens and count_of(chat.cache.layers) == 0  # nobody goes on from what is being read
    stopped.close()
    assert len(kept) == 4 and all(inspect.getgeneratorstate(one) == inspect.GEN_CLOSED for one in kept)
    assert len(chat.cache.tokens) == count_of(chat.cache.layers) > 20


def test_use_base_and_what_is_no_text(model):
    chat = Chat(model)
    model.attach("one")
    chat_module._obey(chat, "/use base", False)
    assert all(info.weight is None for info in model.adapters)
    with pytest.raises(ModelError, match="Unicode"):
        list(chat.ask("caf\udcff"))
    with pytest.raises(ModelError, match=r"has 10,000,0.. characters, more than the 10,000,000"):
        list(chat.ask("x" * 10_000_001))
