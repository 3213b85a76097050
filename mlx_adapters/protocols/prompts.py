"""From conversations and texts to tokens, and to what may be written after them.

Off the event loop, long texts apart from short ones, and no further than the context reaches.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mlx_adapters.answers.constraints import Grammar, Grammars
from mlx_adapters.answers.reading import AnswerReader, is_reasoning, reasoning_marks
from mlx_adapters.answers.schemas import answer_grammar, call_rules, check_arguments, json_rule
from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.errors import AdapterError
from mlx_adapters.models.model import Model
from mlx_adapters.protocols.conversation import Conversation
from mlx_adapters.protocols.errors import ApiError, told_as
from mlx_adapters.protocols.options import Asked
from mlx_adapters.templates.tool_calls import HERMES, ToolFormat, tool_format, with_tools

Result = TypeVar("Result")
LONG_TEXT = 1 << 16  # characters from which a text is tokenized apart, where it keeps no short one waiting


class Tokenizing:
    """Texts to tokens, each thread with a tokenizer of its own: long texts keep short ones waiting in no queue."""

    def __init__(self, model: Model) -> None:
        self._models = {long: self._copied(model) for long in (False, True)}
        self._threads = {long: ThreadPoolExecutor(1, "tokenizing") for long in (False, True)}
        self._waiting = 0
        self._longest = max(map(len, model.tokenizer.get_vocab()), default=1)

    @staticmethod
    def _copied(model: Model) -> Model:
        tokenizer = copy.deepcopy(model.tokenizer)
        return Model(model.module, tokenizer, model.base, model.config, template=model.template)

    async def run(self, size: int, work: Callable[[Model], Result], where: str) -> Result:
        """What `work` makes of a text of `size` characters. Raises ApiError 400 for one that cannot fit the context."""
        long = size > LONG_TEXT
        model = self._models[long]
        context = model.base.context
        if context is not None and size > context * self._longest:
            raise too_long(f"at least {size // self._longest}", context, where)
        if long and self._waiting >= 8:
            raise ApiError(429, "Too many long prompts are waiting.", kind="rate_limit_error", code="queue_full")
        self._waiting += long
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads[long], work, model)
        finally:
            self._waiting -= long

    def stop(self) -> None:
        """End the threads."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)


def check_fits(texts: Sequence[str], model: Model, where: str) -> None:
    """Raise ApiError 400 as soon as so much of the texts is tokenized that they cannot fit the model's context.

    Tokens at the end of a piece may differ from those of the whole, so a few of each are not counted.
    """
    context, counted = model.base.context, 0
    if context is None or sum(map(len, texts)) <= 2 * context:
        return
    for text in texts:
        for start in range(0, len(text), LONG_TEXT):
            counted += max(len(model.tokenizer.encode(text[start : start + LONG_TEXT])) - 16, 0)
            if counted > context:
                raise too_long(f"more than {counted}", context, where)


def too_long(tokens: str, context: int, where: str) -> ApiError:
    """The refusal of a prompt."""
    message = f"The prompt has {tokens} tokens; the model's context has {context}."
    return ApiError(400, message, param=where, code="context_length_exceeded")


Prepared = tuple[list[int], Callable[[], AnswerReader | None], Grammar | None]


def prepared(
    model: Model, own: TemplateConfig, asked: Asked, talk: Conversation, grammars: Grammars, where: str
) -> Prepared:
    """A conversation's prompt, what reads an answer to it, and what may be written.

    Args:
        model: renders and tokenizes.
        own: how the adapter was trained to see conversations.
        asked: the request.
        talk: the conversation.
        grammars: of the model.
        where: the field of the request that a refusal names.

    Raises ApiError 400.
    """
    check_fits([str(message.get("content") or "") for message in talk.messages], model, where)
    tokenizer = model.tokenizer
    with told_as("chat_template_kwargs"):
        given = TemplateConfig(chat_template_args=talk.arguments)
    template = given.over(model.template).over(own).chat_template
    written = template if template is not None else getattr(tokenizer, "chat_template", None)
    if isinstance(written, str) and "prefix" not in written and any(m.get("prefix") for m in talk.messages):
        raise ApiError(400, f"'{where}' has a 'prefix', which this model's template does not know.", param=where)
    called = talk.tools or any(m["role"] == "tool" or m.get("tool_calls") for m in talk.messages)
    format = tool_format(tokenizer, template) if called else None
    messages, tools = with_tools(talk.messages, talk.tools, format) if format else (talk.messages, None)
    try:
        prompt = model.encode_chat(messages, tools, template=given, own=own)
    except AdapterError as error:
        raise ApiError(400, error.message[:240], param=where) from None
    marks = reasoning_marks(tokenizer, template)
    thinks = is_reasoning(tokenizer, prompt, marks)
    if format is not None and (talk.choice == "required" or asked.format) and format.form is None:
        format = ToolFormat(None, HERMES, False)
    grammar = _grammar(tokenizer, asked, talk, grammars, format, marks, thinks)
    if not talk.tools and marks is None:
        return prompt, lambda: None, grammar
    reads = format if talk.tools else None
    return prompt, lambda: AnswerReader(tokenizer, reads, talk.tools, marks, thinks), grammar


def plain_grammar(asked: Asked) -> Grammar | None:
    """What may be written where there is no conversation."""
    form = asked.format
    return None if form is None else Grammar(answer_grammar(json_rule(form.schema, form.strict)))


def _grammar(
    tokenizer: Any,
    asked: Asked,
    talk: Conversation,
    grammars: Grammars,
    format: ToolFormat | None,
    marks: tuple[str, str] | None,
    thinks: bool,
) -> Grammar | None:
    """What may be written: a JSON text, calls, either; or of a call that was begun freely, its rest."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    if talk.tools and format is not None and talk.choice == "auto" and asked.format is None:
        begins = ids(format.marks[0])
        if format.form is None or format.parser is None or len(begins) != 1:
            return None
        rules = call_rules(talk.tools, format, grammars.special, True, begun=True)
        grammar = Grammar(answer_grammar(calls=rules), after=begins, repeats=True)
        return grammar if grammars.allows(grammar) else None  # what the model writes is read all the same
    for i, tool in enumerate(talk.tools):
        with told_as(f"tools[{i}].function.parameters"):
            check_arguments(tool, f"tools[{i}].function.parameters")
    json = json_rule(asked.format.schema, asked.format.strict) if asked.format and talk.choice != "required" else ""
    calls = call_rules(talk.tools, format, grammars.special, talk.parallel) if talk.tools and format else []
    if not json and not calls:
        return None
    text = answer_grammar(json, calls, space=marks is not None)
    if marks is None:
        return Grammar(text)
    begins = ids(marks[0])
    thinks_yet = not thinks and len(begins) == 1 and talk.arguments.get("enable_thinking") is not False
    after = ids(marks[1]) if thinks or thinks_yet else ()
    return Grammar(text, after=after, unless=begins[0] if thinks_yet else None)
