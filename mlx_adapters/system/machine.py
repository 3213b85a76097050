"""What this machine is: versions, device, memory, BLAS."""

import contextlib
import ctypes
import functools
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_adapters.storage import paths
from mlx_adapters.system.blas import INSTALL_OPENBLAS

SLOW_BLAS = "reference BLAS (slow)"
PARENT = "MLX_ADAPTERS_PARENT"  # in a child's environment: the process that started it


def blas_in_use() -> str:
    """The BLAS that MLX's CPU calls resolve to: "Accelerate", "OpenBLAS" or "reference BLAS (slow)"."""
    if sys.platform == "darwin":
        return "Accelerate"
    import mlx.core as mx

    mx.eval(mx.zeros((1,)))
    process = ctypes.CDLL(None)
    symbol, info = getattr(process, "cblas_sgemm", None), _SymbolInfo()
    if symbol is None or not process.dladdr(ctypes.cast(symbol, ctypes.c_void_p), ctypes.byref(info)):
        return SLOW_BLAS
    return "OpenBLAS" if "openblas" in os.path.realpath(os.fsdecode(info.file_name or b"")) else SLOW_BLAS


class _SymbolInfo(ctypes.Structure):
    """glibc's Dl_info: which library a symbol was taken from."""

    _fields_ = [
        (name, ctypes.c_char_p if "name" in name else ctypes.c_void_p)
        for name in ("file_name", "base", "symbol_name", "at")
    ]


_taking = threading.Lock()
_asked: list[int] = []  # by the blocks of `blas_threads` that are open
_own: list[tuple[Callable[[int], None], int]] = []  # what sets each OpenBLAS's, and how many it has without


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Within the block OpenBLAS takes at most so many threads, MLX's and the one that NumPy brings along.

    One for products of thin or small matrices: its others wait for work by asking for it without end, which takes more
    of the cores than the product itself (576 x 8 x 1536 on two cores: 3.0 ms of CPU time with two threads, 0.4 with
    one). Few where others use the cores, since a product waits for all of its threads, and each of them for a core.
    Of several such blocks at once, in one thread or in several, the least holds.
    """
    with _taking:
        if not _asked:
            _own[:] = [(take, told()) for told, take in _switches()]
        _asked.append(count)
        _take_threads()
    try:
        yield
    finally:
        with _taking:
            _asked.remove(count)
            _take_threads()


def _take_threads() -> None:
    for take, own in _own:
        take(min([own, *_asked]))


def _switches() -> Iterator[tuple[Callable[[], int], Callable[[int], None]]]:
    """What tells how many threads an OpenBLAS takes, and what sets it, for each that is loaded."""
    import numpy._core._multiarray_umath as of_numpy

    for library, name in ((None, "openblas_{}_num_threads"), (of_numpy.__file__, "scipy_openblas_{}_num_threads64_")):
        with contextlib.suppress(AttributeError, OSError):  # another BLAS
            found = ctypes.CDLL(library)
            yield getattr(found, name.format("get")), getattr(found, name.format("set"))


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA) by default."""
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.gpu


def on_cuda() -> bool:
    """Whether MLX computes with CUDA by default."""
    import mlx.core as mx

    return on_gpu() and mx.cuda.is_available()


def tool(*command: str) -> str:
    """What a tool of macOS prints, without space around it; "" if it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        paths = "/usr/bin:/usr/sbin:/bin:/sbin"
        done = subprocess.run(command, capture_output=True, timeout=20, env={"PATH": paths}, check=True)
        return done.stdout.decode(errors="replace").strip()
    return ""


def chip_name() -> str:
    """The name of the processor, e.g. "Apple M4 Max" or "AMD EPYC"."""
    if sys.platform == "darwin" and (name := tool("sysctl", "-n", "machdep.cpu.brand_string")):
        return name
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def system_name() -> str:
    """ "macOS 26.1 arm64", "Linux 6.8.0 x86_64". A Python built for an older macOS calls 26 "16"; sw_vers knows."""
    if sys.platform == "darwin":
        return f"macOS {tool('sw_vers', '-productVersion') or platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def performance_cores() -> int:
    """Cores that are worth a process that computes: on a Mac the fast ones, elsewhere those this process may use."""
    if sys.platform == "darwin" and (fast := tool("sysctl", "-n", "hw.perflevel0.physicalcpu")).isdigit():
        return max(1, int(fast))
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory_bytes() -> int:
    """What a model may use: on a Mac Metal's recommended working set, on another GPU its memory, on a CPU what
    is free now."""
    import mlx.core as mx

    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if on_gpu() and info.get(key):
            return int(info[key])
    with contextlib.suppress(OSError, IndexError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return memory_bytes()


def memory_beside_model_bytes() -> int:
    """What other processes may use meanwhile: a quarter of the memory; where the GPU shares it, of what MLX leaves."""
    import mlx.core as mx

    shared = mx.get_active_memory() + mx.get_cache_memory() if mx.metal.is_available() else 0
    return max(0, memory_bytes() - shared) // 4


def versions() -> dict[str, str]:
    """Versions of this package (of the code that runs, whatever is installed) and of what it stands on."""
    from mlx_adapters import __version__

    return {"python": platform.python_version(), "mlx_adapters": __version__, **_installed()}


@functools.cache  # some milliseconds for each package, and at every save; what is installed meanwhile does not run here
def _installed() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    numbers = {}
    for name in ("mlx", "mlx-lm", "numpy", "safetensors", "huggingface-hub", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            numbers[name] = version(name)
    return numbers


def child_environment() -> dict[str, str]:
    """The environment in which a child process finds this package, wherever it lies, and whose child it is."""
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), PARENT: str(os.getpid())}


def typed_command() -> str:
    """How our program was called; "" if it is another one that uses the package."""
    program = Path(sys.argv[0])
    ours = program.stem == "mlx-adapters" or program.parts[-2:] == ("mlx_adapters", "__main__.py")
    return shlex.join(["mlx-adapters", *sys.argv[1:]]) if ours else ""


@dataclass(frozen=True)
class Environment:
    """What `mlx-adapters env` shows."""

    versions: dict[str, str]
    system: str
    chip: str
    cores: int
    memory_bytes: int
    device: str
    device_name: str
    blas: str
    blas_hint: str | None
    home: str

    def to_json(self) -> dict[str, Any]:
        """What describes the machine, as plain JSON values: all fields but `home`, which names its user."""
        return {name: value for name, value in asdict(self).items() if name != "home"}


def environment() -> Environment:
    """Look at this machine: versions, device, BLAS, home folder.

    Example:
        >>> machine = ma.environment()
        >>> machine.cores > 0 and machine.memory_bytes > 0
        True
    """
    import mlx.core as mx

    device = "gpu" if on_gpu() else "cpu"
    name = str(mx.device_info().get("device_name", "")) or chip_name()
    blas = blas_in_use()
    slow = device == "cpu" and blas == SLOW_BLAS
    return Environment(
        versions=versions(),
        system=system_name(),
        chip=chip_name(),
        cores=os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        device=device,
        device_name=name,
        blas=blas,
        blas_hint=INSTALL_OPENBLAS if slow else None,
        home=str(paths.home()),
    )


def made_now() -> dict[str, Any]:
    """The date, the versions and the command line, if it is ours, for the metadata of an adapter in the making."""
    typed = {"command": command} if (command := typed_command()) else {}
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()} | typed
