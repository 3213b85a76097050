"""What `data check` says of rows: what is trained, what the chat template leaves out, and what does not stop."""

import json

import pytest
from click.testing import CliRunner
from helpers.chat_families import TOOLS, chat_tokenizer, write_base

from mlx_adapters import check_data
from mlx_adapters.cli import cli
from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.inspecting import inspect_row
from mlx_adapters.data.tokenizing import tokenize
from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.models.loading import load_model
from mlx_adapters.rows.row import RawRow
from mlx_adapters.sources.bases import resolve_base

MASKED = TrainConfig(mask_prompt=True)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
THOUGHT = "<think>\nI add.\n</think>\n\nIt is 4."


ADD = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": number}}} for number in (2, 3)]
LOOK = {"function": {"name": "look", "arguments": {"city": "Oslo", "days": ["Mon", 'T"ue\n'], "more": {"unit": "é"}}}}
CALLERS = ("qwen2", "qwen3", "llama3", "mistral", "r1", "harmony", "glm", "apertus", "gemma4")
ADD_LEFT_OUT = ("assistant", "tool_calls", "add")  # the second, of which no other text is the message's own


def chat(*turns: str | dict, **values) -> RawRow:
    """User and assistant in turns; dicts stand for themselves."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} if isinstance(t, str) else t for i, t in enumerate(turns)]
    return RawRow({"messages": messages, **values}, "train.jsonl, line 3")


def left_out(family: str, raw: RawRow, template=None) -> list[tuple]:
    _, report = inspect_row(raw, chat_tokenizer(family, template), MASKED)
    return [(text.message, text.role, text.field, text.text) for text in report.left_out]


@pytest.mark.parametrize(
    ("family", "raw", "missing"),
    [
        ("qwen3", chat("sum?", THOUGHT), []),
        ("qwen3", chat({"role": "Narrator", "content": "a"}, "b", "c", "d"), [(1, "Narrator", "content", "a")]),
        ("qwen3", chat("sum?", THOUGHT, "and?", "It is 5."), [(2, "assistant", "content", THOUGHT[:23])]),
        ("r1", chat("sum?", THOUGHT), [(2, "assistant", "content", THOUGHT[:23])]),
        (
            "qwen2",
            chat("a", {"role": "Narrator", "content": "b"}, {"role": "assistant", "content": "c"}),
            [(2, "Narrator", "content", "b")],
        ),
        ("chatml", chat("a", {"role": "Narrator", "content": "b"}, {"role": "assistant", "content": "c"}), []),
        (
            "qwen3",
            chat("a", {"role": "assistant", "content": "b", "reasoning_content": "why"}, "c", "d"),
            [(2, "assistant", "reasoning_content", "why")],
        ),
        (
            "llama3",
            chat("a", {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}),
            [(2, "assistant", "content", "Let me see.")],
        ),
        ("qwen2", chat("a", {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}), []),
        (
            "mistral",
            chat(
                "a",
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": 'a "b"\n', "tool_call_id": "1", "name": "f"},
                {"role": "assistant", "content": "  It is.  "},
            ),
            [],
        ),
        (
            "gemma2",
            chat("a", {"role": "assistant", "content": "b", "tool_calls": [CALL]}),
            [(2, "assistant", "tool_calls", "get_weather"), (2, "assistant", "tool_calls", "Paris")],
        ),
        ("harmony", chat("a", {"role": "assistant", "content": "b", "reasoning_content": "why"}), []),
        ("harmony", chat("a", {"role": "assistant", "content": None, "tool_calls": ADD}), [(2, *ADD_LEFT_OUT)]),
        *((family, chat("a", {"role": "assistant", "content": None, "tool_calls": [LOOK]}), []) for family in CALLERS),
        ("mistral", chat("a", {"role": "assistant", "content": None, "tool_calls": ADD}), []),
        ("qwen3", chat("a", {"role": "assistant", "content": None, "tool_calls": ADD}), []),
    ],
)
def test_text_that_never_reaches_the_model_is_named(family, raw, missing):
    assert left_out(family, raw) == missing


def test_a_turn_tells_its_trained_tokens_and_whether_it_stops():
    row, report = inspect_row(chat("a", "b", "c", "d"), chat_tokenizer("glm"), MASKED)
    assert [(t.message, t.trained_tokens, t.stops) for t in report.turns] == [(2, 3, True), (4, 3, True)]
    assert row.stops and row.trained_tokens == 6
    cut, report = inspect_row(
        chat("a", "b", "c", "d"), chat_tokenizer("glm"), TrainConfig(mask_prompt=True, max_seq_length=7)
    )
    assert [(t.message, t.trained_tokens, t.stops) for t in report.turns] == [(2, 1, False), (4, 0, False)]
    assert not cut.stops and cut.trained_tokens == 1


def test_messages_keep_their_numbers_where_a_system_turn_joins_the_first_question():
    calling = {"role": "assistant", "content": "b", "tool_calls": [CALL]}
    raw = chat({"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}, calling)
    row, report = inspect_row(raw, chat_tokenizer("gemma2"), MASKED)
    assert [piece for piece, _ in report.pieces] == [
        "<bos><start_of_turn>user\nBe brief.\n\na<end_of_turn>\n<start_of_turn>model\n",
        "b<end_of_turn>",
        "\n",
    ]
    assert [turn.message for turn in report.turns] == [3] and row.left_out == ((3, "tool_calls"),)
    assert {(text.message, text.role, text.field) for text in report.left_out} == {(3, "assistant", "tool_calls")}
    weighed = chat({"role": "system", "content": "s"}, {"role": "user", "content": "a"}, calling | {"weight": 0})
    assert not inspect_row(weighed, chat_tokenizer("gemma2"), MASKED)[0].trained.any()


def test_without_a_mask_everything_is_trained_and_the_same_is_found():
    raw = chat("sum?", THOUGHT, "and?", "It is 5.")
    masked, with_mask = inspect_row(raw, chat_tokenizer("qwen3"), MASKED)
    whole, without = inspect_row(raw, chat_tokenizer("qwen3"), TrainConfig())
    assert masked.tokens.tolist() == whole.tokens.tolist() and whole.trained_tokens == len(whole.tokens) - 1
    assert with_mask.left_out == without.left_out != () and with_mask.turns == without.turns


@pytest.mark.parametrize("family", ["chatml", "mistral", "gemma2", "llama3", "glm"])
def test_the_tokens_are_the_same_with_a_mask_and_without(family):
    raw = chat("Hello", "  there ", "é 🎉", "\n")
    one, other = (tokenize([raw], chat_tokenizer(family), mask_prompt=mask).rows[0] for mask in (True, False))
    assert one.tokens.tolist() == other.tokens.tolist()


SILENT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


def test_a_row_whose_answers_the_template_leaves_out_is_refused():
    with pytest.raises(
        FormatError, match=r"line 3: the chat template leaves out what the assistant says \(message 2\)"
    ):
        tokenize([chat("a", "b")], chat_tokenizer("chatml", SILENT), mask_prompt=True)
    assert left_out_of_whole(SILENT) == [(2, "b")]


def left_out_of_whole(template: str) -> list[tuple]:
    _, report = inspect_row(chat("a", "b"), chat_tokenizer("chatml", template), TrainConfig())
    return [(text.message, text.text) for text in report.left_out]


@pytest.mark.parametrize("mask", [True, False])
def test_a_template_that_raises_is_quoted_with_the_row(mask):
    with pytest.raises(FormatError, match="line 3: the chat template refuses the row: Conversation roles must") as e:
        late = chat("a", {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"})
        tokenize([late], chat_tokenizer("gemma2"), mask_prompt=mask)
    assert "--chat-template FILE" in e.value.hint
    broken = "{% for m in messages %}{{ m.content.nothing.there }}{% endfor %}"
    with pytest.raises(FormatError, match="line 3: the chat template refuses the row: 'str object' has no attribute"):
        tokenize([chat("a", "b")], chat_tokenizer("chatml", broken), mask_prompt=mask)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": ""},
        {"content": "  \n"},
        {"content": "", "reasoning_content": "I think."},
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": [CALL, CALL]},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_thinking", "gemma4", "r1", "glm", "kimi", "mistral"])
def test_silent_turns_are_rows_like_others(family, answer):
    raw = chat("a", {"role": "assistant", **answer}, tools=TOOLS)
    (row,) = tokenize([raw], chat_tokenizer(family), mask_prompt=True).rows
    assert row.trained_tokens > 0 and row.stops


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_base(folder / family, family) for family in ("qwen3", "alpaca", "llama3", "mistral")}


def messages(*turns: dict) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, *turns]}


ROWS = [
    messages({"role": "assistant", "content": "b"}),
    messages({"role": "assistant", "content": None, "tool_calls": [CALL]}),
    messages({"role": "assistant", "content": ""}),
    messages({"role": "bot", "content": "hidden"}, {"role": "assistant", "content": "c"}),
]


def test_data_check_lists_what_stands_out_over_all_rows(bases, tmp_path):
    report = check_data(write(tmp_path / "d", ROWS), bases["qwen3"], MASKED, row=4)
    train = report.splits["train"]
    assert [place.rpartition(", ")[2] for place in train.calls_only] == ["line 2"]
    assert [place.rpartition(", ")[2] for place in train.empty_answers] == ["line 3"]
    assert [(t.role, t.field, t.text) for t in train.left_out] == [("bot", "content", "hidden")]
    assert train.unknown_roles == {"bot": 1} and (train.turns, train.endless_turns) == (4, 0) and report.stops
    assert train.turn_tokens[0] == 5 and report.shown.where.endswith("line 4")
    assert report.first_row == report.shown.pieces
    with pytest.raises(ConfigError, match="row 5 cannot be shown: the training data has 4 rows"):
        check_data(tmp_path / "d", bases["qwen3"], MASKED, row=5)


def test_the_command_says_it(bases, tmp_path):
    data = str(write(tmp_path / "d", ROWS))
    command = ["data", "check", data, "--mask-prompt", "--base"]
    said = CliRunner().invoke(cli, [*command, str(bases["qwen3"]), "--row", "2"])
    assert said.exit_code == 0, said.output
    assert (
        "training row 2; the loss counts" in said.output
        and '[[<think>\n\n</think>\n\n<tool_call>\n{"name"' in said.output
    )
    assert (
        "never reaches the model, content of 'bot' (1): " in said.output
        and "line 4, message 2: 'hidden'" in said.output
    )
    assert "train, answers with calls alone (1): " in said.output
    assert "unknown role 'bot' (1): only 'assistant' is trained" in said.output
    assert "1 of train with words that never reach the model" in said.output
    assert "train, 4 turns of the assistant: 5 to 24 tokens" in said.output
    assert "will not learn to stop" not in said.output
    write(tmp_path / "d", ROWS[:1])
    said = CliRunner().invoke(cli, [*command, str(bases["alpaca"])])
    assert "message 2: 1 token, and ends in no token that stops a generation" in said.output
    assert "No trained row holds a token that stops a generation: the model will not learn to stop." in said.output


def test_a_bos_in_a_text_comes_once(bases, tmp_path):
    text = "<|begin_of_text|>Hello"
    data = write(tmp_path / "d", [{"text": text}, {"messages": [{"role": "user", "content": "a"}]}])
    report = check_data(data, bases["llama3"])
    assert report.first_row[0] == ("<|begin_of_text|>", False) and report.first_row[1][0] == "Hello<|eot_id|>"
    twice = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    row = RawRow({"messages": [{"role": "user", "content": text}]}, "row")
    assert inspect_row(row, chat_tokenizer("llama3", twice), TrainConfig())[1].doubled_bos
    assert report.splits["train"].doubled_bos == ()


@pytest.mark.parametrize(
    ("family", "values", "told"),
    [
        ("qwen3", {"prompt": "Name a color.", "completion": "Blue.<|im_end|>"}, "<|im_end|>"),
        ("qwen3", {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "completion": "a"}, "<|im_start|>, <|im_end|>"),
        (
            "llama3",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|eot_id|>"}]},
            "<|eot_id|>",
        ),
        ("mistral", {"prompt": "[INST] a [/INST]", "completion": "b</s>"}, "[INST], [/INST], </s>"),
        ("qwen3", {"prompt": "Is <|user|> or </s> a token?", "completion": "<think>\nNo.\n</think>\n\nNo."}, None),
    ],
)
def test_text_that_is_read_as_special_tokens_is_told(bases, tmp_path, family, values, told):
    """Rows that were rendered before, or that bring their own end: the model would learn to end twice."""
    data = write(tmp_path / "d", [values])
    found = check_data(data, bases[family], MASKED).splits["train"].control_tokens
    assert [place.rpartition(": ")[2] for place in found] == ([told] if told else [])
    command = ["data", "check", str(data), "--base", str(bases[family])]
    said = CliRunner().invoke(cli, command).stdout
    assert ("1 of train with text that is read as special tokens" in said) == (told is not None)
    assert told is None or f"train, text that is read as special tokens (1): {found[0]}" in said


def test_a_prompt_does_not_end_where_the_tokenizer_puts_eos_behind_every_text(tmp_path):
    """`add_eos_token`: what the model is to go on with would be over; a whole text ends once."""
    base = write_base(tmp_path / "base", "llama3")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    edit = {"tokenizer_config.json": lambda config: config.pop("chat_template", None)}
    around = [{"SpecialToken": {"id": w, "type_id": 0}} for w in ("<|begin_of_text|>", "<|eot_id|>")]
    backend = json.loads((base / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in backend["added_tokens"]}
    known = {w: {"id": w, "ids": [ids[w]], "tokens": [w]} for w in ("<|begin_of_text|>", "<|eot_id|>")}
    single = [around[0], {"Sequence": {"id": "A", "type_id": 0}}, around[1]]
    behind = {"type": "TemplateProcessing", "single": single, "pair": [*single, *single], "special_tokens": known}
    edit["tokenizer.json"] = lambda config: config.update(post_processor=behind)
    for name, change in edit.items():
        config = json.loads((base / name).read_text())
        change(config)
        (base / name).write_text(json.dumps(config))
    told = (("<|begin_of_text|>hello", False), (" there<|eot_id|>", True))
    row = {"prompt": "hello", "completion": " there"}
    assert check_data(write(tmp_path / "d", [row]), base, MASKED).first_row == told
    ends = {"prompt": "hello<|eot_id|>", "completion": " there"}
    assert check_data(write(tmp_path / "d", [ends]), base, MASKED).first_row[0] == (f"{told[0][0]}<|eot_id|>", False)
    text = check_data(write(tmp_path / "d", [{"text": "hello there"}]), base).first_row
    assert "".join(piece for piece, _ in text) == "<|begin_of_text|>hello there<|eot_id|>"
    model = load_model(resolve_base(base))
    assert model.tokenizer.decode(model.encode("hello")) == told[0][0]


def remarks(family: str, *raws: RawRow, **settings) -> list[str]:
    return list(tokenize(raws, chat_tokenizer(family), **settings).remarks("train row", "max_seq_length 2048"))


THINKING = {"role": "assistant", "content": "It is 4.", "thinking": "I add."}
MISUSED = {"role": "assistant", "content": "<think>\nI add.\n</think>\n\nIt is 4."}


GREETED = chat({"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "a"}, MISUSED)
CALLS = {"role": "assistant", "tool_calls": [CALL, CALL | {"function": {"name": "look_up"}}]}
TOLD = [
    ("chatml", chat("sum?", THINKING), "1 train row with 'thinking' of the assistant's, of which"),
    ("r1", chat("sum?", MISUSED), "1 train row with 'content' of the assistant's, of which"),
    ("qwen3", chat("sum?", THINKING, "and?", "5"), "1 train row with 'reasoning_content' of the assistant's"),
    ("harmony", chat("a", CALLS), "1 train row with 'tool_calls' of the assistant's"),
    ("chatml", chat("a", "b", tools=TOOLS), "1 train row with tools that the chat template does not tell"),
    (
        "gemma2",
        GREETED,
        "1 train row put otherwise, since the chat template refuses it as it stands (an empty question",
    ),
    ("qwen3", chat("sum?", THINKING), None),
    ("qwen3", chat("sum?", MISUSED), None),
    ("harmony", chat("sum?", THINKING), None),
    ("qwen2", chat("a", CALLS, tools=TOOLS), None),
    ("qwen2", chat(f"Call one of these: {TOOLS}", "b", tools=TOOLS), None),
    ("qwen3", chat("sum?", {**THINKING, "weight": 0}, "and?", "5"), None),
]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(("family", "raw", "told"), TOLD)
def test_training_tells_what_the_template_makes_of_rows_otherwise_than_they_say(family, raw, told, mask):
    if mask or "weight" not in str(raw.values):
        remarked = remarks(family, raw, mask_prompt=mask)
        assert [one.startswith(told) and "train.jsonl, line 3" in one for one in remarked] == ([True] if told else [])


def test_the_same_is_in_the_report(tmp_path):
    base, data = write_base(tmp_path / "base", "gemma2"), tmp_path / "train.jsonl"
    rows = [chat("a", "b", tools=TOOLS), chat({"role": "assistant", "content": "Hello!"})]
    data.write_text("".join(json.dumps(dict(raw.values)) + "\n" for raw in rows))
    report = check_data(str(data), str(base), MASKED).splits["train"]
    assert [(text.message, text.field, text.text) for text in report.left_out] == [(0, "tools", "get_weather")]
    assert [place.partition(", ")[2] for place in report.changed] == ["line 2: an empty question before a first answer"]
    said = CliRunner().invoke(cli, ["data", "check", str(data), "--base", str(base), "--mask-prompt"]).stdout
    assert "train, never reaches the model, tools of the row (1): " in said and "line 1: 'get_weather'" in said
    assert "train, put otherwise, since the chat template refuses it as it stands (1): " in said
