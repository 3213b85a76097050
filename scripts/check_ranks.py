"""Does a run of several processes end, whole, when one of them is killed in the middle? And does it go on?

A tiny random model is trained by `mlx.launch`; each rank in its turn gets SIGKILL once the run is under way. Printed
for each: how long the others took to end, what they said, the last iteration in the folder, and how the resume ended.

    python scripts/check_ranks.py --backend ring          # CPU
    python scripts/check_ranks.py --backend nccl          # two GPUs
    python scripts/check_ranks.py --backend ring --peers  # as on GPUs: with connections beside the sums
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ITERATIONS, WAITED = 2000, 30


def write_data(folder: Path) -> Path:
    """Rows whose answers follow from their prompts."""
    folder.mkdir(parents=True)
    numbers = random.Random(0)
    for name, count in (("train", 64), ("valid", 8)):
        rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in (numbers.random() for _ in range(count))]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def ranks_of(name: str) -> dict[int, int]:
    """The processes that train `name`, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = dict(pair.partition(b"=")[::2] for pair in (entry / "environ").read_bytes().split(b"\0"))
        except (OSError, ValueError):
            continue
        if name.encode() in words and b"MLX_RANK" in environment and b"mlx_adapters" in words:
            found[int(environment[b"MLX_RANK"])] = int(entry.name)
    return found


def iterations(log: Path) -> int:
    """The last iteration that the log knows of."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((json.loads(line).get("iteration", 0) for line in lines), default=0)


def main() -> None:
    """Kill each rank once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="ring")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--ranks", nargs="*", type=int, help="the ranks to kill")
    options = parser.parse_args()
    from helpers.tiny_models import build_model

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data, base = write_data(work / "data"), build_model(work / "base", "llama")
        os.environ |= {"MLX_ADAPTERS_HOME": str(work / "home"), "PYTHONPATH": str(ROOT)}
        os.environ |= {"NCCL_HOST_IP": "127.0.0.1"} if options.peers else {}
        program = [sys.executable, "-m", "mlx_adapters", "train"]
        launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", str(options.processes)]
        launch += ["--backend", options.backend, "--"]
        for rank in options.ranks or reversed(range(options.processes)):
            name, log = f"rank{rank}", work / f"log{rank}.jsonl"
            asked = [str(base), "--data", str(data), "--name", name, "--iterations", str(ITERATIONS), "--log", str(log)]
            run = subprocess.Popen(
                [*launch, *program, *asked, "--report-every", "5", "--save-every", "15", "--batch-size", "4"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            begun = time.monotonic()
            while iterations(log) < 20 and run.poll() is None and time.monotonic() - begun < WAITED:
                time.sleep(0.05)
            if iterations(log) < 20 or rank not in ranks_of(name):
                for pid in ranks_of(name).values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit(f"rank {rank}: no 20 iterations within {WAITED} s: {run.communicate(timeout=20)[0]}")
            print(f"rank {rank}: under way after {time.monotonic() - begun:.0f} s", flush=True)
            time.sleep(random.random())
            os.kill(ranks_of(name)[rank], signal.SIGKILL)
            killed = time.monotonic()
            others = {other: pid for other, pid in ranks_of(name).items() if other != rank}
            while any(Path(f"/proc/{pid}").exists() for pid in others.values()) and time.monotonic() - killed < WAITED:
                time.sleep(0.02)
            took = time.monotonic() - killed
            try:
                said = run.communicate(timeout=20)[0]
            except subprocess.TimeoutExpired:
                for pid in ranks_of(name).values():
                    os.kill(pid, signal.SIGKILL)
                run.kill()
                said = "they wait for ever"
            told = [line for line in said.splitlines() if line.startswith(("Error", "Hint", "Traceback", "they wait"))]
            saved = sorted((work / "home" / "adapters" / name).glob("0*_adapters.safetensors"))
            print(f"rank {rank} killed: the others ended after {took:.1f} s; {' '.join(told)}", flush=True)
            print(f"  saved: {[path.name for path in saved]}", flush=True)
            resumed = subprocess.run(
                [*program, "--resume", name, "--iterations", str(iterations(log) + 20)], capture_output=True, text=True
            )
            last = (resumed.stdout + resumed.stderr).strip().splitlines()[-1]
            print(f"  resumed by one process: status {resumed.returncode}, {last}", flush=True)


if __name__ == "__main__":
    main()
