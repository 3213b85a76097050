"""Prompts that are read in one pass: each is what it is alone, whatever stands beside it."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import random_adapter
from helpers.tiny_configs import make_model, tiny_base, tiny_config

from mlx_adapters.generation import reading
from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.surgery.caches import reads_rows


def model_of(folder, group=False):
    model = load_model(folder)
    model.pool = AdapterPool(model.module, group=group)
    for i, kind in enumerate(("lora", "dora", "lora")):
        model.attach(random_adapter(model, kind, rank=2 + i, seed=i), name=str(i), use=False)
    return model


def tokens_of(seed, *lengths):
    random = np.random.default_rng(seed)
    return [random.integers(5, 500, length).tolist() for length in lengths]


@pytest.fixture
def passes(monkeypatch):
    """(rows, tokens) of each pass over a model of these."""
    seen = []

    def watch(module):
        kind = type(module)
        call = kind.__call__

        def noted(self, tokens, *rest, **more):
            seen.append(tokens.shape)
            return call(self, tokens, *rest, **more)

        monkeypatch.setattr(kind, "__call__", noted)
        return seen

    return watch


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5", "mamba"])
def test_prompts_read_together_are_what_they_are_alone(name, tmp_path, passes):
    """Fresh ones and ones that go on from what is known, on the base and with adapters; windows of 8 come round."""
    model = model_of(tiny_base(tmp_path / name, name), group=name == "llama")
    batcher = Batcher(model.module, model.pool, cache_bytes=1 << 30)
    seen = passes(model.module)
    names = [None, "0", "0", "1", None, "2", "0"]
    chats = tokens_of(1, 20, 18, 25, 7, 3, 19, 21)
    for turn in range(2):
        adapters = [name and model.pool.get(name) for name in names]
        requests = [Request(c, a, 4, top_logprobs=1) for c, a in zip(chats, adapters, strict=True)]
        seen.clear()
        for request in requests:
            batcher.submit(request)
        tokens = [token for _ in range(20) for token in batcher.step()]
        assert batcher.idle
        read = [shape for shape in seen if shape[1] > 1]
        assert (len(read) < len(chats)) == (name in ("llama", "qwen3_5") or (name == "gemma3_text" and turn == 0))
        told = [[token for token in tokens if token.request is request] for request in requests]
        for chat, which, answer in zip(chats, names, told, strict=True):
            model.use(which)
            logits = model.logits([*chat, *(token.id for token in answer)])[len(chat) - 1 : -1]
            alone = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            assert [token.logprob for token in answer] == pytest.approx(mx.max(alone, axis=-1).tolist(), abs=1e-4)
        more = tokens_of(2, 6, 9, 5, 4, 11, 12, 8)
        chats = [[*c, *(t.id for t in answer), *m] for c, answer, m in zip(chats, told, more, strict=True)]
    model.use(None)


def test_what_prompts_begin_with_is_read_once_though_they_come_together(tiny_model, passes):
    model = model_of(tiny_model("llama"))
    batcher = Batcher(model.module, model.pool, cache_bytes=1 << 30)
    seen = passes(model.module)
    seen.clear()
    (system, *users), other = tokens_of(3, 60, 5, 6, 7), tokens_of(4, 64)[0]
    requests = [Request(prompt, None, 2) for prompt in [*([*system, *user] for user in users), other]]
    for request in requests:
        batcher.submit(request)
    batcher.step()
    assert [request.cached_tokens for request in requests] == [0, 60, 60, 0]
    assert seen == [(2, 64), (2, 6), (4, 1)]


def test_while_others_are_answered_a_prompt_waits_a_moment_for_company(tiny_model, passes):
    model = model_of(tiny_model("llama"))
    batcher = Batcher(model.module, model.pool)
    seen = passes(model.module)
    first, *others, last = (Request(prompt, None, 20) for prompt in tokens_of(6, 9, 11, 12, 13, 10))
    batcher.submit(first)
    batcher.step()  # nobody is kept waiting: at once
    seen.clear()
    for request in others:
        batcher.submit(request)
        batcher.step()
    assert seen == [(1, 1), (1, 1), (3, 12), (4, 1)]
    batcher.submit(last)
    steps = 0
    while not any(row.request is last for row in batcher.rows):
        batcher.step()
        steps += 1
    assert steps == 3 and batcher.reader.idle


def test_where_all_places_are_taken_prompts_wait_a_moment_for_a_second_one(tiny_model, passes):
    model = model_of(tiny_model("llama"))
    batcher = Batcher(model.module, model.pool, max_batch=3)
    seen = passes(model.module)
    for prompt, length in zip(tokens_of(6, *[9] * 20), (3, 4, 30, *[5] * 17), strict=True):
        batcher.submit(Request(prompt, None, length))
    while batcher.reader.waiting:
        batcher.step()
    read = [rows for rows, width in seen if width > 1]
    assert sum(read) == 20 and len(read) <= 11  # 18 if each was read at once


def test_a_prompt_that_waits_for_another_is_begun_when_that_is_read(tiny_model, monkeypatch):
    model = model_of(tiny_model("llama"))
    batcher = Batcher(model.module, model.pool, cache_bytes=1 << 30, prefill=16)
    begun, begin = [], batcher.reader._begin
    monkeypatch.setattr(batcher.reader, "_begin", lambda request: begun.append(request) or begin(request))
    system = tokens_of(3, 100)[0]
    requests = [Request([*system, i], None, 2) for i in range(5, 9)]
    for request in requests:
        batcher.submit(request)
    while not batcher.idle:
        batcher.step()
    assert begun == requests and [request.cached_tokens for request in requests] == [0, 100, 100, 100]


def test_where_only_ends_of_messages_are_kept_prompts_wait_for_these_alone(tmp_path, passes, monkeypatch):
    monkeypatch.setattr(reading, "WORTH_KEEPING", 256)  # a GPU's, by which other prompts are kept with their answers
    model = model_of(tiny_base(tmp_path / "base", "qwen3_5"))
    batcher = Batcher(model.module, model.pool, cache_bytes=1 << 30)
    seen = passes(model.module)
    (first, system), ends = tokens_of(5, 30, 60), frozenset({2})
    groups = ([first], [[*system, 5, 6], [*system, 7, 8]], [[*first, *system, 2, i, 6] for i in (5, 7)])
    for prompts, read in zip(groups, [(1, 29), (2, 61), (1, 91 - 29)], strict=True):
        seen.clear()
        requests = [Request(prompt, None, 1, stop_tokens=ends) for prompt in prompts]
        for request in requests:
            batcher.submit(request)
        while not batcher.idle:
            batcher.step()
        assert seen[0] == read
    assert requests[1].cached_tokens == 91


def test_padding_takes_no_more_than_reading(tiny_model, passes):
    """Neither short prompts beside a long one, nor fresh ones beside a long chat."""
    model = model_of(tiny_model("llama"))
    batcher = Batcher(model.module, model.pool, cache_bytes=1 << 30, prefill=256)
    seen = passes(model.module)
    long, *short = tokens_of(5, 200, 11, 10, 9)
    for turn in ([long, *short], [[*long, *tokens_of(6, 10)[0]], *tokens_of(7, 12, 11, 10)]):
        seen.clear()
        for prompt in turn:
            batcher.submit(Request(prompt, None, 1))
        while not batcher.idle:
            batcher.step()
        read = [shape for shape in seen if shape[1] > 1]
        needed = sum(len(prompt) - 1 for prompt in turn) - (200 if turn[0] is not long else 0)
        assert needed <= sum(rows * width for rows, width in read) < 1.3 * needed and len(read) == 2


@pytest.mark.parametrize(("name", "can"), [("llama", True), ("lfm2", True), ("mamba", False), ("llama4", False)])
def test_whether_a_model_reads_prompts_together_is_tried(name, can):
    assert reads_rows(make_model(tiny_config(name))) == can
