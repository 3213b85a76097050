"""Every way that makes tokens of logits refuses those that are no numbers: its tokens would be 0, or any."""

import sys
from types import SimpleNamespace

import httpx
import mlx.core as mx
import pytest
from helpers.fusing import visible_adapter
from helpers.serving import running

from mlx_adapters.config.sampling import Drafting, Sampling
from mlx_adapters.errors import ModelError
from mlx_adapters.evaluation import harness
from mlx_adapters.evaluation.scores import greedy_answers
from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.generation.sampling import Sampler
from mlx_adapters.models.loading import load_model as load_plain_model
from mlx_adapters.models.model import no_numbers
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.sources.registry import register
from mlx_adapters.surgery.calls import call_as

PROMPT, OTHER = [5, 9, 2, 77, 31], [7, 7, 9, 7, 7, 9, 7]
WAYS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=1.0, top_p=0.9, top_k=20, min_p=0.01, xtc_probability=0.5, seed=3),
    "penalties": Sampling(repetition_penalty=1.2, min_tokens=2, logit_bias={7: 1.0}),
}
REFUSED = r"with 'wild' computes NaN or Inf"


@pytest.fixture
def wild(tiny_model):
    """A base, and an adapter on it whose numbers are finite, and what is computed with them in float16 is not."""
    folder = tiny_model("llama")
    register(visible_adapter(folder, strength=1e3), "wild")
    register(visible_adapter(folder), "tame")
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drafting", [None, Drafting(prompt_lookup=True)], ids=["alone", "drafting"])
def test_an_answer_of_no_numbers_is_refused(wild, drafting, way):
    model = load_model(wild, "wild", dtype="float16", drafting=drafting)
    with pytest.raises(ModelError, match=REFUSED) as refused:
        model.generate(PROMPT, WAYS[way])
    weaker = "an earlier checkpoint, or a weaker one: 'mlx-adapters scale'."
    assert refused.value.hint == f"try --dtype float32, {weaker}"
    with pytest.raises(ModelError, match=REFUSED):
        model.generate_batch([(OTHER, None), (OTHER, "wild")], WAYS[way])
    assert model.pool.get("wild").users == 0  # it may be evicted
    with pytest.raises(ModelError, match=REFUSED):
        model.embedding(PROMPT)
    with pytest.raises(ModelError, match=REFUSED):
        model.generate(PROMPT, sampler=lambda logprobs: mx.array([7]))
    model.use(None)
    assert len(model.generate(PROMPT, WAYS[way], max_tokens=4).token_ids) > 0
    model.module.set_dtype(mx.float32)
    assert no_numbers(model.module, "tiny", "wild").hint == f"try {weaker}"
    assert no_numbers(model.module, "tiny", None).hint == "are its weights whole?"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drafting", [None, Drafting(prompt_lookup=True)], ids=["alone", "drafting"])
def test_its_neighbors_in_a_batch_get_what_they_get_alone(wild, drafting, way):
    """And what was read for it is forgotten."""
    model = load_model(wild, "tame", dtype="float16", drafting=drafting)
    model.attach("wild")

    def answers(*names):
        batcher = Batcher(model.module, model.pool, cache_bytes=1 << 30, drafter=model.drafter)
        made = {}
        for name in names:
            entry = name and model.pool.get(name)
            batcher.submit(Request(OTHER, entry, 9, Sampler(WAYS[way]), top_logprobs=1 if name == "tame" else None))
        while not batcher.idle:
            for token in batcher.step():
                name = token.request.adapter and token.request.adapter.name
                made.setdefault(name, []).append((token.id, token.finish_reason))
        assert batcher.reader.known.known(model.pool.get("wild").weights, OTHER) == 0
        return made

    together = answers("wild", "tame", None)
    assert [reason for _, reason in together.pop("wild")] == ["no numbers"]
    assert together == answers("tame", None)


@pytest.mark.parametrize("drafting", [None, Drafting(prompt_lookup=True)], ids=["alone", "drafting"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_it_is_found_at_any_step(tiny_model, bad, drafting):
    """Also where a model computed numbers until then."""
    model, read = load_model(tiny_model("llama"), drafting=drafting), []

    def call(original, tokens, **options):
        read.append(tokens.shape[1])
        logits = original(tokens, **options)
        return logits + bad if sum(read) > len(OTHER) + 5 else logits

    written = []
    with call_as(model.module, call), pytest.raises(ModelError, match=r"llama-\w+' computes NaN or Inf") as refused:
        written += [step.token for step in model.stream(OTHER, max_tokens=30, ignore_eos=True)]
    assert "float32" not in refused.value.hint, "it computes in float32"
    read.clear()
    with call_as(model.module, call), pytest.raises(ModelError, match=r"llama-\w+' computes NaN or Inf"):
        model.generate_batch([(OTHER, None)], max_tokens=30, ignore_eos=True)


def test_scores_are_not_counted_of_such_answers(wild):
    model = load_plain_model(resolve_base(wild), load_adapter("wild"), dtype="float16")
    with pytest.raises(ModelError, match=REFUSED):
        greedy_answers(model, [PROMPT, OTHER], max_tokens=3)


def test_public_tasks_are_not_asked_of_such_a_model(wild, monkeypatch):
    manager = SimpleNamespace(TaskManager=lambda **_: SimpleNamespace(match_tasks=lambda tasks: tasks))
    asked = SimpleNamespace(tasks=manager, __version__="0", simple_evaluate=lambda **_: {"results": {}})
    monkeypatch.setitem(sys.modules, "lm_eval", asked)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", manager)
    monkeypatch.setattr(harness, "harness_model", lambda *_: SimpleNamespace(use_chat_template=False))
    told = {one.variant: one.error for one in harness.run_tasks(["tame", "wild"], ["a"], dtype="float16").evaluations}
    assert told["tame"] is None and "computes NaN or Inf" in told["wild"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_says_so(wild, stream):
    """In place of an answer, of a prompt's log-probabilities, of a vector; to others it goes on."""
    asked = {
        "chat/completions": {"messages": [{"role": "user", "content": "List all."}], "stream": stream},
        "completions": {"prompt": "List all.", "echo": True, "logprobs": 2, "max_tokens": 1, "stream": stream},
        "embeddings": {"input": "List all."},
    }
    with running(wild, [("wild", "wild"), ("tame", "tame")], dtype="float16") as (address, _):
        for path, body in asked.items():
            for name, status in (("wild", 500), ("tame", 200)):
                told = httpx.post(f"{address}/v1/{path}", json=body | {"model": name}, timeout=60)
                assert ("computes NaN or Inf" in told.text) == (name == "wild"), (path, told.text)
                assert told.status_code == status or body.get("stream")
                assert "'wild'" in told.text or name == "tame"
