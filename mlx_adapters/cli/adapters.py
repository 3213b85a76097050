"""`list` and `show`: the registry."""

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import REFERENCE, json_option


@click.command("list")
@click.option("--base", metavar="BASE", help="Only adapters of this base.")
@json_option
def list_command(base: str | None, as_json: bool) -> None:
    """Show all adapters with base, rank, checkpoints and loss.

    \b
    Example:
      mlx-adapters list --base demo
    """
    from mlx_adapters.registry import list_adapters

    entries = list_adapters(base)
    if as_json:
        _output.emit_json({"adapters": entries})
        return
    rows = [
        (e.name, e.type or "-", _output.number(e.rank), _output.number(e.best_validation_loss), str(len(e.iterations)),
         _output.size(e.size_bytes), (e.created or "-")[:16], e.problem or e.base or "-")
        for e in entries
    ]  # fmt: skip
    if not rows:
        _output.note("No adapters yet. 'mlx-adapters train' makes one.")
    else:
        _output.table(
            ("NAME", "TYPE", "RANK", "VALID LOSS", "CHECKPOINTS", "SIZE", "DATE", "BASE"), rows, right=(2, 3, 4, 5)
        )


@click.command("show")
@click.argument("ref", type=REFERENCE)
@json_option
def show_command(ref: str, as_json: bool) -> None:
    """Show one adapter: settings, data, losses, layers.

    \b
    Example:
      mlx-adapters show sql@600
    """
    from mlx_adapters.registry import load_adapter

    adapter = load_adapter(ref)
    if as_json:
        _output.emit_json({"config": adapter.config, "metadata": adapter.metadata, "parameters": adapter.parameters})
        return
    _output.out(repr(adapter))
