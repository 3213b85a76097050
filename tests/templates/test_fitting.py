"""What a chat template refuses is put otherwise until it takes it; what it renders stays as it is."""

import numpy as np
import pytest
from helpers.chat_families import TOOLS, by_marks, chat_tokenizer, write_base

from mlx_adapters.data.tokenizing import row_conversation, tokenize_row
from mlx_adapters.errors import FormatError, ModelError
from mlx_adapters.models.loading import load_model
from mlx_adapters.rows.row import RawRow
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.templates import LimitError
from mlx_adapters.templates.fitting import ASKED, JOINED, SINGLE, TOLD, rendered
from mlx_adapters.templates.tool_calls import tool_format, with_tools


def calling(*cities: str, ids: bool = False, content: str | None = None) -> dict:
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}} for city in cities]
    for number, call in enumerate(calls if ids else ()):
        call["id"] = f"call{number}"
    return {"role": "assistant", "content": content, "tool_calls": calls}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def result(text: str, **more) -> dict:
    return {"role": "tool", "content": text, **more}


# Templates as they are known to refuse things: no calls or results at all, as Gemma 2's and the first of Mistral's.
STRICT = (
    "{%- for m in messages %}"
    "{%- if m.role not in ['user', 'assistant'] or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate') }}{%- endif %}"
    "{{- '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + '</s>' }}{%- endfor %}"
)
ANSWER = [user("a"), calling("Paris"), result("sunny"), said("It is sunny.")]
TWO = [user("a"), calling("Paris", "Rome"), result("sunny"), result("rain"), said("Both.")]


def form_of(template: str, messages: list[dict], tools=None, weights=(), family="mistral"):
    tokenizer = chat_tokenizer(family, template)
    render = lambda form: tokenizer.apply_chat_template(form.messages, tools=form.tools, tokenize=False)  # noqa: E731
    return rendered(messages, tools, tokenizer, render, weights=weights)


@pytest.mark.parametrize(
    ("messages", "changes", "roles", "origins"),
    [
        ([user("a"), said("b")], (), "ua", ((0,), (1,))),
        ([user("a"), user("b"), said("c")], (JOINED,), "ua", ((0, 1), (2,))),
        ([user("a"), said("b"), said("c"), said("d")], (JOINED,), "ua", ((0,), (1, 2, 3))),
        ([said("Hello!"), user("a"), said("b")], (ASKED,), "uaua", ((), (0,), (1,), (2,))),
        ([{"role": "system", "content": "s"}, said("a")], (ASKED,), "ua", ((0,), (1,))),
        (ANSWER, (TOLD,), "uaua", ((0,), (1,), (2,), (3,))),
        (TWO, (TOLD, JOINED), "uaua", ((0,), (1,), (2, 3), (4,))),
        ([user("a"), calling("Paris")], (TOLD,), "ua", ((0,), (1,))),
    ],
)
def test_what_is_refused_is_put_otherwise_by_the_least_change(messages, changes, roles, origins):
    before = [dict(message) for message in messages]
    form, _ = form_of(STRICT, messages)
    assert form.changes == changes and form.origins == origins and messages == before
    assert "".join(message["role"][0] for message in form.messages) == roles


def test_joined_turns_are_parted_by_an_empty_line_and_keep_their_thoughts():
    form, text = form_of(STRICT, [user("a"), said("b", reasoning_content="x"), said("", reasoning_content="y")])
    assert text == "[INST]a[/INST]b</s>"
    assert form.messages[1]["reasoning_content"] == "x\n\ny"
    assert form_of(STRICT, [user("a"), user("b")])[1] == "[INST]a\n\nb[/INST]"


def test_turns_that_are_trained_are_not_joined_with_those_that_are_not():
    messages = [user("a"), said("b"), said("c")]
    with pytest.raises(Exception, match="must alternate"):
        form_of(STRICT, messages, weights=(1, 0, 1))
    assert form_of(STRICT, messages, weights=(0, 1, 1))[0].changes == (JOINED,)


def test_tools_and_calls_become_the_text_that_a_server_of_this_package_gives():
    form, text = form_of(STRICT, ANSWER, TOOLS)
    assert form.tools is None and '"name": "get_weather"' in form.messages[0]["content"]
    assert form.messages[0]["content"].endswith("</tool_call>\n\na") and form.origins[0] == (0,)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert f"[/INST]{call}</s>[INST]<tool_response>\nsunny\n</tool_response>[/INST]It is sunny.</s>" in text


@pytest.mark.parametrize("ids", [False, True])
def test_several_calls_become_turns_of_one_each_followed_by_its_result(ids):
    results = [result("rain", tool_call_id="call1"), result("sunny", tool_call_id="call0")] if ids else TWO[2:4]
    messages = [user("a"), calling("Paris", "Rome", ids=ids, content="Let me see."), *results, said("Both.")]
    tokenizer = chat_tokenizer("llama3")
    form, _ = rendered(messages, None, tokenizer, lambda form: tokenizer.apply_chat_template(form.messages))
    assert form.changes == (SINGLE,) and [message["role"][0] for message in form.messages] == list("uatata")
    assert form.origins == ((0,), (1,), (3 if ids else 2,), (1,), (2 if ids else 3,), (4,))
    assert [message["content"] for message in form.messages] == ["a", "Let me see.", "sunny", "", "rain", "Both."]
    with pytest.raises(Exception, match="single tool-calls"):  # one result for two calls
        rendered([*messages[:3], said("?")], None, tokenizer, lambda form: tokenizer.apply_chat_template(form.messages))


def test_what_nothing_helps_is_refused_as_it_stands():
    broken = "{% for m in messages %}{{ raise_exception('never ' + m.role) }}{% endfor %}"
    with pytest.raises(Exception, match="never assistant"):
        form_of(broken, [said("b"), said("c"), *ANSWER], TOOLS)


def test_a_template_without_end_is_tried_once():
    tried = []

    def render(form):
        tried.append(form)
        raise FormatError("row 1: it takes long") from LimitError("long")

    with pytest.raises(FormatError, match="it takes long"):
        rendered([*ANSWER, said("c")], TOOLS, chat_tokenizer("mistral", STRICT), render)
    assert len(tried) == 1


CONVERSATIONS = [
    ("gemma2", ANSWER, (TOLD,), {1, 3}),
    ("gemma2", TWO, (TOLD, JOINED), {1, 4}),
    ("gemma2", [said("Hello!"), user("a"), said("b")], (ASKED,), {0, 2}),
    ("gemma2", [user("a"), said("b"), said("c")], (JOINED,), {2}),
    ("llama3", TWO, (SINGLE,), {1, 4}),
    ("llama3", [user("a"), calling("Paris", "Rome")], (SINGLE,), {1}),
]


@pytest.mark.parametrize(("family", "messages", "changes", "turns"), CONVERSATIONS)
def test_such_rows_are_trained_where_the_marks_of_the_template_are(family, messages, changes, turns):
    tokenizer, tools = chat_tokenizer(family), TOOLS if any("tool_calls" in message for message in messages) else None
    raw = RawRow({"messages": messages} | ({"tools": tools} if tools else {}), "line 3")
    seen, row = row_conversation(raw, tokenizer), tokenize_row(raw, tokenizer, mask_prompt=True)
    ids, trained = by_marks(tokenizer, family, seen.form.messages, seen.form.tools)
    assert row.tokens.tolist() == ids and (row.trained == trained & (np.arange(len(ids)) > 0)).all()
    assert (row.changes, row.left_out) == (changes, ())
    assert {seen.origin(turn.message) for turn in seen.conversation.turns} == turns
    whole = tokenize_row(raw, tokenizer)
    assert whole.tokens.tolist() == ids and whole.changes == changes


def test_in_use_the_model_is_asked_as_it_was_trained(tmp_path):
    model = load_model(resolve_base(write_base(tmp_path / "base", "gemma2")))
    row = tokenize_row(RawRow({"messages": TWO, "tools": TOOLS}, "line 3"), model.tokenizer, mask_prompt=True)
    starts = np.flatnonzero(row.trained & ~np.roll(row.trained, 1))
    for before, start in zip((TWO[:1], TWO[:4]), starts, strict=True):
        messages, tools = with_tools(before, TOOLS, tool_format(model.tokenizer))  # as a server does
        assert model.encode_chat(messages, tools) == row.tokens[:start].tolist()
    assert model.encode_chat(TWO[:4], TOOLS) == row.tokens[: starts[1]].tolist()
    with pytest.raises(ModelError, match="Conversation roles must alternate"):
        model.encode_chat([{"role": "narrator", "content": "b"}, user("a")])
