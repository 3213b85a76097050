"""A fast BLAS for MLX on Linux without a GPU, loaded just before MLX.

MLX's Linux CPU wheel is linked to the reference BLAS. Where OpenBLAS is loaded first with global symbols,
its functions are taken instead: 5 GFLOP/s becomes 150 to 280 on two cores (measured, mlx 0.32.4). It must
happen before `mlx.core` is imported, so importing this package sets a hook that does it then.
"""

import os
import sys

OPENBLAS = "libopenblas.so.0"
INSTALL_OPENBLAS = "install it with 'sudo apt-get install libopenblas0' (Debian, Ubuntu); nothing else is needed."


class _LoadFirst:
    """A finder that finds nothing; being asked for `mlx.core` makes it load OpenBLAS, if there is one."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            sys.meta_path.remove(self)
            import contextlib
            import ctypes

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
