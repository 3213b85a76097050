"""What single tokens say: as text, and as the bytes that a few of them put together to a character."""

import codecs
import re
from typing import Any

SPELLED = re.compile("<0x([0-9A-F]{2})>")  # a byte, where a vocabulary of words falls back to them
_OWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that byte-level BPE writes as themselves
ALPHABET = {chr(byte): byte for byte in _OWN}
ALPHABET |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _OWN)}


class TokenTexts:
    """The tokens of a tokenizer, looked up once each."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def text(self, token: int) -> str:
        """As it stands within a text: with the space that a word begins with. `\\ufffd` for a part of a character."""
        return self._look(token)[0]

    def spelled(self, token: int) -> bytes | None:
        """Those that it writes; None for a part of a character whose bytes its tokenizer does not spell."""
        return self._look(token)[1]

    def label(self, token: int) -> str:
        """Its text, or as OpenAI's completions tell a part of a character: `bytes:\\xe2\\x82`."""
        text, spelled = self._look(token)
        parted = "\ufffd" in text and spelled is not None and spelled != text.encode()
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled or b"") if parted else text

    def _look(self, token: int) -> tuple[str, bytes | None]:
        if token not in self._known:
            text = self._within(token)
            self._known[token] = text, self._from_piece(token) if "\ufffd" in text else text.encode()
        return self._known[token]

    def _within(self, token: int) -> str:
        """A decoder takes the space from the first word of a text."""
        decode = self._tokenizer.decode
        alone, twice = decode([token]), decode([token, token])
        return twice[len(alone) :] if twice.startswith(alone) and "\ufffd" not in alone else alone

    def _from_piece(self, token: int) -> bytes | None:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return None
        if match := SPELLED.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return bytes(ALPHABET[letter] for letter in piece) if ALPHABET.keys() >= set(piece) else None


class Offsets:
    """Where each of an answer's tokens begins in its text, in characters. `at`: where the next one does.

    A token that goes on with a character begins where the character does.
    """

    def __init__(self, texts: TokenTexts, at: int = 0) -> None:
        self._texts, self.at = texts, at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> int:
        """Where it begins."""
        spelled = self._texts.spelled(token)
        written = self._texts.text(token).encode() if spelled is None else spelled
        if self._decoder.getstate()[0] and written and not 0x80 <= written[0] < 0xC0:  # a character that stays broken
            self.at += len(self._decoder.decode(b"", final=True))
        at = self.at
        self.at += len(self._decoder.decode(written))
        return at
