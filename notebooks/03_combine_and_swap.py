# %% [markdown]
# # 3. Combine and swap
#
# Two adapters on one base: switch between them in milliseconds, weigh them, merge them into one, and answer a batch
# in which every row has its own adapter.

# %%
import json
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

import mlx_adapters as ma
from mlx_adapters.demo.catalog import write_demo_data

BASE = "demo"
lora = ma.LoraConfig(rank=8, scale=20.0, num_layers=12)
settings = ma.TrainConfig(
    iterations=12, batch_size=4, learning_rate=6e-4, schedule="linear", mask_prompt=True, max_seq_length=128,
    eval_every=12, eval_batches=2, save_every=12,
)  # fmt: skip
try:
    sql = ma.load_adapter("demo-sql")
except ma.NotFoundError:
    data = write_demo_data(Path("data/sql"), overwrite=True)
    ma.train(BASE, data, name="notebook-short", lora=lora, training=settings, overwrite=True)
    sql = ma.load_adapter("notebook-short")

# %% [markdown]
# A second task, small enough to be learned in a few iterations: always answer with one word, in capitals.

# %%
ANSWERS = {
    "France": "PARIS", "Italy": "ROME", "Spain": "MADRID", "Japan": "TOKYO", "Egypt": "CAIRO", "Greece": "ATHENS",
    "Germany": "BERLIN", "Russia": "MOSCOW", "China": "BEIJING", "Austria": "VIENNA", "Ireland": "DUBLIN",
    "Peru": "LIMA", "Cuba": "HAVANA", "Portugal": "LISBON", "Poland": "WARSAW", "Hungary": "BUDAPEST",
    "Belgium": "BRUSSELS", "Sweden": "STOCKHOLM", "Finland": "HELSINKI", "Denmark": "COPENHAGEN", "Kenya": "NAIROBI",
    "Iraq": "BAGHDAD", "Iran": "TEHRAN", "Thailand": "BANGKOK",
}  # fmt: skip
folder = Path("data/capitals")
folder.mkdir(parents=True, exist_ok=True)
rows = [{"prompt": f"What is the capital of {land}?", "completion": city} for land, city in ANSWERS.items()]
for split, part in (("train", rows[:20]), ("valid", rows[20:])):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
gentle = replace(settings, learning_rate=2e-4)
run = ma.train(BASE, folder, name="notebook-caps", lora=lora, training=gentle, overwrite=True)
print(f"validation loss {run.validation_losses[0][1]:.2f} -> {run.best_validation_loss:.2f}")

# %% [markdown]
# ## Swap
#
# The base is loaded once. Attaching checks everything before it changes anything; after that a switch costs next to
# nothing, and without an adapter the base is what it was, to the bit.


# %%
def timed(action, *arguments) -> float:
    """Milliseconds from the call until one token was read."""
    start = time.perf_counter()
    (action(*arguments) or model).logits([1])
    return 1000 * (time.perf_counter() - start)


model = ma.load_model(BASE)
milliseconds = {"load the base anew": timed(ma.load_model, BASE)}
for adapter, name in ((sql, "sql"), ("notebook-caps", "caps")):
    model.attach(adapter, name=name, use=False)

questions = ["How many departments are there?", "What is the capital of Norway?"]
for name in (None, "sql", "caps"):
    model.use(name)
    answers = [model.generate(question, max_tokens=20).text.strip().split("\n")[0] for question in questions]
    print(f"{name or 'base':5}", *answers, sep="  |  ")

# %%
for label, names in {"stay": ["sql"] * 21, "swap the adapter": ["sql", "caps"] * 10}.items():
    model.use("sql")
    milliseconds[label] = sorted(timed(model.use, name) for name in names)[len(names) // 2]
figure, axes = plt.subplots(figsize=(7, 1.8))
axes.barh(list(milliseconds), list(milliseconds.values()), color=["0.6", "0.8", "tab:green"])
axes.set(xlabel="milliseconds until one token was read")
plt.show()
print(", ".join(f"{name}: {value:,.1f} ms" for name, value in milliseconds.items()))

# %% [markdown]
# ## One batch, many adapters
#
# Requests of several tenants, decoded together; each row gets its own adapter.

# %%
prompts = [("How many courses are there?", "sql"), ("What is the capital of Norway?", "caps"), ("Say hello.", None)]
for (prompt, name), answer in zip(prompts, model.generate_batch(prompts, max_tokens=20), strict=True):
    print(f"{name or 'base':5} {prompt} -> {answer.strip().splitlines()[0]}")

# %% [markdown]
# ## Combine
#
# Weighted at run time, or merged into one adapter. `cat` is the exact weighted sum, so both give the same logits.

# %%
weights = {"sql": 0.7, "caps": 0.3}
model.use(weights)
tokens = model.encode(questions[1])
together = model.logits(tokens)
merged = ma.merge([sql, "notebook-caps"], weights=list(weights.values()), method="cat")
model.attach(merged, name="merged")
print(f"largest difference of the logits: {abs(model.logits(tokens) - together).max().item():.1e}")
merged

# %% [markdown]
# ## A/B
#
# How strongly should it pull? The same question at several strengths of one adapter:

# %%
for scale in (0.0, 0.25, 0.5, 1.0):
    model.use("caps", scale)
    print(f"{scale:4}", model.generate("What is the capital of Norway?", max_tokens=16).text.strip().split("\n")[0])
