"""The report as one HTML file: no script, no request, light and dark, for a phone as for a wide screen."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from mlx_adapters.benchmarking import words
from mlx_adapters.benchmarking.measurements import METRICS, Measurements, VariantFigures
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.display import bars, svg
from mlx_adapters.display.layout import Chart
from mlx_adapters.units import count, duration, number, size

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8;
  --warn: #8a5a00; --warn-page: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #191d23; --ink: #e8ebef; --soft: #a0a9b5;
  --line: #2c323a; --warn: #f2c661; --warn-page: #2d2614; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.05rem; margin: 0 0 10px; }
p, ul { margin: 0 0 8px; } ul { padding-left: 20px; } .soft { color: var(--soft); font-size: .9rem; }
section, .warn { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px;
  margin: 14px 0 0; }
.warn { background: var(--warn-page); color: var(--warn); border-color: transparent; padding: 10px 16px; }
.warn p:last-child { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 14px;
  margin-top: 14px; }
.plots section { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: 6px 12px 6px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg, svg text { fill: var(--ink); }
pre { overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
"""


def html(report: Measurements) -> str:
    """The whole page."""
    saved, report = report, report.readable
    cards = "".join(_section(name, picture) for name, picture in plots(report).items())
    warnings = "".join(f"<p>{escape(note)}</p>" for note in (*words.failures(report), *words.notes(report)))
    sentences = "".join(f"<li>{escape(line)}</li>" for line in words.sentences(report))
    brackets = "<p class=soft>In brackets: 95 % intervals.</p>" if "[" in sentences else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Benchmark: {escape(", ".join(report.labels))}</title><style>{STYLE}</style></head><body><main>
<h1>{count(len(report.labels), "variant")}, {report.created[:10]}</h1>
{"".join(f'<p class="soft">{escape(line)}</p>' for line in words.head(report))}
{f'<div class="warn">{warnings}</div>' if warnings else ""}
{_section("Figures", f'<div class="wide">{_table(*words.table(report))}</div>')}
{_section("Differences", f"<ul>{sentences}</ul>{brackets}") if sentences else ""}
<div class="plots">{cards}</div>
{_section("Ceiling", _ceiling(report))}
{_section("Conditions", _conditions(saved))}
</main></body></html>
"""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def plots(report: Measurements) -> dict[str, str]:
    """Title -> SVG of each of the `charts`."""
    return {title: svg.picture(chart) for title, chart in charts(report).items()}


def charts(report: Measurements) -> dict[str, Chart]:
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
            drawn[title] = bars.strips(
                {row.label: _values(report, row.label, metric, shape) for row in fine}, title, METRICS[metric].unit
            )
        title = f"Memory by part{where}"
        drawn[title] = bars.stacked({row.label: memory_parts(row, shape) for row in fine}, title, "peak", size)
    drawn["Load time"] = bars.grouped({row.label: _loads(row) for row in fine}, "Load time", "s", number)
    if compared := _intervals(report):
        title = f"Against {fine[0].label}"
        drawn[title] = bars.intervals(compared, title, "change in %, with its 95 % interval")
    return drawn | _quality(report)


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


def _quality(report: Measurements) -> dict[str, Chart]:
    """Decode speed against the task score, or against KL, or against loss: the first that there is."""
    speeds = {row.label: row.shapes[0].decode_tps.median for row in report.rows if row.shapes}
    judged = {e["variant"]: e for e in report.quality.get("evaluations", ()) if e["variant"] in speeds}
    for key, name in (("score", report.quality.get("score") or ""), ("kl", "KL (nats per token)"), ("loss", "loss")):
        points = {
            label: (speeds[label], e[key]["value"], e[key]["error"] or 0.0) for label, e in judged.items() if e.get(key)
        }
        if points:
            title = "Speed against quality"
            return {
                title: bars.scatter(points, title, "decode tok/s", f"{name.partition(':')[0]} (± 2 standard errors)")
            }
    return {}


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


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
    return (
        "<p class=soft>A decode step reads all weights once, so the memory's bandwidth, measured in the same processes "
        "by a matrix-vector product as large as the weights, is the ceiling.</p><div class=wide>"
        + _table(("VARIANT", "PROMPT x BATCH", "READ PER TOKEN", "BANDWIDTH", "SHARE REACHED"), lines)
        + "</div>"
    )


def _conditions(report: Measurements) -> str:
    facts: dict[str, Any] = {
        "machine": report.machine,
        "state": report.state,
        "settings": to_mapping(report.config),
        "variants": {row.label: row.conditions for row in report.rows},
    }
    return (
        f"<p class=soft>{escape(report.created)}, {duration(report.seconds)} in all. "
        f"<code>{escape(report.command)}</code></p>"
        f"<details><summary>Everything</summary><pre>{escape(json.dumps(facts, indent=1, default=str))}</pre></details>"
    )
