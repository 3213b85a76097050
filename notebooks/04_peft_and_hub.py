# %% [markdown]
# # 4. From and to PEFT, and the Hub
#
# Adapters of PEFT and transformers come in with their exact function, ours go out the
# same way; and both kinds can be published with a card that says what is known and
# nothing else.
#
# So that this notebook needs no account, it talks to a small stand-in for the Hub on
# this machine. Leave this cell out to talk to the real one (`hf auth login` first).

# %%
import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ.get("MLX_ADAPTERS_TESTS", "../tests"))
from hub_server import WRITE_TOKEN, HubServer

hub = HubServer().__enter__()
os.environ |= {
    "HF_ENDPOINT": hub.url,
    "HF_TOKEN": WRITE_TOKEN,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HOME": str(Path("hf").absolute()),
}

# %%
import matplotlib.pyplot as plt
from huggingface_hub.utils import disable_progress_bars

import mlx_adapters as ma
from mlx_adapters.demo.catalog import write_demo_data
from mlx_adapters.units import size

disable_progress_bars()
BASE = "demo"
try:
    sql = ma.load_adapter("demo-sql")
except ma.NotFoundError:
    settings = ma.TrainConfig(
        iterations=12,
        batch_size=4,
        learning_rate=6e-4,
        schedule="linear",
        mask_prompt=True,
        max_seq_length=128,
        eval_every=6,
        eval_batches=2,
        save_every=12,
        report_every=2,
    )
    data = write_demo_data(Path("data/sql"), overwrite=True)
    lora, name = ma.LoraConfig(num_layers=12), "notebook-short"
    ma.train(BASE, data, name=name, lora=lora, training=settings, overwrite=True)
    sql = ma.load_adapter(name)
sql

# %% [markdown]
# ## To PEFT
#
# A folder that `PeftModel.from_pretrained` loads. `base_model` is the transformers
# model that the base was made of.

# %%
original = "HuggingFaceTB/SmolLM2-135M-Instruct"
ma.export_peft(sql, "out/peft", base_model=original, overwrite=True)
for path in sorted(Path("out/peft").iterdir()):
    print(f"{path.name:26} {size(path.stat().st_size):>8}")

# %% [markdown]
# ## From PEFT
#
# The way back, and the proof: the logits with the imported adapter are those with the
# original.

# %%
back = ma.import_peft("./out/peft", base=BASE, name="notebook-back", overwrite=True)
model = ma.load_model(BASE)
question = "What courses are there in Math?"
tokens = model.encode(question)
base_logits = model.logits(tokens)
with model.using(sql):
    expected = model.logits(tokens)
with model.using(back):
    logits = model.logits(tokens)
print(f"adapter against base: {abs(expected - base_logits).max().item():.2f}")
print(f"after PEFT and back:  {abs(logits - expected).max().item():.1e}")

# %%
figure, axes = plt.subplots(figsize=(4, 4))
axes.plot(expected[-1].tolist(), logits[-1].tolist(), ".", markersize=2)
axes.set(xlabel="logit with the original", ylabel="logit after PEFT and back")
axes.set(title="49,152 tokens, last position", aspect="equal")
plt.show()

# %% [markdown]
# ## Publish
#
# First as a dry run: every file, what would change, and the card. Training data, logs,
# optimizer states, local paths and tokens never go up.

# %%
dry = ma.publish(sql, "user/sql-lora", dry_run=True)
for file in dry.files:
    print(f"{file.path:26} {size(file.size_bytes):>8}  {file.change}")
print("left out:", ", ".join(dry.left_out) or "nothing")

# %%
ma.make_card(sql, repo="user/sql-lora")

# %%
first = ma.publish(sql, "user/sql-lora")
again = ma.publish(sql, "user/sql-lora")
changed = "changed" if again.changed else "nothing changed"
print(f"private: {first.private}; published again: {changed}")

# %% [markdown]
# ## Download
#
# A reference `user/repo[@revision]` works wherever an adapter is named; the commit is
# kept in the metadata, and the cache is enough to use it offline.

# %%
taken = ma.load_adapter("user/sql-lora")
print("same adapter:", taken.fingerprint == sql.fingerprint)
print("commit:", taken.metadata["hub"]["revision"][:12])
with model.using("user/sql-lora"):
    print(model.generate(question, max_tokens=24).text.strip())
