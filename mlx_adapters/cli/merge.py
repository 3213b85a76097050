"""`merge`, `subtract`, `scale`, `interpolate`, `extract`: adapters out of others."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import (
    REFERENCE,
    Reads,
    carried,
    json_option,
    name_template_option,
    new_name,
    overwrite_option,
    trust_option,
)
from mlx_adapters.cli._output import number
from mlx_adapters.cli._settings import option, options
from mlx_adapters.config.merging import MergeSettings
from mlx_adapters.config.quantization import DTYPES
from mlx_adapters.config.training import LoraConfig
from mlx_adapters.units import count

if TYPE_CHECKING:
    from mlx_adapters.models.adapter import Adapter

Command = TypeVar("Command", bound=Callable[..., Any])
any_base_option = option(MergeSettings, "any_base")


def name_options(command: Command) -> Command:
    """--name, --name-template and --overwrite of a new adapter."""
    decorators = (
        click.option("--name", required=True, metavar="NAME", help="Name of the new adapter."),
        name_template_option,
        overwrite_option,
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


@click.command("merge")
@click.argument("refs", type=REFERENCE, nargs=-1, required=True)
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="One for each adapter, in their order; may be negative [1/n each].",
)
@option(MergeSettings, "method", help="One of those above.")
@options(MergeSettings, without="method")
@name_options
@json_option
def merge_command(
    refs: tuple[str, ...],
    weights: tuple[float, ...],
    name: str,
    name_template: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Merge adapters of one base into one adapter.

    \b
    cat     the exact weighted sum of the updates; ranks add up
    svd     the nearest update of rank R to that sum
    linear  adds A and B apart as PEFT does: cheap, but NOT the weighted sum
    ties, dare-linear, dare-ties, magnitude-prune
            prune and elect on A and B apart; with -svd on the full updates

    \b
    Example:
      mlx-adapters merge sql chat --weight 0.7 --weight 0.3 --name both
      mlx-adapters merge sql chat --method svd --rank auto --energy 0.99 --name both
    """
    from mlx_adapters.merging.recipes import merge

    merged = merge(
        refs,
        list(weights) or None,
        name=new_name(name, name_template),
        overwrite=overwrite,
        on_event=_output.progress(),
        **settings,
    )
    _show(merged, as_json)


@click.command("subtract")
@click.argument("a", type=REFERENCE)
@click.argument("b", type=REFERENCE)
@click.option("--weight", type=float, default=1.0, show_default=True, help="How much of B to take away.")
@any_base_option
@name_options
@json_option
def subtract_command(
    a: str, b: str, weight: float, any_base: bool, name: str, name_template: str | None, overwrite: bool, as_json: bool
) -> None:
    """Take what B has learned away from A: ΔA - weight · ΔB, exactly.

    \b
    Example:
      mlx-adapters subtract chat-sql sql --name chat-only
    """
    from mlx_adapters.merging.recipes import subtract

    new = new_name(name, name_template)
    _show(subtract(a, b, weight=weight, name=new, any_base=any_base, overwrite=overwrite), as_json)


@click.command("scale", context_settings={"ignore_unknown_options": True})  # -0.5 is a factor
@click.argument("ref", type=REFERENCE)
@click.argument("factor", type=float)
@name_options
@json_option
def scale_command(
    ref: str, factor: float, name: str, name_template: str | None, overwrite: bool, as_json: bool
) -> None:
    """Make an adapter stronger or weaker: factor · ΔW, exactly.

    \b
    Example:
      mlx-adapters scale sql 0.5 --name sql-half
    """
    from mlx_adapters.merging.recipes import scale

    _show(scale(ref, factor, name=new_name(name, name_template), overwrite=overwrite), as_json)


@click.command("interpolate")
@click.argument("a", type=REFERENCE)
@click.argument("b", type=REFERENCE)
@click.option(
    "--steps", type=click.IntRange(min=2), default=5, show_default=True, help="Points, the two ends included."
)
@click.option("--data", metavar="DIR", help="Show the loss on this data at each point.")
@click.option("--base", metavar="BASE", help="Base to compute the losses on [the adapters' own].")
@click.option("--name", metavar="NAME", help="Keep every point as NAME-0.25, or with --best the best as NAME.")
@click.option("--best", is_flag=True, help="With --data and --name: keep the point of the lowest loss only.")
@any_base_option
@overwrite_option
@trust_option
@json_option
@Reads(needs={"base": "data", "best": "data", "overwrite": "name"})
def interpolate_command(
    a: str,
    b: str,
    steps: int,
    data: str | None,
    base: str | None,
    name: str | None,
    best: bool,
    any_base: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Go from A to B in even steps: (1 - t) · ΔA + t · ΔB, exactly.

    \b
    Example:
      mlx-adapters interpolate sql chat --steps 5 --data data/sql
    """
    from mlx_adapters.merging.sweep import keep, sweep

    if best and not (data and name):
        raise click.UsageError("--best needs --data and --name.")
    if not data and not name:
        raise click.UsageError("Give --data to see losses, --name to keep the points, or both.")
    on_event = _output.progress()
    points = sweep(a, b, steps=steps, data=data, base=base, any_base=any_base, on_event=on_event)
    kept = keep(points, name, best=best, overwrite=overwrite, reads=(a, b)) if name else {}
    if as_json:
        _output.emit_json({"points": [{"t": p.t, "loss": p.loss, "name": kept.get(p.t)} for p in points]})
        return
    rows = [(number(p.t), number(p.loss, 4), str(p.adapter.config.rank), kept.get(p.t, "-")) for p in points]
    _output.table(("T", "LOSS", "RANK", "KEPT AS"), rows, right=(0, 1, 2))
    best_first = sorted((p for p in points if p.loss is not None), key=lambda p: p.loss or 0.0) or points
    if best_first[0].loss is not None:
        _output.say(f"The lowest loss is {number(best_first[0].loss, 4)}, at {number(best_first[0].t)}.")
    if kept:
        mine = _output.word(next(kept[p.t] for p in best_first if p.t in kept))
        _output.next_steps(f'mlx-adapters generate "..." --adapter {mine}{carried("generate")}')
    else:
        line = f"mlx-adapters interpolate {_output.word(a)} {_output.word(b)}{carried('interpolate')}"
        _output.next_steps(f"{line} --name NAME --best")


@click.command("extract")
@click.argument("finetuned", metavar="FINETUNED")
@click.argument("base", metavar="BASE")
@option(MergeSettings, "rank", default=16, show_default=True, help="Rank of the adapter.")
@option(MergeSettings, "energy")
@option(LoraConfig, "target_modules")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES[1:]),
    default="float32",
    show_default=True,
    help="Type of the adapter's tensors.",
)
@name_options
@trust_option
@json_option
def extract_command(
    finetuned: str,
    base: str,
    rank: Any,
    energy: float | None,
    target_modules: Any,
    dtype: Any,
    name: str,
    name_template: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make an adapter out of a full fine-tune: the nearest low-rank update to FINETUNED - BASE, layer by layer.

    \b
    Example:
      mlx-adapters extract ./my-finetune demo --rank 32 --name from-full
    """
    from mlx_adapters.merging.extraction import extract

    adapter = extract(
        finetuned,
        base,
        rank=rank,
        energy=energy,
        target_modules=target_modules,
        name=new_name(name, name_template),
        dtype=dtype,
        overwrite=overwrite,
        on_event=_output.progress(),
    )
    recipe = adapter.metadata["extract"]
    if not as_json:
        rows = [(key, f"{kept:.2%}") for key, kept in recipe["energy_by_layer"].items()]
        _output.table(("LAYER", "ENERGY KEPT"), rows, right=(1,))
        _output.out()
    _show(adapter, as_json)


def _show(adapter: "Adapter", as_json: bool) -> None:
    if as_json:
        _output.emit_json({"config": adapter.config, "metadata": adapter.metadata, "parameters": adapter.parameters})
        return
    config = adapter.config
    layers = count(len(config.keys), "layer")
    _output.say(f"{adapter.name}: rank {config.rank}, scale {number(config.scale, 4)}, {layers}")
    recipe = adapter.metadata.get("merge") or adapter.metadata.get("extract") or {}
    if "energy_kept" in recipe:
        lowest = min(recipe["energy_by_layer"], key=recipe["energy_by_layer"].get)
        least = f"{recipe['energy_by_layer'][lowest]:.2%}"
        _output.say(f"energy kept: {recipe['energy_kept']:.2%} of all, at least {least} of a layer ({lowest})")
    name = _output.word(adapter.name)
    _output.next_steps(f'mlx-adapters generate "..." --adapter {name}', f"mlx-adapters eval base {name} --data DATA")
