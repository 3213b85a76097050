"""OpenAI's bodies of /v1/chat/completions and /v1/completions, whole or as chunks of a stream."""

import base64
import json
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlx_adapters.answers.reading import Answer, Part, ToolCall
from mlx_adapters.answers.tokens import Offsets, TokenTexts
from mlx_adapters.generation.requests import Token
from mlx_adapters.protocols.options import Asked

Body = dict[str, Any]


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int = 0,
    reasoning_tokens: int = 0,
    guessed_tokens: int = 0,
    accepted_tokens: int = 0,
) -> Body:
    """OpenAI's usage record."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "accepted_prediction_tokens": accepted_tokens,
            "rejected_prediction_tokens": guessed_tokens - accepted_tokens,
        },
    }


class Writer:
    """What is told of the answers of one request; `whole` at once, or `begin`, `piece` for each piece, and `end`.

    `asks_in` is the field of the request that holds the conversation or the prompt, `limits` the one that
    limits the answer. An answer that `continues` goes on from a text, where a leading space means something.

    Args:
        asked: the request.
        model: the adapter or base that answers.
        fingerprint: of what computes.
        texts: of tokens.
        prompts: the texts of the prompts, where they are to be echoed.
    """

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"
    media_type, alive, last = "text/event-stream", b": keep-alive\n\n", b"data: [DONE]\n\n"
    asks_in, limits, continues = "messages", "max_tokens", False

    def __init__(
        self,
        asked: Asked,
        model: str,
        fingerprint: str,
        texts: TokenTexts,
        prompts: Sequence[str] = (),
    ) -> None:
        self.asked, self.model, self.fingerprint, self.prompts = asked, model, fingerprint, prompts
        self._texts = texts
        self.id = self.prefix + uuid.uuid4().hex
        self.created = int(time.time())
        self._opened: set[int] = set()
        self._calls: dict[int, int] = {}
        self._offsets: dict[int, Offsets] = {}

    def frame(self, chunk: Body) -> bytes:
        """One server-sent event."""
        return f"data: {json.dumps(chunk)}\n\n".encode()

    def note_first(self, at: float | None) -> None:
        """When an answer's first token was written (seconds of `time.monotonic`); its text may come much later."""

    def note(self, index: int, parts: Sequence[Part | ToolCall], answer: Answer) -> None:
        """Take in a piece of the choice `index` of answers that will be told whole."""

    def whole(self, answers: Sequence[Answer], usage: Body) -> Body:
        """The body of answers that are not streamed."""
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return self._envelope(self.kind, choices) | {"usage": usage}

    def begin(self, choices: int) -> Iterator[Body]:
        """The chunks that come first."""
        yield from ()

    def piece(self, index: int, parts: Sequence[Part | ToolCall], answer: Answer) -> Iterator[Body]:
        """The chunks that tell of a piece of the choice `index`."""
        if index not in self._opened:
            self._opened.add(index)
            yield self._chunk(index, {"role": "assistant", "content": ""})
        wordless = None
        for part in parts:
            if isinstance(part, Part) and not part.text:
                wordless = part
                continue
            told = part if isinstance(part, Part) else None
            yield from (self._chunk(index, delta, part=told) for delta in self._deltas(index, part))
        if answer.finish_reason is not None:
            yield self._chunk(index, {}, answer.finish_reason, wordless)

    def end(self, answers: Sequence[Answer], usage: Body) -> Iterator[Body]:
        """The chunks that come last."""
        if self.asked.include_usage:
            yield self._envelope(self.chunk_kind, []) | {"usage": usage}

    def _deltas(self, index: int, part: Part | ToolCall) -> Iterator[Body]:
        if isinstance(part, Part):
            yield _said(part.kind, part.text)
            return
        number = self._calls.get(index, 0)
        self._calls[index] = number + 1
        head = {"index": number, "id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
        yield {"tool_calls": [head]}
        yield {"tool_calls": [{"index": number, "function": {"arguments": part.arguments}}]}

    def _chunk(self, index: int, delta: Body, reason: str | None = None, part: Part | None = None) -> Body:
        tokens = {} if part is None else {part.kind: part.tokens}
        choice = {
            "index": index,
            **self._delta(delta),
            "logprobs": self._logprobs(index, **tokens),
            "finish_reason": reason,
        }
        return self._envelope(self.chunk_kind, [choice]) | ({"usage": None} if self.asked.include_usage else {})

    def _delta(self, delta: Body) -> Body:
        return {"delta": delta}

    def _choice(self, index: int, answer: Answer) -> Body:
        message: Body = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message |= _said("reasoning", answer.reasoning)
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(index, answer.tokens, answer.thoughts) or self._no_logprobs,
            "finish_reason": answer.finish_reason,
        }

    @property
    def _no_logprobs(self) -> Body | None:
        """Those of an answer without tokens."""
        return None if self.asked.logprobs is None else {"content": [], "refusal": None}

    def _envelope(self, kind: str, choices: list[Body]) -> Body:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _logprobs(self, index: int, content: Sequence[Token] = (), reasoning: Sequence[Token] = ()) -> Body | None:
        if self.asked.logprobs is None or not (content or reasoning):
            return None
        told: Body = {"content": self._entries(content), "refusal": None}
        return told | ({"reasoning_content": self._entries(reasoning)} if reasoning else {})

    def _entries(self, tokens: Sequence[Token]) -> list[Body]:
        return [self._entry(t.id, t.logprob) | {"top_logprobs": [self._entry(i, p) for i, p in t.top]} for t in tokens]

    def _entry(self, token: int, logprob: float | None) -> Body:
        spelled = self._texts.spelled(token)
        bytes_ = None if spelled is None else list(spelled)
        return {"token": self._texts.text(token), "logprob": _finite(logprob), "bytes": bytes_}


class FunctionWriter(Writer):
    """Of a chat with OpenAI's older `functions`, in whose words an answer has one call: the first."""

    def _deltas(self, index: int, part: Part | ToolCall) -> Iterator[Body]:
        if isinstance(part, Part):
            yield from super()._deltas(index, part)
        elif index not in self._calls:
            self._calls[index] = 1
            yield {"function_call": {"name": part.name, "arguments": ""}}
            yield {"function_call": {"arguments": part.arguments}}

    def _chunk(self, index: int, delta: Body, reason: str | None = None, part: Part | None = None) -> Body:
        return super()._chunk(index, delta, _older(reason), part)

    def _choice(self, index: int, answer: Answer) -> Body:
        choice = super()._choice(index, answer)
        if calls := choice["message"].pop("tool_calls", None):
            choice["message"]["function_call"] = calls[0]["function"]
        return choice | {"finish_reason": _older(answer.finish_reason)}


def _older(reason: str | None) -> str | None:
    return "function_call" if reason == "tool_calls" else reason


class CompletionWriter(Writer):
    """OpenAI's older /v1/completions. An echo is the prompt before the answer, with the prompt's log-probabilities."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"
    asks_in, continues = "prompt", True

    def begin(self, choices: int) -> Iterator[Body]:
        """The echoes of a stream."""
        for index in range(choices):
            self._opened.add(index)
            if self.asked.echo:
                yield self._chunk(index, {"content": self._echo(index)})

    def _echo(self, index: int) -> str:
        return self.prompts[index // self.asked.choices] if self.asked.echo else ""

    def _delta(self, delta: Body) -> Body:
        return {"text": delta.get("content", "")}

    def _choice(self, index: int, answer: Answer) -> Body:
        return {
            "index": index,
            "text": self._echo(index) + answer.content,
            "logprobs": self._logprobs(index, answer.tokens),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, index: int, content: Sequence[Token] = (), reasoning: Sequence[Token] = ()) -> Body | None:
        tokens = content
        if self.asked.logprobs is None or not tokens:
            return None
        if index not in self._offsets:
            prompt = Offsets(self._texts)
            for token in tokens:
                if token.of_prompt:
                    prompt.add(token.id)
            # What stands before the prompt's text (BOS, the space of its first word) begins where that does.
            self._offsets[index] = Offsets(self._texts, len(self._echo(index)) - prompt.at)
        return {
            "tokens": [self._texts.label(t.id) for t in tokens],
            "token_logprobs": [None if t.logprob is None else _finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens],
            "text_offset": [max(self._offsets[index].add(t.id), 0) for t in tokens],
        }

    def _top(self, token: Token) -> Body | None:
        """The likeliest tokens and the one that was chosen; of several that read alike, the likelier."""
        if token.logprob is None:
            return None
        told = {self._texts.label(i): _finite(p) for i, p in reversed(token.top)}
        return dict(reversed(told.items())) | {self._texts.label(token.id): _finite(token.logprob)}


def _said(kind: str, text: str) -> Body:
    """Content; or reasoning, by the two names that clients know it by."""
    return {"content": text} if kind == "content" else {"reasoning_content": text, "reasoning": text}


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else -9999.0


def embeddings_body(vectors: Sequence[Sequence[float]], model: str, tokens: int, packed: bool) -> Body:
    """OpenAI's body of /v1/embeddings; `packed`: float32 in base64, as its clients ask for."""
    data = [
        {"object": "embedding", "index": i, "embedding": _packed(vector) if packed else list(vector)}
        for i, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
