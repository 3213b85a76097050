"""A benchmark's report: shown in a notebook, read from a file, held against an older one.

What changed beyond noise says whether a build should fail for it.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mlx_adapters.benchmarking import words
from mlx_adapters.benchmarking.measurements import COMPARED, FORMAT, METRICS, Measurements, Run, VariantFigures
from mlx_adapters.benchmarking.page import details, overview
from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.config.mapping import from_mapping
from mlx_adapters.display.notebook import html_block, html_pictures, html_table
from mlx_adapters.display.svg import picture
from mlx_adapters.display.tables import Table, flat, named
from mlx_adapters.errors import FormatError
from mlx_adapters.evaluation.statistics import Ratio, unpaired_ratio
from mlx_adapters.evaluation.variants import Variant, short_names
from mlx_adapters.storage import files
from mlx_adapters.units import count


class Report(Measurements, Table):
    """All that one benchmark measured: shown, as a frame (`to_pandas`), and by variant: `report["sql"]`."""

    def records(self) -> list[dict[str, Any]]:
        """One for each variant at each prompt length and batch size: medians, and their spread beside them."""
        return [flat(row) | shape for row in self.rows for shape in [flat(one) for one in row.shapes] or [{}]]

    def __getitem__(self, variant: str) -> VariantFigures:
        return named(self.rows, variant, "label")

    def __repr__(self) -> str:
        return f"Report({', '.join(self.readable.labels)}; {count(self.config.rounds, 'round')}, {self.created})"

    def _repr_html_(self) -> str:
        shown = self.readable
        drawn = {title: picture(chart) for title, chart in overview(shown).items()}
        spread = {title: picture(chart) for title, chart in details(shown).items()}
        remarks = "".join(f"<p>{escape(text)}</p>" for text in (*words.head(shown), *words.sentences(shown)))
        folded = f"<details><summary>Spread and method</summary>{remarks}{html_pictures(spread)}</details>"
        return html_block(words.verdict(shown), html_pictures(drawn), html_table(*words.table(shown)), folded)


def read_report(path: str | Path) -> Report:
    """Read the report of a benchmark that was saved as JSON.

    Args:
        path: the file that `mlx-adapters benchmark --output` wrote, or `to_json()` as text.

    Raises NotFoundError, or FormatError for what cannot be shown whole.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> report = ma.benchmark(["base"], "demo", prompt_tokens=8, decode_tokens=4, rounds=1, trials=1)
        >>> size = Path("report.json").write_text(json.dumps(report.to_json()))
        >>> ma.read_report(Path("report.json")).labels
        ['base']
    """
    raw = files.read_json(Path(path).expanduser())
    try:
        if raw["format"] != FORMAT:
            raise FormatError(f"'{path}' is a report of another version (format {raw['format']}).", "measure again.")
        known = {name: raw[name] for name in Report.__dataclass_fields__ if name in raw}
        report = Report(
            **known
            | {
                "config": from_mapping(BenchmarkConfig, raw["config"]),
                "warnings": tuple(raw["warnings"]),
                "quality": dict(raw.get("quality", {})),
                "variants": tuple(from_mapping(Variant, variant) for variant in raw["variants"]),
                "runs": tuple(Run(run["variant"], run["round"], run["result"]) for run in raw["runs"]),
            }
        )
        words.sentences(report.readable), words.table(report.readable), words.head(report), words.notes(report)
        return report
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, StopIteration) as error:
        raise FormatError(f"'{path}' is no whole benchmark report: {error}.", "save one with --output.") from None


@dataclass(frozen=True)
class Change:
    """One metric of one variant: new over old."""

    variant: str
    metric: str
    ratio: Ratio
    prompt_tokens: int | None = None
    batch: int | None = None

    @property
    def worse_by(self) -> float:
        """By which share it got worse: 0.07 for 7 % slower or 7 % more; below 0 where it got better."""
        return 1 - self.ratio.value if METRICS[self.metric].more_is_better else self.ratio.value - 1

    def fails(self, over: float) -> bool:
        """Whether it got worse by more than `over`, and that beyond noise."""
        return self.ratio.differs and self.worse_by > over

    def __str__(self) -> str:
        where = f" at {self.prompt_tokens} x {self.batch}" if self.prompt_tokens else ""
        return f"{self.variant}, {METRICS[self.metric].title}{where}: {words.phrase(self.metric, self.ratio)}"


def changes(new: Report, old: Report) -> list[Change]:
    """What both reports measured: variants of the same name at the same prompt lengths and batch sizes."""
    shapes = [shape for shape in new.config.shapes if shape in old.config.shapes]
    changed = []
    for label, name in short_names(new.labels).items():
        for metric in COMPARED if label in old.labels else ():
            for shape in shapes if METRICS[metric].per_shape else [None]:
                ratio = unpaired_ratio(new.evidence(label, metric, shape), old.evidence(label, metric, shape))
                if ratio is not None:
                    changed.append(Change(name, metric, ratio, *(shape or (None, None))))
    return changed


def other_conditions(new: Report, old: Report) -> list[str]:
    """Why a change may come from something else than the variants."""
    differences = []
    for key in ("system", "chip", "cores", "device_name", "blas"):
        if new.machine.get(key) != old.machine.get(key):
            differences.append(f"{key} was '{old.machine.get(key)}', now '{new.machine.get(key)}'")
    versions = new.machine.get("versions", {}), old.machine.get("versions", {})
    for name in sorted(versions[0].keys() | versions[1].keys()):
        if versions[0].get(name) != versions[1].get(name):
            differences.append(f"{name} was {versions[1].get(name)}, now {versions[0].get(name)}")
    if new.config.decode_tokens != old.config.decode_tokens:
        differences.append(f"decode_tokens was {old.config.decode_tokens}, now {new.config.decode_tokens}")
    names = short_names(new.labels)
    for label in set(new.labels) & set(old.labels):
        prints = [
            next((row.conditions.get("fingerprint") for row in r.rows if row.label == label), None) for r in (new, old)
        ]
        if None not in prints and prints[0] != prints[1]:
            differences.append(f"'{names[label]}' has other weights now")
    return differences
