"""Training against mlx_lm.lora: the same base, rows, batch size, iterations, seed and adapter layers.

- speed:  rows of very different length (prompt-completion, loss on the completion). After the warm-up
          one epoch is timed, each program in a fresh process, in turn. Tokens are real ones, padding apart.
- memory: peak memory with a vocabulary of 150,000 on a small random Qwen 3.
- save:   seconds of one whole checkpoint within a run, against the 100 iterations between two by default.

Both compute on the same dense float32 weights where there is no GPU, with the same BLAS, and nothing is compiled there:
MLX would call a C++ compiler for each fused kernel, which costs mlx_lm minutes. On a busy machine CPU seconds are
steadier than seconds; both are given.

    python scripts/benchmarks/train.py --json benchmarks/train.json
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx_adapters  # before MLX: it loads the fast BLAS, for mlx_lm too

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
    from helpers import tiny_models

    folder = work / "wide"
    return str(folder if folder.exists() else tiny_models.build_model(folder, "qwen3", tied=True, **WIDE))


class Clock:
    """Times, real tokens and peak memory of the iterations after the warm-up."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds, self.cpu_seconds, self.tokens, self.done = 0.0, 0.0, 0, 0
        self._last, self._pending = (0.0, 0.0), 0

    def tick(self, tokens: int = 0) -> None:
        """An iteration with `tokens` real tokens begins (the one before has ended)."""
        now = (time.perf_counter(), time.process_time())
        if self.done > self.warm_up:
            self.seconds += now[0] - self._last[0]
            self.cpu_seconds += now[1] - self._last[1]
            self.tokens += self._pending
        self._last, self._pending, self.done = now, tokens, self.done + 1

    def result(self) -> dict:
        """The figures as JSON values."""
        import mlx.core as mx

        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "tokens": self.tokens,
            "iterations": self.done - 1 - self.warm_up,
            "peak_bytes": mx.get_peak_memory(),
        }


def run_ours(base: str, data: str, epoch: int, warm_up: int) -> dict:
    """`mlx_adapters.train`'s own pieces, with the clock between the iterations: warm-up, then `epoch` batches."""
    from mlx_adapters.config.training import LoraConfig, TrainConfig
    from mlx_adapters.data.datasets import read_data
    from mlx_adapters.data.tokenizing import tokenize
    from mlx_adapters.models.layers import named_layers
    from mlx_adapters.models.loading import load_model
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.system.door import mx
    from mlx_adapters.training import setup

    config = TrainConfig(batch_size=BATCH, mask_prompt=True, optimizer="adam", learning_rate=1e-5, seed=SEED)
    model = load_model(resolve_base(base))
    rows = tokenize(read_data(data).rows("train"), model.tokenizer, mask_prompt=True).rows
    keys = setup.add_layers(model, LoraConfig(rank=RANK, scale=SCALE), SEED).keys
    layers = dict(named_layers(model.module))
    prepared = setup.prepare(model, config, rows, (), {key: layers[key] for key in keys})
    mx.reset_peak_memory()
    clock, train_step = Clock(warm_up), prepared.train_step
    for first, count in ((0, warm_up), (0, epoch)):
        updates = prepared.feed.updates(first)
        for _ in range(count):
            draw = next(updates)
            clock.tick(sum(batch.real_tokens for batch in draw.batches))
            train_step.take(draw, config.learning_rate)
    clock.tick()
    return clock.result()


def run_theirs(base: str, data: str, epoch: int, warm_up: int) -> dict:
    """mlx_lm.tuner.trainer.train as mlx_lm.lora calls it, on the same weights."""
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner import datasets, trainer, utils

    from mlx_adapters.models.loading import load_model
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.system.machine import on_gpu

    if not on_gpu():
        mx.disable_compile()
    np.random.seed(SEED)
    mx.random.seed(SEED)
    model = load_model(resolve_base(base))
    module = model.module
    module.freeze()
    utils.linear_to_lora_layers(module, len(module.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    rows = [json.loads(line) for line in (Path(data) / "train.jsonl").read_text().splitlines()]
    rows = datasets.CacheDataset(
        datasets.CompletionsDataset(rows, model.tokenizer, "prompt", "completion", mask_prompt=True)
    )
    clock = Clock(warm_up)

    def batches(*arguments, **keywords):
        given = trainer.iterate_batches(*arguments, **keywords)
        first = [next(given) for _ in range(warm_up)]
        for batch, lengths in [*first, *first, *(next(given) for _ in range(epoch - warm_up))]:
            clock.tick(int(lengths[:, 1].sum().item()))
            yield batch, lengths

    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer.TrainingArgs(
            batch_size=BATCH,
            iters=warm_up + epoch,
            steps_per_report=1000,
            steps_per_eval=1000,
            steps_per_save=1000,
            max_seq_length=2048,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        trainer.train(module, optim.Adam(1e-5), rows, None, settings, iterate_batches=batches)
        clock.tick()
    return clock.result()


def run_saving(base: str, data: str, iterations: int, warm_up: int) -> dict:
    """A run of `train` that saves after every iteration."""
    from mlx_adapters import LoraConfig, TrainConfig, train
    from mlx_adapters.events import CheckpointSaved

    saves: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(iterations=warm_up + iterations, batch_size=BATCH, mask_prompt=True, save_every=1, keep=2)
        run = train(
            base,
            data,
            name=f"{folder}/run",
            lora=LoraConfig(rank=RANK),
            training=config,
            on_event=lambda e: saves.append(e.seconds) if isinstance(e, CheckpointSaved) else None,
        )
    return {"save_seconds": saves, "iteration_seconds": run.duration_seconds / (warm_up + iterations)}


RUNS = {"ours": run_ours, "theirs": run_theirs, "saving": run_saving}


def in_a_process(run: str, base: str, data: Path, count: int, warm_up: int) -> dict:
    """What one of RUNS gives in a process of its own."""
    command = [sys.executable, __file__, "--one", run, base, str(data), str(count), str(warm_up)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"  {run}: {result}", file=sys.stderr, flush=True)
    return result


def compare(base: str, data: Path, epoch: int, warm_up: int, trials: int) -> dict[str, list[dict]]:
    """Both programs in turn, `trials` times."""
    runs = [
        {program: in_a_process(program, base, data, epoch, warm_up) for program in ("ours", "theirs")}
        for _ in range(trials)
    ]
    return {program: [run[program] for run in runs] for program in ("ours", "theirs")}


def spread(values: list[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def speed(options: argparse.Namespace, work: Path) -> dict:
    """Real tokens a second of both, and the ratios of each pair of trials."""
    write_rows(work / "mixed", options.rows, 250)
    both = compare(options.base, work / "mixed", options.rows // BATCH, options.warm_up, options.trials)
    figures: dict = {"runs": both}
    for unit in ("seconds", "cpu_seconds"):
        rates = {program: [r["tokens"] / r[unit] for r in runs] for program, runs in both.items()}
        ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
        figures[unit] = {"tokens_per": rates, "ratios": ratios, "ratio": statistics.median(ratios)}
        print(
            f"real tokens per {unit.replace('_', ' ')[:-1]}: ours {spread(rates['ours'])}, "
            f"mlx_lm {spread(rates['theirs'])}, ratio {spread(ratios, 2)}",
            flush=True,
        )
    return figures


def memory(options: argparse.Namespace, work: Path) -> dict:
    """Peak memory of both at a vocabulary of 150,000; it hardly varies, so one run each."""
    write_rows(work / "long", 4 * BATCH, 400)
    both = compare(base_folder("wide", work), work / "long", 2, 2, 1)
    ours, theirs = (both[p][0]["peak_bytes"] for p in ("ours", "theirs"))
    print(
        f"peak memory, vocabulary 150,000: ours {ours / 1e6:,.0f} MB, mlx_lm {theirs / 1e6:,.0f} MB, "
        f"ratio {ours / theirs:.2f}",
        flush=True,
    )
    return {"ours_bytes": ours, "theirs_bytes": theirs, "ratio": ours / theirs}


def save(options: argparse.Namespace, work: Path) -> dict:
    """Seconds of a checkpoint, and their share of 100 iterations."""
    write_rows(work / "saved", 4 * BATCH, 250)
    figures = in_a_process("saving", options.base, work / "saved", 4, 0)
    one = statistics.median(figures["save_seconds"])
    share = one / (100 * figures["iteration_seconds"] + one)
    print(
        f"one checkpoint: {spread(figures['save_seconds'], 3)} s, an iteration {figures['iteration_seconds']:.2f} s; "
        f"one in 100 iterations is {share:.2%} of the time",
        flush=True,
    )
    return figures | {"share": share}


PARTS = {"speed": speed, "memory": memory, "save": save}


def main() -> None:
    """Measure the parts that are named, print them, and keep them as JSON if asked to."""
    assert mlx_adapters.__version__
    if sys.argv[1:2] == ["--one"]:
        run, base, data, count, warm_up = sys.argv[2:]
        print(json.dumps(RUNS[run](base, data, int(count), int(warm_up))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--base", default="demo")
    parser.add_argument("--rows", type=int, default=16, help=f"for speed; a multiple of {BATCH}")
    parser.add_argument("--warm-up", type=int, default=1, help="iterations; at most an epoch, which a GPU needs")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.what) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    from mlx_adapters.storage import files
    from mlx_adapters.system.machine import versions

    figures: dict = {"versions": versions(), "cores": os.cpu_count(), "load_average": os.getloadavg()}
    figures["settings"] = {
        "base": options.base,
        "rows": options.rows,
        "trials": options.trials,
        "batch": BATCH,
        "warm_up": options.warm_up,
    }
    with tempfile.TemporaryDirectory() as name:
        for part in options.what or PARTS:
            figures[part] = PARTS[part](options, Path(name))
    if options.json:
        files.write_text(options.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
