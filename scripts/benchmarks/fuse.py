"""What fusing costs: our ways and mlx-lm's, same base, adapter, text and machine, judged alike.

    python scripts/benchmarks/fuse.py --adapter sql                     # the table of rounding
    python scripts/benchmarks/fuse.py --adapter sql --detours convert gptq awq
    python scripts/benchmarks/fuse.py --memory 12 24 48                 # time and memory as layers are added

The base is brought to 4 bits in groups of 64 first (by mlx-lm's own quantizer), unless it has that already. KL is
KL(adapter model || fused model) in nats per judged token, on rows that no method saw; every model is judged
in dense float32, whatever it was made with. Each method runs in a process of its own: seconds are of its work
without Python's imports (CPU seconds beside them, for a busy machine), memory is MLX's peak and the process's
largest resident size. "ratio" is mlx_lm.fuse's KL divided by the row's.

mlx_lm.gptq, awq and dwq load their calibration text from the network; here they get our calibration rows, joined
and cut into pieces of 512 tokens, through their Python functions, in float32 (their quantized arithmetic takes
hours on a CPU). dwq trains through quantized layers, so it needs a GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WORKER = """
import json, resource, sys, time
import mlx_adapters
import mlx.core as mx
sys.path.insert(0, {scripts!r})
import fuse as script
arguments = json.loads(sys.argv[1])
function = getattr(script, arguments.pop("function"))
mx.reset_peak_memory()
started, worked = time.perf_counter(), time.process_time()
function(**arguments)
seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
result = dict(seconds=seconds, cpu_seconds=cpu_seconds, mlx_peak=mx.get_peak_memory(), process_peak=peak)
print("RESULT " + json.dumps(result))
"""


def in_process(function, **arguments):
    """Run one of this file's functions in a fresh process; its seconds and memory."""
    code = WORKER.format(scripts=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, json.dumps({"function": function, **arguments})]
    run = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"{function} failed:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    return json.loads(found[0].removeprefix("RESULT "))


def to_four_bits(base, out, group_size):
    """The base in 4-bit groups by mlx-lm's own quantizer, from its dense weights."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    from mlx_adapters.door import mx
    from mlx_adapters.fusion.stream import copy_companions
    from mlx_adapters.layers import dequantize_layers
    from mlx_adapters.model import load_module, resolve_base

    found = resolve_base(base)
    module, config = load_module(found)
    dequantize_layers(module, mx.bfloat16)
    module.set_dtype(mx.bfloat16)
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    module, config = quantize_model(module, config, group_size, 4)
    save_model(out, module)
    save_config(config, Path(out) / "config.json")
    copy_companions(found, Path(out))


def to_dense(base, out):
    """The base unquantized, in bfloat16."""
    from mlx_lm.utils import save_config, save_model

    from mlx_adapters.door import mx
    from mlx_adapters.fusion.stream import copy_companions
    from mlx_adapters.layers import dequantize_layers
    from mlx_adapters.model import load_module, resolve_base

    found = resolve_base(base)
    module, config = load_module(found)
    dequantize_layers(module, mx.bfloat16)
    save_model(out, module)
    save_config({k: v for k, v in config.items() if not k.startswith("quantization")}, Path(out) / "config.json")
    copy_companions(found, Path(out))


def ours(base, adapter, out, precision="keep", dtype="auto", **options):
    """mlx_adapters.fuse without its check, which is done for all methods alike."""
    from mlx_adapters.config import Quantization
    from mlx_adapters.fusion.fuse import FuseOptions, fuse

    if isinstance(precision, list):
        precision = Quantization(*precision)
    options = FuseOptions(check=False, **options)
    fuse(base, adapter, out, quantization=precision, dtype=dtype, options=options, any_base=True)


def mlx_lm_fuse(base, adapter, out, dequantize=False):
    """The command `mlx_lm.fuse`."""
    from mlx_lm import fuse

    flags = ["--dequantize"] if dequantize else []
    sys.argv = ["mlx_lm.fuse", "--model", base, "--adapter-path", adapter, "--save-path", out, *flags]
    fuse.main()


def convert(model, out, group_size):
    """The command `mlx_lm.convert -q`."""
    from mlx_lm.convert import convert as mlx_lm_convert

    mlx_lm_convert(model, out, quantize=True, q_group_size=group_size, q_bits=4)


def _dense(model, base, calibration, rows):
    """The fused, dequantized model in float32, and our calibration rows as (pieces, 512) tokens."""
    import mlx.core as mx
    import numpy as np

    from mlx_adapters.fusion.text import choose_text
    from mlx_adapters.model import load_model

    loaded = load_model(model, dtype="float32", dense=True)
    text = choose_text(calibration, [], loaded.tokenizer, rows, 1000)
    tokens = np.concatenate([row for row, _ in text.calibration])
    pieces = len(tokens) // 512
    return loaded, mx.array(tokens[: pieces * 512].reshape(pieces, 512))


def _save(loaded, module, config, out):
    import mlx.core as mx
    from mlx_lm.utils import save_config, save_model

    from mlx_adapters.fusion.stream import copy_companions

    module.set_dtype(mx.bfloat16)
    save_model(out, module)
    save_config(config, Path(out) / "config.json")
    copy_companions(loaded.base, Path(out))


def gptq(model, base, out, group_size, calibration, rows):
    """mlx_lm.gptq's function at 4 bits for every layer."""
    from mlx_lm.quant.gptq import gptq_quantize

    loaded, data = _dense(model, base, calibration, rows)
    module, quantization = gptq_quantize(loaded.module, data, 4, group_size, 4, group_size)
    _save(loaded, module, {**loaded.config, "quantization": quantization}, out)


def awq(model, base, out, group_size, calibration, rows):
    """mlx_lm.awq's function at 4 bits for every layer, with its default search."""
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    loaded, data = _dense(model, base, calibration, rows)
    config = AWQ_MODEL_CONFIGS[loaded.config["model_type"]]
    awq_quantize(loaded.module, data, config, bits=4, group_size=group_size, embed_bits=4, embed_group_size=group_size)
    _save(loaded, loaded.module, update_config(loaded.module, dict(loaded.config)), out)


def random_model(out, layers, bits):
    """A SmolLM2-shaped model of random weights and an adapter on all its linear layers, for the memory table."""
    import mlx.core as mx
    from mlx_lm.models import llama
    from mlx_lm.utils import quantize_model, save_config, save_model
    from tokenizers import Tokenizer, models

    from mlx_adapters.adapter import Adapter, AdapterConfig, write_adapter
    from mlx_adapters.config import LoraConfig
    from mlx_adapters.layers import adaptable_layers, expected_shapes, resolve_target_modules

    config = dict(
        model_type="llama", hidden_size=576, num_hidden_layers=layers, intermediate_size=1536, vocab_size=49152,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    module = llama.Model(llama.ModelArgs.from_dict(config))
    module.set_dtype(mx.bfloat16)
    keys = resolve_target_modules(module, LoraConfig())
    adapter = AdapterConfig(8, 20.0, keys)
    shapes = {key: expected_shapes(adaptable_layers(module)[key], adapter) for key in keys}
    if bits:
        module, config = quantize_model(module, config, 64, bits)
    save_model(Path(out) / "base", module)
    save_config(config, Path(out) / "base" / "config.json")
    Tokenizer(models.BPE()).save(str(Path(out) / "base" / "tokenizer.json"))  # mlx_lm.fuse wants one
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (Path(out) / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = {f"{key}.{leaf}": 0.01 * mx.random.normal(shape) for key in keys for leaf, shape in shapes[key].items()}
    write_adapter(Adapter(adapter, weights, {"name": "random"}), Path(out) / "adapter")


def judge(model, base, adapter, calibration, rows):
    """Fidelity of a fused folder on rows kept aside."""
    from mlx_adapters.fusion.check import check_fused
    from mlx_adapters.fusion.fuse import FuseOptions

    options = FuseOptions(calibration=calibration, check_rows=rows)
    return check_fused(model, adapter, base=base, options=options, any_base=True)


def bits_per_weight(folder, base):
    """All tensors' bits over the numbers they stand for."""
    from mlx_adapters import tensor_files
    from mlx_adapters.fusion.fuse import gather_updates  # noqa: F401  (loads MLX in the right order)
    from mlx_adapters.fusion.job import open_job
    from mlx_adapters.fusion.plan import Updates
    from mlx_adapters.model import resolve_base

    headers = [
        tensor_files.read_safetensors_header(path)[0] for path in sorted(Path(folder).glob("model*.safetensors"))
    ]
    total = sum(e["data_offsets"][1] - e["data_offsets"][0] for header in headers for e in header.values())
    return 8 * total / open_job(resolve_base(base), Updates(), "keep").parameters


def table(headers, rows):
    """Print rows under headers."""
    from mlx_adapters.cli import _output

    _output.table(headers, rows, right=range(1, len(headers)))


def rounding_table(arguments, work):
    """The first table: KL, size and time of every way to fuse."""
    from mlx_adapters.adapter import write_adapter
    from mlx_adapters.model import resolve_base
    from mlx_adapters.registry import load_adapter

    loaded = load_adapter(arguments.adapter)
    adapter = str(write_adapter(loaded, work / "adapter"))
    base = arguments.base or loaded.base_name
    wanted = {"bits": 4, "group_size": arguments.group_size}
    found = resolve_base(base).config.get("quantization") or {}
    if {key: found.get(key) for key in wanted} != wanted or any("." in key for key in found):
        to_four_bits(base, work / "base", arguments.group_size)
        base = str(work / "base")
    base = str(resolve_base(base).folder)
    text = {"calibration": arguments.data, "calibration_rows": arguments.calibration_rows}
    spare = bits_per_weight(base, base)
    ways = [
        ("mlx_lm.fuse", "mlx_lm_fuse", {}),
        ("ours, nearest", "ours", {"method": "nearest"}),
        ("ours, calibrated", "ours", {"method": "calibrated", **text}),
        ("ours, + 0.1 bits", "ours", {"budget_bits": spare + 0.1, **text}),
        ("ours, + 0.3 bits", "ours", {"budget_bits": spare + 0.3, **text}),
        ("ours, 8 bits", "ours", {"precision": [8, arguments.group_size], "method": "nearest"}),
        ("ours, bfloat16", "ours", {"precision": "none", "dtype": "bfloat16"}),
        ("ours, float32", "ours", {"precision": "none", "dtype": "float32"}),
    ]
    results = []
    for number, (name, function, options) in enumerate(ways):
        out = work / f"out-{number}"
        measured = in_process(function, base=base, adapter=adapter, out=str(out), **options)
        results.append(report(name, out, measured, base, adapter, arguments, results))
        shutil.rmtree(out)
    if arguments.detours:
        dense = work / "dense"
        first = in_process("mlx_lm_fuse", base=base, adapter=adapter, out=str(dense), dequantize=True)
        for name in arguments.detours:
            out = work / name
            options = {"calibration": arguments.data, "rows": arguments.calibration_rows, "base": base}
            options = {} if name == "convert" else options
            measured = in_process(name, model=str(dense), out=str(out), group_size=arguments.group_size, **options)
            for key in ("seconds", "cpu_seconds"):
                measured[key] += first[key]
            label = f"mlx_lm.fuse --dequantize, {name}"
            results.append(report(label, out, measured, base, adapter, arguments, results))
        in_process("to_dense", base=base, out=str(work / "unquantized"))
        for name, options in (("nearest", {"method": "nearest"}), ("calibrated", {"method": "calibrated", **text})):
            out = work / f"all-{name}"
            options["precision"] = [4, arguments.group_size]
            measured = in_process("ours", base=str(work / "unquantized"), adapter=adapter, out=str(out), **options)
            results.append(report(f"ours, every layer, {name}", out, measured, base, adapter, arguments, results))
    return results


def report(name, out, measured, base, adapter, arguments, results):
    """Judge one folder; print its line at once."""
    checked = judge(str(out), base, adapter, arguments.data, arguments.check_rows)
    f = checked.fidelity
    reference = results[0]["kl"] if results else f.kl_mean
    line = {
        "name": name, "kl": f.kl_mean, "kl_p99": f.kl_p99, "same_top": f.same_top, "loss": f.loss_fused,
        "loss_adapter": f.loss_adapter, "loss_base": f.loss_base, "base_kl": f.base_kl,
        "ratio": reference / f.kl_mean if f.kl_mean else None, "bits_per_weight": bits_per_weight(out, base),
        "survival": checked.update_survival, **measured,
    }  # fmt: skip
    print(json.dumps(line), file=sys.stderr, flush=True)
    return line


def cells(line):
    """One line of the first table as text."""
    from mlx_adapters.units import size

    figures = [("bits_per_weight", ".2f"), ("kl", ".5f"), ("ratio", ".1f"), ("kl_p99", ".3f"), ("same_top", ".4f"),
               ("loss", ".4f"), ("seconds", ".1f"), ("cpu_seconds", ".1f")]  # fmt: skip
    texts = ["-" if line[name] is None else format(line[name], form) for name, form in figures]
    return [line["name"], *texts, size(line["mlx_peak"]), size(line["process_peak"])]


def memory_cells(line):
    """One line of the second table as text."""
    from mlx_adapters.units import size

    times = [f"{line[name]:.2f}" for name in ("seconds", "cpu_seconds")]
    return [line["name"], str(line["layers"]), *times, size(line["mlx_peak"]), size(line["process_peak"])]


def memory_table(arguments, work):
    """The second table: time and memory of nearest and unquantized fusing as layers are added."""
    lines = []
    for layers in arguments.memory:
        folder = work / f"layers-{layers}"
        in_process("random_model", out=str(folder), layers=layers, bits=4)
        shared = {"base": str(folder / "base"), "adapter": str(folder / "adapter")}
        for name, function, options in (
            ("mlx_lm.fuse", "mlx_lm_fuse", {}),
            ("ours, nearest", "ours", {"method": "nearest"}),
            ("mlx_lm.fuse --dequantize", "mlx_lm_fuse", {"dequantize": True}),
            ("ours, unquantized", "ours", {"precision": "none"}),
        ):
            runs = []
            for _ in range(arguments.trials):
                out = folder / "out"
                runs.append(in_process(function, out=str(out), **shared, **options))
                shutil.rmtree(out)
            best = min(runs, key=lambda run: run["seconds"])
            lines.append({"layers": layers, "name": name, **best})
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="the adapter to fuse; a name or a folder")
    parser.add_argument("--base", help="its base [the one that the adapter names]")
    parser.add_argument("--data", help="folder with train.jsonl and valid.jsonl [the adapter's own]")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--check-rows", type=int, default=160)
    parser.add_argument("--detours", nargs="*", default=[], choices=["convert", "gptq", "awq"])
    parser.add_argument("--memory", nargs="*", type=int, default=[], metavar="LAYERS")
    parser.add_argument("--trials", type=int, default=3, help="of the memory table; the fastest counts")
    parser.add_argument("--json", help="also write the figures here")
    arguments = parser.parse_args()

    from mlx_adapters.machine import environment

    machine, results = environment(), {}
    print(f"# {machine.device_name}, {machine.cores} cores, {machine.system}, {machine.blas}; {machine.versions}")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.adapter:
            results["rounding"] = rounding_table(arguments, Path(folder))
        if arguments.memory:
            results["memory"] = memory_table(arguments, Path(folder))
    if arguments.adapter:
        first = results["rounding"][0]
        losses = f"adapter's loss {first['loss_adapter']:.4f}, base's {first['loss_base']:.4f}"
        print(f"{losses}, KL of the base {first['base_kl']:.3f}")
        table(
            (
                "METHOD",
                "BITS/WEIGHT",
                "KL",
                "RATIO",
                "99 %",
                "SAME TOP",
                "LOSS",
                "SECONDS",
                "CPU S",
                "MLX PEAK",
                "PROCESS",
            ),
            [cells(line) for line in results["rounding"]],
        )
    if arguments.memory:
        table(
            ("METHOD", "LAYERS", "SECONDS", "CPU S", "MLX PEAK", "PROCESS"),
            [memory_cells(line) for line in results["memory"]],
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results | {"machine": machine.to_json()}, indent=2))


if __name__ == "__main__":
    main()
