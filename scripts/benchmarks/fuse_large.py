"""Calibrated fusing of a model as wide as a 7B one: time for each block, and peak memory.

    python scripts/benchmarks/fuse_large.py --blocks 8          # widths of a 7B llama, random weights
    python scripts/benchmarks/fuse_large.py --tiny              # the same way in seconds, to try it

The model is quantized to 4 bits (group 64) and gets a random rank-8 adapter on all linear layers; the text is the
one that the package carries. Cost is linear in blocks, so `seconds a block` times 32 is the whole model.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import mlx_adapters as ma  # isort: skip  (before mlx: it loads the fast BLAS on Linux)
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.training import LoraConfig
from mlx_adapters.events import Note, Progress
from mlx_adapters.models import layers
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.system.conditions import peak_resident_bytes
from mlx_adapters.system.door import load_mlx_model

WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def build(folder: Path, config: dict, dtype: mx.Dtype) -> None:
    """A random quantized llama, made on the device and written as mlx-lm writes it."""
    from helpers.tiny_models import ARCHITECTURES, write_tokenizer
    from mlx_lm.models import llama
    from mlx_lm.utils import quantize_model, save_model

    settings = {"model_type": "llama", **ARCHITECTURES["llama"], **config, "tie_word_embeddings": False}
    settings.pop("head_dim", None)
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(settings))
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
    module, _ = load_mlx_model(folder, lazy=True)
    found = layers.adaptable_layers(module)
    keys = layers.resolve_target_modules(module, LoraConfig(rank=8))
    config = AdapterConfig(8, 1.0, keys)
    weights = {}
    for key in keys:
        for leaf, shape in layers.expected_shapes(found[key], config).items():
            weights[f"{key}.{leaf}"] = mx.random.normal(shape) * 0.1 * shape[0] ** -0.5
    return Adapter(config, weights, {"name": "random"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, help="where to put the models [a temporary folder]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = {"num_hidden_layers": options.blocks} | ({"vocab_size": 512} if options.tiny else WIDE)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        base = Path(work) / "base"
        build(base, config, mx.float32 if options.tiny else mx.bfloat16)
        adapter = random_adapter(base)
        mx.clear_cache()
        report = {"device": str(mx.device_info().get("device_name", "cpu")), "blocks": options.blocks}
        for method in ("nearest", "calibrated"):
            mx.reset_peak_memory()
            start = time.perf_counter()
            result = ma.fuse(
                base,
                adapter,
                Path(work) / method,
                quantization=4,
                any_base=True,
                on_event=talk,
                options=FuseOptions(method=method, calibration_rows=options.rows, check=method == "calibrated"),
            )
            seconds = time.perf_counter() - start
            report[method] = {
                "seconds": seconds,
                "seconds_per_block": seconds / options.blocks,
                "peak_mlx_bytes": mx.get_peak_memory(),
                "peak_resident_bytes": peak_resident_bytes(),
                "bits_per_weight": result.bits_per_weight,
                "model_bytes": result.size_bytes,
                "kl": result.fidelity.kl_mean if result.fidelity else None,
            }
            print(json.dumps({method: report[method]}, indent=1), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1))


def talk(event):
    if isinstance(event, Progress) and (event.done == event.total or event.done % 10 == 0):
        print(f"{time.strftime('%X')} {event.stage} {event.done}/{event.total}", file=sys.stderr, flush=True)
    elif isinstance(event, Note):
        print(event.text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
