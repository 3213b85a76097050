"""OpenAI's /v1/responses, without memory: each request brings the whole conversation."""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_adapters.answers.reading import Answer, Part, ToolCall
from mlx_adapters.protocols.chat import Body, Writer
from mlx_adapters.protocols.conversation import (
    Conversation,
    read_choice,
    read_messages,
    read_template_arguments,
    read_tools,
)
from mlx_adapters.protocols.errors import ApiError
from mlx_adapters.protocols.fields import Fields
from mlx_adapters.protocols.options import MAX_TOP_LOGPROBS, Asked, read_format, read_sampling

LOGPROBS = "message.output_text.logprobs"  # what `include` calls them
FINISHED = {"length": "max_output_tokens"}
# What a response tells again of its request, and how it tells of what was not given.
TOLD: dict[str, Any] = {
    "instructions": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
    "user": None,
}


def read_response(fields: Fields, vocabulary: int) -> tuple[Asked, Conversation]:
    """The checked request. Raises ApiError 400."""
    model = fields.model()
    for name in ("previous_response_id", "conversation"):
        if fields.value(name) is not None:
            raise ApiError(400, "This server keeps no responses; send the whole conversation.", param=name)
    text = fields.part(fields.take("text", dict, {}), "text")
    format = read_format(text.value("format"), "text.format")
    text.refuse_rest()
    reasoning = fields.part(fields.take("reasoning", dict, {}), "reasoning")
    effort = reasoning.take("effort", str)
    for name in ("summary", "generate_summary"):  # what is thought is told whole
        reasoning.value(name)
    reasoning.refuse_rest()
    asked = Asked(
        model=model,
        user=fields.take("user", str),
        stream=fields.take("stream", bool, False),
        include_usage=True,
        max_tokens=fields.take("max_output_tokens", int, None, 1),
        sampling=read_sampling(fields, vocabulary),
        logprobs=_logprobs(fields),
        format=format,
    )
    fields.value("stream_options"), fields.value("max_tool_calls")  # of tools that OpenAI carries out
    own = {} if "reasoning_effort" in fields.raw else {"reasoning.effort": effort}
    arguments = read_template_arguments(Fields({**fields.raw, **own}, spelled={"reasoning.effort": "reasoning_effort"}))
    for name in ("chat_template_kwargs", "enable_thinking", "reasoning_effort"):
        fields.value(name)
    choice = read_choice(fields, read_tools(_nested(fields.value("tools"))))
    messages = _messages(fields.value("input"), fields.take("instructions", str))
    return asked, Conversation(messages, *choice, arguments)


def _logprobs(fields: Fields) -> int | None:
    """How many likeliest tokens are told with each token of the text; None: no log-probabilities are."""
    wanted = LOGPROBS in fields.take("include", list, [])
    top = fields.take("top_logprobs", int, 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise ApiError(400, f"'top_logprobs' needs '{LOGPROBS}' in 'include'.", param="top_logprobs")
    return top if wanted else None


def _nested(tools: Any) -> Any:
    """The tools in the form of chats."""
    if not isinstance(tools, list):
        return tools
    return [
        {"type": tool.get("type"), "function": {key: value for key, value in tool.items() if key != "type"}}
        if isinstance(tool, dict) and "function" not in tool
        else tool
        for tool in tools
    ]


def _messages(given: Any, instructions: str | None) -> list[dict[str, Any]]:
    items = [{"role": "user", "content": given}] if isinstance(given, str) and given else given
    if not isinstance(items, list) or not items:
        raise ApiError(400, "'input' must be a text or a list with at least one item.", param="input")
    messages: list[Any] = [{"role": "system", "content": instructions}] if instructions else []
    for i, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            messages.append(item)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            call = {"type": "function", "id": item.get("call_id"), "function": function}
            if messages and messages[-1].get("role") == "assistant":  # what one answer said and called
                messages[-1] = {"content": None, **messages[-1]}
                messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", []), call]
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str | list) else json.dumps(output)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind != "reasoning":  # what the model thought before is not given back to it
            raise ApiError(400, f"'input[{i}]' is of a type that this server does not support.", param=f"input[{i}]")
    return read_messages(messages, "input")


class ResponseWriter(Writer):
    """A response's body, or its events. It tells again what the `request` asked for."""

    prefix = "resp_"
    last = b""
    asks_in, limits = "input", "max_output_tokens"

    def __init__(self, request: Mapping[str, Any], *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._request = request
        self._number = 0
        self._items: list[Body] = []
        self._open: tuple[str, str] | None = None  # the kind of the item that is being written, and its text
        self._told: list[Body] = []  # the log-probabilities of the text that is being written

    def frame(self, chunk: Body) -> bytes:
        """One server-sent event, with its number."""
        if "type" not in chunk:  # an error that came after the beginning
            chunk = {**chunk.get("error", {}), "type": "error"}
        chunk = {**chunk, "sequence_number": self._number}
        self._number += 1
        return f"event: {chunk['type']}\ndata: {json.dumps(chunk)}\n\n".encode()

    def note(self, *piece: Any) -> None:
        """Take it in as a streamed one's."""
        for _ in self.piece(*piece):
            pass

    def whole(self, answers: Sequence[Answer], usage: Body) -> Body:
        """The body of a response that is not streamed: that which ends its stream."""
        body: Body = list(self.end(answers, usage))[-1]["response"]
        return body

    def begin(self, choices: int) -> Iterator[Body]:
        """The events that come first."""
        for name in ("response.created", "response.in_progress"):
            yield {"type": name, "response": self._response([], None, None)}

    def piece(self, index: int, parts: Sequence[Part | ToolCall], answer: Answer) -> Iterator[Body]:
        """The events that tell of a piece."""
        for part in parts:
            if isinstance(part, ToolCall):
                yield from self._close()
                yield from self._called(part)
                continue
            entries = self._entries(part.tokens) if part.kind == "content" and self.asked.logprobs is not None else []
            if not part.text:  # of a stop word, say
                self._told += entries if self._open else []
                continue
            if self._open is None or self._open[0] != part.kind:
                yield from self._close()
                yield from self._begun(part.kind)
            kind, text = self._open or (part.kind, "")
            self._open = kind, text + part.text
            self._told += entries
            yield self._event(_delta(kind), entries, delta=part.text)

    def end(self, answers: Sequence[Answer], usage: Body) -> Iterator[Body]:
        """The events that come last."""
        yield from self._close()
        (answer,) = answers
        response = self._response(self._items, answer, usage)
        yield {"type": f"response.{response['status']}", "response": response}

    def _begun(self, kind: str) -> Iterator[Body]:
        item = _item(kind, "", "in_progress")
        self._items.append(item)
        self._open = kind, ""
        yield {
            "type": "response.output_item.added",
            "output_index": len(self._items) - 1,
            "item": {**item, "content": []},
        }
        yield self._event("response.content_part.added", part=item["content"][0])

    def _close(self) -> Iterator[Body]:
        if self._open is None:
            return
        kind, text = self._open
        told, self._open, self._told = self._told, None, []
        item = {**_item(kind, text, "completed", told), "id": self._items[-1]["id"]}
        self._items[-1] = item
        yield self._event(_delta(kind).replace(".delta", ".done"), told, text=text)
        yield self._event("response.content_part.done", part=item["content"][0])
        yield {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item}

    def _called(self, call: ToolCall) -> Iterator[Body]:
        item = _call(call, "completed")
        self._items.append(item)
        place = {"output_index": len(self._items) - 1}
        yield {
            "type": "response.output_item.added",
            **place,
            "item": {**item, "arguments": "", "status": "in_progress"},
        }
        name, place = "response.function_call_arguments", {**place, "item_id": item["id"]}
        yield {"type": f"{name}.delta", **place, "delta": call.arguments}
        yield {"type": f"{name}.done", **place, "name": call.name, "arguments": call.arguments}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}

    def _event(self, kind: str, told: Sequence[Body] = (), **more: Any) -> Body:
        place = {"output_index": len(self._items) - 1, "item_id": self._items[-1]["id"], "content_index": 0}
        if kind.startswith("response.output_text"):
            place["logprobs"] = list(told)
        return {"type": kind, **place, **more}

    def _response(self, items: list[Body], answer: Answer | None, usage: Body | None) -> Body:
        reason = FINISHED.get(answer.finish_reason or "") if answer else None
        told = usage and {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
        how = self.asked.sampling
        return {
            **{
                name: default if (value := self._request.get(name)) is None else value for name, default in TOLD.items()
            },
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress" if answer is None else "incomplete" if reason else "completed",
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            "max_output_tokens": self.asked.max_tokens,
            "model": self.model,
            "output": items,
            "previous_response_id": None,
            "store": False,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "usage": told,
        }


def _item(kind: str, text: str, status: str, told: Sequence[Body] = ()) -> Body:
    if kind == "reasoning":
        thought = {"type": "reasoning_text", "text": text}
        return {
            "id": f"rs_{uuid.uuid4().hex}",
            "type": "reasoning",
            "summary": [],
            "content": [thought],
            "status": status,
        }
    part: Body = {"type": "output_text", "text": text, "annotations": [], "logprobs": list(told)}
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "content": [part],
        "status": status,
    }


def _call(call: ToolCall, status: str) -> Body:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


def _delta(kind: str) -> str:
    return "response.reasoning_text.delta" if kind == "reasoning" else "response.output_text.delta"
