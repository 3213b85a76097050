"""A row: its values as they were read, where it stands, and what they mean in the one form that the rest works on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_adapters.config.data import DataConfig
from mlx_adapters.errors import FormatError
from mlx_adapters.rows import shapes
from mlx_adapters.rows.messages import Message
from mlx_adapters.rows.preferences import label_of, says_nothing
from mlx_adapters.rows.shapes import Canonical
from mlx_adapters.rows.values import is_missing, plain
from mlx_adapters.system.limits import LONGEST_TEXT

DEFAULTS = DataConfig()
WEIGHTS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}


def columns_of(read: DataConfig) -> dict[str, str]:
    """The columns that are named, by what they are for."""
    columns = {
        "prompt": read.prompt_column,
        "completion": read.completion_column,
        "text": read.text_column,
        "messages": read.messages_column,
    }
    return {purpose: name for purpose, name in columns.items() if name is not None}


@dataclass(frozen=True)
class RawRow:
    """One row: `values` as read, `where` it stands ("data/train.jsonl, line 7"), and how it is to be `read`."""

    values: Mapping[str, Any]
    where: str
    read: DataConfig = DEFAULTS

    @cached_property
    def canonical(self) -> Canonical:
        """What the row means. Raises FormatError, naming the place, for a shape that nobody knows and a text that no
        memory would hold in tokens."""
        found = shapes.recognize(self.values, columns_of(self.read), self.where)
        if (size := found.characters) > LONGEST_TEXT:
            raise FormatError(
                f"{self.where}: the row has {size:,} characters, more than the {LONGEST_TEXT:,} that one may have.",
                "make several rows of it: of each, --max-seq-length tokens are trained.",
            )
        return found

    @property
    def format(self) -> str:
        """ "chat", "completion" or "text"; of preferences, that of the chosen answer."""
        return self.canonical.format

    @property
    def messages(self) -> list[Message]:
        """The conversation of a chat or completion row, as a chat template expects it (see `rows.messages`)."""
        return [dict(message) for message in self.canonical.messages]

    @property
    def weights(self) -> tuple[int, ...]:
        """Of each message 1, or 0 where it is context that is never trained."""
        return self.canonical.weights

    @property
    def silent(self) -> frozenset[int]:
        """The numbers from 0 of the assistant's messages that are never trained, not even where the prompt is."""
        spoken = enumerate(zip(self.canonical.messages, self.weights, strict=True))
        asked = self.canonical.asked
        return frozenset(i for i, (m, weight) in spoken if m["role"] == "assistant" and not weight and i >= asked)

    @property
    def weight(self) -> int | None:
        """The row's own weight: 0 if it is not to be trained, 1 if it is or says nothing, None for any other value."""
        value = self.values.get("weight")
        if is_missing(value) or value == "":
            return 1
        return WEIGHTS.get(str(value).lower())

    @property
    def rejected(self) -> "RawRow | None":
        """Of preferences, the row that gives the rejected answer."""
        values = self.canonical.rejected
        read = DataConfig(chat_template_args=self.read.chat_template_args)
        return None if values is None else RawRow(values, self.where, read)

    @property
    def label(self) -> bool:
        """Whether the answer is a good one. Raises FormatError, naming the place, if the row does not say so."""
        return label_of(self.values, self.where)

    @property
    def says_nothing(self) -> str | None:
        """Why no preference can be learned from the row, or None: both answers are equal, or one is empty."""
        rows = [self] if self.rejected is None else [self, self.rejected]
        if len(rows) == 2 and (rows[0].messages, rows[0].text) == (rows[1].messages, rows[1].text):
            return "the chosen and the rejected answer are equal"
        texts = [{"content": row.text} for row in rows if row.format == "text"]
        return says_nothing(texts or [row.messages[-1] for row in rows])

    @property
    def tools(self) -> list[Any] | None:
        """The tools that the conversation may use."""
        return self.canonical.tools

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is given beside messages and tools, such as {"enable_thinking": False}."""
        return {**self.read.chat_template_args, **self.canonical.template_arguments}

    @property
    def prompt(self) -> str:
        """Of a completion row: what is asked."""
        return self.canonical.prompt

    @property
    def completion(self) -> str:
        """Of a completion row: the answer."""
        return self.canonical.completion

    @property
    def text(self) -> str:
        """Of a text row: the text."""
        return self.canonical.text

    @property
    def record(self) -> dict[str, Any]:
        """The row's values as JSON holds them."""
        return plain(self.values, nulls=True)

    def key(self) -> str:
        """The row as canonical JSON without nulls, equal for equal rows."""
        return json.dumps(plain(self.values), sort_keys=True, ensure_ascii=False)
