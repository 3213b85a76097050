"""`python -m mlx_adapters` is `mlx-adapters`."""

from mlx_adapters.cli import main

main()
