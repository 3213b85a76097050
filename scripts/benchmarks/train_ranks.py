"""Training on several GPUs of one host against one of them: tokens a second at a fixed batch per process.

The model of `train_memory.py`, random weights and all, once in one process, then in several that `mlx.launch`
starts (NCCL on NVIDIA GPUs; the ring on a CPU tells only that it works). Linear would be as many times the speed as
there are processes. At last one process takes the rows of all: its losses are to be those of the several. Needs MLX's
CUDA build with NCCL, and as many GPUs as processes.

    python scripts/benchmarks/train_ranks.py --shape 4b --processes 2
    python scripts/benchmarks/train_ranks.py --shape tiny --length 64 --backend ring
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from train_memory import OURS, SHAPES, WARM_UP, model_of, ours


def one(options: argparse.Namespace) -> None:
    """Steps of this process, among the others that there are; the first prints what it saw."""
    from mlx_adapters.optimization.distributed import start

    world = start()
    (update,) = ours(model_of(options.shape), options, options.again, world)
    losses = [update()[0] for _ in range(WARM_UP)]
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        losses.append(update()[0])
        seconds.append(time.perf_counter() - began)
    if world.leads:
        tokens = world.size * options.batch * options.length / statistics.median(seconds)
        print(
            json.dumps({"processes": world.size, "rows": options.batch, "tokens_per_second": tokens, "losses": losses}),
            flush=True,
        )


def main() -> None:
    """One process, then several; print the ratio to linear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="4b")
    parser.add_argument("--batch", type=int, default=4, help="rows per process")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--backend", default="nccl", help="of mlx.launch: nccl, ring, jaccl")
    parser.add_argument("--again", choices=sorted(OURS.values()), default="nothing")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ahead, options.near, options.mixed = True, 1.0, 0
    if options.one:
        one(options)
        return
    mine = [sys.executable, __file__, *sys.argv[1:], "--one"]
    launch = [Path(sys.executable).parent / "mlx.launch", "-n", str(options.processes), "--backend", options.backend]
    figures = []
    all_rows = [*mine, "--batch", str(options.processes * options.batch)]
    for command in (mine, [*launch, "--", *mine], all_rows):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures.append(json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))))
        done = figures[-1]
        print(f"{done['processes']} x {done['rows']} rows: {done['tokens_per_second']:,.0f} tokens/s", flush=True)
        if len(figures) == 2:
            alone, together = (each["tokens_per_second"] for each in figures)
            print(f"{together / alone / options.processes:.2f} of linear", flush=True)
    several, one_process = (each["losses"] for each in figures[1:])
    off = max(abs(a - b) / abs(b) for a, b in zip(several, one_process, strict=True))
    print(f"losses: {several[0]:.5f} to {several[-1]:.5f}, off those of one process by at most {off:.1e}")


if __name__ == "__main__":
    main()
