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

    surroundings = environment()
    if as_json:
        _output.emit_json(surroundings)
        return
    _show(surroundings)
    _output.out(f"{'home':<16} {surroundings.home}")


def _show(surroundings: Any) -> None:
    for name, version in surroundings.versions.items():
        _output.out(f"{name:<16} {version}")
    cores, memory = count(surroundings.cores, "core"), _output.size(surroundings.memory_bytes)
    _output.out(f"{'system':<16} {surroundings.system}, {cores}, {memory} memory")
    if surroundings.chip != surroundings.device_name:
        _output.out(f"{'chip':<16} {surroundings.chip}")
    _output.out(f"{'device':<16} {surroundings.device} ({surroundings.device_name})")
    _output.out(f"{'BLAS':<16} {surroundings.blas}")
    if surroundings.blas_hint:
        _output.out(f"{'':<16} OpenBLAS makes it some 50 times faster: {surroundings.blas_hint}")


def _short(value: str | float | None) -> str:
    return f"{value:.1f}" if isinstance(value, float) else value or "unknown"


def _check(ctx: click.Context, as_json: bool) -> None:
    from mlx_adapters.demo.selftest import self_test

    test = self_test(on_event=_output.progress())
    if as_json:
        _output.emit_json(
            {
                "passed": test.passed,
                "environment": test.environment.to_json(),
                "conditions": test.conditions,
                "checks": test.checks,
                "seconds": test.seconds,
            }
        )
    else:
        _show(test.environment)
        state = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in test.conditions.items())
        _output.out(f"{'conditions':<16} {state}")
        for check in test.checks:
            mark = "passed" if check.passed else "FAILED"
            _output.out(f"{check.name:<16} {mark}: {check.seen} ({check.seconds:.1f} s)")
        good = sum(check.passed for check in test.checks)
        _output.out(f"{'self-test':<16} {good} of {count(len(test.checks), 'check')} passed in {test.seconds:.0f} s")
        _output.note("Paste this block into a report: it names no one.")
    if not test.passed:
        ctx.exit(1)
