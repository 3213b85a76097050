"""Grammars on the logits: which tokens may come next in one answer, by llguidance.

The mask of the next token is computed on the CPU while the model computes that token's logits, so a row that has a
grammar keeps no other row waiting.
"""

import functools
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_adapters.answers.schemas import llguidance
from mlx_adapters.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Grammar:
    """What a `Constraint` is made of.

    Args:
        text: Lark, as `schemas` writes it.
        after: the tokens after which it begins, each time they are written; (): at once.
        unless: a first token that puts it off until `after` is written.
        repeats: it may begin again, and text may follow; else the answer ends with it.
    """

    text: str
    after: tuple[int, ...] = ()
    unless: int | None = None
    repeats: bool = False


class Constraint:
    """The state of one answer under a grammar. What has to come yet is not ended by one of `ends`, the model's EOS."""

    def __init__(self, matcher: Any, grammar: Grammar, words: int, ends: Iterable[int]) -> None:
        self._fresh, self._matcher, self._grammar = matcher, matcher.deep_copy(), grammar
        self._waits = bool(grammar.after) and grammar.unless is None
        self._first = True
        self._tail: tuple[int, ...] = ()
        self._words = np.zeros((1, words), np.int32)
        self._before: np.ndarray | None = None  # what may be written before it begins
        if grammar.after and not grammar.repeats:
            self._before = np.full(words, 0xFFFFFFFF, np.uint32)
            for token in {token for token in ends if token < 32 * words} - set(grammar.after):
                self._before[token // 32] &= ~np.uint32(1 << (token % 32))
        self.ended = False

    def mask(self) -> np.ndarray | None:
        """(words,) uint32 with a bit for each token that may come next; None while every one may.

        Raises ModelError when the grammar has become too large to go on with.
        """
        if self._waits:
            return self._before
        llguidance().numpy.fill_next_token_bitmask(self._matcher, self._words)
        if self._matcher.is_error():
            raise ModelError(
                f"The grammar is too large to go on with: {' '.join(self._matcher.get_error().split())[:300]}"
            )
        words = self._words[0].view(np.uint32).copy()
        if self._first and self._grammar.unless is not None:
            words[self._grammar.unless // 32] |= np.uint32(1 << (self._grammar.unless % 32))
        return words

    def accept(self, token: int) -> None:
        """Go on by a token that the mask allows; sets `ended` when nothing more may come.

        Raises ModelError for another one.
        """
        if self._waits:
            after = self._grammar.after
            self._tail = (*self._tail, token)[-len(after) :]
            if self._tail == after:
                self._waits, self._tail, self._matcher = False, (), self._fresh.deep_copy()
            return
        if self._first and token == self._grammar.unless:
            self._first, self._waits = False, True
            return
        self._first = False
        if not self._matcher.consume_token(token):
            raise ModelError(f"The grammar does not go on: {' '.join(self._matcher.get_error().split())[:300]}")
        if self._matcher.is_stopped():
            self._waits = self._grammar.repeats
            self.ended = not self._grammar.repeats


class Grammars:
    """Grammars for one model's tokens. Threads may share it.

    Args:
        tokenizer: the model's.
        vocabulary: the width of its logits.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()
        self._compile = functools.lru_cache(maxsize=64)(self._compiled)

    def constraint(self, grammar: Grammar) -> Constraint:
        """The grammar at its beginning. Raises ConfigError if it is none, or the tokenizer's kind allows none."""
        with self._lock:
            matcher = self._compile(grammar.text)
        return Constraint(matcher, grammar, (self._tokens.vocab_size + 31) // 32, self._ends)

    def allows(self, grammar: Grammar) -> bool:
        """Whether the grammar can be used."""
        try:
            self.constraint(grammar)
        except ConfigError:
            return False
        return True

    def _compiled(self, text: str) -> Any:
        matcher = llguidance().LLMatcher(self._tokens, text, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"The grammar cannot be used: {' '.join(matcher.get_error().split())[:300]}")
        return matcher

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """The tokens that the text of a grammar names by their ids."""
        added = self._tokenizer.get_added_vocab()
        return {text: token for text, token in added.items() if self._tokens.is_special_token(token)}

    @property
    def _ends(self) -> list[int]:
        return sorted(map(int, self._tokenizer.eos_token_ids))

    @functools.cached_property
    def _tokens(self) -> Any:
        made = llguidance().hf.from_tokenizer
        inner = self._tokenizer._tokenizer
        try:
            return made(inner, n_vocab=max(self._vocabulary, len(inner)), eos_token=self._ends)
        except Exception as error:  # a tokenizer of another kind than Rust's
            raise ConfigError(f"This model's tokenizer allows no grammar: {str(error)[:200]}") from None
