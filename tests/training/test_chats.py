"""Chats with tool calls, from rows to a model that writes calls and stops by itself."""

import json
import random

import pytest
from helpers.chat_families import chat_tokenizer, write_base

from mlx_adapters import LoraConfig, TrainConfig, load_adapter, load_model, train
from mlx_adapters.data.datasets import read_data
from mlx_adapters.events import Note
from mlx_adapters.training.setup import tokenize_split

TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
CITIES = ["Paris", "Oslo", "Rome", "Lima", "Bern"]
WAYS = ["How warm is it in {}?", "{}, now?", "Weather in {}", "Is it sunny in {}?", "Tell me of {} today."]


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(city: str) -> dict:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


def row(question: str, city: str, rng: random.Random) -> dict:
    """A question, the call, and in half of the rows its result and the answer."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call(city)]},
    ]
    if rng.random() < 0.5:
        degrees = rng.choice("579")
        messages.append({"role": "tool", "content": f"{degrees} degrees"})
        messages.append({"role": "assistant", "content": f"It is {degrees}."})
    return {"messages": messages, "tools": TOOLS}


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # before a last turn of Qwen 3's alone
WRITTEN = {  # how each family writes a call
    "qwen3": ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "', '"}}\n</tool_call>'),
    "mistral": ('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "', '"}}]'),
    "llama3": ('{"name": "get_weather", "parameters": {"city": "', '"}}'),
    "glm": (
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>",
        "</arg_value>\n</tool_call>",
    ),
}


@pytest.mark.parametrize("family", WRITTEN)
def test_a_model_learns_to_call_and_to_stop(family, tmp_path):
    """Many steps on fifty rows, asked what was trained. So small a model does not always copy the right city."""
    base, rng = write_base(tmp_path / family, family), random.Random(0)
    asked = [(way.format(city), city) for way in WAYS for city in CITIES]
    data = write(tmp_path / "data", [row(question, city, rng) for question, city in asked * 2])
    assert len(data.joinpath("train.jsonl").read_text().splitlines()) == 50
    notes: list[str] = []
    train(
        base,
        data,
        name="calls",
        lora=LoraConfig(rank=32, scale=8.0),
        training=TrainConfig(iterations=150, batch_size=4, learning_rate=5e-3, mask_prompt=True, schedule="cosine"),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert not any("stop" in note or "leaves out" in note for note in notes)
    model = load_model(base, load_adapter("calls"))
    before, after = WRITTEN[family]
    for question, _ in asked[::5]:
        prompt = model.encode_chat([{"role": "user", "content": question}], TOOLS)
        reply = model.generate(prompt, max_tokens=60)
        assert reply.finish_reason == "stop", reply.text
        text = reply.text.removeprefix(EMPTY_THOUGHT)
        assert text.startswith(before) and text.endswith(after), reply.text
        assert text.removeprefix(before).removesuffix(after) in CITIES, reply.text


def notes_of(folder, family: str, **settings) -> list[str]:
    notes: list[str] = []
    config = TrainConfig(mask_prompt=True, **settings)
    tokenize_split(read_data(folder), "train", chat_tokenizer(family), config, lambda e: notes.append(e.text))
    return notes


def chat(content: str | None, **fields) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content, **fields}]}


def test_what_will_not_be_learned_is_told(tmp_path):
    data = write(tmp_path / "plain", [chat("b"), chat("c")])
    assert notes_of(data, "chatml") == []
    endless = "No trained row holds a token that stops a generation: the model will not learn to stop."
    assert notes_of(data, "alpaca") == [endless] and notes_of(data, "glm") == []
    calls = write(
        tmp_path / "calls", [chat("b"), chat(None, tool_calls=[call("Rome")]), chat("", reasoning_content="c")]
    )
    lost, thought = notes_of(calls, "gemma2")
    assert lost.startswith("1 train row with 'tool_calls' of the assistant's, of which the chat template leaves out")
    assert "line 2, message 2" in lost and "line 3, message 2" in thought and "'reasoning_content'" in thought
    assert notes_of(calls, "qwen3") == []


def test_what_the_model_never_hears_is_told(tmp_path):
    def asked(role: str) -> dict:
        return {"messages": [{"role": role, "content": "Be brief."}, *chat("b")["messages"]]}

    data = write(tmp_path / "told", [chat("b"), asked("system"), asked("narrator"), asked("system")])
    (note,) = notes_of(data, "qwen3")
    where = f"{data / 'train.jsonl'}, line 3, message 1"
    assert note == f"1 train row with words of 'narrator' that the chat template leaves out: {where}."
    assert notes_of(data, "chatml") == []  # it writes any role by its name
