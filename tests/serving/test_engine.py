"""What the engine says of the model that it serves, and what it keeps waiting for what."""

import threading

import httpx
import pytest
from helpers.adapters import random_adapter
from helpers.serving import eventually, running
from helpers.tiny_configs import tiny_base

from mlx_adapters.errors import ConfigError
from mlx_adapters.generation.live import load_model
from mlx_adapters.serving import engine as engine_module
from mlx_adapters.serving import jobs, residents, transport
from mlx_adapters.serving.engine import Engine
from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.sources.registry import register
from mlx_adapters.system.door import mx

CHAT = {"messages": [{"role": "user", "content": "List all students."}], "temperature": 0}


@pytest.mark.parametrize("name, in_turn", [("llama4", True), ("qwen3", False)])
def test_it_tells_whether_requests_are_decoded_one_after_another(name, in_turn, tmp_path):
    model = load_model(tiny_base(tmp_path / "base", name))
    assert Engine(model, ServeSettings(), "base").in_turn == in_turn
    assert not Engine(model, ServeSettings(max_batch=1), "base").in_turn


def test_who_ended_together_is_read_together(tiny_model, monkeypatch):
    """And who asked alone waits for nobody."""
    monkeypatch.setattr(jobs, "COMPANY_SECONDS", 60)
    monkeypatch.setattr(jobs, "MOST_COMPANY_SECONDS", 60)
    monkeypatch.setattr(jobs, "RETURN_SECONDS", 60)
    with running(tiny_model("llama"), []) as (address, engine):
        passes, reader = [], engine._batcher.reader
        read = reader._pass
        reader._pass = lambda group, most: (passes.append(len(group)), read(group, most))[1]

        def ask(text, **more):
            body = {"model": "base", "prompt": text, "max_tokens": 3, "temperature": 0, **more}
            assert httpx.post(address + "/v1/completions", json=body, timeout=60).status_code == 200

        ask("the sea")
        ask("by night")
        ask("one two", n=3)
        passes.clear()
        threads = [threading.Thread(target=ask, args=(text,)) for text in ("cat dog", "red sun", "old man")]
        for thread in threads:
            thread.start()
            thread.join(0.1)
        for thread in threads:
            thread.join()
        assert passes == [3]


def test_nothing_is_held_back_while_the_device_works(tiny_model, monkeypatch):
    """What a step wrote is told when the next one is handed over, or before a prompt is read."""
    handed, held = mx.async_eval, []
    with running(tiny_model("llama"), []) as (address, engine):
        monkeypatch.setattr(mx, "async_eval", lambda *a: (held.append(("step", len(engine._untold))), handed(*a))[1])
        reader = engine._batcher.reader
        read = reader._pass
        reader._pass = lambda *given: (held.append(("pass", len(engine._untold))), read(*given))[1]
        body = CHAT | {"model": "base", "max_tokens": 40, "stream": True}
        with httpx.stream("POST", address + "/v1/chat/completions", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            httpx.post(address + "/v1/chat/completions", json=CHAT | {"model": "base", "max_tokens": 4})
            assert sum(line.startswith("data: {") for line in lines) >= 30
    assert {kind for kind, _ in held} == {"step", "pass"} and not any(count for _, count in held)


@pytest.fixture
def slow_disk(monkeypatch):
    """While `.clear()`, whoever reads an adapter waits."""
    turning, load = threading.Event(), residents.load_adapter
    turning.set()
    monkeypatch.setattr(residents, "load_adapter", lambda name: (turning.wait(60), load(name))[1])
    yield turning
    turning.set()


def test_answers_go_on_while_adapters_are_read(tiny_model, slow_disk, monkeypatch):
    """Also a stream that waits for one is told that it is not forgotten."""
    monkeypatch.setattr(transport, "ALIVE_SECONDS", 0.05)
    folder = tiny_model("llama")
    for name in "pqs":
        register(random_adapter(load_model(folder), seed=ord(name)), name)
    with running(folder, [(n, n) for n in "pqs"], max_adapters=2, allow_load=True) as (address, engine):
        url = address + "/v1/chat/completions"
        slow_disk.clear()
        parts, late = [], []

        def wait_for_s():
            with httpx.stream("POST", url, json=CHAT | {"model": "s", "max_tokens": 3, "stream": True}) as answer:
                parts.extend(answer.iter_lines())

        def add():
            late.append(httpx.post(address + "/v1/adapters", json={"name": "r", "reference": "p"}, timeout=60))

        threads = [threading.Thread(target=work) for work in (wait_for_s, add, add)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: any(line.startswith(":") for line in parts))
        for name in ("p", "base"):  # more than OVERTAKING_SECONDS later too: who waits for a disk holds up nobody
            answer = httpx.post(url, json=CHAT | {"model": name, "max_tokens": 40}, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 40
        vector = httpx.post(address + "/v1/embeddings", json={"model": "p", "input": "a"})
        assert vector.status_code == 200 and not late
        slow_disk.set()
        for thread in threads:
            thread.join(30)
        assert "data: [DONE]" in parts
        assert sorted(answer.status_code for answer in late) == [201, 409]
        assert httpx.post(address + "/v1/embeddings", json={"model": "q", "input": "a"}).status_code == 200
        assert engine.catalog.served["s"].reading is None


def test_nobody_waits_without_end_for_a_disk(tiny_model, slow_disk, monkeypatch):
    """Not who asks for a vector, not who loads an adapter, not who ends the server."""
    monkeypatch.setattr(engine_module, "READ_SECONDS", 0.05)
    folder = tiny_model("llama")
    register(random_adapter(load_model(folder), seed=5), "p")
    with running(folder, [("p", "p"), ("q", "p")], allow_load=True, max_adapters=1, max_seconds=0.3) as (address, _):
        slow_disk.clear()
        for path, body in (
            ("embeddings", {"model": "q", "input": "a"}),
            ("adapters", {"name": "r", "reference": "p"}),
            ("chat/completions", CHAT | {"model": "q"}),
        ):
            answer = httpx.post(f"{address}/v1/{path}", json=body, timeout=60)
            assert answer.status_code == 504, path
        base = {"model": "base", "input": "a"}
        assert eventually(lambda: httpx.post(address + "/v1/embeddings", json=base).status_code == 200)


def test_what_the_engine_does_not_come_to_in_time_is_told_and_does_not_happen_later(tiny_model):
    folder = tiny_model("llama")
    register(random_adapter(load_model(folder), seed=5), "p")
    with running(folder, [], allow_load=True, max_seconds=0.2) as (address, engine):
        busy = threading.Event()
        engine._commands.put(lambda: busy.wait(60))
        assert httpx.post(address + "/v1/adapters", json={"name": "p"}).status_code == 504
        assert httpx.post(address + "/v1/embeddings", json={"model": "base", "input": "a"}).status_code == 504
        busy.set()
        base = {"model": "base", "input": "a"}
        assert eventually(lambda: httpx.post(address + "/v1/embeddings", json=base).status_code == 200)
        assert engine.catalog.served == {}


def test_an_engine_that_fails_tells_everybody_who_waits(tiny_model):
    with running(tiny_model("llama"), [], max_seconds=60) as (address, engine):
        busy, late = threading.Event(), []

        def fail():
            busy.wait(60)
            raise SystemExit

        engine._commands.put(fail)
        asked = {"embeddings": {"input": "a"}, "chat/completions": CHAT}
        threads = [
            threading.Thread(
                target=lambda at=at: late.append(httpx.post(f"{address}/v1/{at[0]}", json=at[1], timeout=90))
            )
            for at in ((path, body | {"model": "base"}) for path, body in asked.items())
        ]
        for thread in threads:
            thread.start()
        assert eventually(lambda: len(engine._commands) == 2)
        busy.set()
        for thread in threads:
            thread.join(5)
        assert [answer.status_code for answer in late] == [500, 500]


@pytest.mark.parametrize(
    ("error", "status", "told"), [(ConfigError("top_k is odd."), 400, "top_k is odd."), (KeyError("x"), 500, "request")]
)
def test_an_odd_request_is_not_told_as_a_damaged_adapter(error, status, told, tiny_model, monkeypatch):
    def odd(*_, **__):
        raise error

    folder = tiny_model("llama")
    register(random_adapter(load_model(folder), seed=5), "p")
    with running(folder, [("p", "p")]) as (address, _):
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "Sampler", odd)
            answer = httpx.post(address + "/v1/chat/completions", json=CHAT | {"model": "p"})
        assert answer.status_code == status and told in answer.json()["error"]["message"]
        assert "p" not in answer.json()["error"]["message"].split()
        again = httpx.post(address + "/v1/chat/completions", json=CHAT | {"model": "p"}, timeout=120)
        assert again.status_code == 200


def test_what_was_read_is_told_and_goes_with_its_adapter(tiny_model):
    folder = tiny_model("llama")
    register(random_adapter(load_model(folder), seed=5), "p")
    with running(folder, [("p", "p")], allow_load=True) as (address, engine):

        def cached(path, **body):
            usage = httpx.post(address + path, json={"model": "p", "temperature": 0, **body}).json()["usage"]
            details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
            return details["cached_tokens"], usage.get("prompt_tokens") or usage["input_tokens"]

        ask = {"messages": CHAT["messages"], "max_tokens": 3}
        assert cached("/v1/chat/completions", **ask)[0] == 0
        known, tokens = cached("/v1/chat/completions", **ask, n=2)
        assert known == tokens - 1
        assert cached("/v1/responses", input=CHAT["messages"], max_output_tokens=3)[0] == tokens - 1
        assert cached("/v1/chat/completions", **ask | {"model": "base"})[0] == 0  # other weights
        assert cached("/v1/completions", prompt=list(range(5, 50)), max_tokens=2)[0] == 0
        assert cached("/v1/completions", prompt=[*range(5, 50), 7], max_tokens=2)[0] == 45
        text = httpx.get(address + "/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert int(values['mlx_adapters_cached_tokens_total{model="p"}']) == 3 * (tokens - 1) + 45
        of_all = int(values["mlx_adapters_prompt_cache_bytes"])
        assert httpx.delete(address + "/v1/adapters/p").status_code == 200
        assert eventually(lambda: 0 < engine._batcher.reader.known.nbytes < of_all / 2)  # the base's is left
        httpx.post(address + "/v1/adapters", json={"name": "p", "reference": "p"})
        assert cached("/v1/chat/completions", **ask)[0] == 0
    with running(folder, [], prompt_cache_bytes=0) as (address, engine):
        assert [cached("/v1/chat/completions", **ask | {"model": "base"})[0] for _ in range(2)] == [0, 0]
