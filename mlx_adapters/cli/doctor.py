"""`doctor`: are several machines ready to train together?"""

from pathlib import Path

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import UserPath, json_option


@click.command("doctor")
@click.option("--hosts", metavar="A,B", help="Machines to ask over ssh, as for mlx.launch; 127.0.0.1 is this one.")
@click.option("--hostfile", type=UserPath(path_type=Path), help="Or a host file of mlx.launch.")
@click.option("--base", metavar="BASE", help="Compare this base model's weights.")
@click.option("--data", metavar="DIR", help="Compare this data.")
@click.option("--python", metavar="PATH", help="The interpreter on the hosts [the path of this one].")
@json_option
@click.pass_context
def doctor_command(
    ctx: click.Context,
    hosts: str | None,
    hostfile: Path | None,
    base: str | None,
    data: str | None,
    python: str | None,
    as_json: bool,
) -> None:
    """Compare the machines of a run before it: versions, base and data. Nothing is started or downloaded.

    Ends with status 1 if one differs or cannot be asked. Paths must be the same on all; docs/distributed.md says more.

    \b
    Example:
      mlx-adapters doctor --hosts mac-a,mac-b --base ./base --data data/sql
    """
    from mlx_adapters.demo.hosts import ask_here, ask_hosts, read_hosts

    if hosts is not None and hostfile is not None:
        raise click.UsageError("Give --hosts or --hostfile.")
    if hosts is None and hostfile is None:
        answers = ask_here(base, data)
    else:
        arguments = [part for name, value in (("--base", base), ("--data", data)) if value for part in (name, value)]
        answers = ask_hosts(read_hosts(hosts, hostfile), arguments, python)
    if as_json:
        _output.emit_json(answers)
    else:
        names = list(dict.fromkeys(name for one in answers.hosts for name in one.facts))
        rows = [[name, *(one.facts.get(name, "-") for one in answers.hosts)] for name in names]
        _output.table(["", *(one.host for one in answers.hosts)], rows)
        for text in answers.differences:
            _output.warn(text)
        if len(answers.hosts) > 1 and answers.sound:
            _output.out("All have the same.")
    if not answers.sound:
        ctx.exit(1)
