# %% [markdown]
# # 4. From and to PEFT, and the Hub
#
# Adapters of PEFT and transformers come in with their exact function, ours go out the
# same way; and both kinds can be published with a card that says what is known and
# nothing else.
#
# It runs without an account and without a connection: what goes to the Hub is then only
# shown. With an account (`hf auth login`) take a repository of your own.

# %%
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.utils import disable_progress_bars

import mlx_adapters as ma

disable_progress_bars()
BASE, REPO = "demo", "user/sql-lora"


def size(number: int) -> str:
    return f"{number / 1000:,.1f} kB"


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
    data = ma.write_demo_data("data/sql", overwrite=True)
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

# %% [markdown]
# ## Publish
#
# First as a dry run: every file, what would change, and the card. Training data, logs,
# optimizer states, local paths and tokens never go up.

# %%
dry = ma.publish(sql, REPO, dry_run=True)
for file in dry.files:
    print(f"{file.path:26} {size(file.size_bytes):>8}  {file.change}")
print("left out:", ", ".join(dry.left_out) or "nothing")

# %%
ma.make_card(sql, repo=REPO)

# %%
if signed_in := get_token() is not None:
    first = ma.publish(sql, REPO)
    again = ma.publish(sql, REPO)
    changed = "changed" if again.changed else "nothing changed"
    print(f"private: {first.private}; published again: {changed}")
else:
    print("Not signed in: nothing was published.")

# %% [markdown]
# ## Download
#
# A reference `user/repo[@revision]` works wherever an adapter is named; the commit is
# kept in the metadata, and the cache is enough to use it offline.

# %%
if signed_in:
    taken = ma.load_adapter(REPO)
    print("same adapter:", taken.fingerprint == sql.fingerprint)
    print("commit:", taken.metadata["hub"]["revision"][:12])
    with model.using(REPO):
        print(model.generate(question, max_tokens=24).text.strip())
