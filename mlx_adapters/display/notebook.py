"""What notebooks show: small HTML tables and pictures, readable on light and dark pages."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mlx_adapters.display.charts import lines
from mlx_adapters.display.layout import Points
from mlx_adapters.display.svg import picture
from mlx_adapters.errors import in_python
from mlx_adapters.events import Event, Note, OnEvent, Progress, TrainReport, ValidationReport
from mlx_adapters.units import number

BLOCKS = "▁▂▃▄▅▆▇█"


def html_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; the first column is flush left, the others right."""

    def line(cells: Sequence[Any], tag: str) -> str:
        sides = ("left", *["right"] * len(cells))
        row_cells = [
            f'<{tag} style="text-align:{sides[i]};padding:2px 8px;white-space:nowrap">{escape(str(cell))}</{tag}>'
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(row_cells)}</tr>"

    head = f"<thead>{line(headers, 'th')}</thead>" if any(headers) else ""
    table = f"<table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"
    return f'<div style="overflow-x:auto">{table}</div>'


def html_block(title: str, *parts: str) -> str:
    """A title above tables and pictures; empty parts are left out."""
    return f"<div><strong>{escape(title)}</strong>" + "".join(part for part in parts if part) + "</div>"


def html_facts(facts: Mapping[str, Any]) -> str:
    """Name and value, line by line; what is None is left out, and floats get four digits."""
    shown = {k: number(v, 4) if isinstance(v, float) else v for k, v in facts.items() if v is not None}
    return html_table(("", ""), shown.items())


def html_pictures(pictures: Mapping[str, str]) -> str:
    """SVGs with their titles, side by side as far as there is room."""
    frame = '<figure style="margin:0;width:400px;max-width:100%">'
    figures = [f"{frame}<figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in pictures.items()]
    return f'<div style="display:flex;flex-wrap:wrap;gap:16px">{"".join(figures)}</div>' if figures else ""


def loss_curve(train: Points, validation: Points) -> str:
    """The losses by iteration as an SVG, "" if there are too few to draw a line."""
    series = {"training": train, "validation": validation}
    drawn = {name: [(float(x), float(y)) for x, y in points] for name, points in series.items() if len(points) > 1}
    return picture(lines(drawn, "Loss", "iteration", "nats per token")) if drawn else ""


def progress_bar() -> OnEvent:
    """An `on_event` that draws one bar for each stage, in a notebook or a terminal, and writes notes and warnings.

    Beside the bar of a training stand the losses so far, as numbers and as a line.

    Example:
        >>> checked = ma.check_fused("out/sql-4bit", "sql", on_event=ma.progress_bar())
    """
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}
    train: list[float] = []
    validation: list[float] = []
    stream = sys.stdout if "ipykernel" in sys.modules else sys.stderr

    def on_event(event: Event) -> None:
        if isinstance(event, Note):
            text = in_python(event.text)
            tqdm.write(f"Warning: {text}" if event.level == "warning" else text, file=stream)
        if isinstance(event, TrainReport):
            train.append(event.train_loss)
        if isinstance(event, ValidationReport):
            validation.append(event.validation_loss)
        if isinstance(event, Progress):
            bar = bars.get(event.stage)
            if bar is None:
                bar = bars[event.stage] = tqdm(total=event.total, desc=event.stage, unit=event.unit or "it")
            if event.stage == "train" and (train or validation):
                bar.set_postfix_str(_losses(train, validation), refresh=False)
            bar.update(event.done - bar.n)
            if event.done >= event.total:
                bars.pop(event.stage).close()

    return on_event


def _losses(train: Sequence[float], validation: Sequence[float]) -> str:
    parts = [f"loss {train[-1]:.3f} {sparkline(train)}".rstrip()] if train else []
    return ", ".join(parts + ([f"validation {validation[-1]:.3f}"] if validation else []))


def sparkline(values: Sequence[float], most: int = 20) -> str:
    """The last `most` values as a line of blocks, "" for fewer than two."""
    shown = values[-most:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    if len(shown) < 2:
        return ""
    return "".join(BLOCKS[round((value - low) / (high - low or 1.0) * (len(BLOCKS) - 1))] for value in shown)
