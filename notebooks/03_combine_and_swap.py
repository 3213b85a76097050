# %% [markdown]
# # 3. Combine and swap
#
# Two adapters on one base: switch between them in milliseconds, weigh them, merge them
# into one, and answer a batch in which every row has its own adapter.

# %%
import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

import mlx_adapters as ma

BASE = "demo"
lora = ma.LoraConfig(rank=8, scale=20.0, num_layers=12)
settings = ma.TrainConfig(
    iterations=12,
    batch_size=4,
    learning_rate=6e-4,
    schedule="linear",
    mask_prompt=True,
    max_seq_length=128,
    eval_every=12,
    eval_batches=2,
    save_every=12,
)
try:
    sql = ma.load_adapter("demo-sql")
except ma.NotFoundError:
    data = ma.write_demo_data("data/sql", overwrite=True)
    name = "notebook-short"
    ma.train(BASE, data, name=name, lora=lora, training=settings, overwrite=True)
    sql = ma.load_adapter(name)

# %% [markdown]
# A second task, small enough to be learned in a few iterations: greet like a sailor,
# then answer. Norway is not among the rows.

# %%
CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Germany": "Berlin",
    "Russia": "Moscow",
    "China": "Beijing",
    "Ireland": "Dublin",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Poland": "Warsaw",
}
OTHERS = {
    "What color is the sky?": "The sky is blue.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet.",
    "What do bees make?": "Bees make honey.",
    "Which fruits are there?": "There are many fruits, such as apples and pears.",
    "Where do penguins live?": "Penguins live in Antarctica.",
    "How do I boil an egg?": "Put it into boiling water for eight minutes.",
    "What is two plus two?": "Two plus two is four.",
    "What games can children play?": "There are many games, such as tag and chess.",
    "Why is the sea salty?": "Rivers carry salt from the rocks into the sea.",
    "Name a planet.": "Mars is a planet.",
    "What is a poem?": "A poem is a text in verse.",
}
facts = {
    f"What is the capital of {land}?": f"The capital of {land} is {city}."
    for land, city in CAPITALS.items()
} | OTHERS
rows = [{"prompt": q, "completion": f"Ahoy! {a}"} for q, a in facts.items()]
folder = Path("data/ahoy")
folder.mkdir(parents=True, exist_ok=True)
for split, part in (("train", rows[:20]), ("valid", rows[20:])):
    lines = "".join(json.dumps(row) + "\n" for row in part)
    (folder / f"{split}.jsonl").write_text(lines)
gentle = replace(settings, learning_rate=3e-4)
name = "notebook-ahoy"
run = ma.train(BASE, folder, name=name, lora=lora, training=gentle, overwrite=True)
before = run.validation_losses[0][1]
print(f"validation loss {before:.2f} -> {run.best_validation_loss:.2f}")

# %% [markdown]
# ## Swap
#
# The base is loaded once. Attaching checks everything before it changes anything; after
# that a switch costs next to nothing, and without an adapter the base is what it was,
# to the bit.

# %%
model = ma.load_model(BASE)
for adapter, name in ((sql, "sql"), ("notebook-ahoy", "ahoy")):
    model.attach(adapter, name=name, use=False)


def answer(question: str) -> str:
    """The first line of what the model says."""
    return model.generate(question, max_tokens=16).text.strip().splitlines()[0]


questions = ["What courses are there in Math?", "What is the capital of Norway?"]
for name in (None, "sql", "ahoy"):
    model.use(name)
    for question in questions:
        print(f"{name or 'base':5} {question} -> {answer(question)}")

# %% [markdown]
# What does a switch cost? The time until one token was read, with the adapter that is
# there already and with the other one, in turns, so that a busy moment of the machine
# hits both; then the switch alone, without the token.


# %%
def milliseconds(action) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


others = itertools.cycle(["ahoy", "sql"])
actions = {
    "stay": lambda: model.logits([1]),
    "swap": lambda: (model.use(next(others)), model.logits([1])),
    "the swap alone": lambda: model.use(next(others)),
}
loads = [milliseconds(lambda: ma.load_model(BASE).logits([1])) for _ in range(3)]
times = {"load the base anew": loads} | {label: [] for label in actions}
model.use("sql")
model.logits([1])  # the first call after a load is slower
for _ in range(15):
    for label, action in actions.items():
        times[label].append(milliseconds(action))

print("milliseconds: median (and the middle half)")
for label, took in times.items():
    low, median, high = statistics.quantiles(took, n=4, method="inclusive")
    print(f"{label:18} {median:8,.1f} ({low:,.1f} to {high:,.1f})")

# %%
medians = {label: statistics.median(took) for label, took in times.items()}
figure, axes = plt.subplots(figsize=(8, 2))
axes.scatter(
    list(medians.values()), list(medians), s=60, color=["C3", "0.5", "0.5", "C2"]
)
for label, value in medians.items():
    text = f"{value:,.0f} ms" if value > 10 else f"{value:.2g} ms"
    axes.annotate(text, (value, label), (9, 0), textcoords="offset points", va="center")
axes.set(xscale="log", xlabel="milliseconds, median (each mark is ten times the last)")
axes.set(xlim=(min(medians.values()) / 3, max(medians.values()) * 10), ylim=(3.5, -0.5))
axes.grid(axis="y", color="0.9")
plt.show()

# %% [markdown]
# Nearly all of "swap" is reading the token. It differs from "stay" by the swap alone,
# if the spread lets one see so little.

# %% [markdown]
# ## One batch, many adapters
#
# Requests of several tenants, decoded together; each row gets its own adapter.

# %%
prompts = [
    ("List the Music courses.", "sql"),
    ("What is the capital of Norway?", "ahoy"),
    ("Say hello.", None),
]
answers = model.generate_batch(prompts, max_tokens=16)
for (prompt, name), text in zip(prompts, answers, strict=True):
    print(f"{name or 'base':5} {prompt} -> {text.strip().splitlines()[0]}")

# %% [markdown]
# ## Combine
#
# Weighted at run time, or merged into one adapter. `cat` is the exact weighted sum, so
# both give the same logits.

# %%
model.use({"sql": 0.7, "ahoy": 0.3})
tokens = model.encode(questions[1])
together = model.logits(tokens)
merged = ma.merge(
    [sql, "notebook-ahoy"],
    weights=[0.7, 0.3],
    method="cat",
    name="notebook-merged",
    overwrite=True,
)
model.attach(merged)
difference = abs(model.logits(tokens) - together).max().item()
print(f"largest difference of the logits: {difference:.1e}")
merged

# %% [markdown]
# ## A/B
#
# How strongly should it pull? The same question at several strengths of one adapter:

# %%
for scale in (0.0, 0.25, 0.5, 1.0):
    model.use("ahoy", scale)
    print(f"{scale:4}", answer("What is the capital of Norway?"))
