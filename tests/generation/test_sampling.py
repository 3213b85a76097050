"""How tokens are chosen: one definition, mlx-lm's filters, parts of one's own, the same in a batch."""

import typing
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_sampler

import mlx_adapters as ma
from mlx_adapters.config.sampling import Sampling, SamplingOptions
from mlx_adapters.errors import ConfigError, ModelError
from mlx_adapters.generation.sampling import Sampler, filtered

PROMPT = [5, 9, 2, 77, 31]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "List the Physics courses."}]


@pytest.fixture
def model(tiny_model):
    model = ma.load_model(tiny_model("llama"))
    model.attach(random_adapter(model, seed=1), name="a")
    model.attach(random_adapter(model, seed=2), name="b", use=False)
    return model


def test_the_arguments_of_generate_are_the_fields_of_sampling():
    spelled, fields = typing.get_type_hints(SamplingOptions), typing.get_type_hints(Sampling)
    assert list(spelled) == list(fields)
    accepted = {name: set(typing.get_args(hint) or [hint]) for name, hint in spelled.items()}
    for name, hint in fields.items():
        assert name == "stop" or set(typing.get_args(hint) or [hint]) <= accepted[name]


def test_options_change_a_sampling_and_wrong_ones_are_named():
    wild = Sampling(temperature=1.2, stop=("a",))
    assert wild.changed({"stop": "b", "top_k": np.int64(4)}) == Sampling(temperature=1.2, stop=("b",), top_k=4)
    assert wild.changed({"temperature": np.float32(0.5)}).temperature == 0.5
    for options, message in (
        ({"temprature": 1.0}, "Unknown setting 'temprature'"),
        ({"top_k": "many"}, "'top_k' in sampling cannot be 'many'"),
        ({"min_p": 2}, "min_p must be at most 1"),
        ({"stop": ""}, "stop must be texts"),
        ({"stop": [1]}, "'stop' in sampling cannot be"),
    ):
        with pytest.raises(ConfigError, match=message):
            wild.changed(options)


@pytest.fixture
def uncompiled():
    """mlx-lm compiles its filters, on a CPU by g++ and anew for each number."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@given(seed=st.integers(0, 50), top_p=st.floats(0.05, 1), min_p=st.floats(0.01, 1), top_k=st.integers(0, 40))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_filters_leave_what_mlx_lm_leaves(uncompiled, seed, top_p, min_p, top_k):
    logits = mx.random.normal((2, 32), key=mx.random.key(seed)) * 3
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    wanted = apply_min_p(apply_top_p(logprobs, top_p) if top_p < 1 else logprobs, min_p)
    wanted = apply_top_k(wanted, top_k) if 0 < top_k < 32 else wanted
    kept = filtered(logprobs, Sampling(top_p=top_p, min_p=min_p, top_k=top_k))
    mass = mx.sort(mx.exp(logprobs), axis=-1)[:, ::-1].cumsum(axis=-1)
    if mx.min(mx.abs(mass - top_p)).item() > 1e-5:  # else which is the last one is a matter of the last bit
        assert mx.array_equal(kept > -mx.inf, wanted > -mx.inf)
        assert mx.array_equal(mx.where(kept > -mx.inf, kept, 0), mx.where(kept > -mx.inf, logprobs, 0))


def test_a_stop_text_ends_the_answer_before_it(model):
    whole = model.generate(PROMPT, max_tokens=24)
    word = whole.text[4:7]
    answer = model.generate(PROMPT, max_tokens=24, stop=word)
    assert answer.text == whole.text[: whole.text.index(word)] and answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)] and len(answer.token_ids) < 24
    assert model.generate(PROMPT, max_tokens=24, stop=["never there", word]).text == answer.text
    assert model.generate_batch([(PROMPT, "a"), (PROMPT, "b")], max_tokens=24, stop=word)[0] == answer.text
    pieces = list(model.stream(PROMPT, Sampling(max_tokens=24, stop=(word,))))
    assert "".join(p.text for p in pieces) == answer.text and pieces[-1].finish_reason == "stop"


def test_the_token_that_ends_an_answer_is_no_part_of_it(model):
    tokens = model.generate(PROMPT, max_tokens=12, ignore_eos=True).token_ids
    assert len(tokens) == 12  # also where one of them would have ended it
    last = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 2)
    ended = model.generate(PROMPT, max_tokens=12, ignore_eos=True, extra_eos=(str(tokens[last]),))
    assert ended.finish_reason == "stop" and ended.token_ids == tokens[:last]


def test_a_sampler_and_processors_of_ones_own(model):
    """mlx-lm's own and plain functions; in a batch each row sees its own tokens."""
    greedy = model.generate(PROMPT, max_tokens=8)
    assert model.generate(PROMPT, max_tokens=8, sampler=make_sampler(temp=0.0)).token_ids == greedy.token_ids
    assert model.generate(PROMPT, max_tokens=5, sampler=lambda _: mx.array([7])).token_ids == [7] * 5
    seen = []

    def no_repetition(tokens, logits):
        seen.append(tokens.tolist())
        return mx.put_along_axis(logits, tokens[None], mx.array(-mx.inf), axis=-1)

    answer = model.generate(PROMPT, max_tokens=12, logits_processors=[no_repetition])
    assert len({*PROMPT, *answer.token_ids}) == len(PROMPT) + 12
    assert seen[0] == PROMPT and seen[11] == PROMPT + answer.token_ids[:11]
    solo = []
    for name, prompt in (("a", PROMPT), ("b", PROMPT[:3])):
        with model.using(name):
            solo.append(model.generate(prompt, max_tokens=9, logits_processors=[no_repetition]).text)
    pairs = [(PROMPT, "a"), (PROMPT[:3], "b")]
    assert model.generate_batch(pairs, max_tokens=9, logits_processors=[no_repetition]) == solo
    seeded = [model.generate(PROMPT, max_tokens=9, temperature=1.0, top_k=5, seed=3).text for _ in range(2)]
    assert seeded == model.generate_batch([(PROMPT, "a")] * 2, max_tokens=9, temperature=1.0, top_k=5, seed=3)


def test_what_a_sampler_may_not_give(model):
    for wrong, message in (
        (lambda _: 3, "not int"),
        (lambda _: mx.array([1.5]), "not mlx.core.float32"),
        (lambda _: mx.array([1, 2]), r"of shape \(1,\)"),
        (lambda _: mx.array([512]), "token 512 of 512"),
        (lambda _: mx.array([-1]), "token -1 of 512"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate(PROMPT, max_tokens=3, sampler=wrong)
    with pytest.raises(ConfigError, match="takes the place of top_k"):
        model.generate(PROMPT, sampler=make_sampler(), top_k=3)


def test_a_conversation_is_a_prompt(model):
    ids = model.encode_chat(CHAT)
    wanted = model.generate(ids, max_tokens=6)
    assert model.generate(CHAT, max_tokens=6).text == wanted.text
    assert model.generate(CHAT, max_tokens=6).prompt_tokens == len(ids)
    assert "".join(step.text for step in model.stream(CHAT, max_tokens=6)) == wanted.text
    assert model.generate_batch([(CHAT, "a")], max_tokens=6) == [wanted.text]
    with pytest.raises(ConfigError, match="goes through the chat template"):
        model.generate(CHAT, raw=True)
    with pytest.raises(ModelError):
        model.generate([*CHAT, 3])


def test_a_token_that_the_model_does_not_have_is_never_written_to(model):
    """MLX writes where it would lie: other arrays changed, or the process ended. Many tokenizers have such tokens."""
    last, tokens = model.vocabulary - 1, mx.array([3])
    for beyond in (1, 10**6, 2**31):
        sampling = Sampling(logit_bias={str(last): 2.5, str(last + beyond): 1.0}, max_tokens=2)
        with pytest.raises(ConfigError, match=rf"names token {last + beyond}; this model's ids end at {last}"):
            model.generate([5, 6], sampling)
        with pytest.raises(ConfigError, match="logit_bias"):
            model.generate_batch([([5, 6], None), ([7], None)], sampling)
        ends = SimpleNamespace(eos_token_ids={4, last + beyond})
        (not_yet,) = Sampler(Sampling(min_tokens=1), tokenizer=ends).processors
        logits = not_yet(tokens, mx.zeros((1, last + 1)))
        assert logits.shape == (1, last + 1) and [i for i, x in enumerate(logits[0].tolist()) if x] == [4]
    (bias,) = Sampler(Sampling(logit_bias={last: 2.5})).processors
    assert bias(tokens, mx.zeros((1, last + 1)))[0, last].item() == 2.5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_bias_that_a_type_cannot_hold_forces_its_token(dtype):
    """Inf would make NaN of all log-probabilities."""
    sampler = Sampler(Sampling(logit_bias={7: 3e38, 8: -3e38}, temperature=1.0, seed=1))
    token, logprobs = sampler.step([3], mx.full((1, 12), 5.0, dtype))
    assert token == 7 and logprobs[7].item() == 0 and not mx.isnan(logprobs).any().item()
    for wrong in ({7: 1e39}, {7: float("inf")}, {10**30: 1.0}):
        with pytest.raises(ConfigError, match="logit_bias maps token ids to numbers"):
            Sampling(logit_bias=wrong)
    for twice in ({"7": 1.0, "07": 2.0}, {"7": 1.0, 7: 1.0}):
        with pytest.raises(ConfigError, match=r"logit_bias (names a token|has a name) twice"):
            Sampling(logit_bias=twice)


def test_a_shortest_answer_is_not_longer_than_the_longest(model):
    said = "'min_tokens' is 10, and 5 may be written"
    for refused in (
        lambda: Sampling(max_tokens=5, min_tokens=10),
        lambda: Sampling(min_tokens=10).changed({"max_tokens": 5}),
        lambda: Sampling(max_tokens=5).changed({"min_tokens": 10}),
        lambda: model.generate([5, 6], max_tokens=5, min_tokens=10),
        lambda: model.generate_batch([([5, 6], None)], Sampling(min_tokens=10), max_tokens=5),
    ):
        with pytest.raises(ConfigError, match=said):
            refused()
    for name in ("max_tokens", "min_tokens"):
        with pytest.raises(ConfigError, match=f"^{name} cannot be '3'"):
            Sampling(**{name: "3"})
    long = Sampling(max_tokens=1000).changed({"min_tokens": 500})
    assert (long.max_tokens, long.min_tokens) == (1000, 500)
    assert len(model.generate([5, 6], max_tokens=5, min_tokens=5).token_ids) == 5


def test_greedy_rows_need_no_care_of_their_own():
    assert Sampler(Sampling(temperature=1e-9, top_p=0.5)).plain
    assert not Sampler(Sampling(temperature=0.1)).plain
    assert not Sampler(Sampling(), processors=[lambda _, logits: logits]).plain
