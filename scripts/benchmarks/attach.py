"""Loading a base, alone and with an adapter: seconds and peak memory against mlx-lm's, each in a process of its own.

A random model of a real shape (4 bits on a GPU) and a random adapter of rank 8 on all its linear layers lie in a
folder. `seconds`: from the call until the weights are evaluated, imports aside; all processes of a round wait for each
other, then take turns, and the first round, which brings the files into memory, does not count. `to the first
logits`: and one pass of three tokens, which brings in the kernels that loading here has used already. Also measured, to
see what they would bring: loading with tokenizer and adapter after the weights, not beside them ("in turn"). `peak` is
`mx.get_peak_memory()` after loading; `of both` is that over base and adapter as they lie in memory. The bars: 1.03 of
both, 1.05 of mlx-lm's seconds.

    python scripts/benchmarks/attach.py --shape 4b
    python scripts/benchmarks/attach.py --shape tiny --packed     # a CPU, which would unpack the base otherwise
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from train_memory import SHAPES, base_folder

import mlx_adapters  # noqa: F401  (before mlx: it sees to a fast BLAS)

WAYS = ("mlx-lm", "ours", "ours, in turn", "mlx-lm, adapter", "ours, adapter", "ours, adapter, in turn")


def write_adapter(base: Path, folder: Path) -> None:
    """A random adapter in mlx-lm's format."""
    import mlx.core as mx

    from mlx_adapters.config.training import LoraConfig
    from mlx_adapters.models import adapter as adapters
    from mlx_adapters.models.layers import adaptable_layers, expected_shapes, resolve_target_modules
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.sources.bases import resolve_base

    resolved = resolve_base(base)
    module, _ = load_module(resolved)
    config = AdapterConfig(8, 2.0, resolve_target_modules(module, LoraConfig()))
    layers, weights = adaptable_layers(module), {}
    for key in config.keys:
        for leaf, shape in expected_shapes(layers[key], config).items():
            weights[f"{key}.{leaf}"] = 0.01 * mx.random.normal(shape)
    adapters.write_adapter(adapters.Adapter(config, weights, {"name": "random", "base": resolved.record()}), folder)


def in_turn() -> None:
    """From now on here all weights are read before anything else is."""
    from mlx_adapters.models import loading

    @contextmanager
    def read(*given):
        with beside(*given) as finish:
            laid = finish()
            yield lambda: laid

    beside, loading.reading_into_place = loading.reading_into_place, read


def one(way: str, work: Path, shape: str, packed: bool) -> dict:
    """Load that way, here."""
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten

    from mlx_adapters.generation.live import load_model

    base, adapter = work / shape, str(work / "adapter") if "adapter" in way else None
    mx.eval(mx.zeros((8, 8)) @ mx.zeros((8, 8)))  # the device is up
    if "in turn" in way:
        in_turn()
    print("ready", flush=True)
    sys.stdin.readline()
    mx.reset_peak_memory()
    start = time.perf_counter()
    if way.startswith("mlx-lm"):
        module = mlx_lm.load(str(base), adapter_path=adapter)[0]
        held = {name: array.nbytes for name, array in tree_flatten(module.parameters())}
        bytes_of = {kind: sum(n for name, n in held.items() if ("lora" in name) == kind) for kind in (False, True)}
    else:
        dense = False if packed else None
        model = load_model(base, adapter, dense=dense)
        bytes_of = {True: model.pool.nbytes}
        module = model.module
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
    mx.eval(module(mx.array([[3, 4, 5]])))
    first = time.perf_counter() - start
    return {"seconds": seconds, "first": first, "peak": peak, "bytes": bytes_of, "after": mx.get_active_memory()}


def main() -> None:
    """All ways in turn, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="4b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packed", action="store_true", help="as on a GPU: the base stays as it is stored")
    parser.add_argument("--work", type=Path, help="a folder to keep base and adapter in")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="some of them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.work, options.shape, options.packed)))
        return
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if not (work / "adapter").exists():
            write_adapter(base_folder(options.shape, work), work / "adapter")
        print(f"{options.shape} written, {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        runs: dict[str, list[dict]] = {way: [] for way in options.ways}
        flags = ["--shape", options.shape, "--work", str(work), *(["--packed"] if options.packed else [])]
        for number in range(options.rounds + 1):
            for way, process in started(flags, options.ways).items():
                seen = json.loads(process.communicate("begin\n")[0].splitlines()[-1])
                assert process.returncode == 0, f"'{way}' ended with status {process.returncode}"
                runs[way] += [seen] if number else []
                spent = f"{seen['seconds']:.2f} s, {seen['first']:.2f} to logits, peak {seen['peak'] / 1e6:,.0f} MB"
                after = time.perf_counter() - begun
                print(f"round {number}, {way}: {spent}, after {after:.0f} s", file=sys.stderr, flush=True)
            if number:
                print(table(runs), flush=True)


def started(flags: list[str], ways: Sequence[str]) -> dict[str, subprocess.Popen]:
    """A process for each way, which has imported what it needs and waits for a line."""
    command, pipe = [sys.executable, __file__, *flags, "--one"], subprocess.PIPE
    processes = {way: subprocess.Popen([*command, way], stdin=pipe, stdout=pipe, text=True) for way in ways}
    for process in processes.values():
        while process.stdout.readline() not in ("ready\n", ""):
            pass
    return processes


def table(runs: dict[str, list[dict]]) -> str:
    """The figures of the rounds until now, and their ratios."""
    base = runs["mlx-lm"][0]["after"]
    lines = [
        "| | seconds | of mlx-lm's | to the first logits | of mlx-lm's | peak MB | base and adapter MB | of both |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, seen in runs.items():
        times = []
        for what in ("seconds", "first"):
            alike = "mlx-lm, adapter" if "adapter" in way else "mlx-lm"
            own, theirs = (statistics.median(run[what] for run in runs[w]) for w in (way, alike))
            times.append(f"{own:.2f} | {own / theirs:.2f}")
        both, peak = base + int(seen[0]["bytes"]["true"]), max(run["peak"] for run in seen)
        lines.append(f"| {way} | {' | '.join(times)} | {peak / 1e6:,.0f} | {both / 1e6:,.0f} | {peak / both:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
