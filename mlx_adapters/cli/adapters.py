"""`list`, `show`, `compare`, `verify`: looking at adapters."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import (
    OUTPUT_FILE,
    REFERENCE,
    Reads,
    json_option,
    refuse_outputs_that_are_read,
    trust_option,
)
from mlx_adapters.cli._output import number, size
from mlx_adapters.units import count

if TYPE_CHECKING:
    from mlx_adapters.adapters.inspecting import Comparison, Details, Layer, LayerComparison
    from mlx_adapters.adapters.verifying import Verification
    from mlx_adapters.sources.registry import Entry

MOST_DIFFERENT = 5
SORT_KEYS = {
    "name": lambda entry: entry.name,
    "date": lambda entry: entry.created or "",
    "loss": lambda entry: (entry.validation_loss is None, entry.validation_loss or 0.0),
    "size": lambda entry: entry.size_bytes,
    "base": lambda entry: (entry.base or "", entry.name),
}


@click.command("list")
@click.option("--base", metavar="BASE", help="Only adapters of this base.")
@click.option("--tag", metavar="TAG", help="Only adapters with this tag.")
@click.option(
    "--sort", type=click.Choice(list(SORT_KEYS)), default="name", show_default=True, help="Order of the rows."
)
@click.option("-r", "--reverse", is_flag=True, help="Turn the order around.")
@json_option
def list_command(base: str | None, tag: str | None, sort: str, reverse: bool, as_json: bool) -> None:
    """Show all adapters with base, rank, checkpoints and loss.

    \b
    Example:
      mlx-adapters list --base demo --sort loss
    """
    from mlx_adapters.sources.registry import list_adapters

    entries = sorted(list_adapters(base, tag), key=SORT_KEYS[sort], reverse=reverse)
    if as_json:
        _output.emit_json({"adapters": [_without_metadata(entry) for entry in entries]})
    elif not entries:
        _output.note("No such adapters." if base or tag else "No adapters yet. 'mlx-adapters train' makes one.")
    else:
        head = ("NAME", "TYPE", "RANK", "VALID LOSS", "CHECKPOINTS", "SIZE", "DATE", "BASE")
        _output.table(head, map(_list_row, entries), right=(2, 3, 4, 5))
        if damaged := sum(entry.problem is not None for entry in entries):
            _output.warn(f"{damaged} of {len(entries)} have a problem; 'mlx-adapters verify --all' says more.")


def _without_metadata(entry: "Entry") -> dict[str, Any]:
    return {key: value for key, value in vars(entry).items() if key != "metadata"}  # 'show --json' gives it


def _list_row(e: "Entry") -> tuple[str, ...]:
    name = e.name if e.iteration is None or not e.iterations else f"{e.name} (@{e.iteration})"
    tags = "".join(f" #{tag}" for tag in e.tags)
    about = _output.style(e.problem, fg="red") if e.problem else (_output.place(e.base) if e.base else "-") + tags
    return (
        name,
        e.type or "-",
        number(e.rank),
        number(e.validation_loss),
        str(len(e.iterations)),
        size(e.size_bytes),
        (e.created or "-")[:10],  # the time of day is in `show`
        about,
    )


@click.command("show")
@click.argument("ref", type=REFERENCE)
@click.option("--layers", is_flag=True, help="One row for each layer instead of one for each kind.")
@click.option("--plot", type=OUTPUT_FILE, metavar="FILE", help="Draw the loss curves into FILE.png or .svg.")
@json_option
def show_command(ref: str, layers: bool, plot: Path | None, as_json: bool) -> None:
    """Show one adapter: settings, data, losses, layers and the norms of their updates, files.

    \b
    Example:
      mlx-adapters show sql@600 --plot losses.png
    """
    from mlx_adapters.adapters.inspecting import describe

    refuse_outputs_that_are_read()
    details = describe(ref)
    if plot is not None:
        _plot(details, plot)
    if as_json:
        _output.emit_json(details)
        return
    _output.facts(_facts(details))
    _show_losses(details)
    _output.out()
    if details.layers:
        norm = "‖scale·BA‖" if details.type == "dora" else "‖ΔW‖"
        _output.table(("LAYERS", "SHAPE", norm), _layer_rows(details.layers, layers), right=(2,))
    if details.checkpoints:
        _output.out()
        rows = [
            (
                f"@{c.iteration}" + (" *" if c.in_use else ""),
                number(c.train_loss, 4),
                number(c.validation_loss, 4),
                size(c.size_bytes),
            )
            for c in details.checkpoints
        ]
        _output.table(("CHECKPOINT", "TRAIN LOSS", "VALID LOSS", "SIZE"), rows, right=(1, 2, 3))
    if details.files:
        _output.out()
        _output.table(("FILE", "SIZE"), [(name, size(count)) for name, count in details.files.items()], right=(1,))


def _facts(d: "Details") -> list[tuple[str, str]]:
    """The lines at the top: what an adapter is, then the plain values of its metadata."""
    from mlx_adapters.adapters.inspecting import objective_of

    own = [
        ("name", d.name),
        ("folder", _output.place(d.folder) if d.folder else "-"),
        ("base", _output.place(d.base) if d.base else "-"),
        ("type", f"{d.type}, rank {d.rank}, scale {number(d.scale, 6)}" if d.layers else d.type),
        ("parameters", f"{d.parameters:,}" + (f" in {count(len(d.layers), 'layer')}" if d.layers else "")),
    ]
    shown = {"name", "base", "type", "rank", "scale", "ranks", "alpha", "checkpoints", "sha256", "versions"}
    rest = {
        key: value
        for key, value in d.metadata.items()
        if key not in shown and not key.endswith(("_losses", "_figures"))
    }
    if (objective := objective_of(d.metadata)).get("name", "sft") != "sft":
        rest["objective"] = dict(objective)
    if isinstance(recipe := rest.get("merge"), dict):
        sources = " + ".join(f"{number(source['weight'])} · {source['name']}" for source in recipe["sources"])
        rest["merge"] = f"{recipe['method']}: {sources}"
    return own + [(key.replace("_", " "), text) for key, value in rest.items() if (text := _short(value))]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {text}" for key, v in value.items() if (text := _short(v)) and len(text) < 60)
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value) if len(value) < 10 else f"{len(value)} values"
    return "" if value is None else number(value, 4) if isinstance(value, float) else str(value)


def _kind(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _members(path: str, keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{len(keys)} × {path}"


def _span(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low} to {high}"


def _layer_rows(layers: "tuple[Layer, ...]", each: bool) -> list[tuple[str, str, str]]:
    """One row for each layer, or one for all layers whose paths differ in the block's number alone."""
    if each:
        return [(layer.key, _shape(layer.shape), number(layer.norm)) for layer in layers]
    groups: dict[tuple[str, tuple[int, ...]], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((_kind(layer.key), layer.shape), []).append(layer)
    return [
        (_members(path, [layer.key for layer in members]), _shape(shape), _span(layer.norm for layer in members))
        for (path, shape), members in groups.items()
    ]


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _losses(details: "Details") -> dict[str, list[tuple[int, float]]]:
    from mlx_adapters.models.metadata import losses_of

    losses = dict(zip(("training", "validation"), losses_of(details.metadata), strict=True))
    return {name: points for name, points in losses.items() if points}


def _show_losses(details: "Details") -> None:
    """The curves in the terminal: losses, and what is watched of preferences, where there is more than a point."""
    from mlx_adapters.adapters.inspecting import figures_of, loss_unit
    from mlx_adapters.display import terminal

    charts = {f"LOSS by iteration, {loss_unit(details.metadata)}": _losses(details)}
    charts |= {f"{name.upper()} by iteration": figures_of(details.metadata, name) for name in ("margin", "accuracy")}
    for title, curves in charts.items():
        if any(len(points) > 1 for points in curves.values()):
            _output.out(f"\n{title}")
            for line in terminal.line_chart(curves, width=min(_output.columns(), 100) - 1):
                _output.out(line)


def _plot(details: "Details", path: Path) -> None:
    from mlx_adapters.adapters.inspecting import figures_of, loss_unit
    from mlx_adapters.display import charts, png, svg
    from mlx_adapters.errors import ConfigError, NotFoundError
    from mlx_adapters.storage import files

    ending = path.suffix.lower()
    if ending not in (".svg", ".png"):
        raise ConfigError(f"'{path}' must end in .png or .svg.")
    losses = _losses(details)
    if not losses:
        raise NotFoundError(f"No losses are recorded for '{details.name}'.")
    losses |= {f"{kind} margin": curve for kind, curve in figures_of(details.metadata, "margin").items()}
    chart = charts.lines(losses, details.name, "iteration", loss_unit(details.metadata))
    with files.atomic_file(path) as stream:
        stream.write(png.picture(chart) if ending == ".png" else svg.picture(chart).encode())
    _output.note(f"Losses drawn in {path}")


@click.command("compare")
@click.argument("a", type=REFERENCE)
@click.argument("b", type=REFERENCE)
@click.option("--data", metavar="DIR", help="Also the loss of each on this data.")
@click.option("--base", metavar="BASE", help="Base to compute the losses on [the adapters' own].")
@click.option("--layers", is_flag=True, help="One row for each layer instead of one for each kind.")
@trust_option
@json_option
@Reads(needs={"base": "data"})
def compare_command(a: str, b: str, data: str | None, base: str | None, layers: bool, as_json: bool) -> None:
    """Compare two adapters: settings, data, losses, and the updates by kind of layer.

    \b
    Example:
      mlx-adapters compare sql@400 sql@600 --data data/sql
    """
    from mlx_adapters.adapters.inspecting import compare

    comparison = compare(a, b, data=data, base=base, on_event=_output.progress())
    if as_json:
        _output.emit_json(comparison)
        return
    rows = [(name, _short(x) or "-", _short(y) or "-") for name, x, y in comparison.settings]
    _output.table(("DIFFERS IN", comparison.a, comparison.b), [*rows, *_loss_rows(comparison)])
    _output.out()
    heads = ("LAYERS", f"‖Δ {comparison.a}‖", f"‖Δ {comparison.b}‖", "COSINE")
    total = ("all", number(comparison.norm_a), number(comparison.norm_b), number(comparison.cosine))
    shown = [_row(layer) for layer in comparison.layers] if layers else _kind_rows(comparison.layers)
    _output.table(heads, [*shown, total], right=(1, 2, 3))
    if len(shown) < len(comparison.layers):
        shared = [layer for layer in comparison.layers if layer.cosine is not None]
        _output.out("\nMost different (--layers shows each):")
        farthest = sorted(shared, key=lambda layer: layer.cosine or 0.0)[:MOST_DIFFERENT]
        _output.table(("LAYER", *heads[1:]), map(_row, farthest), right=(1, 2, 3))
        if alone := len(comparison.layers) - len(shared):
            _output.out(f"No cosine in {count(alone, 'layer')}: only one of the two changes it.")


def _row(layer: "LayerComparison") -> tuple[str, ...]:
    return layer.key, number(layer.norm_a), number(layer.norm_b), number(layer.cosine)


def _kind_rows(layers: "tuple[LayerComparison, ...]") -> list[tuple[str, ...]]:
    """One row for all layers whose paths differ in the block's number alone: from the least to the most."""
    groups: dict[str, list[LayerComparison]] = {}
    for layer in layers:
        groups.setdefault(_kind(layer.key), []).append(layer)
    rows = []
    for path, members in groups.items():
        spans = [_span(getattr(layer, what) for layer in members) for what in ("norm_a", "norm_b", "cosine")]
        rows.append((_members(path, [layer.key for layer in members]), *spans))
    return rows


def _loss_rows(comparison: "Comparison") -> list[tuple[str, ...]]:
    if comparison.losses is None:
        return []
    return [("loss on the data", *(number(loss, 4) for loss in comparison.losses))]


@click.command("verify")
@click.argument("ref", type=REFERENCE, required=False)
@click.option("--all", "everything", is_flag=True, help="Every adapter in the registry.")
@click.option("--base", metavar="BASE", help="Base to hold it against [its own, if it is on this machine].")
@trust_option
@json_option
def verify_command(ref: str | None, everything: bool, base: str | None, as_json: bool) -> None:
    """Check files, checksums, tensors, NaN and the fit to the base. Exit status 1 if anything is wrong.

    \b
    Example:
      mlx-adapters verify --all
    """
    from mlx_adapters.adapters.verifying import verify, verify_all

    if (ref is None) == (not everything):
        raise click.UsageError("Give a reference or --all.")
    verifications = [verify(ref, base=base)] if ref is not None else verify_all(base)
    if as_json:
        _output.emit_json({"sound": all(one.sound for one in verifications), "adapters": verifications})
    else:
        for one in verifications:
            _show_verification(one)
        if not verifications:
            _output.note("No adapters yet. 'mlx-adapters train' makes one.")
    if not all(one.sound for one in verifications):
        raise click.exceptions.Exit(1)


def _show_verification(verification: "Verification") -> None:
    _output.out(f"{verification.name}: {'sound' if verification.sound else _output.style('NOT SOUND', fg='red')}")
    for check in verification.checks:
        mark = {True: "ok", False: _output.style("FAILED", fg="red"), None: "not checked"}[check.sound]
        _output.say(f"  {check.what}: {mark}: {check.detail}")
