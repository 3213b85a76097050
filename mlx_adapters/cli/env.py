"""`env`: what this machine is."""

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import json_option
from mlx_adapters.units import count


@click.command("env")
@json_option
def env_command(as_json: bool) -> None:
    """Show versions, device, BLAS and the home folder.

    \b
    Example:
      mlx-adapters env --json
    """
    from mlx_adapters.machine import environment

    found = environment()
    if as_json:
        _output.emit_json(found)
        return
    for name, version in found.versions.items():
        _output.out(f"{name:<16} {version}")
    cores, memory = count(found.cores, "core"), _output.size(found.memory_bytes)
    _output.out(f"{'system':<16} {found.system}, {cores}, {memory} memory")
    _output.out(f"{'device':<16} {found.device} ({found.device_name})")
    _output.out(f"{'BLAS':<16} {found.blas}")
    if found.blas_hint:
        _output.out(f"{'':<16} OpenBLAS makes it some 50 times faster: {found.blas_hint}")
    _output.out(f"{'home':<16} {found.home}")
