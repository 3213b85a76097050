"""Ollama's /api/chat, /api/generate and /api/embed, and what its paths tell of models."""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_adapters.answers.reading import Answer, Part, ToolCall, reasoning_marks
from mlx_adapters.generation.memory import parameter_count
from mlx_adapters.generation.requests import Token
from mlx_adapters.models.model import Model
from mlx_adapters.protocols.chat import Body, Writer
from mlx_adapters.protocols.conversation import Conversation, read_messages, read_tools
from mlx_adapters.protocols.errors import ApiError
from mlx_adapters.protocols.fields import Fields
from mlx_adapters.protocols.options import Asked, ResponseFormat, read_format, read_logprobs, read_sampling

SPELLED = {"repeat_penalty": "repetition_penalty", "repeat_last_n": "repetition_context_size"}
TEMPERATURE = 0.8  # Ollama's default
OF_THE_MACHINE = (
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "use_mmap",
    "low_vram",
    "num_keep",
    "numa",
    "use_mlock",
    "f16_kv",
    "num_gqa",
    "vocab_only",
    "logits_all",
    "mirostat_eta",  # of mirostat, which is refused
    "mirostat_tau",
)
NO_TIME = re.compile(r"0+(\.0*)?[a-z]*")
EFFORTS = ("low", "medium", "high")


def ollama_name(fields: Fields) -> str:
    """The model that is asked for, without Ollama's tag. Raises ApiError 400 if none is named."""
    older = fields.take("name", str)  # what Ollama called it before
    return (older if older and not fields.raw.get("model") else fields.model()).removesuffix(":latest")


def read_ollama(fields: Fields, chat: bool, vocabulary: int) -> tuple[Asked, Conversation]:
    """The checked request. Raises ApiError 400."""
    options = fields.part(_penalized(fields.take("options", dict, {})), "options", SPELLED)
    most = options.take("num_predict", int, -1)
    asked = Asked(
        model=ollama_name(fields),
        user=None,
        stream=fields.take("stream", bool, True),
        include_usage=True,
        max_tokens=most if most > 0 else None,
        sampling=read_sampling(options, vocabulary, TEMPERATURE),
        logprobs=read_logprobs(fields),
        format=_format(fields.value("format")),
    )
    for name in OF_THE_MACHINE:
        options.value(name)
    options.refuse_rest()
    fields.value("keep_alive")
    arguments = _thinking(fields.value("think"))
    if chat:
        tools = read_tools(fields.value("tools"))
        return asked, Conversation(read_messages(_named(fields.value("messages"))), tools, "auto", True, arguments)
    system = fields.take("system", str)
    first = [{"role": "system", "content": system}] if system else []
    messages = read_messages([*first, {"role": "user", "content": fields.take("prompt", str)}], "prompt")
    return asked, Conversation(messages, [], "none", False, arguments)


def _penalized(options: Body) -> Body:
    """Options whose `repeat_last_n` is a number of tokens: 0 penalizes nothing, -1 looks at all."""
    last = options.get("repeat_last_n")
    if type(last) is not int or last not in (0, -1):
        return options
    off = {"repeat_last_n"} if last else {"repeat_last_n", "repeat_penalty", "presence_penalty", "frequency_penalty"}
    return {name: value for name, value in options.items() if name not in off}


def _thinking(value: Any) -> Body:
    """What `think` means to a chat template."""
    if value is None:
        return {}
    if isinstance(value, bool):
        return {"enable_thinking": value}
    if value not in EFFORTS:
        raise ApiError(400, f"'think' must be true, false or one of {', '.join(EFFORTS)}.", param="think")
    return {"enable_thinking": True, "reasoning_effort": value}


def read_embed(fields: Fields) -> int | None:
    """How many numbers of each vector are wanted; a text that is too long is never cut. Raises ApiError 400."""
    options = fields.part(fields.take("options", dict, {}), "options")
    for name in (*OF_THE_MACHINE, *SPELLED, "temperature", "seed"):
        options.value(name)
    options.refuse_rest()
    fields.value("keep_alive")
    fields.take("truncate", bool)
    return fields.take("dimensions", int, None, 1)


def of_length_one(vector: Sequence[float]) -> list[float]:
    """The vector as /api/embed tells it, of length 1; OpenAI's path tells the mean itself."""
    length = math.hypot(*vector) or 1.0
    return [number / length for number in vector]


def _named(messages: Any) -> Any:
    """Messages whose tools are told by `tool_name`, and thoughts by `thinking`; clients leave empty contents out."""
    if not isinstance(messages, list):
        return messages
    spelled = {"tool_name": "name", "thinking": "reasoning_content"}
    return [
        {"content": ""} | {spelled.get(key, key): value for key, value in one.items() if value is not None}
        if isinstance(one, dict)
        else one
        for one in messages
    ]


def _format(value: Any) -> ResponseFormat | None:
    if value in (None, ""):
        return None
    if value == "json":
        return read_format({"type": "json_object"}, "format")
    if not isinstance(value, dict):
        raise ApiError(400, "'format' must be 'json' or a JSON schema.", param="format")
    return read_format({"type": "json_schema", "schema": value}, "format")


class OllamaWriter(Writer):
    """Lines of JSON; `chat` False: of /api/generate."""

    chat, limits = True, "options.num_predict"
    media_type, alive, last = "application/x-ndjson", b"", b""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._start = time.monotonic_ns()
        self._first: int | None = None
        self._wordless: list[Token] = []  # tokens that no line told of, as of a stop word

    def frame(self, chunk: Body) -> bytes:
        """One line."""
        if "error" in chunk:
            chunk = {"error": chunk["error"]["message"]}
        return json.dumps(chunk).encode() + b"\n"

    def note_first(self, at: float | None) -> None:
        """From then on tokens are written and no longer read."""
        self._first = self._first or (None if at is None else int(at * 1e9))

    def whole(self, answers: Sequence[Answer], usage: Body) -> Body:
        """The body of an answer that is not streamed."""
        (answer,) = answers
        line = self._line(answer.content, answer.reasoning, answer.calls, [*answer.thoughts, *answer.tokens])
        return line | self._ending(answer, usage)

    def piece(self, index: int, parts: Sequence[Part | ToolCall], answer: Answer) -> Iterator[Body]:
        """The lines that tell of a piece."""
        for part in parts:
            if isinstance(part, ToolCall):
                yield self._line("", "", [part], ())
            elif part.text:
                content, reasoning = (part.text, "") if part.kind == "content" else ("", part.text)
                yield self._line(content, reasoning, [], part.tokens)
            else:
                self._wordless += part.tokens

    def end(self, answers: Sequence[Answer], usage: Body) -> Iterator[Body]:
        """The last line."""
        (answer,) = answers
        yield self._line("", "", [], self._wordless) | self._ending(answer, usage)

    @classmethod
    def loaded(cls, model: str, keep_alive: Any) -> Body:
        """The body for a request without a prompt, which asks for the model to be in memory, or no longer."""
        gone = NO_TIME.fullmatch(str(keep_alive)) is not None
        return cls._said(model, "", "", []) | {"done": True, "done_reason": "unload" if gone else "load"}

    def _line(self, content: str, reasoning: str, calls: Sequence[ToolCall], tokens: Sequence[Token]) -> Body:
        logprobs = self._logprobs(0, tokens)
        line = self._said(self.model, content, reasoning, calls)
        return line | {"logprobs": logprobs["content"]} if logprobs else line

    @classmethod
    def _said(cls, model: str, content: str, reasoning: str, calls: Sequence[ToolCall]) -> Body:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line: Body = {"model": model, "created_at": at, "done": False}
        thinking = {"thinking": reasoning} if reasoning else {}
        if not cls.chat:
            return line | {"response": content, **thinking}
        message: Body = {"role": "assistant", "content": content, **thinking}
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": json.loads(call.arguments)}} for call in calls
            ]
        return line | {"message": message}

    def _ending(self, answer: Answer, usage: Body) -> Body:
        now = time.monotonic_ns()
        first = self._first or now
        return {
            "done": True,
            "done_reason": "length" if answer.finish_reason == "length" else "stop",
            "total_duration": now - self._start,
            "load_duration": 0,
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": first - self._start,
            "eval_count": usage["completion_tokens"],
            "eval_duration": now - first,
        }


class GenerateWriter(OllamaWriter):
    """Of /api/generate."""

    chat = False
    asks_in = "prompt"


class ModelRecords:
    """What `/api/tags` and `/api/show` tell of the base and its adapters. `since`: from when they are served."""

    def __init__(self, model: Model, since: float) -> None:
        self._model, self._count = model, parameter_count(model.module)
        self._kind = str(model.config.get("model_type"))
        self._size = sum(path.stat().st_size for path in model.base.weight_files)
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(since))

    def listed(self, name: str, base: str, adapter: str | None, adapter_bytes: int) -> Body:
        """A name in the list; `base`: the name that the base is served by; `adapter`: an adapter's fingerprint, and
        what its tensors take in its file."""
        weights = f"{self._model.base.fingerprint} {adapter}"
        return {
            "name": name,
            "model": name,
            "modified_at": self._since,
            "size": self._size + adapter_bytes,
            "digest": hashlib.sha256(weights.encode()).hexdigest(),
            "details": self._details(name, base),
        }

    def shown(self, name: str, base: str, template: str | None) -> Body:
        """All of a name that is not the model's to tell by chatting; `template` None: it is the tokenizer's own."""
        model, sizes = self._model, self._model.config
        sizes = sizes if "hidden_size" in sizes else sizes.get("text_config") or {}
        text = template or getattr(model.tokenizer, "chat_template", None)
        known = {
            "context_length": model.base.context,
            "embedding_length": sizes.get("hidden_size"),
            "block_count": sizes.get("num_hidden_layers"),
        }
        info = {f"{self._kind}.{key}": value for key, value in known.items() if value is not None}
        capabilities = ["completion", "tools"] if model.has_template or template else ["completion"]
        return {
            "modelfile": f"FROM {base}\n" + (f"ADAPTER {name}\n" if name != base else ""),
            "parameters": "",
            "template": text if isinstance(text, str) else "",
            "details": self._details(name, base),
            "model_info": {"general.architecture": self._kind, "general.parameter_count": self._count, **info},
            "capabilities": capabilities + (["thinking"] if reasoning_marks(model.tokenizer, template) else []),
            "modified_at": self._since,
        }

    def _details(self, name: str, base: str) -> Body:
        bits, billions = (self._model.config.get("quantization") or {}).get("bits"), self._count / 1e9
        return {
            "parent_model": base if name != base else "",
            "format": "safetensors",
            "family": self._kind,
            "families": [self._kind],
            "parameter_size": f"{billions:.1f}B" if billions >= 1 else f"{1000 * billions:.2f}M",
            "quantization_level": f"{bits}-bit" if bits else "none",
        }
