"""`env`: what this machine is, and whether it computes right."""

from typing import Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import json_option
from mlx_adapters.units import count


@click.command("env")
@click.option("--check", is_flag=True, help="Also run the self-tests on this device (under a minute, no network).")
@json_option
@click.pass_context
def env_command(ctx: click.Context, check: bool, as_json: bool) -> None:
    """Show versions, device, BLAS and the home folder; with --check, a block to paste into a report.

    Ends with status 1 if a self-test failed.

    \b
    Example:
      mlx-adapters env --json
      mlx-adapters env --check
    """
    if check:
        _check(ctx, as_json)
        return
    from mlx_adapters.system.machine import environment

    found = environment()
    if as_json:
        _output.emit_json(found)
        return
    _show(found)
    _output.out(f"{'home':<16} {found.home}")


def _show(found: Any) -> None:
    for name, version in found.versions.items():
        _output.out(f"{name:<16} {version}")
    cores, memory = count(found.cores, "core"), _output.size(found.memory_bytes)
    _output.out(f"{'system':<16} {found.system}, {cores}, {memory} memory")
    if found.chip != found.device_name:
        _output.out(f"{'chip':<16} {found.chip}")
    _output.out(f"{'device':<16} {found.device} ({found.device_name})")
    _output.out(f"{'BLAS':<16} {found.blas}")
    if found.blas_hint:
        _output.out(f"{'':<16} OpenBLAS makes it some 50 times faster: {found.blas_hint}")


def _short(value: str | float | None) -> str:
    return f"{value:.1f}" if isinstance(value, float) else value or "unknown"


def _check(ctx: click.Context, as_json: bool) -> None:
    from mlx_adapters.demo.selftest import self_test

    found = self_test(on_event=_output.progress())
    if as_json:
        _output.emit_json(
            {
                "passed": found.passed,
                "environment": found.environment.to_json(),
                "conditions": found.conditions,
                "checks": found.checks,
                "seconds": found.seconds,
            }
        )
    else:
        _show(found.environment)
        state = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in found.conditions.items())
        _output.out(f"{'conditions':<16} {state}")
        for check in found.checks:
            mark = "passed" if check.passed else "FAILED"
            _output.out(f"{check.name:<16} {mark}: {check.seen} ({check.seconds:.1f} s)")
        good = sum(check.passed for check in found.checks)
        _output.out(f"{'self-test':<16} {good} of {count(len(found.checks), 'check')} passed in {found.seconds:.0f} s")
        _output.note("Paste this block into a report: it names no one.")
    if not found.passed:
        ctx.exit(1)
