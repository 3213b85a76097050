"""Float32 products are float32: MLX reads its switch for TF32 once, so it is set before MLX starts."""

import os
import subprocess
import sys

import pytest

SHOW = """
import os, sys
{before}
import mlx_adapters
early = "mlx.core" in sys.modules
from mlx_adapters.system.door import mx
print(os.environ.get("MLX_ENABLE_TF32"), early)
"""


@pytest.mark.parametrize(
    "value, before, expected",
    [(None, "", "0 False"), ("1", "", "1 False"), ("0", "", "0 False"), (None, "import mlx.core", "None True")],
)
def test_tf32_is_off_unless_the_user_wants_it(value, before, expected):
    """Set before MLX is imported; what the user set stays, and after MLX has started it would be a lie."""
    environment = {name: text for name, text in os.environ.items() if name != "MLX_ENABLE_TF32"}
    if value is not None:
        environment["MLX_ENABLE_TF32"] = value
    command = [sys.executable, "-c", SHOW.format(before=before)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
