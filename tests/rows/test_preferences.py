"""Preferences in every form that people have them, and what is said of those that are none."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_adapters.errors import FormatError
from mlx_adapters.rows.row import RawRow

ASK = {"role": "user", "content": "Which color?"}
GOOD, BAD = {"role": "assistant", "content": "Blue."}, {"role": "assistant", "content": "Fish."}
SYSTEM = {"role": "system", "content": "Be brief."}


def row(**values) -> RawRow:
    return RawRow(values, "line 7")


FORMS = {
    "texts": {"prompt": "Which color?", "chosen": "Blue.", "rejected": "Fish."},
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "one message each": {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
    "implicit prompt": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "repeated prompt": {"prompt": "Which color?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "repeated messages": {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "a question": {"question": "Which color?", "chosen": "Blue.", "rejected": "Fish."},
    "Alpaca": {"instruction": "Which color?", "input": "", "chosen": "Blue.", "rejected": "Fish."},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Which color?"}],
        "chosen": {"from": "gpt", "value": "Blue."},
        "rejected": {"from": "gpt", "value": "Fish."},
    },
    "OpenAI": {
        "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "JSON texts": {"prompt": json.dumps([ASK]), "chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])},
    "with the whole chat beside": {
        "prompt": "Which color?",
        "messages": [ASK, GOOD],
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
        "score_chosen": 9.0,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_question_with_two_answers(form):
    raw = row(**FORMS[form])
    assert raw.messages == [ASK, GOOD]
    assert raw.rejected.messages == [ASK, BAD]
    assert raw.says_nothing is None


def test_answers_that_begin_with_another_question_are_refused():
    with pytest.raises(
        FormatError, match="line 7: the answers are whole conversations that do not begin with 'prompt'"
    ):
        _ = row(prompt="Which?", chosen=[ASK, GOOD], rejected=[ASK, BAD]).format
    blanks = row(prompt=" Which color?\n", chosen=[ASK, GOOD], rejected=[ASK, BAD])
    assert [m["content"] for m in blanks.rejected.messages] == [" Which color?\n", "Fish."]
    going_on = row(prompt=[ASK, GOOD], chosen=[ASK, GOOD], rejected=[ASK, BAD])
    assert len(going_on.messages) == 4  # the prompt ended in an answer


def test_answers_that_are_lists_in_json_are_texts():
    raw = row(prompt="Call.", chosen='[{"name": "look"}]', rejected="[1, 2]")
    assert (raw.completion, raw.rejected.completion) == ('[{"name": "look"}]', "[1, 2]")


def test_earlier_answers_are_context():
    raw = row(prompt="Which color?", chosen="Blue.", rejected="Fish.", history=[["Yes?", "No."]])
    labeled = row(prompt="Which color?", completion="Blue.", label=True, history=[["Yes?", "No."]])
    for side in (raw, raw.rejected, labeled):
        assert [m["content"] for m in side.messages][:3] == ["Yes?", "No.", "Which color?"]
        assert [w for w, m in zip(side.weights, side.messages, strict=True) if m["role"] == "assistant"] == [0, 1]


def test_openais_tools_go_with_both_answers():
    tools = [{"type": "function", "function": {"name": "look"}}]
    raw = row(input={"messages": [ASK], "tools": tools}, preferred_output=[GOOD], non_preferred_output=[BAD])
    assert raw.tools == raw.rejected.tools == tools


def test_the_prompt_of_whole_conversations_is_what_both_begin_with():
    after = {"role": "user", "content": "And now?"}
    raw = row(chosen=[SYSTEM, ASK, GOOD], rejected=[SYSTEM, ASK, BAD, after, GOOD])
    assert raw.messages == [SYSTEM, ASK, GOOD] and raw.weights == (0, 0, 1)
    assert raw.rejected.messages == [SYSTEM, ASK, BAD, after, GOOD] and raw.rejected.weights == (0, 0, 1, 1, 1)
    longer = row(chosen=[ASK, GOOD], rejected=[ASK, GOOD, after, BAD])  # one begins the other
    assert longer.weights == (0, 1) and longer.rejected.weights == (0, 1, 1, 1)


def test_a_system_prompt_and_tools_go_with_both_answers():
    tools = [{"type": "function", "function": {"name": "look"}}]
    raw = row(system="Be brief.", prompt="Which color?", chosen="Blue.", rejected="Fish.", tools=tools)
    assert raw.messages[0] == raw.rejected.messages[0] == SYSTEM
    assert raw.tools == raw.rejected.tools == tools


def test_texts_without_a_prompt_are_taken_as_they_are():
    raw = row(chosen="Human: Which color? Assistant: Blue.", rejected="Human: Which color? Assistant: Fish.")
    assert (raw.format, raw.rejected.format) == ("text", "text")
    assert raw.rejected.text.endswith("Fish.")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the chosen and the rejected answer are equal"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "the chosen and the rejected answer are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "the rejected answer is empty"),
        ({"prompt": "a", "chosen": " \n", "rejected": "b"}, "the chosen answer is empty"),
        ({"prompt": [ASK], "chosen": [{**GOOD, "content": ""}], "rejected": [BAD]}, "the chosen answer is empty"),
        ({"chosen": "", "rejected": "b"}, "the chosen answer is empty"),
        ({"prompt": "a", "completion": "", "label": True}, "the answer is empty"),
    ],
)
def test_why_a_preference_says_nothing(values, why):
    assert row(**values).says_nothing == why


def test_an_answer_that_only_calls_a_tool_says_something():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    assert row(prompt=[ASK], chosen=[call], rejected=[BAD]).says_nothing is None


@pytest.mark.parametrize("label", [True, "true", "True", np.True_])
def test_labels(label):
    assert row(prompt="a", completion="b", label=label).label is True
    assert row(prompt="a", completion="b", label="FALSE").label is False


@pytest.mark.parametrize("label", [1, 0, 1.0, "yes", "", [], [True], {"a": 1}, np.ones(2, bool), "1"])
def test_a_label_that_is_no_boolean(label):
    with pytest.raises(FormatError, match="line 7: 'label' must be true or false, not"):
        _ = row(prompt="a", completion="b", label=label).label


def test_a_missing_label():
    for values in ({}, {"label": None}, {"label": float("nan")}):
        with pytest.raises(FormatError, match="line 7: the row has no 'label'"):
            _ = row(prompt="a", completion="b", **values).label


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen' must be text or a list of messages, not a number"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "'rejected' must be a list with at least one message"),
        ({"chosen": [ASK, GOOD], "rejected": [BAD]}, "do not begin with the same turn"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "do not begin with the same turn"),
        ({"question": "a", "query": "b", "chosen": "c", "rejected": "d"}, "which of 'question' and 'query'"),
        ({"prompt": 3, "chosen": "c", "rejected": "d"}, "'prompt' must be text or a list of messages"),
        ({"prompt": {"a": 1}, "chosen": [GOOD], "rejected": [BAD]}, "'prompt' must be a list with at least one"),
    ],
)
def test_what_is_wrong_is_said_with_the_line(values, message):
    with pytest.raises(FormatError, match=r"^line 7: ") as caught:
        _ = row(**values).canonical
    assert message in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just(ASK) | st.just(GOOD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from"]), inner),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "label", "question", "system"]), VALUES))
def test_any_values_are_a_row_or_an_error_of_ours(values):
    raw = RawRow(values, "line 7")
    for look in (lambda: raw.rejected, lambda: raw.label, lambda: raw.says_nothing):
        try:
            look()
        except FormatError as error:
            assert str(error).startswith("line 7: ")
