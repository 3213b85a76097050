"""A benchmark's report as one HTML file: the verdict, quality against size and speed, then figures and method."""

import json
import math
from typing import Any

from mlx_adapters.benchmarking import words
from mlx_adapters.benchmarking.measurements import METRICS, Measurements, VariantFigures
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.display import charts, page
from mlx_adapters.display.charts import Axis, Spot, shorten
from mlx_adapters.display.layout import Chart
from mlx_adapters.units import count, duration, number, size

AGAINST = "Against "  # begins the title of the picture of intervals


def html(report: Measurements) -> str:
    """The whole page."""
    saved, report = report, report.readable
    drawn = details(report)
    few = [] if any(title.startswith(AGAINST) for title in drawn) else words.sentences(report)
    rounds = count(report.config.rounds, "round")
    return page.html(
        f"Benchmark of {count(len(report.labels), 'variant')}, {report.created[:10]}",
        words.verdict(report),
        page.section("", page.pictures(overview(report), headed=False)),
        page.warning([*words.failures(report), *words.notes(report)]),
        page.section("Figures", page.table(*words.table(report, ranges=False))),
        page.folded(
            f"How far {rounds} spread",
            page.table(*words.table(report)),
            page.bullets(few),
            page.pictures(drawn),
        ),
        page.folded("How it was measured", page.paragraphs(words.head(report)), _ceiling(report), _conditions(saved)),
    )


def overview(report: Measurements) -> dict[str, Chart]:
    """Title -> chart: how good against how large, and how good against how fast.

    Without quality it is how fast against how large.
    """
    report = report.readable
    rows = {row.label: row for row in report.rows if row.error is None and row.shapes}
    if not rows:
        return {}
    speeds = {label: row.shapes[0].decode_tps for label, row in rows.items()}
    ranges = {label: (speed.minimum, speed.maximum) for label, speed in speeds.items()}
    on_disk, fast = Axis("size on disk", size), Axis("decoding, tokens per second")
    for key, axis in _quality_axes(report).items():
        found = {label: report.judged.get(label, {}).get(key) for label in rows}
        known = {label: one for label, one in found.items() if one and math.isfinite(one["value"])}
        if len(known) > 1:
            off = {label: 2 * (one["error"] or 0.0) for label, one in known.items()}
            good = {n: (v["value"], (v["value"] - off[n], v["value"] + off[n])) for n, v in known.items()}
            sizes = {n: Spot(rows[n].size_bytes or 0, y, None, ys) for n, (y, ys) in good.items()}
            faster = {n: Spot(speeds[n].median, y, ranges[n], ys) for n, (y, ys) in good.items()}
            return {
                "Quality and size": charts.tradeoff(sizes, "Quality and size", on_disk, axis),
                "Quality and speed": charts.tradeoff(faster, "Quality and speed", fast, axis),
            }
    spots = {n: Spot(row.size_bytes or 0, speeds[n].median, None, ranges[n]) for n, row in rows.items()}
    return {"Speed and size": charts.tradeoff(spots, "Speed and size", on_disk, fast)}


def _quality_axes(report: Measurements) -> dict[str, Axis]:
    """Key of an evaluation -> its axis; what says most of a fine-tune comes first."""
    score = (report.quality.get("score") or "").partition(":")[0]
    reference = shorten(report.quality.get("reference") or "", 20)
    return {
        "score": Axis(f"right answers ({score})", lambda share: f"{share:.0%}", limits=(0, 1)),
        "kl": Axis(f"KL from {reference}, in nats", lambda kl: f"{kl:g}", logarithmic=True, reversed=True),
        "loss": Axis("loss, in nats", reversed=True),
    }


def details(report: Measurements) -> dict[str, Chart]:
    """Title -> chart, for the shapes that were measured; what was not measured has no picture."""
    report = report.readable
    fine = [row for row in report.rows if row.error is None]
    if not fine:
        return {}
    drawn = {}
    for shape in report.config.shapes:
        where = f" ({shape[0]} x {shape[1]})" if len(report.config.shapes) > 1 else ""
        for metric in ("decode_tps", "prefill_tps"):
            title = f"{METRICS[metric].title.capitalize()} speed{where}"
            drawn[title] = charts.strips(
                {row.label: _values(report, row.label, metric, shape) for row in fine}, title, METRICS[metric].unit
            )
        title = f"Memory by part{where}"
        drawn[title] = charts.stacked({row.label: memory_parts(row, shape) for row in fine}, title, "peak", size)
    drawn["Load time"] = charts.grouped({row.label: _loads(row) for row in fine}, "Load time", "s", number)
    if compared := _intervals(report):
        title = f"{AGAINST}{fine[0].label}"
        drawn[title] = charts.intervals(compared, title, "change in %, with its 95 % interval")
    return drawn


def _values(report: Measurements, label: str, metric: str, shape: tuple[int, int]) -> list[float]:
    return [value for values in report.blocks(label, metric, shape).values() for value in values]


def memory_parts(row: VariantFigures, shape: tuple[int, int]) -> dict[str, float]:
    """Peak memory as weights, adapter, KV cache and the rest (activations, buffers)."""
    measured = next(s for s in row.shapes if (s.prompt_tokens, s.batch) == shape)
    weights, adapter = row.weights_bytes or 0, row.adapter_bytes or 0
    rest = max(measured.peak_memory_bytes - weights - adapter - measured.kv_cache_bytes, 0)
    return {"base weights": weights, "adapter": adapter, "KV cache": measured.kv_cache_bytes, "activations": rest}


def _loads(row: VariantFigures) -> dict[str, float]:
    loads = {"warm": row.load_seconds, "cold": row.cold_load_seconds}
    return {name: summary.median for name, summary in loads.items() if summary is not None}


def _intervals(report: Measurements) -> list[tuple[str, float, float, float]]:
    """Each variant against the first, in percent."""
    first = next(row.label for row in report.rows if row.error is None)
    many = len(report.config.shapes) > 1
    rows: list[tuple[str, float, float, float]] = []
    for comparison in report.comparisons:
        if comparison.against == first and comparison.ratio.low is not None and comparison.ratio.high is not None:
            where = f" {comparison.prompt_tokens} x {comparison.batch}" if many and comparison.prompt_tokens else ""
            low, middle, high = (
                words.percent(v) for v in (comparison.ratio.low, comparison.ratio.value, comparison.ratio.high)
            )
            rows.append((f"{METRICS[comparison.metric].title}{where}: {comparison.variant}", low, middle, high))
    return rows


def _ceiling(report: Measurements) -> str:
    lines = [
        (
            row.label,
            f"{s.prompt_tokens} x {s.batch}",
            size(row.bytes_per_token),
            size(row.bandwidth_bytes_per_second) + "/s",
            f"{s.ceiling_share:.0%}",
        )
        for row in report.rows
        for s in row.shapes
    ]
    why = (
        "A decode step reads all weights once, so the memory's bandwidth, measured in the same processes by a "
        "matrix-vector product as large as the weights, is the ceiling."
    )
    return page.paragraphs([why]) + page.table(
        ("VARIANT", "PROMPT x BATCH", "READ PER TOKEN", "BANDWIDTH", "SHARE REACHED"), lines
    )


def _conditions(report: Measurements) -> str:
    facts: dict[str, Any] = {
        "machine": report.machine,
        "state": report.state,
        "settings": to_mapping(report.config),
        "variants": {row.label: row.conditions for row in report.rows},
    }
    when = f"{report.created}, {duration(report.seconds)} in all. {report.command}"
    return page.paragraphs([when]) + page.record(json.dumps(facts, indent=1, default=str))
