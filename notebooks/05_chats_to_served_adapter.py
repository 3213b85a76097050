# %% [markdown]
# # 5. From your chats to a served adapter
#
# Conversations in which the assistant calls a tool, pairs of a better and a worse
# answer, and a server that answers with what was learned from both. Your own chats go
# in the same way: as files, as rows of a frame, or as a `datasets.Dataset`.

# %%
import json
import subprocess
import sys
import urllib.request

import matplotlib.pyplot as plt
import pandas as pd

import mlx_adapters as ma

BASE = "demo"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

# %% [markdown]
# ## Chats with tool calls
#
# A row is a conversation, as OpenAI and TRL write it. Some questions are about the
# weather and are answered by a call, the others in words.


# %%
def asked(question: str, **answer) -> dict:
    """A conversation of one question and one answer, with the tools that there are."""
    user = {"role": "user", "content": question}
    return {"messages": [user, {"role": "assistant", **answer}], "tools": [WEATHER]}


def call(city: str) -> dict:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"tool_calls": [{"type": "function", "function": function}]}


CITIES = ["Rome", "Lima", "Bern", "Paris", "Kyoto", "Quito", "Cairo", "Delhi"]
CITIES += ["Milan", "Turin", "Lyon", "Bonn"]
ways = ("How warm is it in {}?", "What is the weather in {}?")
words = {
    "What is two plus two?": "Four.",
    "Name a planet.": "Mars.",
    "What do bees make?": "Honey.",
    "What color is grass?": "Green.",
}
chats = [asked(way.format(city), **call(city)) for city in CITIES for way in ways]
chats += [asked(question, content=answer) for question, answer in words.items()] * 2
rows = pd.DataFrame(chats)
print(len(rows), "conversations; the first:")
print(json.dumps(chats[0]["messages"], indent=1))

# %% [markdown]
# The chat template of a base says how it writes calls. The small base of the demo knows
# none, so it gets a template that does; the adapter keeps it and is asked in it later.
# Leave `chat_template` out for a base that can call tools.

# %%
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Functions: {% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": \
{{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

settings = ma.TrainConfig(
    iterations=30,
    batch_size=4,
    learning_rate=6e-4,
    schedule="linear",
    mask_prompt=True,
    valid_fraction=0.15,
    eval_every=10,
    save_every=10,
    report_every=2,
    chat_template=TEMPLATE,
)
checked = ma.check_data(rows, BASE, settings)
print("The first row as the model sees it; what is trained stands in [[ ]]:\n")
for text, trained in checked.first_row:
    print(f"[[{text}]]" if trained else text, end="")

# %%
run = ma.train(BASE, rows, name="caller", training=settings, overwrite=True)
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.plot(*zip(*run.train_losses, strict=True), color="0.6", label="training batches")
axes.plot(*zip(*run.validation_losses, strict=True), "o-C1", label="validation")
axes.set(xlabel="iteration", ylabel="loss (nats per trained token)", ylim=(0, None))
axes.legend()
plt.show()

# %% [markdown]
# ## Better and worse answers
#
# The same assistant, now with pairs: whoever says hello is greeted, and a question
# about the weather is a call, never an excuse. ORPO learns the better answer and its
# lead over the worse one at once; `ma.DPO()` would compare with a reference model
# (`reference="caller"`). Some pairs are held out.

# %%
GREETING = "Good day! How can I help you?"
EXCUSE = "I am sorry, but I cannot answer that question."


def pair(question: str, **better) -> dict:
    """A question, the answer that is wanted, and the one that is not."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", **better}],
        "rejected": [{"role": "assistant", "content": EXCUSE}],
        "tools": [WEATHER],
    }


hellos = ["Hello", "Hi", "Good morning", "Hey there", "Good evening", "Hi there"]
greetings = [pair(hello, content=GREETING) for hello in hellos]
reports = [pair(f"Is it cold in {city}?", **call(city)) for city in CITIES[:6]]
pairs = {"train": greetings[:4] + reports[:4], "valid": greetings[4:] + reports[4:]}
polite = ma.TrainConfig(
    objective=ma.ORPO(),
    iterations=12,
    batch_size=2,
    learning_rate=1.5e-4,
    mask_prompt=True,
    eval_every=6,
    save_every=12,
    report_every=4,
    chat_template=TEMPLATE,
)
run = ma.train(
    BASE, pairs, name="assistant", training=polite, init_from="caller", overwrite=True
)
scored = ma.EvaluationConfig(score="preference")
judged = ma.evaluate(["base", "caller", "assistant"], pairs, config=scored)
judged.to_pandas()[["variant", "rows", "loss", "score"]]

# %% [markdown]
# ## Serve it
#
# `mlx-adapters serve` speaks OpenAI's API; a request's `model` names the adapter. In a
# terminal of its own it is `mlx-adapters serve demo --adapter assistant`.

# %%
line = ["serve", "demo", "--adapter", "assistant", "--port", "0"]
server = subprocess.Popen(
    [sys.executable, "-m", "mlx_adapters", *line], stderr=subprocess.PIPE, text=True
)
address = next(
    word.rstrip("/.,")
    for told in server.stderr
    for word in told.split()
    if "http://" in word
)


def ask(question: str) -> dict:
    """The assistant's message."""
    body = {
        "model": "assistant",
        "messages": [{"role": "user", "content": question}],
        "tools": [WEATHER],
        "max_tokens": 32,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]


for question in ("How warm is it in Oslo?", "Name a planet.", "Hello"):
    message = ask(question)
    calls = [part["function"] for part in message.get("tool_calls") or []]
    print(f"{question} -> {calls or message['content']}")
server.terminate()
