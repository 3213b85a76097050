"""Predicted against measured peak memory of training, on ten settings of the demo model and tiny architectures.

Each setting trains three iterations of its largest batch in a fresh process (`mx.get_peak_memory()` after a
reset once the model is loaded), and predicts in another. With `--shapes` five settings of random models of these
shapes instead, in this process, as runs do them: a GPU works ahead up to what is foretold; the median of six steps.

    python scripts/benchmarks/estimate.py
    python scripts/benchmarks/estimate.py --shapes 0.6b 4b
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))

DEMO = {"batch_size": 4, "length": 128}
SETTINGS = [
    ("demo, all layers", "demo", {}, {}, DEMO),
    ("demo, batch 1", "demo", {}, {}, {"batch_size": 1, "length": 128}),
    ("demo, length 512", "demo", {}, {}, {"batch_size": 2, "length": 512}),
    ("demo, 8 layers", "demo", {"num_layers": 8}, {}, DEMO),
    ("demo, rank 64", "demo", {"rank": 64}, {}, DEMO),
    ("demo, recomputing", "demo", {}, {"grad_checkpoint": True}, DEMO),
    ("demo, plain loss", "demo", {}, {"chunked_loss": "off"}, DEMO),
    ("demo, accumulation 2", "demo", {}, {"grad_accumulation": 2}, DEMO),
    ("8 wide qwen3 blocks", "qwen3", {}, {}, {"batch_size": 4, "length": 256}),
    ("8 mixtral blocks", "mixtral", {}, {}, {"batch_size": 4, "length": 256}),
]
FULL = {"batch_size": 4, "length": 512}
AT_SHAPES = [
    ("batch 4 x 512", {}, {}, FULL),
    ("batch 1 x 2,048", {}, {}, {"batch_size": 1, "length": 2048}),
    ("MLP recomputed", {}, {"memory": "mlp"}, FULL),
    ("blocks recomputed", {}, {"memory": "blocks"}, FULL),
    ("rank 64, accumulation 2", {"rank": 64}, {"grad_accumulation": 2}, FULL),
]
SHAPES = ("tiny", "0.6b", "4b")
SETTINGS += [(f"{shape}, {label}", shape, *rest) for shape in SHAPES for label, *rest in AT_SHAPES]
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 8192}


def base_folder(name: str, work: Path):
    """The demo model, a random one of a shape, or a tiny architecture made wider and deeper."""
    if name == "demo":
        return "demo"
    if name in SHAPES:
        import train_memory

        return train_memory.base_folder(name, work)
    from helpers import tiny_models

    folder = work / name
    return folder if folder.exists() else tiny_models.build_model(folder, name, **WIDE)


def rows_of(batch_size: int, length: int, vocabulary: int) -> list:
    """Random rows, two thirds of each trained."""
    from mlx_adapters.data.tokenizing import Row

    random = np.random.default_rng(0)
    trained = np.arange(length) >= length // 3
    return [
        Row(random.integers(3, vocabulary, length).astype(np.int32), trained, "here", length)
        for _ in range(2 * batch_size)
    ]


def one(number: int, measure: bool, work: Path) -> int | tuple[int, int]:
    """Bytes predicted or measured for a setting, in this process; of a random model of a shape both."""
    from mlx_adapters.config.training import LoraConfig, TrainConfig
    from mlx_adapters.models.layers import named_layers
    from mlx_adapters.models.loading import load_model
    from mlx_adapters.optimization.step import MemoryPlan
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.system.door import mx
    from mlx_adapters.training import forecast, setup

    _, name, lora, training, shape = SETTINGS[number]
    base = resolve_base(base_folder(name, work))
    config = TrainConfig(batch_size=shape["batch_size"], **training)
    rows = rows_of(shape["batch_size"], shape["length"], base.config["vocab_size"])
    wanted = forecast.Wanted(base, rows, LoraConfig(**lora), config)
    if not measure:
        return forecast.forecast(wanted)[0].peak_bytes
    memory = None
    if name in SHAPES:  # as a run does it: a GPU works ahead up to what is foretold, and no further
        parts = forecast.forecast(wanted)[0]
        memory = forecast._near(MemoryPlan(forecast._asked(config)[0]), parts, wanted)
    gc.collect()
    mx.clear_cache()
    model = load_model(resolve_base(base))
    keys = setup.add_layers(model, LoraConfig(**lora), 0).keys
    layers = dict(named_layers(model.module))
    adapted = {k: layers[k] for k in keys}
    prepared = setup.prepare(model, config, tuple(rows), (), adapted, memory=memory)
    mx.clear_cache()
    mx.reset_peak_memory()
    updates, peaks = prepared.feed.updates(0), []
    for _ in range(3 if memory is None else 6):
        peaks.append(mx.get_peak_memory())
        if memory is not None:
            mx.reset_peak_memory()
        prepared.train_step.take(next(updates), 1e-4)
    peaks.append(mx.get_peak_memory())
    if memory is None:
        return peaks[-1]
    print(
        f"{SETTINGS[number][0]}: GB at the peak of each step {[round(p / 1e9, 2) for p in peaks[1:]]}", file=sys.stderr
    )
    return parts.peak_bytes, statistics.median(peaks[2:])


def line(label: str, predicted: int, measured: int) -> str:
    """A row of the table."""
    return f"| {label} | {predicted / 1e6:,.0f} | {measured / 1e6:,.0f} | {predicted / measured - 1:+.1%} |"


def at_shapes(shapes: list[str], work: Path) -> None:
    """The settings of these shapes, one after the other in this process."""
    for number, (label, name, *_) in enumerate(SETTINGS):
        if name in shapes:
            print(line(label, *one(number, True, work)), flush=True)


def main() -> None:
    """Measure the settings, one after the other or those of some shapes at once."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(int(sys.argv[2]), sys.argv[3] == "measure", Path(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="five settings of random models of these shapes")
    options = parser.parse_args()
    print("| setting | predicted MB | measured MB | error |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        if options.shapes:
            at_shapes(options.shapes, Path(work))
            return
        for number, (label, name, *_) in enumerate(SETTINGS):
            if name in SHAPES:
                continue
            values = []
            for kind in ("predict", "measure"):
                command = [sys.executable, __file__, "--one", str(number), kind, work]
                values.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(line(label, *values), flush=True)


if __name__ == "__main__":
    main()
