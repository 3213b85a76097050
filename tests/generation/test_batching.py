"""Every row of a mixed batch is what it is alone, whatever comes, goes and stops around it."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import distance, random_adapter
from helpers.fusing import visible_adapter
from helpers.tiny_configs import make_model, tiny_base, tiny_config

from mlx_adapters.config.sampling import Sampling
from mlx_adapters.errors import ConfigError
from mlx_adapters.generation.batching import Batcher, answer_all
from mlx_adapters.generation.decoding import TextStream
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.generation.sampling import Sampler
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.surgery.caches import batches
from mlx_adapters.surgery.padded import PaddedCache

ARCHITECTURES = ["llama", "gemma3_text", "qwen3_moe"]
PROMPT = [5, 9, 2, 77, 31]


def many(model, count, group=False):
    """The model with `count` adapters of different ranks named 0, 1, ..."""
    model.pool = AdapterPool(model.module, group=group)
    for i in range(count):
        model.attach(random_adapter(model, "dora" if i == 1 else "lora", rank=2 + i, seed=i), name=str(i))
    model.use(None)
    return model


def prompts(count, seed=0, longest=30):
    random = np.random.default_rng(seed)
    return [random.integers(0, 512, random.integers(1, longest)).tolist() for _ in range(count)]


def finish(batcher):
    """{request number: [tokens]} of everything that is under way."""
    made = {}
    while not batcher.idle:
        for token in batcher.step():
            made.setdefault(token.request.number, []).append(token)
    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_equal_solo_runs(tiny_model, architecture):
    model = many(load_model(tiny_model(architecture)), 3)
    names = ["0", None, "1", "2", "0", None, "2", "1", "1"]
    requests = [
        Request(p, name and model.pool.get(name), max_tokens=3 + 5 * (i % 4), top_logprobs=2)
        for i, (p, name) in enumerate(zip(prompts(len(names)), names, strict=True))
    ]
    batcher = Batcher(model.module, model.pool, max_batch=4, prefill=8)
    for request in requests[:5]:
        batcher.submit(request)
    tokens = [token for _ in range(4) for token in batcher.step()]
    for request in requests[5:]:
        batcher.submit(request)
    made = finish(batcher)
    for token in tokens:
        made.setdefault(token.request.number, []).append(token)
    for request, name in zip(requests, names, strict=True):
        answer = sorted(made[request.number], key=lambda t: t.finish_reason is not None)
        assert len(answer) == request.max_tokens and answer[-1].finish_reason == "length"
        model.use(name)
        order = [t for t in tokens if t.request is request]
        order += [t for t in made[request.number] if t not in order]
        written = [t.id for t in order]
        logits = model.logits([*request.prompt, *written])[len(request.prompt) - 1 : -1]
        alone = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for step, token in enumerate(order):
            assert token.logprob == pytest.approx(alone[step, token.id].item(), abs=1e-4)
            assert token.top[0][0] == token.id and token.logprob == pytest.approx(mx.max(alone[step]).item(), abs=1e-4)


def test_prompts_that_were_read_together_join_as_they_are(tiny_model, monkeypatch):
    """No row is taken out of the caches that they were read in, and more may come; each answer is as alone."""
    model = load_model(tiny_model("llama"))
    texts = [[5, 9, 2], [77, 31, 8, 4, 6], [1, 3, 2, 7]], [[12, 13, 14, 15], [16, 17]]
    alone = [
        dict(answer_all(model.module, model.pool, [Request(text, max_tokens=12)])).popitem()[1]
        for text in (*texts[0], *texts[1])
    ]
    batcher, made, taken = Batcher(model.module, model.pool), {}, []
    monkeypatch.setattr(PaddedCache, "extract", lambda layer, row: taken.append(row))
    for group in texts:
        for text in group:
            batcher.submit(Request(text, max_tokens=12))
        for _ in range(4):
            for token in batcher.step():
                made.setdefault(token.request.number, []).append(token.id)
    assert len(batcher.rows) == 5
    for number, tokens in finish(batcher).items():
        made.setdefault(number, []).extend(token.id for token in tokens)
    assert [made[number] for number in sorted(made)] == alone and not taken


def test_joining_leaving_cancelling_and_evicting(tiny_model):
    model = many(load_model(tiny_model("llama")), 3, group=True)
    texts = prompts(12, seed=3)
    alone = {}
    for i, prompt in enumerate(texts):
        with model.using(str(i % 3)):
            alone[i] = model.generate(prompt, max_tokens=12).token_ids
    batcher = Batcher(model.module, model.pool, max_batch=5)
    requests = [Request(p, model.pool.get(str(i % 3)), 12) for i, p in enumerate(texts)]
    for request in requests:
        batcher.submit(request)
    assert {entry.users for entry in model.pool.attached.values()} == {4}
    assert model.pool.idle == []
    made = {}
    for number in range(60):
        for token in batcher.step():
            made.setdefault(token.request.number, []).append(token.id)
        if number == 3:
            batcher.cancel(requests[1])
            batcher.cancel(requests[11])
        if number == 5:
            model.attach(random_adapter(model, rank=9, seed=9), name="late", use=False)
        if number == 7:
            batcher.cancel(requests[4])
            batcher.cancel(requests[7])
            batcher.cancel(requests[10])
            idle = model.pool.idle[0]
            assert idle.name == "1"  # whose requests are all gone; "late" came after it
            model.detach("late")
    for i, request in enumerate(requests):
        if i not in (1, 4, 7, 10, 11):
            assert made[request.number] == alone[i]
    assert batcher.idle and all(entry.users == 0 for entry in model.pool.attached.values())


def test_seeds_stop_tokens_and_neighbors(tiny_model):
    model = many(load_model(tiny_model("llama")), 2)
    prompt = [5, 6, 7]

    def run(extra):
        mine = Request(prompt, model.pool.get("1"), 20, Sampler(Sampling(temperature=1.0, top_p=0.9, seed=11)))
        batcher = Batcher(model.module, model.pool)
        for request in [mine, *extra]:
            batcher.submit(request)
        return [t.id for t in finish(batcher)[mine.number]]

    alone = run([])
    others = [
        Request(p, model.pool.get("0"), 9, Sampler(Sampling(temperature=0.7, top_p=1.0, seed=i)))
        for i, p in enumerate(prompts(4))
    ]
    assert run(others) == alone and len(alone) == 20
    stop = alone[7]
    request = Request(
        prompt, model.pool.get("1"), 20, Sampler(Sampling(temperature=1.0, top_p=0.9, seed=11)), frozenset([stop])
    )
    batcher = Batcher(model.module, model.pool)
    batcher.submit(request)
    tokens = finish(batcher)[request.number]
    assert [t.id for t in tokens] == alone[: alone.index(stop) + 1] and tokens[-1].finish_reason == "stop"
    with pytest.raises(ConfigError, match="empty"):
        Request([])


def test_generate_batch(tiny_model):
    model = many(load_model(tiny_model("llama")), 2)
    pairs = [("List all students.", "0"), ("Once upon a time", None), ("SELECT", "1")]
    wanted = []
    for prompt, name in pairs:
        with model.using(name):
            wanted.append(model.generate(prompt, max_tokens=10).text)
    assert model.generate_batch(pairs, max_tokens=10) == wanted


def test_top_p_keeps_the_likeliest():
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.7, seed=0))
    assert {sampler(logprobs).item() for _ in range(200)} == {0, 1}
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.01, seed=0))
    assert {sampler(logprobs).item() for _ in range(20)} == {0}
    counts = (
        np.bincount(
            [Sampler(Sampling(temperature=1.0, top_p=1.0, seed=i))(logprobs).item() for i in range(400)], minlength=4
        )
        / 400
    )
    assert abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.08


@pytest.mark.parametrize("stop", [("lo W",), ("xyz", "World"), ("o", "H"), ()])
def test_stop_words_across_tokens(stop):
    class Letters:
        """A tokenizer whose tokens are characters."""

        def __init__(self):
            self.last_segment = ""

        @property
        def detokenizer(self):
            return Letters()

        def add_token(self, token):
            self.last_segment = chr(token)

        def finalize(self):
            self.last_segment = ""

    text, stream, got = "Hello World, hello", TextStream(Letters(), Sampling(stop=tuple(stop))), ""
    for character in text:
        got += stream.add(ord(character))
        if stream.stopped:
            break
    got += stream.finish()
    ends = [text.find(word) for word in stop if word in text]
    assert got == (text[: min(ends)] if ends else text) and stream.stopped == bool(ends)


def test_routed_rows_do_not_leak_into_the_next_call(tiny_model):
    model = many(load_model(tiny_model("llama")), 2, group=True)
    base = model.logits([1, 2, 3])
    with model.pool.routed([model.pool.get("0"), model.pool.get("1"), None]):
        rows = model.module(mx.array([[1, 2, 3]] * 3))
        mx.eval(rows)
    assert distance(rows[2], base) < 1e-4 and mx.array_equal(model.logits([1, 2, 3]), base)


def test_adapters_of_any_rank_come_while_others_are_mixed(tiny_model):
    """A batch of old and new adapters equals the solo runs, and no adapter takes the room of the largest."""
    model = load_model(tiny_model("qwen3_moe"))
    names, solo = [None], [model.generate(PROMPT, max_tokens=6).token_ids]
    for i, rank in enumerate((2, 2, 16, 3)):
        name = model.attach(random_adapter(model, rank=rank, seed=i), name=str(i), use=False)
        with model.using(name):
            solo.append(model.generate(PROMPT, max_tokens=6).token_ids)
        names.append(name)
        before = model.pool.nbytes
        requests = [Request(PROMPT, name and model.pool.get(name), 6) for name in names]
        answers = dict(answer_all(model.module, model.pool, requests))
        assert [answers[request] for request in requests] == solo
        assert model.pool.nbytes == before


def test_stacks_go_without_waiting_for_the_garbage_collector(tiny_model):
    """It counts objects and not bytes, so that what only it frees may fill the memory first."""
    model = many(load_model(tiny_model("llama")), 2)
    model.generate_batch([(PROMPT, "0"), (PROMPT, "1")], max_tokens=2)
    parts = [weakref.ref(p) for update in model.pool._stacks._latest[1].values() for p in update.parts]
    gc.disable()
    try:
        model.detach("1")
        assert parts and not any(part() for part in parts)
    finally:
        gc.enable()


def test_mixtures_are_not_kept_for_ever(tiny_model):
    model = load_model(tiny_model("llama"))
    for i in range(2):
        model.attach(random_adapter(model, rank=64, seed=i), name=str(i), use=False)
    mx.synchronize()
    before = mx.get_active_memory()
    for i in range(10):
        model.use({"0": 0.1 * i + 0.1, "1": 0.5})
    mx.synchronize()
    assert mx.get_active_memory() < before + 2.5 * model.pool.nbytes


TOGETHER = ["llama", "qwen3_5", "gemma4", "mamba"]


@pytest.mark.parametrize("name", [*TOGETHER, "gemma2", "gpt_bigcode", "llama4", "longcat_flash_ngram"])
def test_whether_a_model_decodes_prompts_together_is_tried(name):
    """gemma2 has as many key heads as there are rows here: its masks fit then, and are another row's."""
    assert batches(make_model(tiny_config(name))) == (name in TOGETHER)


def test_rows_with_other_adapters_wait_where_layers_do_not_know_the_rows(tmp_path, on_cpu):
    """Dbrx calls each expert for a token at a time, which MLX cannot do on CUDA.
    It is tried for the adapters that are there."""
    model = load_model(tiny_base(tmp_path / "base", "dbrx"))
    model.attach(visible_adapter(model.base.folder, targets=("Wqkv",)), name="0", use=False)
    batcher = Batcher(model.module, model.pool)
    assert batcher.can_batch and batcher.can_mix
    model.attach(visible_adapter(model.base.folder, seed=1), name="1", use=False)
    assert not batcher.can_mix
    entries = [model.pool.get("0"), None, model.pool.get("1")]
    requests = [Request([5, 6, 7 + i], entry, max_tokens=2) for i, entry in enumerate(entries)]
    together = dict(answer_all(model.module, model.pool, requests))
    for request in requests:
        assert [(request, together[request])] == list(answer_all(model.module, model.pool, [request]))
