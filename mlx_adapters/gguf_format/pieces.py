"""SentencePiece's BPE (Llama 2, Mistral, Gemma, Phi 3) as llama.cpp does it, from a tokenizer.json.

There spaces are "▁", unknown characters become bytes, and two neighbours become one token in the order of that token's
score. A tokenizer.json has no scores, but ranks of merges, which were made of them: the earlier a merge gives a token,
the higher its score. llama.cpp (src/llama-vocab.cpp) merges whatever gives a token, so what it does is tried here.
"""

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_adapters.errors import ConfigError

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
LEAST = -1e6  # the score of what no merge gives


@dataclass(frozen=True)
class Pieces:
    """How text becomes pieces. `prefix`: when a space is put before a text: "always", "first" of a prompt, "never"."""

    prefix: str
    scores: dict[str, float]

    @property
    def space_before(self) -> bool:
        """What llama.cpp is told: a space before each text, or none. In a chat a text stands behind a special token."""
        return self.prefix == "always"

    def encode(self, text: str, ids: Mapping[str, int], whole: Sequence[str]) -> list[int]:
        """The tokens of `text` in llama.cpp; those of `whole` are taken out of it first."""
        made: list[int] = []
        cut = re.split("(" + "|".join(map(re.escape, sorted(whole, key=len, reverse=True))) + ")", text)
        for number, part in enumerate(cut if whole else [text]):
            if number % 2:
                made.append(ids[part])
            elif part:
                spaced = f" {part}" if self.space_before else part
                made += self._merged(spaced.replace(" ", SPACE), ids)
        return made

    def _merged(self, text: str, ids: Mapping[str, int]) -> list[int]:
        symbols, after = list(text), list(range(1, len(text) + 1))
        before = list(range(-1, len(text) - 1))
        waiting: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols) and (pair := symbols[left] + symbols[right]) in ids:
                heapq.heappush(waiting, (-self.scores.get(pair, LEAST), left, right, pair))

        for i in range(len(symbols) - 1):
            offer(i, i + 1)
        while waiting:
            _, left, right, pair = heapq.heappop(waiting)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != pair:
                continue
            symbols[left], symbols[right], after[left] = pair, "", after[right]
            if after[left] < len(symbols):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [index for symbol in symbols if symbol for index in _ids_of(symbol, ids)]


def _ids_of(symbol: str, ids: Mapping[str, int]) -> list[int]:
    return [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def read_pieces(stored: Mapping[str, Any], merges: Sequence[str]) -> Pieces:
    """The pieces of a tokenizer.json with `byte_fallback`. Raises ConfigError for what llama.cpp does otherwise."""
    steps = steps_of(stored.get("normalizer"), "normalizers") + steps_of(stored.get("pre_tokenizer"), "pretokenizers")
    prefix, kinds = "never", []
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = "always"
        elif kind == "Metaspace" and step.get("replacement") == SPACE:
            prefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        elif not (kind == "Replace" and step.get("content") == SPACE) and not _harmless(step):
            kinds.append(str(kind))
    if kinds:
        raise ConfigError(f"llama.cpp does not know this tokenizer's {', '.join(kinds)}.")
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault(merge.replace(" ", "", 1), -float(rank))
    return Pieces(prefix, scores)


def _harmless(step: Mapping[str, Any]) -> bool:
    """Spaces are "▁" by then, so that cutting at spaces cuts nothing."""
    return step.get("type") == "Split" and step.get("pattern") == {"String": " "}


def steps_of(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer.json's part: those `inner` of it, or the part itself, or none."""
    return list((part or {}).get(inner, [part] if part else []))
