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
    _output.facts([*_facts(surroundings), ("home", _output.place(surroundings.home))])


def _facts(surroundings: Any) -> list[tuple[str, str]]:
    cores, memory = count(surroundings.cores, "core"), _output.size(surroundings.memory_bytes)
    facts = [*surroundings.versions.items(), ("system", f"{surroundings.system}, {cores}, {memory} memory")]
    if surroundings.chip != surroundings.device_name:
        facts.append(("chip", surroundings.chip))
    facts += [("device", f"{surroundings.device} ({surroundings.device_name})"), ("BLAS", surroundings.blas)]
    if surroundings.blas_hint:
        facts.append(("", f"OpenBLAS makes it some 50 times faster: {surroundings.blas_hint}"))
    return facts


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
        state = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in test.conditions.items())
        good = sum(check.passed for check in test.checks)
        checks = [
            (check.name, f"{'passed' if check.passed else 'FAILED'}: {check.seen} ({check.seconds:.1f} s)")
            for check in test.checks
        ]
        result = f"{good} of {count(len(test.checks), 'check')} passed in {test.seconds:.0f} s"
        _output.facts([*_facts(test.environment), ("conditions", state), *checks, ("self-test", result)])
        _output.note("Paste this block into a report: it names no one.")
    if not test.passed:
        ctx.exit(1)
