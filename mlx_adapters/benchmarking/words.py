"""A report in words: the head with the conditions, the table, and a sentence for each difference."""

from collections.abc import Sequence

from mlx_adapters.benchmarking.measurements import METRICS, NOT_RUN, Measurements, ShapeRow, VariantFigures
from mlx_adapters.benchmarking.schedule import stretch
from mlx_adapters.evaluation.statistics import Ratio, Summary
from mlx_adapters.units import count, number, size

HEADERS = ("VARIANT", "LOAD s", "TTFT ms", "PREFILL tok/s", "DECODE tok/s", "PEAK", "DISK")
TOO_FEW = "(too few rounds to say)"
TOLERANCE = 0.01  # a fused model that undoes no more of the fine-tune keeps it
TELLING = 2  # an interval that reaches over a factor of two says nothing
WORDS = {"tok/s": ("faster", "slower"), "s": ("longer", "shorter"), "B": ("more", "less")}


def head(report: Measurements) -> list[str]:
    """The conditions: machine and versions, arithmetic, and how it was measured."""
    m, c = report.machine, report.config
    versions = ", ".join(
        f"{name} {m['versions'][name]}" for name in ("mlx", "mlx-lm", "mlx_adapters") if name in m["versions"]
    )
    name = report.state.get("gpu") or m["device_name"]
    prompts = "real prompts of" if c.data else "random prompts of"
    lengths = ", ".join(map(str, c.prompt_tokens))
    steps = count(stretch(c.decode_tokens), "step")
    return [
        f"{name}, {count(m['cores'], 'core')}, {size(m['memory_bytes'])} memory, {m['system']}; {versions}",
        f"{prompts} {lengths} tokens, {c.decode_tokens} decoded, batch {', '.join(map(str, c.batch))}; "
        f"{count(c.rounds, 'round')} of fresh processes, {count(c.trials, 'trial')} each: median (smallest-largest)",
        f"differences are of what was least disturbed: each round's best trial, in decoding its best {steps} in a row",
        *arithmetic(report.rows),
        *_quality_head(report),
    ]


def _quality_head(report: Measurements) -> list[str]:
    if not report.quality:
        return []
    data, reference = report.quality["data"], report.quality["reference"]
    if "said" in data:
        return [data["said"]]
    against = f"; KL and same top token against {reference}" if reference else ""
    return [f"quality on {data['rows']} {data['split']} rows of {data['source']}, loss in nats per token{against}"]


def arithmetic(rows: Sequence[VariantFigures]) -> list[str]:
    """Which number types were computed with; said once if all variants agree."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row.error is None:
            lines.setdefault(_arithmetic(row.conditions), []).append(row.label)
    return [f"{', '.join(labels)}: {line}" if len(lines) > 1 else line for line, labels in lines.items()]


def _arithmetic(conditions: dict) -> str:
    stored = conditions["stored_quantization"]
    kept = f"stored in {stored['bits']} bits" if stored else "stored unquantized"
    text = f"computed in {conditions['dtype']} on the {conditions['device'].upper()}, {kept}"
    dense = ", made dense on loading: speed and memory are those of the dense copy, not of the packed weights"
    return text + (dense if conditions["dense"] else "")


def failures(report: Measurements) -> list[str]:
    """A sentence for each variant that could not be measured, or not be judged."""
    return [f"'{label}' failed: {error}" for label, error in report.failures.items()]


def notes(report: Measurements) -> list[str]:
    """What a reader must know before comparing the rows."""
    lines = [*report.warnings]
    fine = [row for row in report.rows if row.error is None]
    if len({(row.conditions["vocabulary"], row.conditions["tokenizer"]) for row in fine}) > 1:
        lines.append("The variants have different tokenizers: a token is not the same amount of text.")
    if len({row.conditions["fingerprint"] for row in fine if row.adapter_bytes}) > 1:
        lines.append("The adapters stand on different base models.")
    kinds = {row.conditions["model_type"] for row in fine}
    if len(kinds) > 1:
        lines.append(f"The variants are of different kinds: {', '.join(sorted(map(str, kinds)))}.")
    if report.config.cold_load:
        lines += _cold_notes(report)
    if report.interrupted:
        lines.append("The run was interrupted; these are the finished processes.")
    return lines


def _cold_notes(report: Measurements) -> list[str]:
    results = [run.result for run in report.runs if "error" not in run.result]
    if not results:
        return []
    if not any("cold_load_seconds" in result for result in results):
        return ["No cold load: only root can drop this system's file cache."]
    share = min(r["cold_disk_bytes"] / r["size_bytes"] for r in results if "cold_disk_bytes" in r)
    if share >= 0.9:
        return []
    return [f"Cold load: the file cache could not be dropped wholly ({share:.0%} of the bytes came from the disk)."]


def verdict(report: Measurements) -> str:
    """What the figures come to, in a sentence."""
    rows = [row for row in report.rows if row.error is None and row.shapes]
    if not rows:
        return "Nothing could be measured."
    adapter = next((row for row in rows if row.adapter_bytes), None)
    base, fused = report.around(adapter) if adapter else (None, [])
    if adapter is None or not fused:
        return _of_the_best(rows) if adapter is None or base is None else _of_an_adapter(report, adapter, base)
    kept = [row for row in fused if keeps(report, row, adapter, base)]
    if kept:
        best = min(kept, key=_size)
        told, cost = _told(report, best, adapter, base), _cost(report, best, adapter)
        by = _by(report, best, base)
        return f"{best.label} keeps the fine-tune{by}: {told}; {cost}."
    far = {row.label: _distance(report, row, base) for row in fused if row.label in report.judged}
    if not far:
        small = min(fused, key=_size)
        return f"Quality was not measured (--quality DATA); {small.label}: {_cost(report, small, adapter)}."
    near = next(row for row in fused if row.label == min(far, key=far.__getitem__))
    found = {keeps(report, row, adapter, base) for row in fused}
    if found == {False}:
        said = f"No fused model keeps the fine-tune{_by(report, near, base)}"
    elif base is None and adapter.label in report.judged and found == {None}:
        said = "Whether a fused model keeps the fine-tune is not known without `base` among the variants"
    else:
        said = "No fused model is known to keep the fine-tune"
    return f"{said}; {near.label} comes nearest: {_told(report, near, adapter, base)}."


def _by(report: Measurements, row: VariantFigures, base: VariantFigures | None) -> str:
    return " by its score" if report.lost(row, base) is None else ""


def _distance(report: Measurements, row: VariantFigures, base: VariantFigures | None) -> float:
    """By what is known of a row: its score where that decides, else its KL, else its loss."""
    known = {key: found["value"] for key in ("kl", "loss", "score") if (found := report.judged[row.label].get(key))}
    if "score" in known and report.lost(row, base) is None:
        return -known["score"]
    return known.get("kl", known.get("loss", 0.0))


def keeps(
    report: Measurements, fused: VariantFigures, adapter: VariantFigures, base: VariantFigures | None
) -> bool | None:
    """Whether a fused model keeps the fine-tune: by its distance from the adapter over the base's, else by its score
    beside the adapter's; None if neither is known."""
    lost = report.lost(fused, base)
    if lost is not None:
        return lost <= TOLERANCE
    mine, whole = (report.judged.get(row.label, {}).get("score") for row in (fused, adapter))
    return mine["value"] >= whole["value"] if mine and whole else None


def _size(row: VariantFigures) -> int:
    return row.size_bytes or 0


def _told(report: Measurements, row: VariantFigures, adapter: VariantFigures, base: VariantFigures | None) -> str:
    """The quality of a row, with the adapter's and the base's for scale."""
    others = [(name, report.judged.get(one.label, {})) for name, one in (("adapter", adapter), ("base", base)) if one]
    mine = report.judged[row.label]
    if mine.get("score"):
        scale = ", ".join(f"{name} {e['score']['value']:.1%}" for name, e in others if e.get("score"))
        return f"{mine['score']['value']:.1%} right ({scale})"
    if mine.get("kl"):
        same = f"same token {mine['same_top']['value']:.1%}, " if mine.get("same_top") else ""
        scale = "".join(f" (base {number(e['kl']['value'])})" for name, e in others if name == "base" and e.get("kl"))
        return f"{same}KL {number(mine['kl']['value'], 2)}{scale}"
    scale = ", ".join(f"{name} {number(e['loss']['value'])}" for name, e in others if e.get("loss"))
    return f"loss {number(mine['loss']['value'])} ({scale})"


def _cost(report: Measurements, row: VariantFigures, adapter: VariantFigures) -> str:
    """Size and speed of a fused model beside the adapter on its base."""
    beside = "instead of" if _size(row) < _size(adapter) else "against"
    sizes = f"{size(row.size_bytes)} {beside} {size(adapter.size_bytes)}"
    speeds = [f"{number(one.shapes[0].decode_tps.median)}" for one in (row, adapter)]
    ratio = next((c.ratio for c in report.compare(row.label, adapter.label, "decode_tps")), None)
    if ratio is None or ratio.low is None:
        return f"{sizes}, {' against '.join(speeds)} tok/s"
    if not ratio.differs and _tells_nothing(ratio):
        return f"{sizes}; the rounds are too few or too noisy to tell which decodes faster"
    if not ratio.differs:
        return f"{sizes}, and decodes as fast as far as {count(report.config.rounds, 'round')} can tell"
    return f"{sizes}, and decodes {number(ratio.value, 2)} times as fast"


def _of_an_adapter(report: Measurements, adapter: VariantFigures, base: VariantFigures) -> str:
    told = f"{_told(report, adapter, base, None)}; " if adapter.label in report.judged else ""
    return f"{adapter.label} on its base: {told}{_cost(report, adapter, base)}."


def _of_the_best(rows: Sequence[VariantFigures]) -> str:
    """Which is fastest and which smallest."""
    fast = max(rows, key=lambda row: row.shapes[0].decode_tps.median)
    small = min(rows, key=_size)
    speed, least = f"{number(fast.shapes[0].decode_tps.median)} tok/s", size(small.size_bytes)
    if len(rows) == 1:
        return f"{fast.label} decodes {speed} and takes {least}."
    if fast is small:
        return f"{fast.label} decodes fastest ({speed}) and is the smallest ({least})."
    return f"{fast.label} decodes fastest ({speed}), {small.label} is the smallest ({least})."


def table(report: Measurements, ranges: bool = True) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and lines; with several shapes there is one line for each, with quality more columns.

    ranges: with the smallest and the largest value beside each median.
    """
    many = len(report.config.shapes) > 1
    quality = quality_cells(report)
    headers = (HEADERS[0], *(["PROMPT x BATCH"] if many else []), *HEADERS[1:], *quality.get("", ()))
    lines = []
    for row in report.rows:
        for shape in row.shapes or (None,):
            line = cells(row, shape, many, ranges) + quality.get(row.label, ())
            lines.append(line + ("",) * (len(headers) - len(line)))
    return headers, lines


def cells(row: VariantFigures, shape: ShapeRow | None, many: bool, ranges: bool = True) -> tuple[str, ...]:
    """One line of the table, without quality."""
    if shape is None or row.load_seconds is None:
        return (row.label, *[""] * many, NOT_RUN if row.error == NOT_RUN else "failed")
    return (
        row.label,
        *([f"{shape.prompt_tokens} x {shape.batch}"] if many else []),
        spread(row.load_seconds, 3, ranges=ranges),
        spread(shape.ttft_seconds, 3, 1000, ranges),
        spread(shape.prefill_tps, ranges=ranges),
        spread(shape.decode_tps, ranges=ranges),
        size(shape.peak_memory_bytes),
        size(row.size_bytes),
    )


def quality_cells(report: Measurements) -> dict[str, tuple[str, ...]]:
    """Label -> its cells of quality, "" -> their headers; empty if no quality was asked for."""
    if not report.quality:
        return {}
    score = (report.quality["score"] or "").partition(":")[0]
    keys = ["loss", *(["kl", "same_top"] if report.quality["reference"] else []), *(["score"] if score else [])]
    names = {"loss": "LOSS", "kl": "KL", "same_top": "SAME TOP", "score": score.upper()}
    cells = {"": tuple(names[key] for key in keys)}
    for evaluation in report.quality["evaluations"]:
        values = [evaluation.get(key) for key in keys]
        cells[evaluation["variant"]] = tuple("-" if v is None else number(v["value"]) for v in values)
    return cells


def spread(summary: Summary, digits: int = 3, factor: float = 1.0, ranges: bool = True) -> str:
    """ "median (smallest-largest)"."""
    low, middle, high = (number(v * factor, digits) for v in (summary.minimum, summary.median, summary.maximum))
    return f"{middle} ({low}-{high})" if ranges and summary.count > 1 else middle


def percent(ratio: float) -> float:
    """The change in percent to one digit after the point; 0, never -0."""
    return round(100 * (ratio - 1), 1) + 0.0


def phrase(metric: str, ratio: Ratio) -> str:
    """A ratio in words: "8.0 % slower [6.1, 9.8]" or "the same within noise [-1.2, +2.0] %"."""
    up, down = WORDS[METRICS[metric].unit]
    value, low, high = (None if v is None else percent(v) for v in (ratio.value, ratio.low, ratio.high))
    if low is None or high is None or value is None:
        return f"{value:+.1f} % {TOO_FEW}"
    if not ratio.differs and _tells_nothing(ratio):
        return f"too few or too noisy rounds to tell [{low:+.0f}, {high:+.0f}] %"
    if not ratio.differs:
        return f"the same within noise [{low:+.1f}, {high:+.1f}] %"
    bounds = sorted((abs(low), abs(high)))
    return f"{abs(value):.1f} % {up if ratio.value > 1 else down} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def _tells_nothing(ratio: Ratio) -> bool:
    """Whether an interval is so wide that anything may be true."""
    return ratio.low is not None and ratio.high is not None and ratio.high > TELLING * ratio.low


def sentences(report: Measurements) -> list[str]:
    """Every variant against the first one that ran: "sql against base, decode: 8.0 % slower [6.1, 9.8]".

    Where there are too few rounds for a claim, the ratios of a variant share a line.
    """
    first = next((row.label for row in report.rows if row.error is None), None)
    many = len(report.config.shapes) > 1
    lines, short = [], dict[str, list[str]]()
    for comparison in (c for c in report.comparisons if c.against == first):
        who, said = f"{comparison.variant} against {first}", phrase(comparison.metric, comparison.ratio)
        where = f" at {comparison.prompt_tokens} x {comparison.batch}" if many and comparison.prompt_tokens else ""
        what = METRICS[comparison.metric].title + where
        if comparison.ratio.low is None:
            short.setdefault(who, []).append(f"{what} {said.removesuffix(TOO_FEW).rstrip()}")
        else:
            lines.append(f"{who}, {what}: {said}")
    return lines + [f"{who}: {', '.join(parts)} {TOO_FEW}" for who, parts in short.items()]


def markdown(report: Measurements) -> str:
    """The report for a README or a model card."""
    report = report.readable
    headers, lines = table(report)
    right = ["---"] + ["---:"] * (len(headers) - 1)
    rows = ["| " + " | ".join(line) + " |" for line in (headers, right, *lines)]
    remarks = [f"- {text}" for text in (*head(report), *sentences(report), *failures(report), *notes(report))]
    return "\n".join(
        [
            verdict(report),
            "",
            *rows,
            "",
            *remarks,
            "",
            f"`{report.command}`, {report.created}" if report.command else report.created,
            "",
        ]
    )
