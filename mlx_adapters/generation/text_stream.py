"""Tokens to text while they come, and stop words, which may begin in one token and end in another."""

import contextlib
from collections.abc import Sequence
from typing import Any

from mlx_adapters.config.sampling import Sampling

PLAIN = Sampling()


class TextStream:
    """The text of one answer. Text that may be the beginning of a stop word is held back until it is not.

    With `continues` it goes on from a text: a space that it begins with is kept, which mlx-lm takes off. The stop words
    are those of `sampling`, which may ask for some tokens before they count.
    """

    def __init__(self, tokenizer: Any, sampling: Sampling = PLAIN, continues: bool = False) -> None:
        self._detokenizer, self._stop, self._held = tokenizer.detokenizer, sampling.stop, ""
        self._left = sampling.min_tokens
        self.stopped = False
        if continues:
            with contextlib.suppress(AttributeError):  # those that compute their text take nothing off
                self._detokenizer.text, self._detokenizer.offset = ".", 1

    def add(self, token: int) -> str:
        """The text that is certain after this token; sets `stopped` when a stop word is complete."""
        self._detokenizer.add_token(token)
        self._left -= 1
        return self._take(self._detokenizer.last_segment)

    def finish(self) -> str:
        """The rest of the text."""
        self._detokenizer.finalize()
        rest = self._take(self._detokenizer.last_segment)
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._left > 0:
            return text
        text = self._held + text
        places = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` are the beginning of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def text_of(tokenizer: Any, tokens: Sequence[int], sampling: Sampling = PLAIN) -> str:
    """The text of these tokens up to the first stop word, as streaming them gives it."""
    stream = TextStream(tokenizer, sampling)
    return "".join([stream.add(token) for token in tokens]) + stream.finish()
