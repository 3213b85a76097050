"""Time what is done to adapter files: list, merge, pack, add, extract, conversion from and to PEFT.

    python scripts/benchmarks/adapters.py list merge            (all parts if none is named)

- list: `mlx-adapters list` as a process, with `--entries` adapters in an empty home folder.
- merge: two all-linear adapters of rank 16 for a 7B-shaped model (224 layers), by `cat` (weights 1 and -1, whose
  bytes are taken over; weights 0.7 and 0.3, whose factors are multiplied), `svd` and one method on full updates
  (on `--blocks` of the 32 blocks, scaled up). Beside it `cp` of the two sources and `sync`, on the same disk.
- pack: the same adapter into a .tar.gz and back.
- peft: import-peft and export-peft of such an adapter, beside `cp` of its file and `sync`.
- extract: rank 16 out of the change of one 4096 x 11008 matrix, by sketch and by the exact SVD.

Each figure is the median of `--trials`, with the range, and the CPU time (all threads, child processes
included), which a busy machine changes less. Files are warm in the page cache.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008),
    "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}
BLOCKS, RANK = 32, 16


def timed(trials, function):
    """(wall seconds, CPU seconds) of each call of `function`, its child processes included."""
    taken = []
    for _ in range(trials):
        start, before = time.perf_counter(), sum(os.times()[:4])
        function()
        taken.append((time.perf_counter() - start, sum(os.times()[:4]) - before))
    return taken


def report(name, taken, copying=None, scale=1.0):
    wall, cpu = (statistics.median(column) * scale for column in zip(*taken, strict=True))
    low, high = min(taken)[0] * scale, max(taken)[0] * scale
    ratio = f"  {wall / statistics.median(w for w, _ in copying):5.2f} x cp" if copying else ""
    print(f"{name:<44} {wall:8.3f} s ({low:.3f}-{high:.3f})  CPU {cpu:.3f} s{ratio}", flush=True)


def random_adapter(seed, dtype, blocks=BLOCKS):
    """An adapter with trained-looking factors on every linear layer of `blocks` blocks."""
    import mlx.core as mx

    from mlx_adapters.models.adapter import Adapter
    from mlx_adapters.models.metadata import AdapterConfig

    mx.random.seed(seed)
    weights = {}
    for block in range(blocks):
        for name, (inputs, outputs) in SHAPES.items():
            key = f"model.layers.{block}.{name}"
            weights[f"{key}.lora_a"] = mx.random.normal((inputs, RANK)).astype(getattr(mx, dtype))
            weights[f"{key}.lora_b"] = mx.random.normal((RANK, outputs)).astype(getattr(mx, dtype))
    mx.eval(weights)
    keys = tuple(f"model.layers.{block}.{name}" for block in range(blocks) for name in SHAPES)
    return Adapter(AdapterConfig(RANK, 2.0, keys), weights, {"base": {"name": "seven-billion", "model_type": "llama"}})


def bench_list(options):
    from mlx_adapters.sources import registry

    folder = registry.adapters_folder()
    template = random_adapter(0, "bfloat16")
    registry.register(template, "a0000")
    files = {path.name: path for path in (folder / "a0000").iterdir()}
    curve = [[i, 1.0 / i] for i in range(1, 61)]
    metadata = json.loads(files["adapter_metadata.json"].read_bytes()) | {
        "validation_losses": curve,
        "train_losses": curve,
    }
    header = wide_header()
    for number in range(options.entries):
        entry = folder / f"a{number:04d}"
        entry.mkdir(exist_ok=True)
        (entry / "adapter_config.json").write_bytes(files["adapter_config.json"].read_bytes())
        (entry / "adapter_metadata.json").write_text(json.dumps(metadata | {"best_validation_loss": number / 100}))
        (entry / "adapters.safetensors").write_bytes(header)
        for iteration in range(100, 700, 100):
            (entry / f"{iteration:07d}_adapters.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "mlx_adapters", "list"]
    print(f"# {options.entries} adapters, each with 6 checkpoints and a header of {len(SHAPES) * BLOCKS * 2} tensors")
    for label, extra in (("list", []), ("list --json", ["--json"]), ("list --help", ["--help"])):
        report(f"{label}, whole process", timed(options.trials, lambda extra=extra: quiet([*command, *extra])))


def wide_header():
    """A safetensors file with the names of a whole 7B-shaped adapter and tensors of no size."""
    entry = {"dtype": "F32", "shape": [0, RANK], "data_offsets": [0, 0]}
    names = [f"model.layers.{b}.{n}.{leaf}" for b in range(BLOCKS) for n in SHAPES for leaf in ("lora_a", "lora_b")]
    encoded = json.dumps(dict.fromkeys(names, entry)).encode()
    return len(encoded).to_bytes(8, "little") + encoded


def quiet(command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def copy_time(options, *paths):
    target = Path(os.environ["MLX_ADAPTERS_HOME"]) / "copied"

    def copy():
        target.mkdir(exist_ok=True)
        quiet(["cp", *map(str, paths), str(target)])
        quiet(["sync", *(str(path) for path in target.iterdir())])

    return timed(options.trials, copy)


def bench_merge(options):
    from mlx_adapters.merging.recipes import merge
    from mlx_adapters.sources import registry

    for dtype in ("float32", "bfloat16"):
        names = [f"{dtype}-{seed}" for seed in (0, 1)]
        for seed, name in enumerate(names):
            registry.register(random_adapter(seed, dtype), name, overwrite=True)
        weights = [registry.adapter_folder(name) / "adapters.safetensors" for name in names]
        print(f"# two adapters of {weights[0].stat().st_size / 1e6:.0f} MB in {dtype}")
        copying = copy_time(options, *link_apart(weights))
        report("cp of both and sync", copying)

        def run(names=names, **how):
            return timed(options.trials, lambda: merge(names, name="out", overwrite=True, **how))

        report("cat, weights 1 and -1", run(weights=[1, -1]), copying)
        report("cat, weights 0.7 and 0.3", run(weights=[0.7, 0.3]), copying)
        report(f"svd to rank {RANK}", run(method="svd"))
    few = [random_adapter(seed, "float32", options.blocks) for seed in (0, 1)]
    done = timed(1, lambda: merge(few, [1, 1], method="ties-svd", density=0.5))
    report(f"ties-svd ({options.blocks} blocks x {BLOCKS / options.blocks:g})", done, scale=BLOCKS / options.blocks)


def link_apart(paths):
    """The files under names of their own, so that cp can put them into one folder."""
    for path in paths:
        other = path.parent.parent / f"{path.parent.name}.safetensors"
        other.unlink(missing_ok=True)
        os.link(path, other)
        yield other


def bench_pack(options):
    from mlx_adapters.adapters.adding import add
    from mlx_adapters.adapters.packing import pack
    from mlx_adapters.sources import registry

    registry.register(random_adapter(0, "bfloat16"), "packed", overwrite=True)
    target = Path(os.environ["MLX_ADAPTERS_HOME"]) / "packed.tar.gz"
    report("pack, bfloat16", timed(1, lambda: pack("packed", target, overwrite=True)))
    report("add", timed(options.trials, lambda: add(target, name="again", overwrite=True)))
    print(f"# {target.stat().st_size / 1e6:.0f} MB packed")


def bench_peft(options):
    from mlx_adapters.adapters.peft_export import export_peft
    from mlx_adapters.adapters.peft_import import import_peft

    home = Path(os.environ["MLX_ADAPTERS_HOME"])
    base = sparse_base(home / "base")
    for dtype in ("float32", "bfloat16"):
        source = home / f"peft-{dtype}"
        export_peft(random_adapter(0, dtype), source, base_model="seven-billion", base=base)
        weights = source / "adapter_model.safetensors"
        print(f"# an adapter of {weights.stat().st_size / 1e6:.0f} MB in {dtype}")
        copying = copy_time(options, weights)
        report("cp and sync", copying)
        taken = timed(options.trials, lambda s=source: import_peft(s, base=base, name="it", overwrite=True))
        report("import-peft", taken, copying)
        taken = timed(options.trials, lambda: export_peft("it", home / "out", overwrite=True))
        report("export-peft", taken, copying)


def sparse_base(folder):
    """A 7B-shaped base whose weights are one hole in a file: an import reads their shapes only."""
    shapes = {"model.embed_tokens": (32000, 4096), "lm_head": (32000, 4096), "model.norm": (4096,)}
    for block in range(BLOCKS):
        path = f"model.layers.{block}"
        shapes |= {f"{path}.{name}": (outputs, inputs) for name, (inputs, outputs) in SHAPES.items()}
        shapes |= {f"{path}.{name}": (4096,) for name in ("input_layernorm", "post_attention_layernorm")}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + offset)
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bench_extract(options):
    import numpy as np

    from mlx_adapters.merging.decomposition import decompose_matrix

    rng = np.random.default_rng(0)
    low = rng.standard_normal((4096, 64), dtype=np.float32) * np.float32(0.9) ** np.arange(64, dtype=np.float32)
    matrix = low @ rng.standard_normal((64, 11008), dtype=np.float32)
    matrix += np.float32(0.01) * rng.standard_normal(matrix.shape, dtype=np.float32)
    report("rank 16 of 4096 x 11008, sketch", timed(options.trials, lambda: decompose_matrix(matrix, 16)))
    parts = decompose_matrix(matrix, 16)
    if options.exact:
        report("the same by the exact SVD", timed(1, lambda: np.linalg.svd(matrix, full_matrices=False)))
        exact = np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
        print(f"# energy kept {parts.kept(16):.6f}, exact {np.sum(exact[:16] ** 2) / np.sum(exact**2):.6f}")


PARTS = {"list": bench_list, "merge": bench_merge, "pack": bench_pack, "peft": bench_peft, "extract": bench_extract}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to time [all]")
    parser.add_argument("--entries", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=1, help="blocks for the methods on full updates")
    parser.add_argument("--exact", action="store_true", help="also the exact SVD of a large matrix (minutes)")
    parser.add_argument("--folder", help="where to work [the system's temporary folder]")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder) as home:
            os.environ["MLX_ADAPTERS_HOME"] = home
            print(f"## {part}", flush=True)
            PARTS[part](options)


if __name__ == "__main__":
    main()
