"""A fast BLAS for MLX on Linux without a GPU, loaded just before MLX.

MLX's Linux CPU wheel is linked to the reference BLAS. Where OpenBLAS is loaded first with global symbols,
its functions are taken instead: 5 GFLOP/s becomes 150 to 280 on two cores (measured, mlx 0.32.4). It must
happen before `mlx.core` is imported, so importing this package sets a hook that does it then.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator

OPENBLAS = "libopenblas.so.0"
INSTALL_OPENBLAS = "install it with 'sudo apt-get install libopenblas0' (Debian, Ubuntu); nothing else is needed."


class _LoadFirst:
    """A finder that finds nothing; being asked for `mlx.core` makes it load OpenBLAS, if there is one."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            sys.meta_path.remove(self)
            with contextlib.suppress(OSError):
                ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)


def keep_float32() -> None:
    """Have MLX compute float32 products in float32 on GPUs too, unless the user has set MLX_ENABLE_TF32.

    CUDA's default, and that of Apple's newest GPUs, is TF32, which keeps 10 bits of a factor: too few for gradients,
    moments and judgments. MLX reads the variable once, when it starts; child processes inherit it.
    """
    if "mlx.core" not in sys.modules:
        os.environ.setdefault("MLX_ENABLE_TF32", "0")


def load_before_mlx() -> None:
    """Arrange that OpenBLAS is loaded just before MLX, on Linux."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        sys.meta_path.insert(0, _LoadFirst())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block OpenBLAS takes one thread, MLX's and the one that NumPy brings along.

    For products of thin or small matrices: its others wait for work by asking for it without end, which takes more of
    the cores than the product itself (576 x 8 x 1536 on two cores: 3.0 ms of CPU time with two threads, 0.4 with one),
    and on a busy machine a product waits for all of them.
    """
    before = [(take, count()) for count, take in _switches()]
    for take, _ in before:
        take(1)
    try:
        yield
    finally:
        for take, count in before:
            take(count)


def _switches() -> Iterator[tuple[Callable[[], int], Callable[[int], None]]]:
    """What tells how many threads an OpenBLAS takes, and what sets it, for each that is loaded."""
    import numpy._core._multiarray_umath as of_numpy

    for library, name in ((None, "openblas_{}_num_threads"), (of_numpy.__file__, "scipy_openblas_{}_num_threads64_")):
        with contextlib.suppress(AttributeError, OSError):  # another BLAS
            found = ctypes.CDLL(library)
            yield getattr(found, name.format("get")), getattr(found, name.format("set"))
