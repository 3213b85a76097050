"""Conversations in the form that a base's own chat template takes, found by trying, and what it may be given beside.

Templates differ in what they know: some write no `developer`, some refuse system turns, some want the arguments of a
tool call as JSON text, some fail on a call without content, each reads thoughts under a name of its own. A template is
asked once, with a small conversation for each. What it refuses all the same, `templates.fitting` puts otherwise.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
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
# Fields of a message that hold what is thought before the answer, as data and templates name them.
THOUGHT = re.compile(
    r"(\w+_)?(think|thinking|thoughts?|reasoning|rationale|cot)(_(content|text|trace|details|blocks))?"
)
STANDARD = ("reasoning_content", "thinking", "reasoning")  # of several, the first counts
PARTS = "content"  # thoughts are among the parts of the content


@dataclass(frozen=True)
class Habits:
    """What a template takes: `developer` as a role of its own, system turns, arguments as text, content beside calls as
    "", and the field in which it reads thoughts (`PARTS`: as parts of the content; None: it reads none)."""

    developer: bool = True
    system: bool = True
    text_arguments: bool = False
    empty_content: bool = False
    thought: str | None = None


def fitted(messages: Messages, tokenizer: TokenizerWrapper, template: str | None = None) -> list[dict[str, Any]]:
    """The messages as the template takes them; the same ones where it takes all.

    Where it refuses a system turn, those at the beginning go before the first question: then there are fewer messages.

    Args:
        messages: in the one form of `rows.messages`.
        tokenizer: whose template it is.
        template: another one's text.
    """
    special = any(m.get("role") in ("system", "developer") or m.get("tool_calls") or thoughts(m) for m in messages)
    habits = _habits(tokenizer, template) if special else Habits()
    taken = [_fitted(dict(message), habits) for message in messages]
    told = list(takewhile(lambda message: message.get("role") == "system", taken)) if not habits.system else []
    asked = taken[len(told)] if told and len(told) < len(taken) else {}
    if asked.get("role") == "user" and all(isinstance(m.get("content"), str) for m in (*told, asked)):
        texts = [*(m["content"] for m in told if m["content"].strip()), asked["content"]]
        taken[: len(told) + 1] = [{**asked, "content": "\n\n".join(texts)}]
    return taken


def thoughts(message: Mapping[str, Any]) -> dict[str, str]:
    """What a message of the assistant's says that it thought, by field; the first counts. Lists of parts are joined."""
    if message.get("role") != "assistant":
        return {}
    names = [name for name in message if name not in STANDARD and THOUGHT.fullmatch(name)]
    thoughts = {name: _thought(message[name]) for name in (*STANDARD, *names) if name in message}
    return {name: text for name, text in thoughts.items() if text.strip()}


def _thought(value: Any) -> str:
    if isinstance(value, Mapping):
        return "".join(text for key, text in value.items() if isinstance(text, str) and _holds_words(key))
    if isinstance(value, list | tuple):
        return "".join(map(_thought, value))
    return value if isinstance(value, str) else ""


def _holds_words(key: str) -> bool:
    return key in ("text", "summary") or bool(THOUGHT.fullmatch(key))


def _fitted(message: dict[str, Any], habits: Habits) -> dict[str, Any]:
    if habits.thought is not None and (said := thoughts(message)):
        message = _with_thought(message, said, habits.thought)
    if message.get("role") == "developer" and not habits.developer:
        message["role"] = "system"
    if message.get("tool_calls"):
        if message.get("content") is None and habits.empty_content:
            message["content"] = ""
        if habits.text_arguments:
            message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return message


def _with_thought(message: dict[str, Any], said: Mapping[str, str], field: str) -> dict[str, Any]:
    """The message with its thought where the template reads it; the same under other names is left out."""
    thought = said.get(field) or next(iter(said.values()))
    message = {name: value for name, value in message.items() if said.get(name) != thought}
    if field != PARTS:
        return message | {field: thought}
    content = message.get("content") or ""
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return message | {PARTS: [{"type": "thinking", "thinking": thought}, *texts]}


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
    thought = next((field for field in _thought_fields(tokenizer, template) if _reads(field, rendered)), None)
    for content in (None, ""):
        for as_text in (False, True):
            habits = Habits(developer, system, as_text, content == "", thought)
            call = _fitted({"role": "assistant", "content": content, "tool_calls": [CALL]}, habits)
            text = rendered(ASK, call)
            if WORD in text and OTHER in text and not any(mark in text for mark in MANGLED):
                return habits
    return Habits(developer, system, thought=thought)


def _reads(field: str, rendered: Callable[..., str]) -> bool:
    """Whether the template writes a thought of that field, in an answer or beside a call."""
    for answer in ({"content": WORD}, {"content": "", "tool_calls": [CALL]}):
        text = rendered(ASK, _with_thought({"role": "assistant", **answer}, {field: OTHER * 2}, field))
        if (
            OTHER * 2 in text and "thinking'" not in text and 'thinking"' not in text
        ):  # parts as Python or JSON has them
            return True
    return False


def _thought_fields(tokenizer: TokenizerWrapper, template: str | None) -> list[str]:
    """The fields in which the template may read thoughts: those that its text names, and the content's parts."""
    text = getattr(tokenizer, "chat_template", None) if template is None else template
    if not isinstance(text, str):
        return []
    words = [word for word in dict.fromkeys(re.findall(r"\w+", text)) if THOUGHT.fullmatch(word)]
    return [*(name for name in STANDARD if name in words), *(word for word in words if word not in STANDARD), PARTS]


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
