"""The shapes that rows come in, recognized by the names of their columns.

First the columns that the user named; then, in this order:

- preferences: `chosen` and `rejected`, perhaps with a question, or OpenAI's `input`, `preferred_output` and
  `non_preferred_output`; the row then means its chosen answer;
- a conversation: `messages` (OpenAI, TRL), or ShareGPT's `conversations`;
- TRL's `prompt` and `completion`, each a text or a list of messages;
- Alpaca: `instruction`, perhaps `input`, and `output`;
- a question, `tools` and, as JSON, the calls that they are asked with: `answers`;
- a question, perhaps with a text `context`, and an answer under other names, if just one column can be each;
- `text`.

A `system` column goes before the conversation, `history`, a list of questions with their answers, before a question.
Rows that two of the first shapes fit, with different answers, are refused: nobody can know which one is meant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_adapters.config.data import RESERVED
from mlx_adapters.errors import FormatError
from mlx_adapters.rows.messages import Message, conversation, earlier, in_rows, spelled, tools_of, turn
from mlx_adapters.rows.preferences import OPENAI, SIDES, from_openai, two_answers
from mlx_adapters.rows.values import is_missing, kind, parsed, plain, text_of
from mlx_adapters.templates.habits import THOUGHT

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction", "question", "query", "problem", "input")
ANSWERS = ("completion", "response", "output", "answer", "solution", "target", "reply")
BELOW = ("input", "context")  # what goes below a question
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"  # LLaMA-Factory's and ms-swift's
TEMPLATE_ARGUMENTS = "chat_template_kwargs"  # TRL's name
EXTRAS = (*SYSTEM, HISTORY, "tools", "functions", TEMPLATE_ARGUMENTS)  # what goes with any conversation
ORDINARY = {"messages", "'prompt' and 'completion'", "text", "preferences"}  # need no word about how they are read
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Canonical:
    """What a row means, in one form.

    Args:
        format: "chat", "completion" or "text".
        shape: how it was recognized, for people.
        used: the columns that matter.
        messages: of a chat or completion row.
        weights: of each message, 1 or 0.
        tools: of the conversation.
        prompt: of a completion row, as text.
        completion: likewise.
        text: of a text row.
        template_arguments: what the row gives the chat template.
        rejected: of preferences: the values of a row that gives the rejected answer.
        asked: of a prompt and a completion: how many messages are the prompt.
    """

    format: str
    shape: str
    used: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    weights: tuple[int, ...] = ()
    tools: list[Any] | None = None
    prompt: str = ""
    completion: str = ""
    text: str = ""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    rejected: Values | None = None
    asked: int = 0

    @property
    def characters(self) -> int:
        """How long its texts are together."""
        said = (value for message in self.messages for value in message.values() if isinstance(value, str))
        return len(self.text) + sum(map(len, said))


def recognize(values: Values, columns: Mapping[str, str], where: str) -> Canonical:
    """What the values of a row mean.

    Args:
        values: by column.
        columns: names that the user gave, by "prompt", "completion", "text" and "messages"; they decide alone.
        where: the place of the row, for errors.

    Raises FormatError, naming the place, for no shape or for two.
    """
    present = {name: value for name, value in values.items() if not is_missing(value)}
    if columns:
        return _named(present, columns, where)
    canonical = next((shape for shape in (find(present, where) for find in SHAPES) if shape is not None), None)
    if canonical is None:
        raise _unknown(values, where)
    return canonical


def belongs(name: str) -> bool:
    """Whether a column of this name holds, where it is used, a part of what the model reads or says."""
    return name in (*SYSTEM, HISTORY, *BELOW) or bool(THOUGHT.fullmatch(name))


def is_known(values: Values) -> bool:
    """Whether columns of these names are recognized, whatever they hold."""
    try:
        return any(find(dict.fromkeys(values, ""), "") is not None for find in SHAPES)
    except FormatError:
        return True


def _named(values: Values, columns: Mapping[str, str], where: str) -> Canonical:
    for name in columns.values():
        if name not in values:
            has = ", ".join(map(repr, values)) or "none"
            raise FormatError(f"{where}: the row has no column '{name}'.", f"it has: {has}.")
    if "messages" in columns:
        return _chat(values, columns["messages"], where)
    if "text" in columns:
        return _text(values, columns["text"], where)
    return _pair(values, columns["prompt"], columns["completion"], where)


def _conversation(values: Values, where: str) -> Canonical | None:
    names = [name for name in CONVERSATIONS if name in values]
    if not names:
        return None
    conversed = _chat(values, names[0], where)
    others = [_chat(values, name, where) for name in names[1:]]
    if "prompt" in values and "completion" in values:
        others.append(_pair(values, "prompt", "completion", where))
    for other in others:
        if other.messages[-1].get("content") != conversed.messages[-1].get("content"):
            here, there = (" and ".join(f"'{name}'" for name in shape.used[:2]) for shape in (conversed, other))
            raise FormatError(
                f"{where}: the row has {here}, and {there}, which end differently.",
                "say which is meant: --messages-column, or --prompt-column and --completion-column.",
            )
    return conversed


def _prompt_completion(values: Values, where: str) -> Canonical | None:
    return _pair(values, "prompt", "completion", where) if {"prompt", "completion"} <= values.keys() else None


def _preference(values: Values, where: str) -> Canonical | None:
    """The chosen answer to a prompt, with the rejected one beside it."""
    if not set(SIDES) <= values.keys():
        return None
    asking, prompt = _asked(values, where)
    extras = {name: values[name] for name in EXTRAS if name in values}
    prompt, answers = two_answers(prompt, values["chosen"], values["rejected"], where)
    before = earlier(extras.pop(HISTORY, None)) if isinstance(prompt, str) else []
    prompt = [*before, turn("user", prompt)] if before else prompt
    if prompt is None:
        sides = [{"text": answer} for answer in answers]
        chosen = _text(sides[0], "text", where)
    else:
        sides = [{**extras, "prompt": prompt, "completion": answer} for answer in answers]
        chosen = _pair(sides[0], "prompt", "completion", where)
    shape = "preferences" if asking in ((), ("prompt",)) else f"preferences ({', '.join(map(repr, asking))})"
    used = (*asking, *SIDES, *(name for name in extras if name in chosen.used), *((HISTORY,) if before else ()))
    return replace(chosen, shape=shape, used=used, rejected=sides[1])


def _openai_preference(values: Values, where: str) -> Canonical | None:
    pair = from_openai(values, where)
    found = None if pair is None else _preference(pair, where)
    return None if found is None else replace(found, used=OPENAI)


def _asked(values: Values, where: str) -> tuple[tuple[str, ...], Any]:
    """The columns that ask, beside answers of other names, and what they ask: (), None if there are none."""
    asking = [name for name in QUESTIONS if name in values]
    if asking == ["instruction", "input"]:
        return tuple(asking), _instruction(values, "input", where)
    if len(asking) > 1 and "prompt" not in asking:
        both = " and ".join(f"'{name}'" for name in asking)
        raise FormatError(f"{where}: which of {both} is the prompt?", "name it 'prompt'.")
    asking = asking or [name for name in CONVERSATIONS if name in values]
    return (tuple(asking[:1]), values[asking[0]]) if asking else ((), None)


def _alpaca(values: Values, where: str) -> Canonical | None:
    answer = next((name for name in ("output", "response") if name in values), None)
    if "instruction" not in values or answer is None:
        return None
    extra = next((name for name in BELOW if name in values), None)
    prompt = _instruction(values, extra, where)
    used = ("instruction", *([extra] if extra else []), answer)
    return _completion(values, prompt, text_of(values[answer], answer, where), used, "Alpaca", where)


def _instruction(values: Values, extra: str | None, where: str) -> str:
    prompt = text_of(values["instruction"], "instruction", where)
    more = text_of(values[extra], extra, where) if extra else ""
    return _below(prompt, more)


def _below(prompt: str, more: str) -> str:
    return "\n\n".join(part for part in (prompt, more) if part.strip()) or prompt


def _question_answer(values: Values, where: str) -> Canonical | None:
    questions, answers = ([name for name in known if name in values] for known in (QUESTIONS, ANSWERS))
    if len(questions) == 1 and len(answers) == 1:
        asked, below = values[questions[0]], values.get("context")
        if not isinstance(below, str) or not isinstance(asked, str):
            return _pair(values, questions[0], answers[0], where)
        pair = _pair({**values, questions[0]: _below(asked, below)}, questions[0], answers[0], where)
        return replace(pair, used=(*pair.used, "context"))
    if questions and answers and "text" not in values:
        both = ", ".join(f"'{name}'" for name in (*questions, *answers))
        raise FormatError(
            f"{where}: of {both}, which is the prompt and which the answer?",
            "say so: --prompt-column NAME --completion-column NAME.",
        )
    return None


def _calls(values: Values, where: str) -> Canonical | None:
    """A question, tools, and the calls of them that are the answer (xLAM)."""
    questions, calls = [name for name in QUESTIONS if name in values], parsed(values.get("answers"))
    if len(questions) != 1 or "tools" not in values or not isinstance(calls, list | tuple) or not calls:
        return None
    asked = turn("user", text_of(values[questions[0]], questions[0], where))
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    messages, weights = conversation([asked, answer], where, "answers")
    used = (questions[0], "answers")
    return _with_extras(values, messages, weights, used, f"'{questions[0]}' and calls", where)


def _whole_text(values: Values, where: str) -> Canonical | None:
    return _text(values, "text", where) if "text" in values else None


SHAPES: tuple[Callable[[Values, str], Canonical | None], ...] = (
    _preference,
    _openai_preference,
    _conversation,
    _prompt_completion,
    _alpaca,
    _calls,
    _question_answer,
    _whole_text,
)


def _text(values: Values, name: str, where: str) -> Canonical:
    return Canonical(
        "text", "text" if name == "text" else f"text ('{name}')", (name,), text=text_of(values[name], name, where)
    )


def _chat(values: Values, name: str, where: str) -> Canonical:
    messages, weights = conversation(values[name], where, name)
    shape = "ShareGPT" if "from" in parsed(in_rows(values[name])[0]) else "messages"
    return _with_extras(
        values, messages, weights, (name,), shape if name == "messages" else f"{shape} ('{name}')", where
    )


def _pair(values: Values, asked: str, answered: str, where: str) -> Canonical:
    """A prompt and a completion; as lists of messages they are one conversation, of which the completion is trained."""
    prompt, completion = (spelled(values[name], name, where) for name in (asked, answered))
    used = (asked, answered)
    shape = f"'{asked}' and '{answered}'"
    if isinstance(prompt, str) and isinstance(completion, str):
        return _completion(values, prompt, completion, used, shape, where)
    before = _turns(prompt, "user", asked, where)
    after = _turns(completion, "assistant", answered, where)
    weights = (*(0 for _ in before[0]), *after[1])
    found = _with_extras(values, [*before[0], *after[0]], weights, used, f"{shape} of messages", where)
    return replace(found, asked=len(found.messages) - len(after[0]))


def _turns(value: Any, role: str, name: str, where: str) -> tuple[list[Message], tuple[int, ...]]:
    if isinstance(value, str):
        return [turn(role, value)], (1,)
    if not isinstance(value, list | tuple):
        raise FormatError(f"{where}: '{name}' must be text or a list of messages, not {kind(value)}.")
    return conversation(value, where, name)


def _completion(
    values: Values, prompt: str, completion: str, used: tuple[str, ...], shape: str, where: str
) -> Canonical:
    before = earlier(values.get(HISTORY))
    used = (*used, HISTORY) if before else used
    messages = [*before, turn("user", prompt), turn("assistant", completion)]
    learned = int("label" not in values)  # of an answer that is judged earlier ones are context
    weights = (*(learned for _ in before), 1, 1)
    whole = _with_extras(values, messages, weights, used, shape, where)
    whole = replace(whole, asked=len(whole.messages) - 1)
    if len(whole.messages) > 2 or whole.tools:  # a system prompt or tools: it takes a template to write them
        return whole
    return Canonical(
        "completion",
        shape,
        whole.used,
        whole.messages,
        weights,
        None,
        prompt,
        completion,
        template_arguments=whole.template_arguments,
    )


def _with_extras(
    values: Values, messages: list[Message], weights: tuple[int, ...], used: tuple[str, ...], shape: str, where: str
) -> Canonical:
    """A conversation, with what its row says of system prompt, tools and template."""
    system = next((name for name in SYSTEM if name in values), None)
    if system and messages[0]["role"] not in ("system", "developer"):
        told = values[system] if isinstance(values[system], list) else text_of(values[system], system, where)
        if told:
            first = conversation([{"role": "system", "content": told}], where, system)[0]
            messages, weights = [*first, *messages], (0, *weights)
        used = (*used, system)
    name = "tools" if "tools" in values else "functions"
    tools = tools_of(values.get(name), where, name)
    arguments = plain(parsed(values.get(TEMPLATE_ARGUMENTS, {})))
    if not isinstance(arguments, dict):
        raise FormatError(f"{where}: '{TEMPLATE_ARGUMENTS}' must be an object, not {kind(arguments)}.")
    if reserved := sorted(RESERVED & arguments.keys()):
        raise FormatError(f"{where}: the chat template's '{reserved[0]}' cannot be given by '{TEMPLATE_ARGUMENTS}'.")
    used = (*used, *([name] if tools else []), *([TEMPLATE_ARGUMENTS] if arguments else []))
    return Canonical("chat", shape, used, tuple(messages), weights, tools, template_arguments=arguments)


def _unknown(values: Values, where: str) -> FormatError:
    nulls = [name for name, value in values.items() if is_missing(value)]
    keys = ", ".join(repr(name) for name in values if name not in nulls) or "no key"
    empty = f", and null as {', '.join(map(repr, nulls))}" if nulls else ""
    if any(side in name for side in (*SIDES, "preferred") for name in values):
        half = "" if set(SIDES).isdisjoint(values) else ", which is half a pair"
        hint = "a pair has 'chosen' and 'rejected', with a 'prompt' or a common beginning."
        return FormatError(f"{where}: the row has {keys}{empty}{half}.", hint)
    return FormatError(
        f"{where}: the row has {keys}{empty}.",
        "a row has 'messages', or 'prompt' and 'completion', or 'text'; "
        "name other columns with --prompt-column and --completion-column, --messages-column or --text-column.",
    )
