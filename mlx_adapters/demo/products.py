"""Does this device compute quantized products right? Linear layers, routers and experts in the common precisions.

MLX's CUDA build compiles each kind of product when it is first used, for half a minute and longer. There each precision
is tried by a process of its own (this module, run as a program), beside the other self-tests; what is not done in time
is named. What was compiled is kept by MLX, so another run gets further.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple

from mlx_adapters.config.quantization import Quantization
from mlx_adapters.demo.arithmetic import Outcome
from mlx_adapters.models.quantized_check import LayerCheck, check_layer
from mlx_adapters.system.door import SwitchLinear, mx, nn
from mlx_adapters.system.interrupt import end_with_parent
from mlx_adapters.system.machine import child_environment
from mlx_adapters.units import count

PRECISIONS = (Quantization(4), Quantization(8), Quantization(4, 32), Quantization(4, 32, "mxfp4"))
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(512, 256, bias=False),
    "router": lambda: nn.Linear(512, 8, bias=False),
    "experts": lambda: SwitchLinear(512, 256, 8, bias=False),
}


class Products:
    """The checks of quantized products. Close it: it may have processes."""

    def __init__(self, apart: bool | None = None) -> None:
        """apart: in processes of their own (default: where MLX compiles kernels by CUDA)."""
        apart = mx.cuda.is_available() if apart is None else apart
        self._processes = {q: _start(q) for q in PRECISIONS} if apart else {}

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes.values():
            process.kill()
            process.communicate()

    def outcome(self, until: float) -> Outcome:
        """What was found; processes are waited for until that time of `time.perf_counter`."""
        kinds, missing = list[LayerCheck](), list[str]()
        for quantization in PRECISIONS:
            process = self._processes.get(quantization)
            checks = list(_tried(quantization)) if process is None else _said(process, until)
            kinds += checks
            missing += [f"{name} at {_words(quantization)}" for name in list(LAYERS)[len(checks) :]]
        wrong = [check.kind for check in kinds if not check.right]
        worst = max((check.error for check in kinds), default=0.0)
        text = "; ".join(wrong) if wrong else f"{count(len(kinds), 'kind')}, largest error {100 * worst:.2g} %"
        if missing:
            text += f"; not tried, since MLX compiles each for long at first ({', '.join(missing)})"
        return Outcome(not wrong, text)


def _words(quantization: Quantization) -> str:
    mode = "" if quantization.mode == "affine" else f" {quantization.mode}"
    return f"{quantization.bits} bits in {quantization.group_size}s{mode}"


def _tried(quantization: Quantization) -> Iterator[LayerCheck]:
    options = {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}
    for make in LAYERS.values():
        dense = make()
        dense.set_dtype(mx.bfloat16)
        yield check_layer(dense.to_quantized(**options), mx.bfloat16)


def _start(quantization: Quantization) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "mlx_adapters.demo.products", *map(str, astuple(quantization))]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=pipe, stderr=null, text=True, env=child_environment())


def _said(process: subprocess.Popen[str], until: float) -> list[LayerCheck]:
    """The checks that a process has printed, a line each; it is ended if it takes longer."""
    failed: list[LayerCheck] = []
    try:
        text, _ = process.communicate(timeout=max(until - time.perf_counter(), 0.1))
        if process.returncode:
            failed = [LayerCheck(f"'{shlex.join(process.args[3:])}' ended with {process.returncode}", math.inf, False)]  # type: ignore[index,arg-type]
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    return [LayerCheck(*json.loads(line)) for line in text.splitlines()] + failed


if __name__ == "__main__":
    end_with_parent()
    bits, group_size, mode = sys.argv[1:]
    for check in _tried(Quantization(int(bits), int(group_size), mode)):
        os.write(1, f"{json.dumps(astuple(check))}\n".encode())
