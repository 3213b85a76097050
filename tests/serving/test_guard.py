"""Who may ask from where, and what a connection may cost."""

import json
import logging
import resource
import socket
import threading
import time

import httpx
import pytest
from helpers.serving import eventually, running

from mlx_adapters.serving import engine
from mlx_adapters.serving.jobs import OncePerSecond
from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.serving.start import connections
from mlx_adapters.storage import files

CHAT = {"model": "base", "messages": [{"role": "user", "content": "List."}], "max_tokens": 2}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tiny_model):
    with running(tiny_model("llama"), [], header_seconds=1.0, write_seconds=1.0) as (address, engine):
        yield address, engine


def raw(address, text, wait=5.0):
    """What the server says to these bytes, until it closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(text)
        said = b""
        try:
            while piece := connection.recv(65536):
                said += piece
        except (TimeoutError, ConnectionResetError):
            said += b"<open>" if said == b"" else b""
    return said


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", ""])
def test_a_name_that_is_not_this_servers_is_refused(server, host):
    """A page whose name comes to mean 127.0.0.1 is of the server's own origin for the browser."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    answer = httpx.post(server[0] + PATH, json=CHAT, headers=headers)
    assert answer.status_code in (400, 403)
    assert httpx.get(server[0] + "/", headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"])
def test_loopbacks_names_are_this_servers(server, host):
    assert httpx.post(server[0] + PATH, json=CHAT, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1", "file://"])
def test_pages_of_other_origins_are_refused(server, origin):
    before = server[1].metrics._values["requests_total"].copy()
    for path in (PATH, "/v1/adapters", "/v1/load_lora_adapter"):
        answer = httpx.post(server[0] + path, json=CHAT, headers={"Origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert httpx.request("OPTIONS", server[0] + PATH, headers={"Origin": origin}).status_code == 403
    assert server[1].metrics._values["requests_total"] == before
    own = httpx.post(server[0] + PATH, json=CHAT, headers={"Origin": server[0]})
    assert own.status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_body_must_be_told_to_be_json(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(server[0] + PATH, content=json.dumps(CHAT), headers=headers)
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]["message"]
    with_charset = {"Content-Type": "application/json; charset=utf-8"}
    assert httpx.post(server[0] + PATH, content=json.dumps(CHAT), headers=with_charset).status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
def test_a_body_that_is_packed_is_refused_as_that(server, coding):
    answer = httpx.post(server[0] + PATH, json=CHAT, headers={"Content-Encoding": coding})
    assert answer.status_code == 415 and coding in answer.json()["error"]["message"]
    assert httpx.post(server[0] + PATH, json=CHAT, headers={"Content-Encoding": "identity"}).status_code == 200


def test_no_path_sends_elsewhere(server):
    """A proxy that ends TLS has another address than this server: whoever followed would send the key in the open."""
    for path in (PATH + "/", "/health/", "/v1/models/base/"):
        answer = httpx.post(server[0] + path, json=CHAT)
        assert answer.status_code in (404, 405) and "location" not in answer.headers


def test_origins_and_hosts_that_are_allowed(tiny_model):
    page = "http://localhost:3000"
    with running(tiny_model("llama"), [], cors_origins=(page,), allowed_hosts=("models.example",)) as (address, _):
        asked = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
        preflight = httpx.request("OPTIONS", address + PATH, headers=asked)
        assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == page
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == "x-a"
        answer = httpx.post(address + PATH, json=CHAT, headers={"Origin": page, "Host": "models.example:443"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == page
        assert (
            answer.headers["vary"] == "Origin" and "X-Ignored-Fields" in answer.headers["access-control-expose-headers"]
        )
        assert httpx.post(address + PATH, json=CHAT, headers={"Origin": page + "1"}).status_code == 403
    assert "frame-ancestors 'none'" in httpx_page(tiny_model)


def httpx_page(tiny_model):
    with running(tiny_model("llama"), []) as (address, _):
        assert httpx.request("OPTIONS", address + PATH).headers["allow"] == "GET, POST, DELETE, OPTIONS"
        return httpx.get(address + "/").headers["content-security-policy"]


def test_two_lengths_close_the_connection(server):
    body = json.dumps(CHAT).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    smuggled = b"%x\r\n%s\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" % (len(body), body)
    said = raw(server[0], head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + smuggled)
    assert said.startswith(b"HTTP/1.1 400") and said.count(b"HTTP/1.1") == 1 and b"ok" not in said


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: local", b"\r\n"])
def test_who_says_nothing_is_let_go(server, said):
    start = time.monotonic()
    assert raw(server[0], said, wait=8.0) != b"<open>" and time.monotonic() - start < 6


def test_headers_that_trickle_do_not_hold_a_connection(server):
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for _ in range(60):
                connection.sendall(b"X-A: b\r\n")
                time.sleep(0.1)


def test_a_connection_that_was_used_is_let_go_when_nobody_uses_it(server):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    said = raw(server[0], head + head, wait=8.0)
    assert said.count(b"200 OK") == 2


def test_connections_are_fewer_than_files(tiny_model):
    with running(tiny_model("llama"), [], max_connections=20, header_seconds=8.0) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(60)]
        try:
            assert eventually(lambda: sum(closed(one) for one in silent) >= 40)
            assert all(closed(one) for one in silent[:40]) and not any(closed(one) for one in silent[45:])
            assert httpx.post(address + PATH, json=CHAT).status_code == 200  # who asks gets in at once
        finally:
            for one in silent:
                one.close()
        assert httpx.post(address + PATH, json=CHAT).status_code == 200


def closed(connection):
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_the_limit_follows_the_process(monkeypatch):
    for soft, wanted in ((256, 128), (600, 400), (100_000, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        made = connections(ServeSettings())
        cells = dict(zip(made.connection_made.__code__.co_freevars, made.connection_made.__closure__, strict=True))
        assert cells["most"].cell_contents == wanted


def test_keys_have_limits_of_their_own(tiny_model):
    keys = ("first-key-of-the-test", "second-key-of-the-test")
    with running(tiny_model("llama"), [], api_keys=keys, key_rate=3, key_requests=1) as (address, engine):
        ask = lambda key, **more: httpx.post(  # noqa: E731
            address + PATH, json=CHAT | more, headers={"Authorization": f"Bearer {key}"}, timeout=60
        )
        assert [ask(keys[0]).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ask(keys[0])
        assert "3 times a minute" in refused.json()["error"]["message"] and "retry-after" in refused.headers
        long = threading.Thread(target=ask, args=(keys[1],), kwargs={"max_tokens": 1900, "ignore_eos": True})
        long.start()
        assert eventually(lambda: len(engine._open) == 1)
        assert "1 requests at once" in ask(keys[1]).json()["error"]["message"]
        long.join()
        assert ask(keys[1]).status_code == 200
        assert ask("a-key-that-is-none").status_code == 401


def test_the_access_log_has_a_line_for_each_request_when_the_server_has_ended(tiny_model, tmp_path, monkeypatch):
    append = files.append_line
    monkeypatch.setattr(files, "append_line", lambda *what: time.sleep(0.05) or append(*what))
    path, key = tmp_path / "logs" / "access.jsonl", "first-key-of-the-test"
    with running(tiny_model("llama"), [], api_keys=(key,), access_log=path, access_log_json=True) as (address, _):
        headers = {"Authorization": f"Bearer {key}"}
        httpx.post(address + PATH, json=CHAT | {"ignore_eos": True}, headers=headers)
        httpx.post(address + PATH, json=CHAT | {"stream": True, "ignore_eos": True}, headers=headers)
        httpx.post(address + PATH, json=CHAT)
        httpx.get(address + "/health")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 401, 200]
    assert all(lines[i]["model"] == "base" and lines[i]["completion_tokens"] == 2 for i in (0, 1))
    assert lines[0]["prompt_tokens"] > 2 and lines[0]["ms"] >= 0 and key not in path.read_text()
    assert lines[0]["key"] == lines[1]["key"] and lines[2]["key"] is None


def test_a_kind_of_line_is_logged_once_a_second():
    once = OncePerSecond()
    record = lambda text: logging.LogRecord("a", logging.ERROR, "f", 1, text, (), None)  # noqa: E731
    assert [once.filter(record("socket.accept() failed")) for _ in range(5)] == [True] + [False] * 4
    assert once.filter(record("another"))
    once._last = {kind: (at - 2, left) for kind, (at, left) in once._last.items()}
    last = record("socket.accept() failed")
    assert once.filter(last) and last.getMessage().endswith("(and 4 times since)")


def test_a_huge_prompt_keeps_no_small_one_waiting(tiny_model):
    with running(tiny_model("llama"), [], max_body_bytes=4 << 20) as (address, _):
        huge = CHAT | {"messages": [{"role": "user", "content": "a few words more " * 60_000}]}
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(httpx.post(address + PATH, json=huge, timeout=60)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        assert httpx.post(address + PATH, json=CHAT, timeout=60).status_code == 200
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} <= {400, 429}
        assert any(answer.json()["error"]["code"] == "context_length_exceeded" for answer in answers)


def test_a_request_is_counted_before_its_answer_ends(server, monkeypatch):
    """Who has read a whole answer finds it in the metrics."""
    counts, counted = [], server[1].metrics._values["requests_total"]
    send_all = engine.send_all

    def watched(told):
        counts.extend((getattr(piece, "finish_reason", None), sum(counted.values())) for _, piece in told)
        send_all(told)

    monkeypatch.setattr(engine, "send_all", watched)
    before = sum(counted.values())
    assert httpx.post(server[0] + PATH, json=CHAT).status_code == 200
    assert [count for reason, count in counts if reason] == [before + 1]


def test_what_is_no_http_after_its_head_is_closed_without_a_traceback(server, caplog):
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for body in (b"zz\r\n", b"-1\r\nx\r\n"):
        assert raw(server[0], head + body).startswith(b"HTTP/1.1 400")
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"zz\r\n")
        while connection.recv(65536):
            pass
    assert httpx.get(server[0] + "/v1/models").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_a_refusal_comes_with_the_header_of_its_status(server, tiny_model):
    assert set(httpx.get(server[0] + PATH).headers["allow"].split(", ")) == {"POST"}
    with running(tiny_model("llama"), [], api_keys=("sesame",)) as (address, _):
        refused = httpx.get(address + "/v1/models")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
