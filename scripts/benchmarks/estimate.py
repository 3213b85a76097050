"""Predicted against measured peak memory of training, on ten settings of the demo model and tiny architectures.

Each setting trains three iterations of its largest batch in a fresh process (`mx.get_peak_memory()` after a
reset once the model is loaded), and predicts in another. Run: python scripts/benchmarks/estimate.py [--quick]
"""

import json
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
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 8192}


def base_folder(name: str, work: Path):
    """The demo model, or a tiny architecture made wider and deeper."""
    if name == "demo":
        return "demo"
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


def one(number: int, measure: bool, work: Path) -> int:
    """Bytes predicted or measured for a setting, in this process."""
    from mlx_adapters.config.training import LoraConfig, TrainConfig
    from mlx_adapters.models.layers import named_layers
    from mlx_adapters.models.loading import load_model
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.system.door import mx
    from mlx_adapters.training import forecast, setup

    _, name, lora, training, shape = SETTINGS[number]
    base = resolve_base(base_folder(name, work))
    config = TrainConfig(batch_size=shape["batch_size"], **training)
    rows = rows_of(shape["batch_size"], shape["length"], base.config["vocab_size"])
    if not measure:
        return forecast.forecast(base, rows, LoraConfig(**lora), config)[0].peak_bytes
    model = load_model(resolve_base(base))
    keys = setup.add_layers(model, LoraConfig(**lora), 0).keys
    layers = dict(named_layers(model.module))
    train_step, feed, _ = vars(setup.prepare(model, config, tuple(rows), (), {k: layers[k] for k in keys})).values()
    mx.clear_cache()
    mx.reset_peak_memory()
    updates = feed.updates(0)
    for _ in range(3):
        train_step.take(next(updates), 1e-4)
    return mx.get_peak_memory()


def main() -> None:
    if len(sys.argv) > 3:
        print(json.dumps(one(int(sys.argv[1]), sys.argv[2] == "measure", Path(sys.argv[3]))))
        return
    print("| setting | predicted MB | measured MB | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for number, (label, *_) in enumerate(SETTINGS):
            values = []
            for kind in ("predict", "measure"):
                command = [sys.executable, __file__, str(number), kind, work]
                values.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            predicted, measured = values
            error = predicted / measured - 1
            print(f"| {label} | {predicted / 1e6:,.0f} | {measured / 1e6:,.0f} | {error:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
