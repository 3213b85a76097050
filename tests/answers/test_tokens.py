"""The text and the bytes of single tokens, of every kind of tokenizer."""

import pytest
from helpers.chat_families import chat_tokenizer

from mlx_adapters.answers.tokens import Offsets, TokenTexts

TEXT = "Paris is ü€😀 sunny, and\n is  warm"


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_bytes_of_tokens_are_those_of_their_text(kind):
    tokenizer = chat_tokenizer("mistral", kind=kind)
    ids, texts = tokenizer.encode(TEXT, add_special_tokens=False), TokenTexts(tokenizer)
    spelled = [texts.spelled(token) for token in ids]
    assert b"".join(spelled).decode().removeprefix(" ") == TEXT
    parts = [i for i, token in enumerate(ids) if "\ufffd" in texts.text(token)]
    assert len(parts) >= 9 - 3  # ü, € and 😀 are of two, three and four bytes; a token may hold a whole character
    for i, token in enumerate(ids):
        assert texts.label(token) == (
            "bytes:" + "".join(f"\\x{b:02x}" for b in spelled[i]) if i in parts else texts.text(token)
        )
    whole = "".join(texts.text(token) for i, token in enumerate(ids) if i not in parts)
    assert whole.removeprefix(" ") == "".join(letter for letter in TEXT if letter not in "ü€😀")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_tokens_begin_where_their_text_does(kind):
    tokenizer = chat_tokenizer("mistral", kind=kind)
    ids, texts = tokenizer.encode(TEXT, add_special_tokens=False), TokenTexts(tokenizer)
    offsets = Offsets(texts, -1 if texts.text(ids[0]).startswith(" ") else 0)
    for token in ids:
        at = offsets.add(token)
        if "\ufffd" not in texts.text(token):
            assert f" {TEXT}".startswith(texts.text(token), at + 1)
        else:
            assert TEXT[at] in "ü€😀"
    assert offsets.at == len(TEXT)
    first = next(token for token in ids if texts.spelled(token)[:1] == b"\xe2")  # of €, whose rest does not follow
    sunny = tokenizer.encode(" sunny", add_special_tokens=False)[-1]
    broken = Offsets(texts)
    assert [broken.add(token) for token in (first, sunny, first, first, sunny)] == [
        0,
        1,
        1 + (n := len(texts.text(sunny))),
        2 + n,
        3 + n,
    ]


def test_a_token_that_is_none_of_the_tokenizers_says_nothing():
    """The rows of a model's embedding are often more than its tokenizer has tokens."""
    texts = TokenTexts(chat_tokenizer("qwen3"))
    assert (texts.text(100_000), texts.spelled(100_000), texts.label(100_000)) == ("", b"", "")
