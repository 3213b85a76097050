"""OpenAI's requests and responses: read strictly, written exactly.

What this server cannot do is refused, never ignored: an option it does not have is accepted at its neutral value
only, and an unknown one is an error.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_adapters.config.sampling import Sampling
from mlx_adapters.errors import did_you_mean
from mlx_adapters.generation.batching import Token
from mlx_adapters.serving.jobs import ApiError

DEFAULT_MAX_TOKENS = 512
MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS = 4, 256, 20
# Options we do not have -> the values that mean "not used".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "parallel_tool_calls": (None, True, False),
    "modalities": (None, ["text"]),
}
# Options that ask for nothing of the model.
NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
SHARED = {"model", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "max_tokens", "logprobs"}
SHARED |= {"top_k", "min_p"}  # not of OpenAI's own; the field's servers have them
CHAT = SHARED | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
COMPLETION = SHARED | {"prompt"}


@dataclass(frozen=True)
class Asked:
    """A checked request, but for the prompt. `max_tokens` None: what the context leaves, up to the default; that of
    `sampling` means nothing."""

    model: str
    user: str | None
    stream: bool
    include_usage: bool
    max_tokens: int | None
    sampling: Sampling
    top_logprobs: int | None


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body. Raises ApiError 400."""
    try:
        value = json.loads(body, parse_constant=_no_constant, parse_float=_finite_float)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair, spelled or in bytes, is no text
    except UnicodeEncodeError:
        raise ApiError(400, "The body is not valid Unicode.") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def read_request(raw: Mapping[str, Any], chat: bool) -> Asked:
    """Check everything but messages or prompt. Raises ApiError 400."""
    _refuse_unknown(raw, CHAT if chat else COMPLETION)
    options = raw.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "'stream_options' must be an object with 'include_usage'.", param="stream_options")
    model = _get(raw, "model", str, None)
    if not model:
        raise ApiError(400, "You must provide a 'model'.", param="model")
    limit = _get(raw, "max_completion_tokens", int, None, low=1) if chat else None
    return Asked(
        model=model,
        user=_get(raw, "user", str, None),
        stream=_get(raw, "stream", bool, False),
        include_usage=_get(options, "include_usage", bool, False),
        max_tokens=limit if limit is not None else _get(raw, "max_tokens", int, None, low=1),
        sampling=Sampling(
            temperature=_get(raw, "temperature", float, 1.0, low=0, high=2),
            top_p=_top_p(raw),
            min_p=_get(raw, "min_p", float, 0.0, low=0, high=1),
            top_k=max(_get(raw, "top_k", int, 0, low=-1), 0),  # -1, as vLLM's clients say it: all
            seed=_seed(raw),
            stop=_stop(raw.get("stop")),
        ),
        top_logprobs=_top_logprobs(raw, chat),
    )


def _refuse_unknown(raw: Mapping[str, Any], known: set[str]) -> None:
    for name, value in raw.items():
        if name in known or name in NOTES:
            continue
        if name not in NEUTRAL:
            hint = did_you_mean(name, known)
            raise ApiError(
                400, f"Unrecognized request argument: {name[:100]}." + (f" {hint}" if hint else ""), param=name[:100]
            )
        if value not in NEUTRAL[name]:
            raise ApiError(400, f"This server does not support '{name}'.", param=name, code="unsupported_parameter")


def _get(
    raw: Mapping[str, Any], name: str, kind: type, default: Any, low: float | None = None, high: float | None = None
) -> Any:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "an integer", float: "a number", str: "a string", bool: "a boolean"}
        raise ApiError(400, f"'{name}' must be {names[kind]}.", param=name)
    number: Any = value  # only numbers come with bounds
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"at least {low:g}" + (f" and at most {high:g}" if high is not None else "")
        raise ApiError(400, f"'{name}' must be {bounds}.", param=name)
    return kind(value)


def _top_p(raw: Mapping[str, Any]) -> float:
    top_p = _get(raw, "top_p", float, 1.0, low=0, high=1)
    return max(top_p, 1e-9)  # 0 means the likeliest token alone


def _seed(raw: Mapping[str, Any]) -> int | None:
    seed = _get(raw, "seed", int, None, low=-(2**63), high=2**63 - 1)
    return None if seed is None else seed % 2**63


def _stop(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value if value is not None else []
    good = isinstance(words, list) and all(isinstance(w, str) and 0 < len(w) <= MAX_STOP_LENGTH for w in words)
    if not good or len(words) > MAX_STOPS:
        raise ApiError(
            400,
            f"'stop' must be a string or up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters.",
            param="stop",
        )
    return tuple(words)


def _top_logprobs(raw: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return _get(raw, "logprobs", int, None, low=0, high=5)
    wanted, top = _get(raw, "logprobs", bool, False), _get(raw, "top_logprobs", int, 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    return top if wanted else None


def read_messages(raw: Mapping[str, Any]) -> list[dict[str, str]]:
    """The checked messages of a chat, contents as plain text. Raises ApiError 400."""
    messages = raw.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "'messages' must be a list with at least one message.", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f"'{where}' must be an object.", param=where)
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"'{where}.role' must be system, developer, user or assistant.", param=f"{where}.role")
    extra = set(message) - {"role", "content", "name", "refusal"}
    if any(message[name] for name in extra):
        raise ApiError(400, f"'{where}' has '{min(extra)[:100]}', which this server does not support.", param=where)
    if isinstance(content, list):
        parts = [part["text"] for part in content if _is_text(part)]
        if len(parts) != len(content):
            raise ApiError(400, f"'{where}.content' may hold parts of type 'text' only.", param=f"{where}.content")
        content = "".join(parts) if parts else None
    if not isinstance(content, str):
        raise ApiError(400, f"'{where}.content' must be a string.", param=f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def read_template_arguments(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat gives its template beside the messages. Raises ApiError 400."""
    arguments = raw.get("chat_template_kwargs")
    if not isinstance(arguments, dict | None):
        raise ApiError(400, "'chat_template_kwargs' must be an object.", param="chat_template_kwargs")
    return arguments or {}


def read_prompt(raw: Mapping[str, Any], vocabulary: int) -> str | list[int]:
    """The checked prompt of a completion: text or token ids. Raises ApiError 400."""
    prompt = raw.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if prompt and ids and all(0 <= i < vocabulary for i in prompt):
        return list(prompt)
    raise ApiError(400, f"'prompt' must be one text, or a list of token ids below {vocabulary}.", param="prompt")


class ResponseWriter:
    """The response bodies of one request: whole, or as chunks of a stream."""

    def __init__(self, asked: Asked, model: str, chat: bool, token_text: Callable[[int], str]) -> None:
        self.asked, self.model, self.chat, self._token_text = asked, model, chat, token_text
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self._offset = 0

    def whole(self, text: str, tokens: Sequence[Token], reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return self._envelope("chat.completion" if self.chat else "text_completion", body, tokens, reason) | {
            "usage": usage
        }

    def chunk(self, text: str | None, tokens: Sequence[Token], reason: str | None, first: bool) -> dict[str, Any]:
        """One chunk of a stream."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text is not None else {})
        body = {"delta": delta} if self.chat else {"text": text or ""}
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", body, tokens, reason) | (
            {"usage": None} if self.asked.include_usage else {}
        )

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind, {}, (), None) | {"choices": [], "usage": usage}

    def _envelope(self, kind: str, body: dict[str, Any], tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **body, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.asked.top_logprobs is None or not tokens:
            return None
        if self.chat:
            entries = [
                self._entry(t.id, t.logprob) | {"top_logprobs": [self._entry(i, p) for i, p in t.top]} for t in tokens
            ]
            return {"content": entries, "refusal": None}
        texts, offsets = [self._token_text(t.id) for t in tokens], []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        top = [{self._token_text(i): _finite(p) for i, p in t.top} for t in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._token_text(token)
        whole = "\ufffd" not in text  # else the token holds a part of a character
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else -9999.0


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage record."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
