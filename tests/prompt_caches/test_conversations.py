"""Conversations in a mixed batch that goes on from what it knows: every answer is the one of a cold run."""

import numpy as np
import pytest
from helpers.adapters import random_adapter
from helpers.tiny_configs import tiny_base

from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.prompt_caches.tree import PrefixTree
from mlx_adapters.runtime.pool import AdapterPool

END = 2


def model_of(folder, count=2):
    model = load_model(folder)
    model.pool = AdapterPool(model.module, group=False)
    for i in range(count):
        model.attach(random_adapter(model, "dora" if i else "lora", rank=2 + i, seed=i), name=str(i))
    model.use(None)
    return model


def finish(batcher, steps=10_000):
    """{request: [tokens]} of what is under way."""
    made = {}
    while not batcher.idle and steps > 0:
        steps -= 1
        for token in batcher.step():
            made.setdefault(token.request, []).append(token.id)
    return made


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5", "llama4"])
def test_answers_are_those_of_cold_runs(name, tiny_model, tmp_path):
    model = model_of(tiny_model("llama") if name == "llama" else tiny_base(tmp_path / name, name))
    warm = Batcher(model.module, model.pool, max_batch=3, prefill=16, cache_bytes=1 << 30)
    cold = Batcher(model.module, model.pool, max_batch=3, prefill=16)
    assert warm.reader.known.limit
    random, names = np.random.default_rng(3), [None, "0", "1", None, "0"]
    system = random.integers(5, 200, 30).tolist()
    chats = [[*system, END, *random.integers(5, 200, 5 + i).tolist(), END, 7] for i in range(len(names))]
    known = [0] * len(chats)
    for _ in range(3):
        made = []
        for batcher in (cold, warm):
            adapters = [name and model.pool.get(name) for name in names]
            requests = [
                Request(chat, adapter, 4 + i, stop_tokens=frozenset({END}))
                for i, (chat, adapter) in enumerate(zip(chats, adapters, strict=True))
            ]
            for request in requests:
                batcher.submit(request)
            answers = finish(batcher)
            made.append([answers[request] for request in requests])
        assert made[0] == made[1]
        assert all(request.cached_tokens >= tokens for request, tokens in zip(requests, known, strict=True))
        known = [len(chat) + len(answer) for chat, answer in zip(chats, made[1], strict=True)]
        user = random.integers(5, 200, 5).tolist()
        chats = [[*chat, *answer, *user, END, 7] for chat, answer in zip(chats, made[1], strict=True)]


def test_equal_prompts_are_read_once_for_each_adapter(tiny_model):
    model = model_of(tiny_model("llama"))
    batcher = Batcher(model.module, model.pool, max_batch=16, prefill=64, cache_bytes=1 << 30)
    prompt = np.random.default_rng(4).integers(5, 200, 100).tolist()
    requests = [Request(prompt, model.pool.get("0") if i % 2 else None, 5) for i in range(16)]
    for request in requests:
        batcher.submit(request)
    made = finish(batcher)
    assert [request.cached_tokens for request in requests] == [0, 0] + [99] * 14
    assert all(made[request] == made[requests[i % 2]] for i, request in enumerate(requests))
    assert made[requests[0]] != made[requests[1]]
    fresh = Request(prompt, model.pool.add("0", random_adapter(model, rank=2, seed=5)), 5)  # in place of the first "0"
    batcher.submit(fresh)
    assert finish(batcher)[fresh] != made[requests[1]] and fresh.cached_tokens == 0


def test_a_long_prompt_keeps_nobody_waiting(tiny_model):
    """Not those who are written to, not short prompts behind it, not one who leaves."""
    model = model_of(tiny_model("llama"), 0)
    batcher = Batcher(model.module, model.pool, max_batch=4, prefill=16, cache_bytes=1 << 30)
    random = np.random.default_rng(5)
    first, long, short, late = (Request(random.integers(5, 200, n).tolist(), None, 40) for n in (5, 600, 6, 700))
    for request in (first, long, short):
        batcher.submit(request)
    seen = []
    for _ in range(6):  # of 38 that the long one takes
        seen += [token.request for token in batcher.step()]
    assert seen.count(first) >= 4 and seen.count(short) >= 3 and long not in seen
    batcher.cancel(long)
    again = Request(long.prompt, None, 3)
    for request in (again, late):
        batcher.submit(request)
    for _ in range(3):  # two of them for company
        batcher.step()
    assert 32 <= again.cached_tokens < 599  # what was read of it when its client left
    batcher.cancel(late)
    assert len(finish(batcher)[again]) == 3
    assert batcher.clear() == [] and batcher.idle


def test_what_cannot_be_kept_stops_nobody(tiny_model, monkeypatch):
    model = model_of(tiny_model("llama"), 0)
    batcher = Batcher(model.module, model.pool, max_batch=4, cache_bytes=1 << 30)
    wanted = model.generate([5, 6, 7, 8], max_tokens=5).token_ids
    for failing in (True, False, False):
        with monkeypatch.context() as patch:
            if failing:
                patch.setattr(PrefixTree, "_count", lambda *_: 1 / 0)
            request = Request([5, 6, 7, 8], None, 5)
            batcher.submit(request)
            assert finish(batcher)[request] == wanted
    assert request.cached_tokens == 3 and len(batcher.reader.known) > 0
    batcher.clear()
    assert len(batcher.reader.known) == batcher.reader.known.nbytes == 0


def test_where_tokens_cannot_be_taken_back_the_ends_of_messages_are_kept(tmp_path):
    """Also a system message that others begin with, and what stands before the beginning of an answer."""
    model = model_of(tiny_base(tmp_path / "base", "qwen3_5"), 0)
    batcher = Batcher(model.module, model.pool, max_batch=4, cache_bytes=1 << 30)
    system, known = [*range(5, 25), END], []
    for user in ([30, 31], [40, 41, 42], [50, 51], [40, 41, 42]):
        prompt = [*system, *user, END, 60 + len(known)]
        request = Request(prompt, None, 3, stop_tokens=frozenset({END}))
        batcher.submit(request)
        made = [token for token in finish(batcher)[request] if token != END]  # which `generate` leaves out
        assert made == model.generate(prompt, max_tokens=3, extra_eos=(str(END),)).token_ids
        known.append(request.cached_tokens)
    assert known == [0, 0, len(system), len(system) + 4]
