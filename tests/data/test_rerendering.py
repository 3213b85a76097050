"""Conversations that no jinja template writes, and tokenizers that do not tell which characters they stand for."""

import random

import numpy as np
import pytest
from helpers.chat_families import FAMILIES, TOOLS, backend, by_marks, chat_tokenizer, conversation, drawn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.conversation import conversation as tokenized
from mlx_adapters.data.conversation import encode
from mlx_adapters.data.inspecting import inspect_row
from mlx_adapters.data.tokenizing import tokenize
from mlx_adapters.errors import FormatError
from mlx_adapters.rows.row import RawRow
from mlx_adapters.system.templates import LimitError
from mlx_adapters.templates import tracing


def written_by_code(messages, add_generation_prompt=False, tools=None, **_) -> str:
    """A conversation as code of mlx-lm's might write it: thoughts of earlier turns are dropped."""
    text = "# Tools\n" if tools else ""
    for number, message in enumerate(messages):
        body = message.get("content") or ""
        if message["role"] == "assistant":
            last = number + 1 == len(messages)
            body = (body if last else body.split("</think>")[-1].lstrip()) + "".join(
                f"<tool_call>{call['function']['name']}</tool_call>" for call in message.get("tool_calls") or []
            )
        text += f"<|im_start|>{message['role']}\n{body}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def code_tokenizer(write=written_by_code) -> TokenizerWrapper:
    inner = backend("qwen2")
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    return TokenizerWrapper(fast, eos_token_ids=[inner.token_to_id("<|im_end|>")], chat_template=write)


def trained(messages, write=written_by_code, tools=None) -> str:
    tokenizer = code_tokenizer(write)
    row = tokenized(messages, tokenizer, "row", tools=tools)
    assert row.written is None
    return drawn(tokenizer, row.tokens, row.trained)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str | None, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {}}}


def test_turns_are_found_by_rendering_changed_conversations():
    head = "<|im_start|>assistant\n"
    assert trained([user("a"), answer("b"), user("c"), answer("d")]) == (
        f"<|im_start|>user\na<|im_end|>\n{head}[[b<|im_end|>]]\n<|im_start|>user\nc<|im_end|>\n{head}[[d<|im_end|>]]\n"
    )
    thought = "<think>\nWhy\n</think>\n\nb"
    assert trained([user("a"), answer(thought), user("c"), answer(thought)]).count("[[") == 2
    assert trained([user("a"), answer(thought), user("c"), answer("d")]).split(head)[1].startswith("[[b<|im_end|>]]")
    called = [user("a"), answer(None, tool_calls=[CALL]), {"role": "tool", "content": "sunny"}, answer("d")]
    assert f"{head}[[<tool_call>get_weather</tool_call><|im_end|>]]\n" in trained(called, tools=TOOLS)
    assert f"{head}[[<|im_end|>]]\n" in trained([user("a"), answer(""), user("c"), answer("d")])


def test_a_turn_that_is_nowhere_is_refused_with_its_row():
    def refuses(messages, add_generation_prompt=False, **_):
        if len(messages) % 2 or messages[1]["content"] != "b":
            raise ValueError("not this one")
        return "<|im_end|>".join(message["content"] for message in messages)

    with pytest.raises(FormatError, match="row: the chat template does not show where message 2 lies") as caught:
        trained([user("a"), answer("b")], refuses)
    assert caught.value.hint == "train without --mask-prompt."  # the last turn alone is no other
    with pytest.raises(FormatError, match="row: the chat template does not show where message 2 lies") as caught:
        trained([user("a"), answer("b"), user("c"), answer("d")], refuses)
    assert caught.value.hint == "train without --mask-prompt, or with --last-turn-only."
    with pytest.raises(FormatError, match="line 3: the chat template refuses the row: not this one"):
        tokenize([RawRow({"messages": [user("a")]}, "line 3")], code_tokenizer(refuses))


def test_what_such_a_template_leaves_out_is_named():
    raw = RawRow({"messages": [user("a"), answer("<think>x</think>b"), user("c"), answer("d")]}, "row")
    _, report = inspect_row(raw, code_tokenizer(), TrainConfig(mask_prompt=True))
    assert [(text.message, text.text) for text in report.left_out] == [(2, "<think>x</think>b")]


class Slow:
    """A fast tokenizer that keeps its offsets to itself."""

    is_fast = False

    def __init__(self, fast) -> None:
        self.encode, self.decode = fast.encode, fast.decode


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_without_offsets_the_tokens_are_found_in_the_text(family, kind):
    tokenizer, rng = chat_tokenizer(family, kind=kind), random.Random(family)
    for _ in range(20):
        messages, tools = conversation(rng, FAMILIES[family])
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        told, searched = encode(text, tokenizer, "row"), encode(text, Slow(tokenizer._tokenizer), "row")
        assert searched.ids == told.ids
        for border in range(0, len(text), 7):
            assert abs(searched.from_char(border) - told.from_char(border)) <= (kind == "metaspace")
        specials = {token for token in told.ids if token in tokenizer.all_special_ids}
        for i, token in enumerate(told.ids):
            if token in specials:
                assert (searched.starts[i], searched.ends[i]) == (told.starts[i], told.ends[i])


def test_a_slow_tokenizer_of_bytes_trains_the_same_characters():
    slow = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    slow.chat_template = chat_tokenizer("chatml").chat_template
    assert not slow.is_fast
    messages = [user("é 🎉"), answer("日本 é"), user("c"), answer("")]
    row = tokenized(messages, TokenizerWrapper(slow), "row")
    picked = slow.decode(row.tokens[row.trained].tolist(), clean_up_tokenization_spaces=False)
    assert picked == "日本 é<|im_end|><|im_end|>"


def test_a_tokenizer_whose_tokens_are_not_in_the_text_is_refused():
    class Odd(Slow):
        def __init__(self, fast) -> None:
            super().__init__(fast)
            self.decode = lambda ids, **_: "?" * len(ids)

    with pytest.raises(FormatError, match="row: the tokenizer does not tell which characters"):
        encode("a longer text of many tokens, none of which it knows", Odd(chat_tokenizer("qwen3")._tokenizer), "row")


def test_a_template_that_shows_another_face_when_traced_is_rendered_anew():
    """One that counts its renderings, and one that takes longer than its limits."""
    plain = chat_tokenizer("qwen2")
    messages = [user("a"), answer("b")]
    wanted = tokenized(messages, plain, "row")

    def refuse(*_):
        raise LimitError("it takes more than 5 seconds")

    for odd in (lambda *_: tracing.account("other"), refuse):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracing, "render", odd)
            row = tokenized(messages, plain, "row")
        assert row.written is None and row.tokens.tolist() == wanted.tokens.tolist()
        assert np.array_equal(row.trained, wanted.trained)


def test_the_second_way_agrees_with_the_marks_where_it_can(monkeypatch):
    """On plain conversations of four families, as if their templates could not be looked into."""
    monkeypatch.setattr("mlx_adapters.data.conversation.written", lambda call: None)
    for family in ("qwen2", "llama3", "harmony", "glm"):
        tokenizer = chat_tokenizer(family)
        for messages in ([user("a"), answer("It is.")], [user("a"), answer("b"), user("c"), answer("d é")]):
            ids, wanted = by_marks(tokenizer, family, messages)
            row = tokenized(messages, tokenizer, "row")
            assert row.tokens.tolist() == ids and np.array_equal(row.trained, wanted), drawn(
                tokenizer, ids, row.trained
            )
