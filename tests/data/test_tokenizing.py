"""Rows, masks and batches: pure functions, values checked on a word-level tokenizer."""

import json

import numpy as np
import pytest
from helpers.chat_families import chat_tokenizer, drawn
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_adapters.data.batches import batch_sequence, epoch_batches, fill_bins, make_batch
from mlx_adapters.data.datasets import RawRow, read_data
from mlx_adapters.data.tokenizing import Row, tokenize, tokenize_row
from mlx_adapters.errors import FormatError, NotFoundError

TEXT = "hi you are what is one two three four red blue tool call system user assistant think"
WORDS = TEXT.split()
STABLE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
# Like Qwen 3: only the last assistant turn shows its (empty) reasoning.
FORGETFUL = (
    "{% for m in messages %}<s> {{ m.role }} "
    "{% if m.role == 'assistant' and loop.last %}think {% endif %}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
NOWHERE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}red{% endif %}"


def tokenizer(template=STABLE, **ids):
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *WORDS, "<unk>", "0", "zebra", "."])} | ids
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    fast.chat_template = template
    return TokenizerWrapper(fast)


def words(tokens, marks=None):
    names = {i: w for w, i in tokenizer()._tokenizer.get_vocab().items()}
    picked = tokens if marks is None else tokens[marks]
    return " ".join(names[int(i)] for i in picked)


TWO_TURNS = [
    {"role": "system", "content": "you are"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two red"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def raw(**values):
    return RawRow(values, "train.jsonl, line 3")


def test_every_assistant_turn_is_trained_or_only_the_last():
    row = tokenize_row(raw(messages=TWO_TURNS), tokenizer(), mask_prompt=True)
    assert words(row.tokens).startswith("<s> system you are </s> <s> user one </s>")
    assert words(row.tokens, row.trained) == "two red </s> four </s>"
    last = tokenize_row(raw(messages=TWO_TURNS), tokenizer(), mask_prompt=True, last_turn_only=True)
    assert words(last.tokens, last.trained) == "four </s>"


def test_an_id_beyond_31_bits_is_left_to_whoever_knows_the_models(monkeypatch):
    """As from a tokenizer whose `red` has such an id; one that really has takes transformers 20 s to make."""
    red = tokenizer().encode("red", add_special_tokens=False)[0]

    def moved(ids):
        if isinstance(ids, list):
            return [2**31 if token == red else token for token in ids]
        if not isinstance(ids, str):
            ids["input_ids"] = moved(ids["input_ids"])
        return ids

    for name in ("encode", "apply_chat_template", "__call__"):
        plain = getattr(PreTrainedTokenizerFast, name)
        far = lambda *given, plain=plain, **more: moved(plain(*given, **more))  # noqa: E731
        monkeypatch.setattr(PreTrainedTokenizerFast, name, far)
    for values in ({"messages": TWO_TURNS}, {"text": "red one"}):
        row = tokenize_row(raw(**values), tokenizer(), mask_prompt="messages" in values)
        assert row.tokens.dtype == np.int32 and row.tokens.max() == 2**31 - 1


def test_a_template_that_rewrites_earlier_turns_is_still_masked_right():
    row = tokenize_row(raw(messages=TWO_TURNS), tokenizer(FORGETFUL), mask_prompt=True)
    assert words(row.tokens, row.trained) == "two red </s> think four </s>"


def test_a_template_without_turns_is_refused_with_the_line():
    with pytest.raises(FormatError, match=r"line 3.*message 3"):
        tokenize_row(raw(messages=TWO_TURNS), tokenizer(NOWHERE.replace("m.content", "'hi'")), mask_prompt=True)


def test_without_mask_all_but_the_first_token_is_trained():
    row = tokenize_row(raw(text="one two three"), tokenizer())
    assert words(row.tokens) == "one two three </s>" and row.trained.tolist() == [False, True, True, True]


def test_prompt_completion_with_and_without_a_template():
    values = {"prompt": "what is", "completion": "red blue"}
    chat = tokenize_row(raw(**values), tokenizer(), mask_prompt=True)
    assert words(chat.tokens) == "<s> user what is </s> <s> assistant red blue </s>"
    plain = tokenize_row(raw(**values), tokenizer(None), mask_prompt=True)
    assert words(plain.tokens) == "what is red blue </s>"
    assert words(chat.tokens, chat.trained) == words(plain.tokens, plain.trained) == "red blue </s>"


TOOL = {"type": "function", "function": {"name": "call"}}


def test_tools_reach_the_template():
    template = "{% for t in tools or [] %}tool {{ t.function.name }} {% endfor %}" + STABLE
    row = raw(messages=TWO_TURNS, tools=[TOOL])
    assert words(tokenize_row(row, tokenizer(template)).tokens).startswith("tool call <s> system")


def test_truncation_keeps_the_start_and_drops_rows_with_nothing_left():
    rows = [raw(messages=TWO_TURNS), raw(prompt="one two three four", completion="red")]
    full = tokenize(rows, tokenizer(), mask_prompt=True)
    assert len(full.rows) == 2 and full.truncated == 0
    cut = tokenize(rows, tokenizer(), max_seq_length=8, mask_prompt=True)
    assert cut.rows == () and cut.dropped == ("train.jsonl, line 3",) * 2
    some = tokenize(rows[1:], tokenizer(), max_seq_length=10, mask_prompt=True)
    assert some.truncated == 1 and some.rows[0].full_length == 11 and len(some.rows[0].tokens) == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2: the line is empty"),
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object"),
        ("\xff", "line 2: not UTF-8 text"),
        ('{"prompt": "a"}', "line 2: the row has 'prompt'"),
        ('{"text": 3}', "line 2: 'text' must be text, not a number"),
        ('{"messages": []}', "line 2: 'messages' must be a list"),
        ('{"messages": [{"content": "a"}]}', "line 2: message 1 has no 'role'"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 1 has no 'content'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a"}\n' + line.encode("latin-1") + b'\n{"text": "b"}\n')
    with pytest.raises(FormatError, match=message):
        read_data(tmp_path)


def test_missing_and_empty_data(tmp_path):
    with pytest.raises(NotFoundError, match="no data folder"):
        read_data(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"no train\.jsonl"):
        read_data(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(FormatError, match="no training row"):
        read_data(tmp_path)
    with pytest.raises(FormatError, match=r"none of \.jsonl"):
        (tmp_path / "a.doc").write_text("x")
        read_data(tmp_path / "a.doc")


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": TWO_TURNS, "tools": [TOOL]}, {"messages": TWO_TURNS[1:3]}]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    (tmp_path / "b").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b" / "train.parquet")
    a, b = read_data(tmp_path / "a").rows("train"), read_data(tmp_path / "b").rows("train")
    assert [r.key() for r in a] == [r.key() for r in b] and a[0].tools == b[0].tools == [TOOL]
    assert [r.messages for r in a] == [r.messages for r in b] == [TWO_TURNS, TWO_TURNS[1:3]]
    assert b[1].where.endswith("train.parquet, row 2")


@given(st.lists(st.integers(2, 60), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 3))
def test_every_row_once_per_epoch(lengths, batch_size, epoch):
    batches = epoch_batches(lengths, batch_size, 5, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)


def test_order_depends_on_seed_and_epoch_and_can_be_entered_anywhere():
    lengths = np.arange(40) % 7 + 3
    flat = lambda b: np.concatenate(b).tolist()  # noqa: E731
    same, other = epoch_batches(lengths, 4, 1, 0), epoch_batches(lengths, 4, 2, 0)
    assert flat(same) == flat(epoch_batches(lengths, 4, 1, 0)) != flat(other)
    assert flat(same) != flat(epoch_batches(lengths, 4, 1, 1))
    whole, late = batch_sequence(lengths, 4, 1), batch_sequence(lengths, 4, 1, start=13)
    expected = [next(whole) for _ in range(25)][13:]
    for (epoch, rows), (late_epoch, late_rows) in zip(expected, late, strict=False):
        assert epoch == late_epoch and rows.tolist() == late_rows.tolist()


def test_batches_of_like_length_waste_little_padding_and_vary_by_epoch():
    lengths = np.random.default_rng(0).integers(5, 400, 1000)
    first, second = (epoch_batches(lengths, 4, 0, epoch) for epoch in (0, 1))
    assert sum(max(lengths[b]) * len(b) for b in first) < 1.03 * lengths.sum()
    assert len({frozenset(b) for b in first} & {frozenset(b) for b in second}) < 25  # of 250


def test_the_tokenizer_does_not_warn_of_rows_that_are_cut(tiny_model, monkeypatch):
    from transformers import tokenization_utils_base

    from mlx_adapters.models.loading import load_tokenizer_of
    from mlx_adapters.sources.bases import resolve_base

    warned = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda *a, **k: warned.append(a))
    tokenizer = load_tokenizer_of(resolve_base(tiny_model()))
    tokenizer._tokenizer.model_max_length = 10
    tokenize([raw(text="word " * 50)], tokenizer, max_seq_length=8)
    assert not warned


def row(tokens, trained):
    return Row(np.array(tokens, np.int32), np.array(trained, bool), "here", len(tokens))


def test_a_batch_lists_exactly_the_trained_positions():
    batch = make_batch([[row([5, 6, 7], [0, 1, 1])], [row([8, 9, 4, 3, 2], [0, 0, 0, 1, 1])]])
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 0], [8, 9, 4, 3, 2]]
    assert batch.trained_tokens == 4 and batch.real_tokens == 8
    real = batch.weights > 0
    assert batch.positions[real].tolist() == [0, 1, 6, 7] and batch.targets[real].tolist() == [6, 7, 3, 2]
    wide = make_batch([[row([5, 6, 7], [0, 1, 1])]], pad_to=16, rows=3)
    assert wide.tokens.shape == (3, 17) and len(wide.positions) == 32 and wide.trained_tokens == 2


def test_packed_rows_never_train_across_a_border():
    batch = make_batch([[row([5, 6], [0, 1]), row([7, 8], [0, 1])]], packed=True)
    assert batch.segments.tolist() == [[1, 1, 2, 2]]
    assert batch.positions[batch.weights > 0].tolist() == [0, 2]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_packing_holds_every_row_once_within_capacity(lengths):
    bins = fill_bins(lengths, 50)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 50 for b in bins)


def test_turns_of_weight_0_are_not_trained_where_the_prompt_is():
    tokenizer = chat_tokenizer("qwen3")
    user = {"role": "user", "content": "a"}
    bad, good = ({"role": "assistant", "content": text, "weight": weight} for text, weight in (("bad", 0), ("good", 1)))
    raw = RawRow({"messages": [user, bad, user, good]}, "row")
    whole, masked = (tokenize_row(raw, tokenizer, mask_prompt=mask) for mask in (False, True))
    start = "<|im_start|>[[user\na<|im_end|>\n<|im_start|>assistant\n]]"
    answer = "<|im_start|>assistant\n<think>\n\n</think>\n\ngood<|im_end|>\n]]"
    assert drawn(tokenizer, whole.tokens, whole.trained) == (
        f"{start}bad<|im_end|>[[\n<|im_start|>user\na<|im_end|>\n{answer}"
    )
    assert np.array_equal(whole.tokens, masked.tokens) and not (masked.trained & ~whole.trained).any()
    context = RawRow({"prompt": [user, good, user], "completion": [good], "system": "s"}, "row")
    assert tokenize_row(context, tokenizer).trained[1:].all()  # a prompt is trained whole, or not at all
