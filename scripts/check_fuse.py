"""Does a fuse say what is wrong in a sentence, and leave nothing behind but what `--continue` needs?

Each case is the command `mlx-adapters fuse` on a tiny random model, in a process of its own, on whatever device there
is: a group size that does not divide, 3, 5 and 6 bits, NaN in what one expert sees, kernels that do not compile, memory
that ends in the middle, Ctrl-C, and going on after both. Printed for each: what the command said last, and what is
there afterward that should not be, or lacks. Faults are put in by this script; all else is the program as it is.

    python scripts/check_fuse.py                 # on this device
    python scripts/check_fuse.py --as-on-gpu     # what is chosen on a GPU, computed by the CPU
    python scripts/check_fuse.py --full          # besides, last: a GPU whose memory really is full
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LAYERS = 5  # rounded ones after which a fault comes
LEFT = 300 << 20  # bytes of a GPU's memory that --full leaves
TOLD = ("Error", "Hint", "Warning", "Interrupted")
SMALL = ("--calibration-rows", "8", "--no-check")
WIDE_GROUPS = ("--bits", "3", "--group-size", "128")


def nan_expert() -> None:
    """NaN in the moments of one expert."""
    from mlx_adapters.calibration.moments import ExpertMoments
    from mlx_adapters.system.door import mx

    honest = ExpertMoments.of

    def of(seen, a, b):
        moments = honest(seen, a, b)
        last = mx.arange(b - a)[:, None, None] == b - a - 1
        moments.fisher = mx.where(last, float("nan"), moments.fisher)
        return moments

    ExpertMoments.of = of


def no_kernels() -> None:
    """A word that no compiler knows in all kernels that round."""
    from mlx_adapters.rounding import kernel_texts

    for words in kernel_texts.WORDS.values():
        words["THREAD"] = words["ROW"] = "no_such_word"


def no_memory() -> None:
    """No room for an array from some layer on; what is rounded till then is worth keeping."""
    from mlx_adapters.rounding.workers import Task, Workers

    worth_keeping()
    left = [LAYERS]

    def short(honest):
        def run(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("[malloc] Unable to allocate 12345678 bytes.")
            return honest(*arguments)

        return run

    for owner, name in ((Task, "run_each"), (Task, "run"), (Workers, "submit")):
        setattr(owner, name, short(getattr(owner, name)))


def interrupt() -> None:
    """Ctrl-C after some layers, which are worth keeping."""
    worth_keeping()
    interrupt_early()


def interrupt_early() -> None:
    """Ctrl-C after some layers."""
    from mlx_adapters.assembly.spool import Spool

    put, done = Spool.put, []

    def counted(*arguments):
        put(*arguments)
        done.append(1)
        if len(done) == LAYERS:
            os.kill(os.getpid(), signal.SIGINT)

    Spool.put = counted


def worth_keeping() -> None:
    """As if each layer took a minute."""
    from mlx_adapters.assembly import spool

    spool.WORTH_KEEPING = 0.0


def full() -> None:
    """Little of the GPU's memory is left."""
    from mlx_adapters.system.door import mx
    from mlx_adapters.system.machine import usable_memory_bytes

    held = []
    try:
        while (room := usable_memory_bytes() - mx.get_active_memory() - LEFT) > 1 << 20:
            held.append(mx.zeros((min(room, 1 << 30),), mx.uint8) + 1)
            mx.eval(held[-1])
    except RuntimeError:
        print(f"full at {mx.get_active_memory() / 1e9:.1f} GB", file=sys.stderr)
    full.held = held


FAULTS = {f.__name__: f for f in (nan_expert, no_kernels, no_memory, interrupt, interrupt_early, full)}

KERNELS = "kernels that do not compile"
# name: (model, options, faults one after the other, exit statuses, words that are said)
CASES = {
    "a group size that no layer's inputs divide into": ("none", WIDE_GROUPS, [None], [2], "No layer can"),
    "a group size that some layers' inputs divide into": ("some", WIDE_GROUPS, [None], [0], "left unquantized"),
    "3 bits": ("llama", ("--bits", "3"), [None], [0], "calibrated rounding"),
    "5 bits": ("llama", ("--bits", "5"), [None], [0], "calibrated rounding"),
    "6 bits": ("mixtral", ("--bits", "6"), [None], [0], "calibrated rounding"),
    "NaN in what one expert sees": ("mixtral", ("--bits", "4"), ["nan_expert"], [1], "computes NaN or Inf"),
    KERNELS: ("llama", ("--bits", "4"), ["no_kernels"], [0], "kernels cannot be used"),
    "memory that ends, then --continue": ("llama", ("--bits", "4"), ["no_memory", None], [1, 0], "too little memory"),
    "Ctrl-C, then --continue": ("llama", ("--bits", "4"), ["interrupt", None], [130, 0], "--continue"),
    "Ctrl-C within a minute": ("llama", ("--bits", "4"), ["interrupt_early"], [130], "Interrupted"),
}  # fmt: skip


def child(fault: str, as_on_gpu: bool, arguments: list[str]) -> None:
    """The program, with a fault in it."""
    sys.argv = ["mlx-adapters", *arguments]
    import mlx_adapters  # noqa: F401  (before mlx: it loads the fast BLAS on Linux)
    from mlx_adapters.system import machine

    if as_on_gpu:
        import mlx.core as mx

        plain, machine.on_gpu = mx.gather_mm, lambda: True
        mx.gather_mm = lambda a, b, *rest, **more: plain(  # the CPU has no product of experts in 16 bits
            a.astype(mx.float32), b.astype(mx.float32), *rest, **more
        ).astype(a.dtype)
    FAULTS.get(fault, lambda: None)()
    from mlx_adapters.__main__ import main as run

    run()


def models(work: Path) -> bool:
    """The tiny bases, and an adapter on each; whether this device is a GPU."""
    from helpers.fusing import visible_adapter
    from helpers.tiny_models import build_model

    import mlx_adapters  # noqa: F401
    from mlx_adapters.models.adapter import write_adapter
    from mlx_adapters.system.machine import on_gpu

    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    some, none = {"num_hidden_layers": 1}, {"intermediate_size": 64, "num_hidden_layers": 1}
    kinds = {"llama": ("llama", wide), "mixtral": ("mixtral", {}), "some": ("llama", some), "none": ("llama", none)}
    for name, (kind, config) in kinds.items():
        build_model(work / name, kind, bits=4, **config)
        write_adapter(visible_adapter(work / name), work / f"{name}-adapter")
    return on_gpu()


def case(work: Path, name: str, as_on_gpu: bool) -> bool:
    """Go through one case and tell of it; whether all is as it should be."""
    model, options, faults, statuses, words = CASES[name]
    folder = work / name.replace(" ", "-").replace(",", "").replace("'", "")
    folder.mkdir()
    asked = ["fuse", str(work / f"{model}-adapter"), str(folder / "out"), "--base", str(work / model), *SMALL, *options]
    wrong, told, began = [], [], time.monotonic()
    for number, (fault, status) in enumerate(zip(faults, statuses, strict=True)):
        again = ["--continue"] if number else []
        command = [sys.executable, __file__, "--child", str(fault), *["--as-on-gpu"] * as_on_gpu, "--", *asked, *again]
        environment = os.environ | {"MLX_ADAPTERS_HOME": str(work / "home")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        told += [line for line in lines if line.startswith(TOLD) or words in line or "--continue" in line]
        if done.returncode != status or "Traceback" in done.stderr:
            wrong.append(f"exit {done.returncode}, not {status}: {' | '.join(lines[-4:])}")
        there, kept = sorted(path.name for path in folder.iterdir()), len(faults) > number + 1
        expected = [".out.mlx-adapters-parts"] if kept else ["out"] if status == 0 else []
        if there != expected:
            wrong.append(f"there is {there}, not {expected}")
    if words not in " ".join(told):
        wrong.append(f"nothing was said of '{words}'")
    if "--bits" in options and statuses[-1] == 0 and (folder / "out").is_dir():
        written = json.loads((folder / "out" / "config.json").read_text())["quantization"]
        told.append(f"written: {written['bits']} bits, groups of {written['group_size']}")
        if str(written["bits"]) != options[1]:
            wrong.append("other bits than were asked for")
    print(f"{'FAIL' if wrong else 'ok  '} {name} ({time.monotonic() - began:.1f} s)", flush=True)
    for line in [*dict.fromkeys(told), *wrong]:
        print(f"       {line}", flush=True)
    return not wrong


def main() -> None:
    """All cases, some at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-on-gpu", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.as_on_gpu, options.arguments)
        return
    began, work = time.monotonic(), Path(tempfile.mkdtemp())
    try:
        gpu = models(work) or options.as_on_gpu
        names = [name for name in CASES if gpu or name != KERNELS]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            fine = list(pool.map(lambda name: case(work, name, options.as_on_gpu), names))
        if options.full:
            CASES["a GPU that is full"] = ("llama", ("--bits", "4"), ["full"], [0], "")
            fine.append(case(work, "a GPU that is full", options.as_on_gpu))
    finally:
        shutil.rmtree(work)
    print(f"{sum(fine)} of {len(fine)} as they should be, {time.monotonic() - began:.0f} s")
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
