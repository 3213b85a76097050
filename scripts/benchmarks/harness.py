"""Is the benchmark honest? Known answers, many times over.

- same:   two copies of one model, compared; a claimed difference is a false alarm (5 % are expected).
- slower: a copy whose every step is made 5 % longer; found if the whole interval says slower.
- repeat: two reports of the same command, one after the other; they agree if no difference is seen.

The model is a random llama, so that a step takes milliseconds and nothing is downloaded. All that counts happens
in the same processes as in `mlx-adapters benchmark`; the slower copy spins after each step.

    python scripts/benchmarks/harness.py --repeats 20 --json benchmarks/harness.json

On a machine that others use too, --cpu-time counts the process's own CPU seconds instead of the clock's (with one
BLAS thread): that tests the method, and says nothing about the machine.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import mlx_adapters
from mlx_adapters import files
from mlx_adapters.benchmarking import measure, text, worker
from mlx_adapters.benchmarking.changes import changes
from mlx_adapters.benchmarking.plan import BenchmarkConfig
from mlx_adapters.benchmarking.run import run
from mlx_adapters.benchmarking.variants import Variant, workspace
from mlx_adapters.door import mx

SPEEDS = ("decode_tps", "prefill_tps")


def build(folder: Path, width: int, blocks: int) -> None:
    """A random float32 llama with the tokenizer of the tests' tiny models."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from tiny_models import build_model

    build_model(folder, "llama", hidden_size=width, num_hidden_layers=blocks, intermediate_size=3 * width,
                num_attention_heads=width // 64, num_key_value_heads=width // 128)  # fmt: skip


def slow_down(factor: float, clock) -> None:
    """Make every step of this process `factor` times as long; 1 only waits for it, as the slower one does."""
    fast = measure.step
    measure.time = SimpleNamespace(perf_counter=clock)

    def step(module, cache, tokens):
        start = clock()
        result = fast(module, cache, tokens)
        mx.eval(result)
        end = start + factor * (clock() - start)
        while clock() < end:
            pass
        return result

    measure.step = step


def measured(names, model, config, folder, cpu_time):
    """A report of the model under these names; those that begin with "slow" are slowed by 5 %."""
    worker_arguments = (str(Path(__file__).resolve()), "--worker-cpu" if cpu_time else "--worker")
    return run([Variant(name, str(model)) for name in names], config, lambda _: None, folder, worker_arguments)


def trial(model, config, folder, cpu_time):
    """One report of twins and a slower copy, and what it claims."""
    report = measured(("one", "two", "slow"), model, config, folder, cpu_time)
    found = {(c.variant, c.against, c.metric): c.ratio for c in report.comparisons}
    same = {m: found["two", "one", m].differs for m in SPEEDS}
    slow = found["slow", "one", "decode_tps"]
    return report, same, slow


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--budget", type=float, default=3600, help="stop repeating after so many seconds")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = BenchmarkConfig(rounds=options.rounds, trials=options.trials, decode_tokens=options.decode_tokens,
                             prompt_tokens=(256,), cold_load=False)  # fmt: skip
    same, slow, repeated, shares, reports, start = [], [], [], [], [], time.time()
    with tempfile.TemporaryDirectory() as place, workspace() as folder:
        model = Path(place) / "model"
        build(model, options.width, options.blocks)
        for number in range(options.repeats):
            if time.time() - start > options.budget:
                break
            report, twins, ratio = trial(
                model, BenchmarkConfig(**{**vars(config), "seed": number}), folder, options.cpu_time
            )
            same += twins.values()
            slow.append({"ratio": ratio.value, "low": ratio.low, "high": ratio.high})
            shares.append(1 - report.measured_seconds / report.seconds)
            if reports:
                repeated += [c.ratio.differs for c in changes(report, reports[-1]) if c.metric in SPEEDS]
            reports.append(report)
            print(f"{number + 1}: twins differ {twins}, slow {text.phrase('decode_tps', ratio)}", flush=True)
    caught = sum(r["high"] < 1 for r in slow)
    first = reports[0]
    result = {
        "versions": first.machine["versions"], "machine": first.machine["device_name"],
        "cores": first.machine["cores"], "load_average": [r.state["load_average"] for r in reports],
        "clock": "CPU seconds" if options.cpu_time else "wall clock", "settings": vars(config),
        "twins_compared": len(same), "twins_differ": sum(same), "slower_runs": len(slow), "slower_found": caught,
        "slow_ratios": slow, "repeats_compared": len(repeated), "repeats_differ": sum(repeated),
        "share_of_time_outside_trials": sum(shares) / len(shares),
    }  # fmt: skip
    print(f"two copies of one model: a difference is claimed in {sum(same)} of {len(same)} comparisons")
    print(f"5 % slower: found in {caught} of {len(slow)} runs")
    print(f"the same command twice: disagrees in {sum(repeated)} of {len(repeated)} comparisons")
    print(f"time outside loads and trials (process start, warm-up, bandwidth): {sum(shares) / len(shares):.0%}")
    if options.json:
        files.write_text(options.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    assert mlx_adapters.__version__
    if sys.argv[1:2] in (["--worker"], ["--worker-cpu"]):
        clock = time.process_time if sys.argv[1] == "--worker-cpu" else time.perf_counter
        job = json.loads(Path(sys.argv[2]).read_text())
        slow_down(1.05 if job["variant"]["label"].startswith("slow") else 1.0, clock)
        worker.main(*sys.argv[2:])
    else:
        main()
