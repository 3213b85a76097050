"""Rows of a mixed batch are what they are without guesses, whatever of their guesses is right, comes and goes."""

from functools import partial

import numpy as np
import pytest
from helpers.adapters import random_adapter
from helpers.drafts import Prompter, a_module

from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting, Sampling
from mlx_adapters.drafting import attention, one_token
from mlx_adapters.drafting.drafts import Drafts
from mlx_adapters.drafting.rewinding import rewinds
from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.generation.sampling import Sampler
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.system.door import make_prompt_cache


class Knowing:
    """A drafter that knows the answers, and errs."""

    most = 4

    def __init__(self, texts, wrong):
        self.texts, self.wrong = texts, wrong

    def begin(self):
        return Drafts([self], self.most)

    def guess(self, tokens, most, choose):
        text = next((text for text in self.texts if text[: len(tokens)] == list(tokens)), [])
        return Prompter(text, self.wrong, seed=len(tokens)).guess(tokens, most, choose)


class Even:
    """A constraint: even tokens, and the end after a few."""

    def __init__(self, least):
        self.left, self.ended = least, False

    def mask(self):
        return np.full(16, 0x55555555, np.uint32)

    def accept(self, token):
        assert token % 2 == 0
        self.left -= 1
        self.ended = self.left == 0


def requests(model, count=9):
    """Rows of all kinds."""
    random = np.random.default_rng(0)
    kinds = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 1.0, "seed": 1},
    ]
    names = [*model.pool.attached, None]
    made = []
    for i in range(count):
        how = Sampling(max_tokens=20 - i, **kinds[i % 3])
        made.append(
            Request(
                random.integers(0, 512, 1 + 5 * (i % 4)).tolist(),
                (name := names[i % len(names)]) and model.pool.get(name),
                how.max_tokens,
                Sampler(how),
                frozenset([7, 9, 100, 101, 102, 103]) if i == 4 else frozenset(),
                top_logprobs=1 if i % 2 else None,
                constraint=Even(6) if i in (3, 8) else None,
            )
        )
    return made


def finish(batcher, submitted):
    """[[tokens] of each request], where three begin later."""
    made = {request.number: [] for request in submitted}
    for request in submitted[:-3]:
        batcher.submit(request)
    steps = 0
    while not batcher.idle or steps < 5:
        if steps == 4:
            for request in submitted[-3:]:
                batcher.submit(request)
        for token in batcher.step():
            made[token.request.number].append(token)
        steps += 1
    return [made[request.number] for request in submitted], steps


@pytest.mark.parametrize("max_batch", [1, 3, 4])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5"])
def test_no_wrong_token(tiny_model, name, max_batch):
    model = load_model(tiny_model("llama"))
    model.module = a_module(name, **({"sliding_window": 40} if "gemma" in name else {}))
    model.pool = AdapterPool(model.module, group=False)
    for i in range(2):
        model.attach(random_adapter(model, rank=2 + i, seed=i), name=str(i), use=False)
    wanted, steps = finish(Batcher(model.module, model.pool, max_batch), requests(model))
    texts = [[*answer[0].request.prompt, *(token.id for token in answer)] for answer in wanted]
    knowing = Knowing(texts, wrong=0.2)
    answered, fewer = finish(
        Batcher(model.module, model.pool, max_batch, drafter=knowing, cache_bytes=1 << 20), requests(model)
    )
    can = rewinds(model.module, partial(make_prompt_cache, model.module))
    if max_batch == 1 or can:  # else only while there is one row
        assert fewer < steps and sum(answer[0].request.accepted_tokens for answer in answered) > 20
    for one, other in zip(answered, wanted, strict=True):
        assert [(t.id, t.finish_reason) for t in one] == [(t.id, t.finish_reason) for t in other]
        for mine, theirs in zip(one, other, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3) and len(mine.top) == len(theirs.top)


@pytest.mark.parametrize(
    ("name", "can"), [("llama", True), ("gemma3_text", True), ("qwen3_5", False), ("mamba", False)]
)
def test_whether_rows_can_forget_their_own_tokens_is_tried(name, can):
    module = a_module(name)
    assert rewinds(module, partial(make_prompt_cache, module)) == can


def test_answers_of_a_batch_end_at_their_stop_texts(tiny_model):
    plain = load_model(tiny_model("llama"))
    drafted = load_model(tiny_model("llama"), drafting=Drafting(prompt_lookup=True))
    prompts = [("one two three one two three", None), ("a b a b a b", None)]
    whole = plain.generate_batch(prompts, max_tokens=40)
    assert drafted.generate_batch(prompts, max_tokens=40) == whole
    stop = whole[0][5:8]
    assert drafted.generate_batch(prompts, max_tokens=40, stop=stop) == plain.generate_batch(
        prompts, max_tokens=40, stop=stop
    )


def test_caches_in_few_bits_with_guesses(tiny_model):
    """The same text as without guesses from the same caches, alone and together."""
    folder, kv = tiny_model("llama", head_dim=64), CacheQuantization(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    plain, drafted = load_model(folder, kv=kv), load_model(folder, kv=kv, drafting=Drafting(prompt_lookup=True))
    prompts = ["one two three one two three", "a b a b a b"]
    for prompt in prompts:
        answered = drafted.generate(prompt, max_tokens=30, ignore_eos=True)
        assert answered.token_ids == plain.generate(prompt, max_tokens=30, ignore_eos=True).token_ids
        assert answered.accepted_tokens > 0
    pairs = [(prompt, None) for prompt in prompts]
    assert drafted.generate_batch(pairs, max_tokens=30) == plain.generate_batch(pairs, max_tokens=30)


def test_a_row_alone_is_decoded_by_compiled_steps(tiny_model, monkeypatch, on_cpu):
    """Rows that come, go and follow each other, also with another adapter, have the tokens that they have without."""
    model = load_model(tiny_model("llama"))
    model.pool = AdapterPool(model.module, group=False)
    for i in range(2):
        model.attach(random_adapter(model, rank=2, seed=i), name=str(i), use=False)

    def answers():
        batcher, random = Batcher(model.module, model.pool, 3, cache_bytes=1 << 20), np.random.default_rng(1)
        asked = [
            Request(random.integers(5, 200, 7 + i).tolist(), name and model.pool.get(name), 20)
            for i, name in enumerate([None, "0", "0", "1", None])
        ]
        made = {request: [] for request in asked}
        for first, *others in (asked[:1], asked[1:3], asked[3:]):  # the others come into the middle of an answer
            batcher.submit(first)
            while not batcher.idle or others:
                if len(made[first]) == 14 and others:
                    batcher.submit(others.pop())
                for token in batcher.step():
                    made[token.request].append(token.id)
        return list(made.values())

    expected, compiled = answers(), []
    step = one_token.OneToken._one
    monkeypatch.setattr(one_token, "serves", lambda: True)
    monkeypatch.setattr(attention, "on_cuda", lambda: False)  # its kernel is for wider heads
    attention.is_right.cache_clear()
    monkeypatch.setattr(one_token.OneToken, "_one", lambda self, *given: compiled.append(1) or step(self, *given))
    assert answers() == expected and len(compiled) > 20
