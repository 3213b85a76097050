"""An evaluation shown: a table with standard errors, and a sentence for each paired difference."""

import math
from typing import Any

from mlx_adapters.display.notebook import html_block, html_table
from mlx_adapters.display.tables import Table, flat, named
from mlx_adapters.evaluation.figures import Difference, Evaluation, Evaluations
from mlx_adapters.evaluation.statistics import Mean, share_interval, student
from mlx_adapters.units import count, number


class EvaluationReport(Evaluations, Table):
    """All evaluations of one call: shown, as a frame (`to_pandas`), and by variant: `report["sql"]`."""

    def records(self) -> list[dict[str, Any]]:
        """One for each variant: its figures, with standard errors as `loss.error`."""
        return [flat(e) | {"perplexity": e.perplexity} for e in self.evaluations]

    def __getitem__(self, variant: str) -> Evaluation:
        return named(self.evaluations, variant, "variant")

    def __repr__(self) -> str:
        rows = count(self.data["rows"], f"{self.data['split']} row")
        return f"EvaluationReport({', '.join(e.variant for e in self.readable.evaluations)}; {rows} of {self.source})"

    def _repr_html_(self) -> str:
        return html_block(f"{self.source} ({self.data['split']})", html_table(*table(self.readable)))


def table(report: Evaluations) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and lines; columns without a figure are left out."""
    headers = ["VARIANT", "LOSS", "PERPLEXITY"]
    headers += ["KL", "SAME TOP"] if report.reference else []
    headers += [report.score.partition(":")[0].upper()] if report.score else []
    return tuple(headers), [_line(evaluation, report) for evaluation in report.evaluations]


def _line(e: Evaluation, report: Evaluations) -> tuple[str, ...]:
    if e.loss is None:
        return (e.variant, "failed", *[""] * (1 + 2 * bool(report.reference) + bool(report.score)))
    cells = [e.variant, plus_minus(e.loss), number(e.perplexity, 4)]
    if report.reference:
        cells += ["0", "1"] if e.variant == report.reference else [plus_minus(e.kl), plus_minus(e.same_top)]
    return (*cells, plus_minus(e.score)) if report.score else tuple(cells)


def plus_minus(value: Mean | None) -> str:
    """ "0.213 ±0.012": mean and standard error."""
    if value is None:
        return "-"
    return number(value.value) + (f" ±{number(value.error, 2)}" if value.error is not None else "")


def notes(report: Evaluations) -> list[str]:
    """What the figures stand on."""
    data = report.data
    lines = [
        f"{data['rows']} {data['split']} rows of {data['source']}; loss and KL in nats per token; ± standard error"
    ]
    if report.reference:
        lines.append(f"KL and same top token against '{report.reference}'")
    told = {
        ("pairs", "preference"): "the share of pairs whose chosen answer is likelier per token; losses are of it",
        ("pairs", "reward"): f"the share of pairs whose chosen answer gained more on '{report.reference}'",
        ("labeled", "preference"): "how often a good answer is likelier per token than a bad one; losses are of both",
        ("labeled", "reward"): f"the share of answers that gained on '{report.reference}' if good, or lost if bad",
    }.get((str(data.get("preferences")), str(report.score)))
    return [*lines, f"{report.score}: {told}"] if told else lines


def sentences(report: Evaluations) -> list[str]:
    """Each preference with its 95 % interval, and each variant against the first, row by row."""
    kind = report.data.get("preferences")
    rows = count(report.data["rows"], "pair" if kind == "pairs" else "answer")
    shares = [f"{e.variant}, {report.score}: {_share(e.score)} of {rows}" for e in report.evaluations if e.score]
    return (shares if kind else []) + [
        text for difference in report.differences for text in _sentences(difference, report)
    ]


def _sentences(d: Difference, report: Evaluations) -> list[str]:
    who = f"{d.variant} against {d.against}"
    lines = [f"{who}, loss: {_phrase(d.loss, 'higher', 'lower')}"]
    if d.score is not None and report.score:
        lines.append(f"{who}, {report.score.partition(':')[0]}: {_phrase(d.score, 'higher', 'lower')}")
    return lines


def _share(value: Mean) -> str:
    """A share with its 95 % interval."""
    low, high = share_interval(value.value, value.count)
    return f"{value.value:.2f} [{low:.2f}, {high:.2f}]"


def _phrase(value: Mean, up: str, down: str) -> str:
    """A paired difference with its 95 % interval."""
    if math.isnan(value.value):
        return "both infinite"
    if value.error is None:
        return f"{value.value:+.3g} ({'one row: ' if value.count == 1 else ''}no interval)"
    margin = student(value.count - 1) * value.error
    low, high = value.value - margin, value.value + margin
    if not value.differs:
        return f"the same within noise [{low:+.2g}, {high:+.2g}]"
    bounds = sorted((abs(low), abs(high)))
    return f"{abs(value.value):.3g} {up if value.value > 0 else down} [{bounds[0]:.2g}, {bounds[1]:.2g}]"
