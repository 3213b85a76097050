"""Fusing of models as wide as large ones: seconds and memory, and how far what comes out is from the adapter model.

    python scripts/benchmarks/fuse_large.py --blocks 32                    # a whole 7B llama's shape, random weights
    python scripts/benchmarks/fuse_large.py --shape 30b-a3b --blocks 4 --apart      # blocks of a mixture of 128 experts
    python scripts/benchmarks/fuse_large.py --blocks 4 --methods calibrated gptq mlx_lm.fuse nearest   # beside mlx-lm's
    python scripts/benchmarks/fuse_large.py --shape small --blocks 2 --rows 5 --methods calibrated gptq    # on a CPU
    python scripts/benchmarks/fuse_large.py --tiny                         # the same way in seconds, to try it

The model is quantized to 4 bits (group 64) and gets a random rank-8 adapter on all linear layers and experts; the text
is the one that the package carries. `mlx_lm.fuse` is the command, `gptq` is mlx_lm.gptq's function on the fused model,
on the same rows, without the time that it takes to fuse and load that; KL is measured alike for all. A line of JSON for
each method and at last a table, in which the whole model (a 7B llama has 32 blocks, Qwen3-30B-A3B 48) is extrapolated
where it did not run: all seconds as if blocks took them. `small` has about the 7B's tokens for each input of a layer if
it is calibrated on 5 rows. `--apart` fuses a model of one block twice before, which tells
what a process does once and what a fuse does once from what a block takes.
"""

import argparse
import contextlib
import gc
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import mlx_adapters as ma  # isort: skip  (before mlx: it loads the fast BLAS on Linux)
import fuse_ways
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters.assembly.weights import Updates
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.fidelity import measure_fidelity
from mlx_adapters.calibration.texts import batches_of, choose_text
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.training import LoraConfig
from mlx_adapters.events import Note, Progress
from mlx_adapters.models import layers
from mlx_adapters.models.adapter import Adapter, write_adapter
from mlx_adapters.models.loading import load_module, load_tokenizer_of
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.conditions import peak_resident_bytes
from mlx_adapters.system.machine import performance_cores

SEVEN = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
}
SMALL = SEVEN | {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 4, "num_key_value_heads": 4}
SHAPES = {"7b": SEVEN, "30b-a3b": MIXTURE, "small": SMALL}
WHOLE = {"7b": 32, "30b-a3b": 48, "small": 2}  # blocks


def build(folder: Path, config: dict, dtype: mx.Dtype) -> None:
    """A random quantized model, made on the device and written as mlx-lm writes it."""
    from importlib import import_module

    from helpers.tiny_models import ARCHITECTURES, write_tokenizer
    from mlx_lm.utils import quantize_model, save_model

    kind = config["model_type"]
    settings = {**ARCHITECTURES[kind], **config, "tie_word_embeddings": False}
    if kind == "llama":
        settings.pop("head_dim", None)
    mx.random.seed(0)
    code = import_module(f"mlx_lm.models.{kind}")
    model = code.Model(code.ModelArgs.from_dict(settings))
    scaled = [
        (name, (mx.random.normal(v.shape) * v.shape[-1] ** -0.5).astype(dtype) if v.ndim > 1 else v.astype(dtype))
        for name, v in tree_flatten(model.parameters())
    ]
    model.load_weights(scaled)
    model, settings = quantize_model(model, settings, 64, 4)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(settings))
    write_tokenizer(folder)


def random_adapter(folder: Path) -> Adapter:
    """Rank 8 on all linear layers; the update is some percent of the weights."""
    module = load_module(resolve_base(folder))[0]
    adaptable = layers.adaptable_layers(module)
    keys = layers.resolve_target_modules(module, LoraConfig(rank=8))
    config = AdapterConfig(8, 1.0, keys)
    weights = {}
    for key in keys:
        for leaf, shape in layers.expected_shapes(adaptable[key], config).items():
            weights[f"{key}.{leaf}"] = mx.random.normal(shape) * 0.1 * shape[0] ** -0.5
    return Adapter(config, weights, {"name": "random"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--methods", nargs="*", default=["nearest", "calibrated"], choices=WAYS)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--apart", action="store_true", help="a model of one block first, twice")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, help="where to put the models [a temporary folder]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"device": str(mx.device_info().get("device_name", "cpu")), "blocks": options.blocks}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        models = {
            count: made(Path(work), options, count) for count in {options.blocks} | ({1} if options.apart else set())
        }
        for method in options.methods:
            once = [run(method, *models[1], Path(work), options.rows)["seconds"] for _ in range(2 * options.apart)]
            report[method] = run(method, *models[options.blocks], Path(work), options.rows)
            report[method] |= apart(report[method]["seconds"], options.blocks, WHOLE[options.shape], *once)
            print(json.dumps({method: report[method]}), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1))
    table(report, options)


def made(work, options, blocks):
    """(base, adapter) of so many blocks."""
    config = {"num_hidden_layers": blocks} | SHAPES[options.shape]
    if options.tiny:
        config = {k: config[k] for k in ("num_hidden_layers", "model_type")} | {"vocab_size": 512}
    base = work / f"base-{blocks}"
    build(base, config, mx.float32 if options.tiny else mx.bfloat16)
    return base, random_adapter(base)


def run(method, base, adapter, work, rows):
    """Seconds, figures and peaks of one fuse."""
    gc.collect()  # the random model is a cycle
    mx.clear_cache()
    forget_peaks()
    out = work / f"{method}-{base.name}"
    seconds, figures = WAYS[method](base, adapter, out, method, rows)
    shutil.rmtree(out)
    return {"seconds": seconds} | figures


def forget_peaks():
    """Begin anew."""
    mx.reset_peak_memory()
    with contextlib.suppress(OSError):  # of the process: where Linux allows it
        Path("/proc/self/clear_refs").write_text("5")


def peaks_now():
    """The most memory since the run began."""
    return {"peak_mlx_bytes": mx.get_peak_memory(), "peak_resident_bytes": peak_resident_bytes()}


def apart(seconds, blocks, whole, first=None, again=None):
    """What a block takes, and what so many would: extrapolated by what two runs of one block took, the first in the
    process and another, or as if all seconds were blocks'."""
    each = seconds / blocks if again is None or blocks == 1 else (seconds - again) / (blocks - 1)
    found = {"seconds_per_block": each, "whole_seconds": seconds + (whole - blocks) * each}
    if again is not None:
        found |= {"once_a_process": first - again, "once_a_fuse": again - each}
        found["whole_seconds"] += first - again  # (the first run's, not this one's)
    return found


def table(report, options):
    """Print all methods side by side."""
    whole, blocks = WHOLE[options.shape], options.blocks
    of_whole = "" if whole == blocks else f" (extrapolated from {blocks})"
    where = "tiny" if options.tiny else options.shape
    print(f"\n{report['device']}, {performance_cores()} cores, {where}, {options.rows} rows\n")
    columns = "KL", "same top", "seconds", "a block", f"{whole} blocks{of_whole}", "MLX memory", "process memory"
    print("| |", " | ".join(columns), "|\n| --- |", " | ".join(["---:"] * len(columns)), "|")
    for method in options.methods:
        r = report[method]
        kl = f"{r['kl']:.6f} | {r['same_top']:.3f}" if "kl" in r else " | "
        spans = (f"{r[name]:.1f}" for name in ("seconds", "seconds_per_block", "whole_seconds"))
        peaks = (f"{r[name] / 1e9:.2f} GB" for name in ("peak_mlx_bytes", "peak_resident_bytes"))
        print(f"| {method} | {kl} |", " | ".join([*spans, *peaks]), "|")
    for method in options.methods if options.apart else ():
        r = report[method]
        print(f"\n{method}: {r['once_a_process']:.1f} s once a process, {r['once_a_fuse']:.1f} s once a fuse")
    if {"calibrated", "gptq"} <= set(options.methods):
        ours, its = report["calibrated"], report["gptq"]
        kl, seconds = its["kl"] / ours["kl"], its["whole_seconds"] / ours["whole_seconds"]
        print(f"\ngptq / calibrated: KL {kl:.1f}, seconds of {whole} blocks {seconds:.1f}")


def ours(base, adapter, out, method, rows):
    """(seconds, figures) of our fuse, with its check if it is calibrated."""
    start = time.perf_counter()
    result = ma.fuse(
        base,
        adapter,
        out,
        quantization=4,
        any_base=True,
        on_event=Talk(),
        options=FuseOptions(method=method, calibration_rows=rows, check=method == "calibrated"),
    )
    seconds, fidelity = time.perf_counter() - start, result.fidelity
    figures = peaks_now() | {"bits_per_weight": result.bits_per_weight, "model_bytes": result.size_bytes}
    if fidelity:
        figures |= {"kl": fidelity.kl_mean, "same_top": fidelity.same_top, "base_kl": fidelity.base_kl}
    else:
        figures |= judged(base, adapter, out, rows)
    return seconds, figures


def gptq(base, adapter, out, method, rows):
    """(seconds, figures) of mlx_lm.gptq's function; the fuse and the model's loading are not counted."""
    from mlx_lm.quant.gptq import gptq_quantize

    dense = out.with_name("dense")
    plain = FuseOptions(check=False)
    ma.fuse(base, adapter, dense, quantization="none", dtype="bfloat16", any_base=True, options=plain)
    loaded, data = fuse_ways._dense(str(dense), None, rows)
    mx.eval(loaded.module.parameters())
    forget_peaks()
    start = time.perf_counter()
    module, quantization = gptq_quantize(loaded.module, fuse_ways._pieces(data), 4, 64, 4, 64)
    mx.eval(module.parameters())
    seconds, peaks = time.perf_counter() - start, peaks_now()
    fuse_ways._save(loaded.base, module, {**loaded.config, "quantization": quantization}, str(out))
    del module, loaded
    shutil.rmtree(dense)
    return seconds, peaks | judged(base, adapter, out, rows)


def mlx_lm_fuse(base, adapter, out, method, rows):
    """(seconds, figures) of the command `mlx_lm.fuse`."""
    folder = write_adapter(adapter, out.with_name(f"adapter-{out.name}"), overwrite=True)
    start = time.perf_counter()
    fuse_ways.mlx_lm_fuse(str(base), str(folder), str(out))
    seconds, peaks = time.perf_counter() - start, peaks_now()
    return seconds, peaks | judged(base, adapter, out, rows)


def judged(base, adapter, out, rows):
    """KL and same top of what others have fused, on the rows that ours is checked on."""
    its_base = resolve_base(base)
    text = choose_text(None, [adapter], load_tokenizer_of(its_base), rows, FuseOptions().check_rows)
    exact = BlockwiseModel(its_base, Updates(((adapter, 1.0),)))
    fused = BlockwiseModel(resolve_base(out), None, lambda _: True)
    fidelity = measure_fidelity(exact, fused, None, batches_of(text.check, its_base))
    return {"kl": fidelity.kl_mean, "same_top": fidelity.same_top}


WAYS = {"nearest": ours, "calibrated": ours, "mlx_lm.fuse": mlx_lm_fuse, "gptq": gptq}


class Talk:
    """Says when a stage begins and ends, and every tenth step of it."""

    def __call__(self, event):
        if isinstance(event, Progress) and event.stage != "write":
            if event.done in (1, event.total) or event.done % 10 == 0:
                print(f"{time.strftime('%X')} {event.stage} {event.done}/{event.total}", file=sys.stderr, flush=True)
        elif isinstance(event, Note):
            print(f"{time.strftime('%X')} {event.text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
