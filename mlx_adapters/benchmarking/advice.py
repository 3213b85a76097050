"""The decision that a benchmark is made for: keep the adapter apart or fuse it, and at which precision.

Every sentence stands on figures of the report. A fused model is taken only if it keeps the fine-tune: its
distance from the adapter model, KL(adapter ‖ fused), may be at most `tolerance` of KL(adapter ‖ base), which is
what the fine-tune changed in all; or, with a task score, no loss of score may be seen.
"""

from dataclasses import dataclass

from mlx_adapters.benchmarking.measurements import METRICS, ShapeRow, VariantFigures
from mlx_adapters.benchmarking.reports import Report
from mlx_adapters.benchmarking.words import TOLERANCE, phrase
from mlx_adapters.display.tables import Table
from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.evaluation.statistics import Ratio
from mlx_adapters.evaluation.variants import label_of
from mlx_adapters.models.adapter import AdapterLike
from mlx_adapters.units import count, number, size


@dataclass(frozen=True)
class Storage:
    """What `adapters` fine-tunes of one base take on the disk: as adapters, or each as a fused model."""

    adapters: int
    as_adapters_bytes: int
    fused_bytes: dict[str, int]


@dataclass(frozen=True)
class Advice(Table):
    """`choice` is the label of the variant to use; the reasons carry their figures."""

    choice: str
    decision: str
    reasons: tuple[str, ...]
    storage: Storage


def advise(
    report: Report,
    adapter: AdapterLike,
    *,
    adapters: int = 1,
    batch: int | None = None,
    memory_bytes: int | None = None,
    tolerance: float = TOLERANCE,
) -> Advice:
    """Say whether to keep an adapter or to fuse it, from a report that also measured its base and a fused variant.

    Args:
        report: of `benchmark`.
        adapter: the adapter's variant in it: its label, or what stands for it.
        adapters: how many such adapters are to be kept on one base.
        batch: concurrent requests, a batch size that was measured; None: the smallest.
        memory_bytes: what there is for the model; None: this machine's.
        tolerance: loss of quality that does not count, as a share.

    Raises ConfigError for a report that lacks what is asked of it.

    Example:
        >>> variants = ["base", "sql", "out/sql-4bit"]
        >>> report = ma.benchmark(variants, prompt_tokens=8, decode_tokens=4, rounds=1, trials=1)
        >>> ma.advise(report, "sql", adapters=3).choice in report.labels
        True
    """
    rows = {row.label: row for row in report.rows if row.error is None}
    mine = rows.get(label_of(adapter, rows))
    failed = {row.label: row.error for row in report.rows if row.error is not None}
    if mine is None and (why := failed.get(label_of(adapter, failed))):
        raise ConfigError(f"'{adapter}' could not be measured: {why}")
    if mine is None or not mine.adapter_bytes:
        raise ConfigError(f"The report has no adapter '{adapter}'.", f"it has: {', '.join(rows) or 'nothing'}.")
    judge = _Judge(report, rows, mine, batch, memory_bytes, tolerance)
    fitting = [row for row in judge.fused if judge.fits(row)]
    keeping = [row for row in fitting if judge.keeps(row)]
    if adapters > 1:
        choice, decision = mine, f"Keep the {count(adapters, 'adapter')} beside one base; switch between them."
    elif keeping:
        choice = max(keeping, key=lambda row: (judge.gain(row), -(row.size_bytes or 0)))
        decision = f"Fuse: use '{choice.label}'."
        if judge.gain(choice) <= 0:
            choice, decision = mine, "Keep the adapter: no fused variant was seen to decode faster."
    else:
        fits = "" if memory_bytes is None else "fits the memory and "
        choice, decision = mine, f"Keep the adapter: no fused variant {fits}is known to keep the fine-tune."
    if not judge.fits(mine) and choice.label == adapter:
        decision = "Nothing fits: " + (
            f"the adapter on its base needs {size(judge.peak(choice))}. Use a base of fewer bits."
        )
    storage = judge.storage(adapters)
    return Advice(choice.label, decision, tuple(judge.reasons(storage)), storage)


class _Judge:
    """The figures of one report, seen from one adapter."""

    def __init__(
        self,
        report: Report,
        rows: dict[str, VariantFigures],
        adapter: VariantFigures,
        batch: int | None,
        memory: int | None,
        tolerance: float,
    ) -> None:
        self.report, self.rows, self.adapter = report, rows, adapter
        self.memory, self.tolerance = memory, tolerance
        self.base, self.fused = report.around(adapter)
        self.batch = batch or report.config.batch[0]
        if self.batch not in report.config.batch:
            raise ConfigError(f"Batch size {batch} was not measured.", f"measured: {report.config.batch}.")
        self.quality = report.judged

    def shape(self, row: VariantFigures) -> ShapeRow:
        """The row at the longest prompt of the wanted batch size."""
        return max((s for s in row.shapes if s.batch == self.batch), key=lambda s: s.prompt_tokens)

    def peak(self, row: VariantFigures) -> int:
        return self.shape(row).peak_memory_bytes

    def fits(self, row: VariantFigures) -> bool:
        return self.memory is None or self.peak(row) <= self.memory

    def gain(self, row: VariantFigures) -> float:
        """By which share the fused row decodes faster than the adapter, 0 where no difference was seen."""
        ratio = self._compare(row.label, self.adapter.label, "decode_tps")
        return ratio.value - 1 if ratio.differs else 0.0

    def _compare(self, label: str, other: str, metric: str) -> Ratio:
        shape = self.shape(self.rows[label])
        wanted = (shape.prompt_tokens, shape.batch) if METRICS[metric].per_shape else (None, None)
        for comparison in self.report.compare(label, other, metric):
            if (comparison.prompt_tokens, comparison.batch) == wanted:
                return comparison.ratio
        raise FormatError(f"The report lacks figures of '{label}' and '{other}' to compare.", "measure again.")

    def keeps(self, row: VariantFigures) -> bool:
        """Whether the fused row keeps the fine-tune; what was not measured is not believed."""
        lost = self.report.lost(row, self.base)
        return lost is not None and lost <= self.tolerance

    def storage(self, adapters: int) -> Storage:
        base = self.base.size_bytes if self.base else None
        own = (self.adapter.size_bytes or 0) - base if base is not None else self.adapter.adapter_bytes or 0
        shared = base if base is not None else (self.adapter.size_bytes or 0) - own
        return Storage(adapters, shared + adapters * own, {r.label: adapters * (r.size_bytes or 0) for r in self.fused})

    def reasons(self, storage: Storage) -> list[str]:
        """A sentence for each thing that was weighed."""
        return [*self._storage(storage), *self._speed(), *self._quality(), *self._memory()]

    def _storage(self, storage: Storage) -> list[str]:
        n, apart = storage.adapters, storage.as_adapters_bytes
        what = f"1 base + {count(n, 'adapter')}"
        return [
            f"Storage: {what} take {size(apart)}; {n} x '{label}' {size(fused)}, {number(fused / apart)} times as much."
            for label, fused in storage.fused_bytes.items()
        ]

    def _speed(self) -> list[str]:
        """What the adapter costs beside its bare base, then what each fused model gains over the adapter."""
        pairs = [(self.adapter, self.base, "base")] if self.base else []
        pairs += [(row, self.adapter, "adapter") for row in self.fused]
        return [
            self._faster(metric, *pair) for pair in pairs for metric in ("decode_tps", "prefill_tps", "load_seconds")
        ]

    def _faster(self, metric: str, row: VariantFigures, other: VariantFigures, name: str) -> str:
        m, shape = METRICS[metric], self.shape(row)
        summaries = [
            r.load_seconds if metric == "load_seconds" else getattr(self.shape(r), metric) for r in (row, other)
        ]
        figures = " against ".join(number(summary.median) for summary in summaries if summary)
        where = f" at {shape.prompt_tokens} x {shape.batch}" if m.per_shape else ""
        ratio = phrase(metric, self._compare(row.label, other.label, metric))
        return f"'{row.label}' against the {name}, {m.title}{where}: {figures} {m.unit}, {ratio}."

    def _quality(self) -> list[str]:
        lines = []
        for row in self.fused:
            lost, judged = self.report.lost(row, self.base), self.quality.get(row.label)
            if lost is None or judged is None:
                lines.append(
                    f"'{row.label}': what fusing loses was not measured, so it is not advised (give --quality)."
                )
                continue
            words = (
                f"'{row.label}' loses {lost:.2%} of what the fine-tune changed (KL {number(judged['kl']['value'])} nats"
            )
            score, own = judged.get("score"), self.quality.get(self.adapter.label, {}).get("score")
            scores = f"; score {number(score['value'])} against {number(own['value'])}" if score and own else ""
            verdict = "kept" if lost <= self.tolerance else f"more than the {self.tolerance:.0%} allowed"
            lines.append(f"{words}{scores}): {verdict}.")
        return lines

    def _memory(self) -> list[str]:
        rows = [self.adapter, *self.fused]
        text = ", ".join(f"'{row.label}' {size(self.peak(row))}" for row in rows)
        room = "" if self.memory is None else f"; there is {size(self.memory)}"
        return [f"Peak memory at batch {self.batch}: {text}{room}."]
