"""What a program's host does for a GPU, where there is none: MLX's CUDA build with launches that do nothing.

Memory is the host's, copies copy, kernels are compiled and never run (`pretend_gpu.c`). So Python's and MLX's time for
each step, the number of graphs and launches, the peak of memory and whether a kernel compiles can be seen; what is
computed is nothing, and no second of it is a GPU's. Checks that a kernel computes right are passed over.

    python -m venv cuda && cuda/bin/pip install "mlx[cuda13]==0.32.4" "mlx-lm==0.32.2" -e .
    CUDA_HOME=/usr/local/cuda cuda/bin/python scripts/benchmarks/pretend_gpu.py scripts/benchmarks/decode.py --shapes 4b

CUDA_HOME/include must hold cuda.h and cuda_runtime_api.h; a C compiler is needed, and x86-64. PRETEND_GPU_COUNTS=1
says how often each function of CUDA was called, PRETEND_GPU_KERNELS=1 how many registers each compiled kernel takes.
"""

import atexit
import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def begin() -> ctypes.CDLL:
    """Pretend, from now on and in this process; before MLX is imported."""
    os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")  # cuDNN is not there: attention by products
    made = Path(tempfile.mkdtemp()) / "libcuda.so.1"
    include = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    command = ["cc", "-shared", "-fPIC", "-O2", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", str(made)]
    subprocess.run([*command, str(HERE / "pretend_gpu.c"), "-ldl"], check=True)
    gpu = ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)
    mlx = importlib.util.find_spec("mlx")
    library = next(path for place in mlx.submodule_search_locations for path in Path(place).glob("lib/libmlx.so"))
    ctypes.CDLL(str(library))
    if not gpu.pretend(str(library).encode()):
        raise SystemExit(f"{library} is not MLX's CUDA build.")
    if os.environ.get("PRETEND_GPU_COUNTS"):
        atexit.register(lambda: print("\n".join(f"{n:10} {name}" for name, n in counts(gpu).items()), file=sys.stderr))
    return gpu


def counts(gpu: ctypes.CDLL) -> dict[str, int]:
    """How often each function was called until now."""
    names: list[bytes] = []
    gpu.pretended_names(ctypes.CFUNCTYPE(None, ctypes.c_char_p)(names.append))
    gpu.pretended.restype = ctypes.c_long
    return dict(sorted((name.decode(), gpu.pretended(name)) for name in names))


def pass_over_checks() -> None:
    """What is computed is nothing: all kernels and layers are taken as right, and all logits as near."""
    from mlx_adapters.drafting import one_token
    from mlx_adapters.models import quantized_check

    quantized_check.remembered = lambda kind, measure: (measure(), 0.0)[1]
    quantized_check.are_right = lambda layers, *_, **__: [True] * len(layers)
    one_token._near = lambda logits, expected: True


if __name__ == "__main__":
    begin()
    import mlx_adapters  # noqa: F401

    pass_over_checks()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
