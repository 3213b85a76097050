"""Is the benchmark honest? Known answers, many times over.

- same:   two copies of one model, compared; a claimed difference is a false alarm (5 % are expected).
- slower: a copy whose every step is made 5 % longer; found if the whole interval says slower.
- repeat: two reports of the same command, one after the other; they agree if no difference is seen.
- overhead: one benchmark of --overhead, of two rounds and else with the program's defaults; what part of its time
  goes into anything but loads, trials and the bandwidth.

The model of the first three is a random llama, so that a step takes milliseconds and nothing is downloaded. They do
what the processes of `mlx-adapters benchmark` do; so that hundreds of them take minutes, each is a fork of one that
has imported everything (Linux on a CPU; --spawn starts them as the program does). The slower
copy spins after each step.

    python scripts/benchmarks/harness.py --json benchmarks/harness.json

On a machine that others use too, --cpu-time counts the process's own CPU seconds instead of the clock's (with one
BLAS thread): that tests the method, and says nothing about the machine.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import mlx_adapters  # (before MLX: it loads the fast BLAS on Linux)
from mlx_adapters.benchmarking import run as running
from mlx_adapters.benchmarking import trials, words, worker
from mlx_adapters.benchmarking.reports import changes
from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.evaluation.variants import Variant, workspace
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu

SPEEDS = ("decode_tps", "prefill_tps")
TESTS = Path(__file__).resolve().parents[2] / "tests"


def build(folder, width, blocks):
    """A random float32 llama with the tokenizer of the tests' tiny models, made by a process of its own."""
    shape = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
    }
    call = f"build_model(Path({str(folder)!r}), 'llama', **{shape})"
    code = f"from pathlib import Path; from helpers.tiny_models import build_model; {call}"
    paths = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True)


def slow_down(factor, clock):
    """Make every step of this process `factor` times as long; 1 only waits for it, as the slower one does."""
    fast = trials.step
    trials.time = SimpleNamespace(perf_counter=clock)

    def step(module, cache, tokens):
        start = clock()
        result = fast(module, cache, tokens)
        mx.eval(result)
        end = start + factor * (clock() - start)
        while clock() < end:
            pass
        return result

    trials.step = step


def work(job_file, result_file, clock):
    """What a process of the benchmark does; a variant that begins with "slow" is slowed by 5 %."""
    label = json.loads(Path(job_file).read_text())["variant"]["label"]
    slow_down(1.05 if label.startswith("slow") else 1.0, clock)
    bandwidth = trials.bandwidth
    trials.bandwidth = lambda size_bytes: bandwidth(size_bytes, seconds=0.01)  # judged by nobody here
    worker.main(job_file, result_file)


def serve_forks(clock):
    """Import everything and compute nothing (threads do not survive a fork); a child for each pair of files."""
    import mlx_lm  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(*json.loads(line), clock)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        sys.stdout.write("done\n")
        sys.stdout.flush()


def forked(cpu_time):
    """A replacement of `run_worker` whose processes are forks of one that has imported everything."""
    command = [sys.executable, __file__, "--forks-cpu" if cpu_time else "--forks"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run_worker(variant, config, own, folder, _):
        job, result = folder / "job.json", folder / "result.json"
        result.unlink(missing_ok=True)
        settings = {"variant": to_mapping(variant), "config": to_mapping(config), "data": to_mapping(own)}
        files.write_json(job, settings | {"trust_remote_code": False})
        server.stdin.write(json.dumps([str(job), str(result)]) + "\n")
        server.stdin.flush()
        server.stdout.readline()
        return files.read_json(result) if result.is_file() else {"error": "The process failed."}

    return run_worker


def claims(report):
    """{metric: a difference of the twins is claimed}, and the ratio of the slower copy."""
    ratios = {(c.variant, c.against, c.metric): c.ratio for c in report.comparisons}
    return {m: ratios["two", "one", m].differs for m in SPEEDS}, ratios["slow", "one", "decode_tps"]


def overhead(model):
    """Share of the time of a benchmark of two rounds that is neither load, trial nor bandwidth."""
    resolve_base(model)  # the first time it may be fetched
    report = running.benchmark(["base"], model, rounds=2)
    failed = next((row.error for row in report.rows if row.error), None)
    return sys.exit(failed) if failed else 1 - report.measured_seconds / report.seconds


def repeat(options, model, folder):
    """All reports, one after the other."""
    reports, start = [], time.time()
    arguments = (str(Path(__file__).resolve()), "--worker-cpu" if options.cpu_time else "--worker")
    while len(reports) < options.repeats and time.time() - start < options.budget:
        config = BenchmarkConfig(
            rounds=options.rounds,
            trials=options.trials,
            decode_tokens=options.decode_tokens,
            prompt_tokens=(256,),
            cold_load=False,
            seed=len(reports),
        )
        variants = [Variant(name, str(model)) for name in ("one", "two", "slow")]
        reports.append(running.run(variants, config, lambda _: None, folder, worker=arguments))
        twins, slow = claims(reports[-1])
        print(f"{len(reports)}: twins differ {twins}, slow {words.phrase('decode_tps', slow)}", flush=True)
    return reports


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="reports; each but the first is a repeat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--decode-tokens", type=int, default=192)
    parser.add_argument("--budget", type=float, default=420, help="stop repeating after so many seconds")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds")
    parser.add_argument("--spawn", action="store_true", help="start each process as the program does")
    parser.add_argument("--overhead", default="demo", metavar="MODEL", help="'' leaves it out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.time()
    share = overhead(options.overhead) if options.overhead else None
    if share is not None:
        print(f"benchmark of {options.overhead}, time outside loads, trials and bandwidth: {share:.1%}", flush=True)
    if not options.spawn and sys.platform == "linux" and not on_gpu():
        running.run_worker = forked(options.cpu_time)
    with tempfile.TemporaryDirectory() as place, workspace() as folder:
        build(Path(place) / "model", options.width, options.blocks)
        reports = repeat(options, Path(place) / "model", folder)
    same = [differs for report in reports for differs in claims(report)[0].values()]
    slow = [claims(report)[1] for report in reports]
    repeated = [
        c.ratio.differs for old, new in itertools.pairwise(reports) for c in changes(new, old) if c.metric in SPEEDS
    ]
    caught, first = sum(ratio.differs and ratio.high < 1 for ratio in slow), reports[0]
    result = {
        "versions": first.machine["versions"],
        "machine": first.machine["device_name"],
        "cores": first.machine["cores"],
        "load_average": [r.state["load_average"] for r in reports],
        "clock": "CPU seconds" if options.cpu_time else "wall clock",
        "settings": to_mapping(first.config),
        "twins_compared": len(same),
        "twins_differ": sum(same),
        "slower_runs": len(slow),
        "slower_found": caught,
        "slow_ratios": [to_mapping(ratio) for ratio in slow],
        "repeats_compared": len(repeated),
        "repeats_differ": sum(repeated),
        "overhead": {"model": options.overhead, "share": share},
        "seconds": time.time() - start,
    }
    print(f"two copies of one model: a difference is claimed in {sum(same)} of {len(same)} comparisons")
    print(f"5 % slower: found in {caught} of {len(slow)} runs")
    print(f"the same command twice: disagrees in {sum(repeated)} of {len(repeated)} comparisons")
    if options.json:
        files.write_text(options.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    assert mlx_adapters.__version__
    mode, clock = sys.argv[1] if sys.argv[1:] else "", time.perf_counter
    if mode.endswith("-cpu"):
        mode, clock = mode.removesuffix("-cpu"), time.process_time
    if mode == "--worker":
        work(*sys.argv[2:], clock)
    elif mode == "--forks":
        serve_forks(clock)
    else:
        main()
