"""Each test gets an empty home folder and no network; tiny and real models are built once per session."""

import os

# Read once by huggingface_hub, MLX and OpenBLAS, so they must be set before any of them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLX_ENABLE_TF32"] = "0"  # on a GPU: float32 products with 24 bits, not 11
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import fcntl
import gc
import hashlib
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from helpers.kernels import read_header_once

import mlx_adapters  # before mlx: it loads the fast BLAS on Linux
from mlx_adapters.system import machine

AS_ON_GPU = bool(os.environ.get("MLX_ADAPTERS_AS_ON_GPU"))  # what is chosen on a GPU is chosen here; the CPU computes
told = {"gpu": AS_ON_GPU}
if AS_ON_GPU:
    import mlx.core as mx

    plain = mx.gather_mm
    machine.on_gpu = lambda: told["gpu"]
    # the CPU has no product of experts in 16 bits
    mx.gather_mm = lambda a, b, *rest, **more: plain(a.astype(mx.float32), b.astype(mx.float32), *rest, **more).astype(
        a.dtype
    )

import mlx_adapters.system.door  # noqa: E402, F401  (before mlx-lm, which lowers the limit of open files for good)

# The same examples everywhere, however long one takes; MLX_ADAPTERS_SEARCH=1 looks for others.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("search" if os.environ.get("MLX_ADAPTERS_SEARCH") else "steady")

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # ignored under nohup and in a shell's background
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# Nothing waits for the disk: a killed process loses nothing that it wrote, and nobody pulls the plug of a test.
os.fsync = lambda descriptor: None
vars(fcntl).pop("F_FULLFSYNC", None)

LOOPBACK = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None)


def pytest_configure(config: pytest.Config) -> None:
    """Once for all workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="kernels-"))
        read_header_once(folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a Mac the tests marked `metal` are not collected. On a GPU that is pretended the embedded real model is
    told the truth: a CPU takes hours for it in 16 bits. The longest come first, so that no worker is left alone."""
    items.sort(key=lambda item: item.path.name != "test_torture.py")
    if sys.platform != "darwin":
        metal = [item for item in items if item.get_closest_marker("metal")]
        items[:] = [item for item in items if item not in metal]
        config.hook.pytest_deselected(items=metal)
    for item in items if AS_ON_GPU else ():
        names = getattr(item, "fixturenames", [])
        if "demo_home" in names:
            names.insert(0, "on_cpu")


def pytest_collection_finish() -> None:
    """What the suite itself holds, 370,000 objects, is no garbage; the package looks for garbage before it measures."""
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty home folder of this test; nothing of the user's own is seen."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(folder))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets reach this machine only."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    def guarded_look_up(host, *arguments, **keywords):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in LOOPBACK:
            raise AssertionError(f"a test tried to look up {host}")
        return look_up(host, *arguments, **keywords)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark's processes measure is measured in this one."""
    from helpers.benchmarks import measure_here

    measure_here(monkeypatch)


@pytest.fixture
def knows_no_case(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """`knows_no_case(path)`: the path in capital letters, which leads there as on a disk that knows no case.

    A link stands for it; nothing tells that it is one, and renaming to it is a change of case.
    """
    look, move = os.stat, os.rename

    def is_spelling(path: str | Path) -> bool:
        try:
            told = look(path, follow_symlinks=False)
            return stat.S_ISLNK(told.st_mode) and os.readlink(path).upper() == os.path.basename(path)
        except (OSError, TypeError, ValueError):
            return False

    def found(path, *, dir_fd=None, follow_symlinks=True):
        return look(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks or is_spelling(path))

    def renamed(source, target, **options):
        if is_spelling(target):
            os.unlink(target)
        move(source, target, **options)

    def capital(path: Path) -> Path:
        spelled = path.parent / path.name.upper()
        if not os.path.lexists(spelled):
            spelled.symlink_to(path.name)
        return spelled

    monkeypatch.setattr(os, "stat", found)
    monkeypatch.setattr(os, "lstat", lambda path, *, dir_fd=None: found(path, dir_fd=dir_fd, follow_symlinks=False))
    monkeypatch.setattr(os, "rename", renamed)
    return capital


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama")`, `tiny_model("qwen3", bits=4)`: a tiny model's folder, made once per run. Do not change it.

    Takes the keywords of `tiny_models.build_model`; equal calls give the same folder.
    """
    from helpers.tiny_models import build_model

    from mlx_adapters.storage.locks import lock_file

    root, built = shared(tmp_path_factory) / "tiny", {}

    def factory(architecture: str = "llama", bits: int | None = None, **options) -> Path:
        key = (architecture, bits, *sorted(options.items()))
        if key not in built:
            folder = root / f"{architecture}-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
            lock, part = folder.with_suffix(".lock"), folder.with_suffix(".part")
            root.mkdir(exist_ok=True)
            lock.touch()
            with lock_file(lock, wait=True):
                if not folder.exists():
                    build_model(part, architecture, bits=bits, **options).rename(folder)
            built[key] = folder
        return built[key]

    return factory


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, one for all its workers."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder in which the embedded real model is made, once per run, by the code under test."""
    from mlx_adapters.sources.demo_base import demo_base_folder

    root = shared(tmp_path_factory)  # the lock lets one of the workers make it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(root / "demo-home"))
        demo_base_folder()
    return root / "demo-home"


@pytest.fixture(scope="session")
def demo_base(demo_home: Path) -> Path:
    """The folder of the embedded real model. Do not change it."""
    return demo_home / "bases" / "demo"


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """MLX computes on the CPU, whatever this machine has: its quantized products are right there."""
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    told["gpu"] = False
    yield
    told["gpu"] = AS_ON_GPU
    mx.set_default_device(before)
