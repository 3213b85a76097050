"""What may come next: looked up in the text, or guessed by a second model."""

import mlx.core as mx
import pytest
from helpers.drafts import a_module
from hypothesis import given
from hypothesis import strategies as st

from mlx_adapters.config.sampling import Drafting, Sampling
from mlx_adapters.drafting import guessing
from mlx_adapters.drafting.drafts import Drafter, Drafts, check_tokens
from mlx_adapters.drafting.guessing import Lookup, SmallModel, agreeing, of_width
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.sampling import Sampler

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def looked_up(tokens, most):
    """What `Lookup` is to give, by going through the text."""
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if size < len(tokens) and tokens[end - size : end] == tokens[-size:]:
                text = list(tokens)
                while len(text) < end + most:
                    text.append(text[end - len(tokens)])
                return text[end : end + most]
    return []


@given(TEXTS, TEXTS, st.integers(1, 6))
def test_lookup_finds_the_latest_place_of_the_longest_run(first, more, most):
    """Also where the text grew since it was asked last."""
    lookup = Lookup()
    assert lookup.guess(first, most, mx.argmax) == looked_up(first, most)
    assert lookup.guess(first + more, most, mx.argmax) == looked_up(first + more, most)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=60))
def test_guesses_are_fewer_after_misses_and_never_more_than_allowed(history):
    class Willing:
        asked = ()

        def guess(self, tokens, most, choose):
            self.asked = (*self.asked, most)
            return [1] * most

    willing = Willing()
    drafts = Drafts([willing], 4)
    for room, right in history:
        ids = drafts.guess([1], room, mx.argmax)
        assert len(ids) <= min(room, 4)
        if ids:
            drafts.note(len(ids), len(ids) if right else 0)
    if len(history) > 10 and not any(right for _, right in history):
        assert len(willing.asked) < len(history) / 2 + 4  # it rests
    assert Drafts([willing], 4).guess([1], 0, mx.argmax) == []


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "qwen3_5"])
def test_a_second_model_guesses_what_it_would_write(name, tiny_model):
    """However many of its guesses were right, and whatever its caches can drop."""
    model, module = load_model(tiny_model("llama")), a_module(name)
    model.module = module
    guesser, text = SmallModel(model, 512), [5, 9, 2, 77, 31, 8, 1, 4, 9]
    for right in (0, 2, 4, 3, 0, 1):
        guessed = guesser.guess(text, 4, lambda logprobs: mx.argmax(logprobs, axis=-1))
        wanted = list(text)
        for _ in range(4):
            wanted.append(mx.argmax(module(mx.array([wanted]))[0, -1]).item())
        assert guessed == wanted[-4:]
        text += [*guessed[:right], (guessed[right] + 1) % 512 if right < 4 else 3]
    assert guesser.guess(text, 0, mx.argmax) == []


def test_a_second_model_keeps_to_its_context(tiny_model):
    model = load_model(tiny_model("llama"))
    guesser = SmallModel(model, 512)
    assert guesser.guess([1] * (model.base.context - 1), 2, mx.argmax) == []


def test_a_second_model_never_reads_a_token_that_it_does_not_have(tiny_model):
    """It would read memory that is not its own."""
    model = load_model(tiny_model("llama", vocab_size=300))
    guesser, greedy = SmallModel(model, 512), Sampler(Sampling())
    assert len(guesser.guess([5, 299], 3, greedy)) == 3
    assert guesser.guess([5, 299, 300], 3, greedy) == guesser.guess([5, 299, 300, 7], 3, greedy) == []


def test_a_second_model_reads_a_long_prompt_between_the_steps(tiny_model, monkeypatch):
    """It guesses once it has read all, as it would have at once."""
    model, tokens = load_model(tiny_model("llama")), [7 * i % 500 for i in range(300)]

    def greedy(logprobs):
        return mx.argmax(logprobs, axis=-1)

    wanted = SmallModel(model, 512).guess([*tokens, 1, 2, 3, 4], 3, greedy)
    monkeypatch.setattr(guessing, "PIECE_SECONDS", 0.0)
    guesser = SmallModel(model, 512)
    guesses = [guesser.guess([*tokens, *range(1, i + 1)], 3, greedy) for i in range(5)]
    assert guesses == [[]] * 4 + [wanted]


def test_widths_and_agreeing():
    logits = mx.array([[1.0, 2.0, 3.0]])
    assert of_width(logits, 2).tolist() == [[1, 2]] and of_width(logits, 3).tolist() == [[1, 2, 3]]
    assert of_width(logits, 4).tolist() == [[1, 2, 3, -float("inf")]]
    assert agreeing([1, 2, 3], [1, 2, 4, 5]) == 2 and agreeing([], [1]) == 0 and agreeing([1], [1, 2]) == 1


class Words:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_tokens_must_be_the_same():
    words = [f"w{i}" for i in range(40)]
    check_tokens(Words(*words), Words(*words), "small", "main")
    check_tokens(Words(*words, "<extra>"), Words(*words), "small", "main")
    check_tokens(Words(*words), Words(*words, "<extra>"), "small", "main")
    with pytest.raises(IncompatibleError, match="token 3 is 'other' there and 'w3' here") as error:
        check_tokens(Words(*words[:3], "other", *words[4:]), Words(*words), "small", "main")
    assert "same tokenizer" in error.value.hint
    with pytest.raises(IncompatibleError, match="'small' cannot guess for 'main'"):
        check_tokens(Words(*words[:20]), Words(*words), "small", "main")


def test_settings_that_ask_for_nothing_guess_nothing(tiny_model):
    assert load_model(tiny_model("llama"), drafting=Drafting()).drafter is None
    assert Drafter(Drafting(prompt_lookup=True), 9).begin().guess([1, 2, 3, 1, 2], 2, mx.argmax) == [3, 1]
