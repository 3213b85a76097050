"""What many adapters on one base cost: switching, memory, and mixed batches. Ratios within one run.

    python scripts/benchmarks/serve.py --base demo                       # the embedded 135M model
    python scripts/benchmarks/serve.py --base mlx-community/Qwen3-0.6B-4bit --rank 8

Adapters have random weights, rank 8 on every linear layer. `load` is mlx_lm.load of the base with one adapter's
folder, until its weights are evaluated. `switch` is between attached adapters; its first time costs a plan, and
`from disk` is what an adapter costs that was put out of memory. Batches are 16 requests of one prompt length,
greedy, with the same number of tokens each; every variant is run in turn `--rounds` times and the median is shown.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx_adapters  # noqa: F401  (before mlx: it sees to a fast BLAS)

# isort: split
import mlx.core as mx
import mlx_lm

from mlx_adapters.config.training import LoraConfig
from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.models.adapter import Adapter, write_adapter
from mlx_adapters.models.layers import adaptable_layers, expected_shapes, resolve_target_modules
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.machine import environment


def random_adapter(model, rank, seed):
    """LoRA of this rank on every linear layer of the blocks; small enough to leave the model sane."""
    keys = resolve_target_modules(model.module, LoraConfig(rank=rank, scale=2.0))
    config, layers = AdapterConfig(rank, 2.0, keys), adaptable_layers(model.module)
    weights = {}
    mx.random.seed(seed)
    for key in keys:
        for leaf, shape in expected_shapes(layers[key], config).items():
            weights[f"{key}.{leaf}"] = 0.01 * mx.random.normal(shape)
    mx.eval(weights)
    return Adapter(config, weights, {"name": f"random{seed}", "base": model.base.record()})


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def active_bytes():
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def run_batch(model, names, prompt, tokens, max_batch):
    """Seconds for one request for each name."""
    batcher = Batcher(model.module, model.pool, max_batch)
    for name in names:
        batcher.submit(Request(prompt, None if name is None else model.pool.get(name), tokens))
    start = time.perf_counter()
    while not batcher.idle:
        batcher.step()
    return time.perf_counter() - start


def load_seconds(base, folder):
    def load():
        model, _ = mlx_lm.load(str(resolve_base(base).folder), adapter_path=str(folder))
        mx.eval(model.parameters())

    load()
    return statistics.median(timed(load) for _ in range(3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    model = load_model(options.base)
    base_bytes = active_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(random_adapter(model, options.rank, 0), Path(folder) / "a")
        loading = load_seconds(options.base, path)
        disk = []
        for _ in range(5):
            disk.append(timed(lambda: model.attach(path, name="disk")))
            model.detach("disk")
    attach = []
    for i in range(options.adapters):
        adapter = random_adapter(model, options.rank, i)
        attach.append(timed(lambda a=adapter, i=i: model.attach(a, name=str(i), use=False)))
        del adapter
    names = list(model.pool.attached)
    adapter_bytes = sum(w.nbytes for w in random_adapter(model, options.rank, 0).weights.values())
    if model.pool.dtype != mx.float32:
        adapter_bytes //= 2
    expected = base_bytes + options.adapters * adapter_bytes
    switches = [timed(lambda n=n: model.use(n)) for _ in range(6) for n in names]
    firsts, switches = switches[: len(names)], switches[len(names) :]
    model.use(None)
    resident = active_bytes()
    prompt = [(7 * i) % 1000 + 5 for i in range(options.prompt)]
    mixed = [names[i % len(names)] for i in range(options.batch)]
    variants = {
        "base batch": lambda: run_batch(model, [None] * options.batch, prompt, options.tokens, options.batch),
        "one adapter": lambda: run_batch(model, [names[0]] * options.batch, prompt, options.tokens, options.batch),
        "mixed": lambda: run_batch(model, mixed, prompt, options.tokens, options.batch),
        "one by one": lambda: run_batch(model, mixed, prompt, options.tokens, 1),
    }
    run_batch(model, mixed, prompt, 2, options.batch)
    stacked = active_bytes()
    trials = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, work in variants.items():
            trials[name].append(work())
    seconds = {name: statistics.median(values) for name, values in trials.items()}
    result = {
        "environment": environment(),
        "options": vars(options),
        "load_seconds": loading,
        "attach_seconds": statistics.median(attach),
        "switch_seconds": statistics.median(switches),
        "first_switch_seconds": statistics.median(firsts),
        "from_disk_seconds": statistics.median(disk),
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "resident_bytes": resident,
        "resident_mixed_bytes": stacked,
        "seconds": seconds,
        "trials": trials,
    }
    total = options.batch * options.tokens
    print(
        f"{options.base}, rank {options.rank}, {options.adapters} adapters, {mx.default_device()}, mlx {mx.__version__}"
    )
    switching = result["switch_seconds"]
    print(f"mlx_lm.load with an adapter {loading * 1e3:.0f} ms; attach {result['attach_seconds'] * 1e3:.1f} ms")
    print(f"switch {switching * 1e3:.3f} ms: {switching / loading:.4%} of load")
    for name, label in (("first_switch_seconds", "its first time"), ("from_disk_seconds", "attach from disk")):
        print(f"{label} {result[name] * 1e3:.2f} ms: {result[name] / loading:.2%} of load")
    print(f"memory: base {base_bytes / 1e6:.1f} MB, adapter {adapter_bytes / 1e6:.2f} MB, all {resident / 1e6:.1f} MB")
    print(f"= {resident / expected:.3f} of base + N adapters; once rows were mixed {stacked / expected:.3f}")
    for name, spent in seconds.items():
        print(f"{name:12} {spent:7.2f} s {total / spent:8.1f} tok/s")
    print(
        f"mixed / one adapter: {seconds['one adapter'] / seconds['mixed']:.2f} of its speed; "
        f"mixed / one by one: {seconds['one by one'] / seconds['mixed']:.2f} times"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
