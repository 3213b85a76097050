"""Conversations in the form that a base's own chat template takes, found by trying, and what it may be given beside.

Templates differ in what they know: some write no `developer`, some refuse system turns, some want the arguments of a
tool call as JSON text, some fail on a call without content. A template is asked once, with a small conversation for
each.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2
import jinja2.meta

from mlx_adapters.errors import ConfigError, did_you_mean
from mlx_adapters.system.door import TokenizerWrapper, compile_chat_template

Messages = Sequence[Mapping[str, Any]]
WORD, OTHER = "zebra", "okapi"
ASK = {"role": "user", "content": "Go on."}
CALL = {"type": "function", "id": "call00000", "function": {"name": "look", "arguments": {WORD: OTHER}}}
MANGLED = (
    f"'{WORD}'",
    f'\\"{WORD}',
    "None",
)  # arguments as Python or escaped JSON shows them, and content that is none


@dataclass(frozen=True)
class Habits:
    """What a template takes: `developer` as a role of its own, system turns, arguments as text, content beside calls as
    ""."""

    developer: bool = True
    system: bool = True
    text_arguments: bool = False
    empty_content: bool = False


def fitted(messages: Messages, tokenizer: TokenizerWrapper, template: str | None = None) -> list[dict[str, Any]]:
    """The messages as the template takes them; the same ones where it takes all.

    Where it refuses a system turn, those at the beginning go before the first question: then there are fewer messages.

    Args:
        messages: in the one form of `rows.messages`.
        tokenizer: whose template it is.
        template: another one's text.
    """
    special = any(m.get("role") in ("system", "developer") or m.get("tool_calls") for m in messages)
    habits = _habits(tokenizer, template) if special else Habits()
    taken = [_fitted(dict(message), habits) for message in messages]
    told = list(takewhile(lambda message: message.get("role") == "system", taken)) if not habits.system else []
    asked = taken[len(told)] if told and len(told) < len(taken) else {}
    if asked.get("role") == "user" and all(isinstance(m.get("content"), str) for m in (*told, asked)):
        texts = [*(m["content"] for m in told if m["content"].strip()), asked["content"]]
        taken[: len(told) + 1] = [{**asked, "content": "\n\n".join(texts)}]
    return taken


def _fitted(message: dict[str, Any], habits: Habits) -> dict[str, Any]:
    if message.get("role") == "developer" and not habits.developer:
        message["role"] = "system"
    if message.get("tool_calls"):
        if message.get("content") is None and habits.empty_content:
            message["content"] = ""
        if habits.text_arguments:
            message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return message


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    text = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


@functools.lru_cache(maxsize=16)
def _habits(tokenizer: TokenizerWrapper, template: str | None) -> Habits:
    def rendered(*messages: Mapping[str, Any]) -> str:
        more = {} if template is None else {"chat_template": template}
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))
        except Exception:  # a template may raise what it likes
            return ""

    told, made_up = (rendered({"role": role, "content": WORD}, ASK) for role in ("developer", "narrator"))
    # One that writes any role by its name knows none.
    developer = WORD in told and told.lower() != made_up.lower().replace("narrator", "developer")
    system = bool(rendered({"role": "system", "content": WORD}, ASK)) or not rendered(ASK)
    for content in (None, ""):
        for as_text in (False, True):
            habits = Habits(developer, system, as_text, content == "")
            call = _fitted({"role": "assistant", "content": content, "tool_calls": [CALL]}, habits)
            text = rendered(ASK, call)
            if WORD in text and OTHER in text and not any(mark in text for mark in MANGLED):
                return habits
    return Habits(developer, system)


def check_arguments(tokenizer: TokenizerWrapper, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that the tokenizer's chat template does not read."""
    template = getattr(tokenizer, "chat_template", None)
    if not arguments or not isinstance(template, str):
        return
    try:
        known = jinja2.meta.find_undeclared_variables(compile_chat_template(template).environment.parse(template))
    except jinja2.TemplateError:  # it will be said when it renders
        return
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known, "leave --chat-template-arg (chat_template_args) out.")
            raise ConfigError(f"The chat template reads no '{name}'.", hint)
