"""Training against mlx_lm.lora: the same base, rows, batch size, iterations, seed and adapter layers.

Speed: rows of very different length (prompt-completion, loss on the completion), one epoch, each program in a
fresh process; tokens per second count real tokens, padding apart. Memory: a random Qwen-shaped model with a
vocabulary of 150,000. Saving: seconds of one whole checkpoint against 100 iterations, the default interval.
On a busy machine CPU seconds are steadier than seconds; both are given.

Run: python scripts/benchmarks/train.py [speed] [memory] [--base demo] [--rows 48] [--trials 3]
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
BATCH, RANK, SCALE, SEED = 4, 8, 2.0, 0
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 150_000}
WORDS = "list the titles of all courses that a student of physics may take in the second year".split()  # noqa: SIM905


def write_rows(folder: Path, count: int, longest: int) -> None:
    """Prompts of 5 to `longest` words, spread evenly on a logarithmic scale, and answers of a quarter of that."""
    rng = random.Random(SEED)
    folder.mkdir()
    lines = []
    for _ in range(count):
        words = round(5 * (longest / 5) ** rng.random())
        text = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))  # noqa: E731
        lines.append({"prompt": text(words), "completion": text(max(3, words // 4))})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def base_folder(base: str, work: Path) -> str:
    """The named base, or the random wide one."""
    if base != "wide":
        return base
    import tiny_models

    folder = work / "wide"
    return str(folder if folder.exists() else tiny_models.build_model(folder, "qwen3", tied=True, **WIDE))


class Clock:
    """Times, real tokens and peak memory of the iterations after the first two."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds, self.tokens, self.done = 0.0, 0.0, 0, 0
        self._last: tuple[float, float] | None = None

    def tick(self, tokens: int) -> None:
        """An iteration with `tokens` real tokens begins (the one before has ended)."""
        now = (time.perf_counter(), time.process_time())
        if self._last is not None and self.done > 2:
            self.seconds += now[0] - self._last[0]
            self.cpu_seconds += now[1] - self._last[1]
            self.tokens += self._pending
        self._last, self._pending, self.done = now, tokens, self.done + 1

    def result(self, save_seconds: float = 0.0) -> dict:
        """The figures as JSON values."""
        import mlx.core as mx

        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "tokens": self.tokens,
                "peak_bytes": mx.get_peak_memory(), "save_seconds": save_seconds}  # fmt: skip


def run_ours(base: str, data: str, iterations: int) -> dict:
    """`mlx_adapters.train`'s own pieces, with the clock between the iterations."""
    from mlx_adapters.config import LoraConfig, TrainConfig
    from mlx_adapters.door import mx
    from mlx_adapters.layers import named_layers
    from mlx_adapters.model import load_model
    from mlx_adapters.training import start, state
    from mlx_adapters.training.data import tokenize
    from mlx_adapters.training.rows import read_data

    config = TrainConfig(batch_size=BATCH, mask_prompt=True, optimizer="adam", learning_rate=1e-5, seed=SEED)
    model = load_model(base)
    rows = tokenize(read_data(data).rows("train"), model.tokenizer, mask_prompt=True).rows
    keys = start.add_layers(model, LoraConfig(rank=RANK, scale=SCALE), SEED).keys
    layers = dict(named_layers(model.module))
    prepared = start.prepare(model, config, rows, (), {key: layers[key] for key in keys})
    mx.reset_peak_memory()
    clock, updates, engine = Clock(), prepared.feed.updates(0), prepared.engine
    for _ in range(iterations):
        batches, tokens = next(updates)
        clock.tick(sum(batch.real_tokens for batch in batches))
        engine.step(batches, 1 / tokens, config.learning_rate)
    clock.tick(0)
    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder), state.State(), engine.weights, engine.optimizer.arrays())
    return clock.result(time.perf_counter() - before)


def run_theirs(base: str, data: str, iterations: int) -> dict:
    """mlx_lm.tuner.trainer.train as mlx_lm.lora calls it, on the same float32 dense base."""
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner import datasets, trainer, utils

    from mlx_adapters.model import load_model

    np.random.seed(SEED)
    mx.random.seed(SEED)
    model = load_model(base)
    module = model.module
    module.freeze()
    utils.linear_to_lora_layers(module, len(module.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    rows = [json.loads(line) for line in (Path(data) / "train.jsonl").read_text().splitlines()]
    rows = datasets.CacheDataset(
        datasets.CompletionsDataset(rows, model.tokenizer, "prompt", "completion", mask_prompt=True)
    )
    clock = Clock()

    def batches(*arguments, **keywords):
        for batch, lengths in trainer.iterate_batches(*arguments, **keywords):
            clock.tick(int(lengths[:, 1].sum().item()))
            yield batch, lengths

    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer.TrainingArgs(
            batch_size=BATCH, iters=iterations, steps_per_report=1000, steps_per_eval=1000, steps_per_save=1000,
            max_seq_length=2048, adapter_file=str(Path(folder) / "adapters.safetensors"),
        )  # fmt: skip
        trainer.train(module, optim.Adam(1e-5), rows, None, settings, iterate_batches=batches)
        clock.tick(0)
    return clock.result()


def compare(base: str, data: Path, iterations: int, trials: int) -> dict[str, list[dict]]:
    """Both programs in turn, each in a fresh process."""
    found: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(trials):
        for program, results in found.items():
            command = [sys.executable, __file__, "--one", program, base, str(data), str(iterations)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            sys.stderr.write(f"{program}: {results[-1]}\n")
    return found


def median(results: list[dict], value) -> float:
    """The median over the trials."""
    return statistics.median(value(r) for r in results)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        program, base, data, iterations = sys.argv[2:]
        run = {"ours": run_ours, "theirs": run_theirs}[program]
        print(json.dumps(run(base, data, int(iterations))))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["speed", "memory"])
    parser.add_argument("--base", default="demo")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if "speed" in options.what:
            write_rows(work / "mixed", options.rows, 300)
            both = compare(options.base, work / "mixed", options.rows // BATCH, options.trials)
            for unit in ("seconds", "cpu_seconds"):
                ours, theirs = (median(both[p], lambda r, u=unit: r["tokens"] / r[u]) for p in ("ours", "theirs"))
                print(f"real tokens per {unit[:-1]}: ours {ours:.1f}, mlx_lm {theirs:.1f}, ratio {ours / theirs:.2f}")
            each = median(both["ours"], lambda r: r["seconds"] / (options.rows // BATCH - 2))
            save = median(both["ours"], lambda r: r["save_seconds"])
            print(f"one checkpoint {save:.3f} s, {save / (100 * each):.2%} of 100 iterations of {each:.2f} s")
        if "memory" in options.what:
            write_rows(work / "long", 16, 500)
            both = compare(base_folder("wide", work), work / "long", 4, 1)
            ours, theirs = (both[p][0]["peak_bytes"] for p in ("ours", "theirs"))
            print(f"peak memory, vocabulary 150,000: ours {ours / 1e6:,.0f} MB, mlx_lm {theirs / 1e6:,.0f} MB, "
                  f"ratio {ours / theirs:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
