"""What is in an answer: text for the reader, the model's reasoning, calls of tools. Split while it is written.

The marks are the model's own and the states between them mlx-lm's. What begins as a call and is none that can be
carried out stays what it is: text.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from mlx_adapters.system.door import TextStateMachine, TokenizerWrapper, make_text_state_machine
from mlx_adapters.templates.tool_calls import ToolFormat

Kind = Literal["content", "reasoning"]
THINK = ("<think>", "</think>")
_KINDS: dict[str | None, Kind] = {"normal": "content", "reasoning": "reasoning"}


@dataclass(frozen=True)
class Part:
    """Something more of the text or of the reasoning, and the tokens that wrote it."""

    kind: Kind
    text: str
    tokens: tuple[Any, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the request names. `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


def reasoning_marks(tokenizer: TokenizerWrapper, template: str | None = None) -> tuple[str, str] | None:
    """What begins and ends a model's reasoning: as mlx-lm knows it, else as its template writes it."""
    if tokenizer.has_thinking:
        return tokenizer.think_start, tokenizer.think_end
    text = template if template is not None else getattr(tokenizer, "chat_template", None)
    return THINK if isinstance(text, str) and THINK[1] in text else None


def is_reasoning(tokenizer: TokenizerWrapper, prompt: Sequence[int], marks: tuple[str, str] | None) -> bool:
    """Whether the prompt ends in the mark that begins reasoning, so that the answer begins within it."""
    if marks is None:
        return False
    tail = tokenizer.decode(list(prompt[-16:]))
    return tail.rstrip().endswith(marks[0])


class AnswerReader:
    """Splits one answer. Its pieces of text go in with `add`, the rest with `finish`; parts and calls come out.

    Args:
        tokenizer: whose marks there are.
        format: how calls are written; None: none are looked for.
        tools: those of the request, in OpenAI's form.
        marks: of reasoning, from `reasoning_marks`; None: none is looked for.
        reasoning: the answer begins within the reasoning.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        format: ToolFormat | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        marks: tuple[str, str] | None = None,
        reasoning: bool = False,
    ) -> None:
        self._format, self._tools = format, tools
        self._names = {tool["function"]["name"] for tool in tools}
        self._start, self._end = format.marks if format else ("", "")
        known = SimpleNamespace(
            has_thinking=marks is not None,
            think_start=marks and marks[0],
            think_end=marks and marks[1],
            has_tool_calling=format is not None,
            tool_call_start=self._start,
            tool_call_end=self._end,
            structural_markers=tokenizer.structural_markers,
            response_transitions=tokenizer.response_transitions,
        )
        initial = tokenizer.response_initial_state or ("reasoning" if reasoning else "normal")
        self._state = make_text_state_machine(known).make_state(initial)
        self._within: str | None = None
        self._raw = Part("content", "")  # what may be a call
        self._space: dict[Kind, Part] = {"content": Part("content", ""), "reasoning": Part("reasoning", "")}
        self._written: list[tuple[int, int, tuple[Any, ...]]] = []  # from where to where tokens that have no place yet
        self._length = 0
        self._begun: dict[Kind, bool] = {"content": False, "reasoning": False}
        self._split = initial != "normal"
        self.called = False

    @property
    def reasoning(self) -> bool:
        """Whether what is written now is reasoning."""
        return self._state[0] == "reasoning"

    def add(self, text: str, tokens: Sequence[Any] = ()) -> list[Part | ToolCall]:
        """What is certain after this text, which these tokens wrote."""
        held = self._state[3]
        whole, start = held + text, self._length - len(held)
        self._written.append((self._length, self._length + len(text), tuple(tokens)))
        self._length += len(text)
        self._state, segments = TextStateMachine.split(self._state, text)
        parts, at, last = [], 0, len(segments) - 1
        for number, (within, said) in enumerate(segments):  # marks stand between them, what is held back behind
            if number:
                at = len(whole) - len(self._state[3]) - len(said) if number == last else whole.find(said, at)
            parts += self._take(within, said, start + at)
            at += len(said)
        return parts

    def finish(self) -> list[Part | ToolCall]:
        """The rest."""
        self._state, rest, kind = TextStateMachine.flush(self._state)
        parts = self._take(kind, rest, self._length - len(rest)) if rest else []
        if self._within == "tool":
            parts += self._calls(ended=False)
        space = self._space["content"]
        if not self.called and space.text:
            parts.append(space)
        wordless = tuple(token for _, _, tokens in self._written for token in tokens)  # of a stop word, say
        return [*parts, Part("content", "", wordless)] if wordless and not self.reasoning and not self.called else parts

    def _take(self, within: str | None, text: str, begin: int) -> list[Part | ToolCall]:
        """What is certain after a text in the state `within`, which begins there."""
        parts: list[Part | ToolCall] = []
        before, tokens = self._tokens(begin, begin + len(text))
        if self._within == "tool" or within == "tool":
            self._raw = Part("content", self._raw.text, self._raw.tokens + before)
        if self._within == "tool" and within != "tool":
            parts += self._calls(ended=True)
        self._within = within
        if within == "tool":
            self._split, self._raw = True, Part("content", self._raw.text + text, self._raw.tokens + tokens)
        elif within in _KINDS:
            parts += self._say(_KINDS[within], text, tokens)
        return parts

    def _tokens(self, begin: int, end: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Those that wrote the mark before this place, and those that wrote what is there."""
        before: list[Any] = []
        there: list[Any] = []
        while self._written and self._written[0][0] < max(begin, end):
            _, until, tokens = self._written.pop(0)
            (before if until <= begin else there).extend(tokens)
        return tuple(before), tuple(there)

    def _say(self, kind: Kind, text: str, tokens: tuple[Any, ...]) -> list[Part | ToolCall]:
        """The text without the space around reasoning and calls."""
        self._split = self._split or kind == "reasoning"
        text, tokens = self._space[kind].text + text, self._space[kind].tokens + tokens
        if self._split and not self._begun[kind]:
            text = text.lstrip()
        body = text.rstrip() if self._splits else text
        space = text[len(body) :]
        self._space[kind] = Part(kind, space, tokens if space and not body else ())
        self._begun[kind] = self._begun[kind] or bool(body)
        return [Part(kind, body, tokens)] if body else []

    @property
    def _splits(self) -> bool:
        """Whether space may turn out to stand before a call or at the end of reasoning."""
        return self._format is not None or self._within == "reasoning"

    def _calls(self, ended: bool) -> list[Part | ToolCall]:
        """The calls in what was between the marks; the text as it is, if these are none."""
        assert self._format is not None
        raw, self._raw, self._within = self._raw, Part("content", ""), None
        try:
            calls = [self._call(call) for call in self._format.calls(raw.text, self._tools)]
        except Exception:  # a parser raises what it likes
            return self._say("content", self._start + raw.text + (self._end if ended else ""), raw.tokens)
        self.called, self._space["content"] = True, Part("content", "")
        return list(calls)

    def _call(self, call: Mapping[str, Any]) -> ToolCall:
        name, arguments = call["name"], call.get("arguments") or {}
        if name not in self._names or not isinstance(arguments, dict):
            raise ValueError("no such tool, or no object of arguments")
        given = call.get("id")
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        return ToolCall(given if isinstance(given, str) else f"call_{uuid.uuid4().hex[:24]}", name, text)


@dataclass
class Answer:
    """What was written of one answer, put together of its parts.

    `read` None: all of it is content. `tokens` are those of the content, `thoughts` those of the reasoning;
    `reasoning_tokens` counts those of `completion_tokens` that were written after reasoning began, with the mark that
    ends it.
    """

    read: AnswerReader | None = None
    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.calls: list[ToolCall] = []
        self.tokens: list[Any] = []
        self.thoughts: list[Any] = []
        self.completion_tokens = self.reasoning_tokens = 0

    def count(self, completion_tokens: int) -> int:
        """Take in how many tokens are written with the piece to come; how many of them are new."""
        new, self.completion_tokens = completion_tokens - self.completion_tokens, completion_tokens
        if self.read is not None and self.read.reasoning:
            self.reasoning_tokens += new
        return new

    def add(self, text: str, finish_reason: str | None, tokens: Sequence[Any] = ()) -> list[Part | ToolCall]:
        """Take in a piece, which these tokens wrote; what is new of the answer."""
        if self.read is None:
            parts: list[Part | ToolCall] = [Part("content", text, tuple(tokens))] if text or tokens else []
        else:
            parts = self.read.add(text, tokens) + (self.read.finish() if finish_reason else [])
        for part in parts:
            if isinstance(part, ToolCall):
                self.calls.append(part)
            elif part.kind == "content":
                self.content += part.text
                self.tokens += part.tokens
            else:
                self.reasoning += part.text
                self.thoughts += part.tokens
        if finish_reason is not None:
            self.finish_reason = "tool_calls" if self.calls and finish_reason == "stop" else finish_reason
        return parts
