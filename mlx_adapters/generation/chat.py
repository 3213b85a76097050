"""A conversation that may change its adapter, and prompts answered by two adapters."""

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.generation.decoding import PromptCache
from mlx_adapters.generation.live import LiveModel


@dataclass
class Chat:
    """A conversation with a model and the adapters attached to it.

    What was read before is not read again, as long as the adapter stays: keys and values of one adapter mean
    nothing to another. `full`: the last answer stopped where the model's context ends.
    """

    model: LiveModel
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: PromptCache | None = field(default=None, repr=False)
    full: bool = field(default=False, init=False)

    def ask(self, text: str, **options: Any) -> Generator[str]:
        """The answer of the adapter at work, piece by piece; the turn is remembered when it is complete."""
        messages = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        with contextlib.closing(self._answer(messages, **options)) as answer:
            for piece in answer:
                pieces.append(piece)
                yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def compare(self, text: str, adapters: list[str | None], **options: Any) -> list[str]:
        """The answers of several adapters to the same turn; none of them is remembered."""
        messages = [*self.messages, {"role": "user", "content": text}]
        attached = self.model.pool.attached
        own = [self.model.template_for(attached[name].adapter if name else None) for name in adapters]
        prompts = [(self._encode(messages, one), name) for name, one in zip(adapters, own, strict=True)]
        return self.model.generate_batch(prompts, **options)

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages, self.cache = [], None

    def _answer(self, messages: list[dict[str, str]], **options: Any) -> Generator[str]:
        prompt = self._encode(messages)
        self.cache, rest = self.model.going_on(self.cache, prompt)
        with contextlib.closing(self.model.stream(rest, cache=self.cache, **options)) as steps:
            for response in steps:
                self.full = response.finish_reason == "context"
                yield response.text

    def _encode(self, messages: list[dict[str, str]], own: TemplateConfig | None = None) -> list[int]:
        if not self.model.has_template:
            return self.model.encode(messages[-1]["content"])
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.model.encode_chat([*system, *messages], own=own)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    prompt: str
    a: str
    b: str


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: JSONL rows with `prompt` or `messages` (the last user turn), or one a line."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise NotFoundError(f"There is no file '{path}'.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"'{path}' cannot be read: {error}.") from None
    prompts = [
        _prompt(line, f"'{path}', line {i}") if path.suffix.lower() == ".jsonl" else line.strip()
        for i, line in enumerate(lines, start=1)
    ]
    if not prompts:
        raise FormatError(f"'{path}' holds no prompt.", "write one to a line.")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        if isinstance(row.get("prompt"), str):
            return row["prompt"]
        content = [m["content"] for m in row["messages"] if m["role"] == "user"][-1]
        if isinstance(content, str):
            return content
        raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise FormatError(f"{where} has neither 'prompt' nor 'messages' with a user's turn.") from None


def conversation(text: str, system: str | None = None) -> list[dict[str, str]]:
    """The messages of a question, after the system's."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]


def answer_pairs(
    model: LiveModel, prompts: list[str], a: str | None, b: str | None, system: str | None = None, **options: Any
) -> list[Pair]:
    """The answers of adapters `a` and `b` (None: the base) to each prompt, all decoded together."""
    told: list[Any] = [conversation(prompt, system) if system else prompt for prompt in prompts]
    answers = model.generate_batch([(prompt, name) for prompt in told for name in (a, b)], **options)
    return [Pair(p, *answers[2 * i : 2 * i + 2]) for i, p in enumerate(prompts)]
