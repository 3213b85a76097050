"""`rename`, `tag`, `use`, `remove`, `prune`: changing what is in the registry."""

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import REFERENCE, confirm, json_option, yes_option
from mlx_adapters.errors import AdapterError
from mlx_adapters.units import count


@click.command("rename")
@click.argument("name", type=REFERENCE)
@click.argument("new")
@json_option
def rename_command(name: str, new: str, as_json: bool) -> None:
    """Give an adapter another name.

    \b
    Example:
      mlx-adapters rename sql sql-v1
    """
    from mlx_adapters.adapters.keeping import rename

    entry = rename(name, new)
    _say(f"'{name}' is now '{new}'.", entry, as_json)


@click.command("tag")
@click.argument("name", type=REFERENCE)
@click.argument("tags", nargs=-1)
@click.option("--remove", "removed", multiple=True, metavar="TAG", help="Take this tag off. Can be repeated.")
@json_option
def tag_command(name: str, tags: tuple[str, ...], removed: tuple[str, ...], as_json: bool) -> None:
    """Add tags to an adapter and take tags off; without either, show them.

    \b
    Example:
      mlx-adapters tag sql production --remove candidate
    """
    from mlx_adapters.adapters.keeping import tag

    now = tag(name, tags, removed)
    _say(f"{name}: {', '.join(now) or 'no tags'}", {"name": name, "tags": now}, as_json)


@click.command("use")
@click.argument("ref", type=REFERENCE)
@json_option
def use_command(ref: str, as_json: bool) -> None:
    """Let the bare name mean the checkpoint NAME@ITERATION.

    \b
    Example:
      mlx-adapters use sql@400
    """
    from mlx_adapters.adapters.keeping import use

    entry = use(ref)
    _say(f"'{entry.name}' now means checkpoint {entry.iteration}.", entry, as_json)


@click.command("remove")
@click.argument("refs", type=REFERENCE, nargs=-1, required=True)
@yes_option
@json_option
def remove_command(refs: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Remove adapters, or single checkpoints (NAME@ITERATION), from the disk.

    \b
    Example:
      mlx-adapters remove sql-old sql@200 --yes
    """
    from mlx_adapters.adapters.keeping import removable, remove

    references = removable(refs)  # a wrong name among several removes nothing
    confirm(f"Remove {', '.join(references)} for good?", yes)
    removed = [remove(ref) for ref in references]
    freed = _output.size(sum(one.freed_bytes for one in removed))
    _say(f"Removed {', '.join(references)}: {freed} freed.", {"removed": removed}, as_json)


@click.command("prune")
@click.argument("names", type=REFERENCE, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every adapter in the registry.")
@click.option("--keep-best/--no-keep-best", default=True, show_default=True, help="Keep the lowest validation loss.")
@click.option("--keep-last", type=click.IntRange(min=0), default=1, show_default=True, help="Keep the last N.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@yes_option
@json_option
def prune_command(
    names: tuple[str, ...], everything: bool, keep_best: bool, keep_last: int, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Remove checkpoints; the best, the last and the one in use stay.

    \b
    Example:
      mlx-adapters prune sql --keep-best --keep-last 2 --dry-run
    """
    from mlx_adapters.adapters.keeping import prune
    from mlx_adapters.sources import registry

    if bool(names) == everything:
        raise click.UsageError("Give names or --all.")
    plans = []
    for name in names or registry.names():
        try:
            plans.append(prune(name, keep_best=keep_best, keep_last=keep_last, dry_run=True))
        except AdapterError as error:
            if names:
                raise
            _output.warn(f"'{name}' is left alone: {error.message}")  # one of many must not hinder the others
    many = sum(len(plan.iterations) for plan in plans)
    total = f"{count(many, 'checkpoint')}, {_output.size(sum(plan.freed_bytes for plan in plans))}"
    if not dry_run and any(plan.iterations for plan in plans):
        confirm(f"Remove {total}?", yes)
        plans = [prune(plan.name, keep_best=keep_best, keep_last=keep_last) for plan in plans]
    if as_json:
        _output.emit_json({"dry_run": dry_run, "pruned": plans})
        return
    for plan in plans:
        _output.say(f"{plan.name}: {', '.join(f'@{i}' for i in plan.iterations) or 'nothing to remove'}")
    _output.note(f"{'Would remove' if dry_run else 'Removed'} {total}.")


def _say(text: str, value: object, as_json: bool) -> None:
    if as_json:
        _output.emit_json(value)
    else:
        _output.out(text)
