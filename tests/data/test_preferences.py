"""Preferences in tokens: what is judged is the answer, whatever its form, and what cannot be is left out by name."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from mlx_adapters import check_data
from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.training import DPO, KTO, ORPO, TrainConfig
from mlx_adapters.data.inspecting import inspect_row
from mlx_adapters.data.preferences import require_texts, tokenize_for
from mlx_adapters.errors import FormatError
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.optimization.feed import mismatched
from mlx_adapters.rows.row import RawRow
from mlx_adapters.sources.bases import resolve_base

ASK, GOOD, BAD = "How many students are there?", "SELECT COUNT(*) FROM students;", "SELECT title FROM courses;"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer_of(resolve_base(tiny_model()))


def examples(tokenizer, objective, *rows, **settings):
    raw = [RawRow(values, f"line {number}") for number, values in enumerate(rows, 1)]
    return tokenize_for(raw, tokenizer, TrainConfig(objective=objective, **settings))


def judged(row, tokenizer) -> str:
    return tokenizer.decode(row.tokens[row.answer].tolist())


def test_a_pair_is_two_sequences_of_which_the_answers_are_judged(tokenizer):
    (row,) = examples(tokenizer, DPO(), {"prompt": ASK, "chosen": GOOD, "rejected": BAD}).rows
    assert judged(row, tokenizer) == GOOD + "<|im_end|>" and judged(row.rejected, tokenizer) == BAD + "<|im_end|>"
    assert np.array_equal(row.trained, row.answer)
    start = int(np.argmax(row.answer))
    assert np.array_equal(row.tokens[:start], row.rejected.tokens[:start])


def test_orpo_learns_the_prompt_too_unless_it_is_masked(tokenizer):
    values = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    (whole,) = examples(tokenizer, ORPO(), values).rows
    assert whole.trained_tokens == len(whole.tokens) - 1 > whole.answer.sum()
    (masked,) = examples(tokenizer, ORPO(), values, mask_prompt=True).rows
    assert np.array_equal(masked.trained, masked.answer) and np.array_equal(masked.answer, whole.answer)
    assert np.array_equal(whole.rejected.trained, whole.rejected.answer)


def test_whole_texts_are_judged_from_where_their_tokens_part(tokenizer):
    (row,) = examples(tokenizer, DPO(), {"chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}"}).rows
    assert f"{ASK} {GOOD}".endswith(judged(row, tokenizer).removesuffix("<|im_end|>"))
    assert "students?" not in judged(row, tokenizer)
    raw = RawRow({"chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}"}, "line 1")
    looked, report = inspect_row(raw, tokenizer, TrainConfig(objective=DPO()))  # data check shows the same
    assert np.array_equal(looked.trained, row.answer)
    shown = [[text for text, trained in side if trained] for side in (report.pieces, report.rejected)]
    assert shown == [[judged(row, tokenizer)], [judged(row.rejected, tokenizer)]]
    (row,) = examples(tokenizer, DPO(), {"chosen": GOOD, "rejected": f"{GOOD} {BAD}"}).rows  # one begins the other
    assert judged(row, tokenizer) == "<|im_end|>" and row.rejected.answer.sum() > 3


def test_labels_and_pairs_as_labels(tokenizer):
    rows = {"prompt": ASK, "completion": GOOD, "label": True}, {"prompt": ASK, "completion": BAD, "label": False}
    assert [row.desirable for row in examples(tokenizer, KTO(), *rows).rows] == [True, False]
    unpaired = examples(tokenizer, KTO(), {"prompt": ASK, "chosen": GOOD, "rejected": BAD}).rows
    labeled = examples(tokenizer, KTO(), *rows).rows
    for one, other in zip(unpaired, labeled, strict=True):
        assert np.array_equal(one.tokens, other.tokens) and one.desirable == other.desirable
        assert one.rejected is None


def test_rows_that_say_nothing_are_left_out_by_name(tokenizer):
    good = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    done = examples(tokenizer, DPO(), {**good, "rejected": GOOD}, good, {**good, "chosen": ""})
    assert len(done.rows) == 1
    assert done.unusable == (
        "line 1: the chosen and the rejected answer are equal",
        "line 3: the chosen answer is empty",
    )


def test_a_pair_of_which_an_answer_does_not_fit_is_dropped(tokenizer):
    good = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    (row,) = examples(tokenizer, DPO(), good).rows
    prompt = int(np.argmax(row.answer))
    assert examples(tokenizer, DPO(), good, max_seq_length=prompt).dropped == ("line 1",)
    (cut,) = examples(tokenizer, DPO(), good, max_seq_length=prompt + 1).rows
    assert cut.answer.sum() == cut.rejected.answer.sum() == 1 and cut.truncated
    texts = {"chosen": f"{GOOD} a", "rejected": f"{GOOD} b"}
    assert examples(tokenizer, DPO(), texts, max_seq_length=4).dropped == ("line 1",)  # alike as far as they go


@pytest.mark.parametrize(
    ("objective", "values", "message", "hint"),
    [
        (DPO(), {"prompt": ASK, "completion": GOOD}, "no two answers to compare", "'chosen' and 'rejected'"),
        (DPO(), {"prompt": ASK, "completion": GOOD, "label": True}, "no two answers", "--objective kto"),
        (DPO(), {"prompt": ASK, "chosen": GOOD, "rejected": None, "completion": "a"}, "no two answers", "a pair has"),
        (KTO(), {"prompt": ASK, "completion": GOOD}, "no 'label'", "true or false"),
        (KTO(), {"prompt": ASK, "completion": GOOD, "label": 1}, "must be true or false, not 1", "true or false"),
        (KTO(), {"text": GOOD, "label": True}, "no prompt", "'completion' and 'label'"),
    ],
)
def test_rows_that_the_objective_cannot_use(objective, values, message, hint, tokenizer):
    with pytest.raises(FormatError, match=r"^line 1: ") as caught:
        examples(tokenizer, objective, values)
    assert message in str(caught.value) and hint in caught.value.hint


def test_sft_refuses_pairs(tokenizer):
    with pytest.raises(FormatError, match="line 1: the row has 'chosen' and 'rejected'") as caught:
        examples(tokenizer, TrainConfig().objective, {"prompt": ASK, "chosen": GOOD, "rejected": BAD})
    assert "--objective dpo" in caught.value.hint


@pytest.mark.parametrize("label", [False, True, None, "false", 0])
def test_sft_refuses_answers_that_are_marked_as_bad_ones(label, tokenizer):
    values = {"prompt": ASK, "completion": GOOD, "label": label}
    read = DataConfig(prompt_column="prompt", completion_column="completion")
    require_texts([RawRow(values, "line 1", read), RawRow({"text": "a", "label": label}, "line 2")])
    refused = pytest.raises(FormatError, match="line 1: the row has a bad answer")
    with refused if label is False else nullcontext():  # another column of that name means nothing
        require_texts([RawRow(values, "line 1")])


def test_data_check_sees_pairs_as_train_does(tiny_model):
    pairs = [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}]
    with pytest.raises(FormatError, match="row 1: the row has 'chosen' and 'rejected', and sft learns one answer"):
        check_data(pairs, tiny_model())
    assert check_data(pairs, tiny_model(), TrainConfig(objective=DPO())).splits["train"].rows == 1
    sides = {name: [{"role": "assistant", "content": name}] for name in ("preferred_output", "non_preferred_output")}
    theirs = [{"input": {"messages": [{"role": "user", "content": ASK}]}, **sides}]
    with pytest.raises(FormatError, match="the row has 'preferred_output' and 'non_preferred_output', and sft"):
        check_data(theirs, tiny_model())


def test_mismatched_answers_belong_to_another_prompt(tokenizer):
    asked = [ASK, ASK, "List the titles of all courses.", ASK]
    answers = [GOOD, BAD, "SELECT title;", "SELECT 1;"]
    values = [{"prompt": q, "completion": a, "label": True} for q, a in zip(asked, answers, strict=True)]
    rows = examples(tokenizer, KTO(), *values).rows
    aside = mismatched(rows, 2048)
    assert [judged(row, tokenizer).removesuffix("<|im_end|>") for row in aside] == [answers[i] for i in (2, 2, 3, 2)]
    for row, other in zip(rows, aside, strict=True):
        start = int(np.argmax(row.answer))
        assert np.array_equal(row.tokens[:start], other.tokens[:start])
        assert int(np.argmax(other.answer)) == start and np.array_equal(other.trained, other.answer)
    one_prompt = [replace(row, tokens=rows[0].tokens, answer=rows[0].answer) for row in rows[:2]]
    assert len(mismatched(one_prompt, 2048)) == 2 and mismatched(rows[:1], 2048) == []
