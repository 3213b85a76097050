# %% [markdown]
# # 2. Adapter or fused model?
#
# Guides answer this with tables of ticks. Here everything is measured on the machine
# that ran this notebook: size, load time, speed, memory, and what fusing to 4 bits
# does to the answers. The adapter is small (the last two blocks) and trained briefly,
# so that all this takes a minute or two.

# %%
import matplotlib.pyplot as plt

import mlx_adapters as ma

BASE = "demo"
data = ma.write_demo_data("data/sql", overwrite=True)
settings = ma.TrainConfig(
    iterations=12,
    batch_size=4,
    learning_rate=2e-3,
    schedule="linear",
    warmup=2,
    mask_prompt=True,
    max_seq_length=128,
    eval_every=6,
    eval_batches=2,
    save_every=12,
    report_every=2,
)
lora = ma.LoraConfig(rank=8, scale=20.0, num_layers=2)
ma.train(BASE, data, name="notebook-fuse", lora=lora, training=settings, overwrite=True)
sql = ma.load_adapter("notebook-fuse")
sql

# %% [markdown]
# ## What fusing changes
#
# Fusing adds the update to the weights and rounds them again; the base has 4 bits, and
# "keep" keeps them. Rounded to the nearest value, a 4-bit model keeps only part of a
# light update; calibrated rounding steers the error away from what the model uses. The
# figures come from rows that calibration never saw.


# %%
def fuse(folder: str, precision: int | str, method: str) -> ma.FuseResult:
    options = ma.FuseOptions(
        method=method, calibration=str(data), calibration_rows=16, check_rows=24
    )
    return ma.fuse(
        BASE, sql, folder, quantization=precision, options=options, overwrite=True
    )


fused = {
    "4 bits, nearest": fuse("out/nearest", "keep", "nearest"),
    "4 bits, calibrated": fuse("out/calibrated", "keep", "calibrated"),
    "8 bits, nearest": fuse("out/8bit", 8, "nearest"),
}
fused["4 bits, calibrated"]

# %% [markdown]
# "Update survival" and "same top" look at different things. Survival compares weights:
# the change that was stored with the change that was wanted, weight by weight. At 4
# bits the rounding of a single weight is larger than a light update, so it is low. KL
# and "same top" compare answers. Calibrated rounding chooses the roundings so that
# their errors cancel in a layer's output: what the update does is kept, though not in
# each weight.

# %%
kl = {name: result.fidelity.kl_mean for name, result in fused.items()}
judged = fused["8 bits, nearest"].fidelity
figure, axes = plt.subplots(figsize=(8, 2.4))
axes.scatter(list(kl.values()), list(kl), s=60, color=["C3", "C1", "C2"], zorder=2)
for name, value in kl.items():
    same = f"{value:.4f}; same top token {fused[name].fidelity.same_top:.1%}"
    axes.annotate(same, (value, name), (10, 0), textcoords="offset points", va="center")
axes.set(xscale="log", xlim=(min(kl.values()) / 2, max(kl.values()) * 30))
axes.set(
    title=f"{judged.tokens:,} tokens of {judged.rows} unseen rows",
    ylim=(2.5, -0.5),
    xlabel=f"KL from the adapter model, nats per token (base: {judged.base_kl:.2f})",
)
axes.grid(axis="y", color="0.9")
plt.show()

# %% [markdown]
# Only the first is plainly worse. The other two are no ranking of 4 and 8 bits: "keep"
# rounds the adapted layers alone, calibrated; 8 bits round every layer of the base, to
# the nearest value. And a few hundred tokens leave the last digits open.

# %% [markdown]
# ## Size
#
# An adapter is small beside a base that all adapters share.


# %%
def size(number: float) -> str:
    """Bytes in words, as "98.3 MB"."""
    unit = "MB" if number >= 1e6 else "kB"
    value = number / (1e6 if unit == "MB" else 1e3)
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


adapter = (sql.folder / "adapters.safetensors").stat().st_size
base = sum(path.stat().st_size for path in ma.load_model(BASE).base.weight_files)
model = fused["4 bits, calibrated"].size_bytes
print(f"adapter {size(adapter)}, base {size(base)}, fused model {size(model)}")
for tasks in (1, 3, 10):
    shared, copies = size(base + tasks * adapter), size(tasks * model)
    print(f"tasks: {tasks:>2}, {shared:>6} as adapters, {copies:>6} as fused models")

# %% [markdown]
# ## Load time, speed and memory
#
# Each variant runs in fresh processes, in shuffled order. On a CPU all of them compute
# with dense float32 copies of their weights, so packed weights save no memory there;
# on a GPU they do. The bars reach from the smallest figure to the largest: where they
# overlap as here, few rounds on a busy machine show no difference.

# %%
report = ma.benchmark(
    ["base", sql, fused["4 bits, calibrated"]],
    BASE,
    prompt_tokens=32,
    decode_tokens=12,
    rounds=3,
    trials=2,
    cold_load=False,
)
measured = report.to_pandas()
measured["label"] = ["base", "adapter", "fused, 4 bits"]
shown = {
    "load_seconds": "load, seconds",
    "ttft_seconds": "first token, seconds",
    "decode_tps": "decode, tokens per second",
}
figure, axes = plt.subplots(1, 3, figsize=(9, 1.8), sharey=True)
for panel, (name, title) in zip(axes, shown.items(), strict=True):
    low, high = measured[f"{name}.minimum"], measured[f"{name}.maximum"]
    panel.hlines(measured["label"], low, high, color="0.8", linewidth=6)
    panel.plot(measured[name], measured["label"], "o", color="C0")
    panel.set(xlabel=title, xlim=(0, high.max() * 1.1), ylim=(2.5, -0.5))
plt.show()
memory = measured.set_index("label")["peak_memory_bytes"] / 1e6
print("peak memory, MB:", ", ".join(f"{name} {mb:,.0f}" for name, mb in memory.items()))

# %% [markdown]
# ## So which?
#
# - Several tasks, frequent updates, A/B tests: adapters. They share one base, load in
#   milliseconds and swap.
# - One task, or a program that cannot take adapters: fuse, at 8 bits, or at 4 bits
#   calibrated; look at the KL first.
# - `mlx-adapters advise` writes this decision from such a benchmark, with your own
#   numbers behind each sentence.
