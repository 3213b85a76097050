"""Everything that a benchmark measured, and what follows from it, as data; `reports` shows it.

Each process's raw result is kept; rows and ratios are computed from those, so that what was saved can be read
again by a later version and compared with something new.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.evaluation.statistics import Blocks, Ratio, Summary, paired_ratio, summarize
from mlx_adapters.evaluation.variants import Variant, short_names

FORMAT = 2
NOT_RUN = "not run"  # stands where the error of a variant does that no process came to


@dataclass(frozen=True)
class Metric:
    """What is compared: its name in sentences, whether more is better, whether each shape has its own."""

    title: str
    unit: str
    more_is_better: bool
    per_shape: bool = True


METRICS = {
    "decode_tps": Metric("decode", "tok/s", True),
    "prefill_tps": Metric("prefill", "tok/s", True),
    "ttft_seconds": Metric("TTFT", "s", False),
    "tpot_seconds": Metric("TPOT", "s", False),
    "stretch_tps": Metric("fastest steps", "tok/s", True),
    "load_seconds": Metric("load", "s", False, per_shape=False),
    "cold_load_seconds": Metric("cold load", "s", False, per_shape=False),
    "peak_memory_bytes": Metric("peak memory", "B", False),
}
COMPARED = ("decode_tps", "prefill_tps", "load_seconds", "peak_memory_bytes")
Shape = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """The raw result of one process: which variant, in which round."""

    variant: str
    round: int
    result: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class ShapeRow:
    """One variant at one prompt length and batch size.

    `ceiling_share`: bytes that decoding read per second over the device's measured bandwidth.
    """

    prompt_tokens: int
    batch: int
    ttft_seconds: Summary
    prefill_tps: Summary
    decode_tps: Summary
    tpot_seconds: Summary
    peak_memory_bytes: int
    kv_cache_bytes: int
    ceiling_share: float


@dataclass(frozen=True)
class VariantFigures:
    """One variant: its figures, or the error that kept it from having any."""

    label: str
    error: str | None = None
    size_bytes: int | None = None
    load_seconds: Summary | None = None
    cold_load_seconds: Summary | None = None
    load_peak_bytes: int | None = None
    weights_bytes: int | None = None
    adapter_bytes: int | None = None
    bytes_per_token: int | None = None
    bandwidth_bytes_per_second: float | None = None
    peak_resident_bytes: int | None = None
    footprint_bytes: int | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[ShapeRow, ...] = ()


@dataclass(frozen=True)
class RatioOf:
    """`variant` held against another in one metric."""

    variant: str
    against: str
    metric: str
    ratio: Ratio
    prompt_tokens: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Measurements:
    """All that one benchmark measured, with its conditions."""

    created: str
    command: str
    machine: dict[str, Any]
    state: dict[str, Any]
    config: BenchmarkConfig
    variants: tuple[Variant, ...]
    runs: tuple[Run, ...] = field(repr=False)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    interrupted: bool = False
    quality: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The names of the variants, in their order."""
        return [variant.label for variant in self.variants]

    @cached_property
    def readable(self) -> Self:
        """The same with short names for folders: what people read. What is saved keeps the references."""
        names = short_names(self.labels)
        return self if list(names) == list(names.values()) else self.renamed(names)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same with each variant under another name."""
        quality = {**self.quality}
        if quality:
            evaluations = [{**e, "variant": names.get(e["variant"], e["variant"])} for e in quality["evaluations"]]
            quality |= {"evaluations": evaluations, "reference": names.get(quality["reference"])}
        return replace(
            self,
            variants=tuple(replace(v, label=names[v.label]) for v in self.variants),
            quality=quality,
            runs=tuple(replace(run, variant=names[run.variant]) for run in self.runs),
        )

    @property
    def failures(self) -> dict[str, str]:
        """Label -> why the variant could not be measured, or not be judged."""
        judged = {e["variant"]: e["error"] for e in self.quality.get("evaluations", ())}
        errors = {row.label: row.error or judged.get(row.label) for row in self.rows}
        return {label: error for label, error in errors.items() if error}

    @property
    def judged(self) -> dict[str, dict[str, Any]]:
        """Label -> evaluation of the variants whose quality was measured."""
        return {e["variant"]: e for e in self.quality.get("evaluations", ()) if not e.get("error")}

    def around(self, adapter: VariantFigures) -> tuple[VariantFigures | None, list[VariantFigures]]:
        """The bare base of an adapter, and the fused models: what has weights of its own and no adapter on it."""
        bare = [row for row in self.rows if row.error is None and not row.adapter_bytes]
        mine = adapter.conditions["fingerprint"]
        base = next((row for row in bare if row.conditions["fingerprint"] == mine), None)
        return base, [row for row in bare if row.conditions["fingerprint"] != mine]

    def lost(self, fused: VariantFigures, base: VariantFigures | None) -> float | None:
        """KL(adapter ‖ fused) over KL(adapter ‖ base): the share of the fine-tune that fusing undid. None if it was not
        measured."""
        mine, whole = (self.judged.get(row.label, {}).get("kl") if row else None for row in (fused, base))
        return mine["value"] / whole["value"] if mine and whole and whole["value"] > 0 else None

    def of(self, label: str) -> list[Run]:
        """The runs of a variant, in the order of the rounds."""
        return sorted((run for run in self.runs if run.variant == label), key=lambda run: run.round)

    def blocks(self, label: str, metric: str, shape: Shape | None = None) -> Blocks:
        """{round: values of the trials} of one metric."""
        blocks: dict[int, list[float]] = {}
        for run in self.of(label):
            if not METRICS[metric].per_shape:
                blocks[run.round] = [run.result[metric]] if run.result.get(metric) else []
            for measured in run.result.get("shapes", ()) if METRICS[metric].per_shape else ():
                if shape in (None, (measured["prompt_tokens"], measured["batch"])):
                    own = [measured[metric]] if metric in measured else [t[metric] for t in measured["trials"]]
                    blocks.setdefault(run.round, []).extend(own)
        return blocks

    def evidence(self, label: str, metric: str, shape: Shape | None = None) -> Blocks:
        """{round: [what is compared]}: the least disturbed value of each round.

        Other programs only ever take speed away, so the best trial says most about the variant itself, and of a
        decoding its fastest steps in a row.
        """
        best = max if METRICS[metric].more_is_better else min
        measured = self.blocks(label, "stretch_tps" if metric == "decode_tps" else metric, shape)
        return {number: [best(values)] for number, values in measured.items() if values}

    @cached_property
    def rows(self) -> list[VariantFigures]:
        """One row for each variant, in the order they were named."""
        return [self._row(label) for label in self.labels]

    def _row(self, label: str) -> VariantFigures:
        runs = self.of(label)
        error = next((run.result["error"] for run in runs if "error" in run.result), None)
        if error or not runs:
            return VariantFigures(label, error or NOT_RUN)
        results = [run.result for run in runs]
        return VariantFigures(
            label,
            None,
            results[0]["size_bytes"],
            load_seconds=self.summary(label, "load_seconds"),
            cold_load_seconds=self.summary(label, "cold_load_seconds"),
            load_peak_bytes=max(r["load_peak_bytes"] for r in results),
            weights_bytes=results[0]["weights_bytes"],
            adapter_bytes=results[0]["adapter_bytes"],
            bytes_per_token=results[0]["bytes_per_token"],
            bandwidth_bytes_per_second=_median(r["bandwidth_bytes_per_second"] for r in results),
            peak_resident_bytes=max(r["process"]["peak_resident_bytes"] for r in results),
            footprint_bytes=max((r["process"]["footprint_bytes"] or 0 for r in results), default=0) or None,
            conditions=results[0]["conditions"],
            shapes=tuple(self._shape(label, s) for s in self.config.shapes),
        )

    def _shape(self, label: str, shape: Shape) -> ShapeRow:
        results = [run.result for run in self.of(label)]
        kv = max(
            t["kv_cache_bytes"]
            for r in results
            for m in r["shapes"]
            if (m["prompt_tokens"], m["batch"]) == shape
            for t in m["trials"]
        )
        speeds = {
            name: self.summary(label, name, shape)
            for name in ("ttft_seconds", "prefill_tps", "decode_tps", "tpot_seconds")
        }
        ceiling = _median(r["bandwidth_bytes_per_second"] for r in results)
        steps = speeds["decode_tps"].median / shape[1]
        return ShapeRow(
            *shape,
            **speeds,
            kv_cache_bytes=kv,
            peak_memory_bytes=int(max(v for b in self.blocks(label, "peak_memory_bytes", shape).values() for v in b)),
            ceiling_share=steps * (results[0]["bytes_per_token"] + kv) / ceiling,
        )

    def summary(self, label: str, metric: str, shape: Shape | None = None) -> Any:
        """The summary of all trials of one metric, None if it was not measured."""
        return summarize([value for values in self.blocks(label, metric, shape).values() for value in values])

    @cached_property
    def comparisons(self) -> list[RatioOf]:
        """Each variant against each one named before it, in every compared metric."""
        fine = [row.label for row in self.rows if row.error is None]
        pairs = [(label, other) for i, label in enumerate(fine) for other in fine[:i]]
        return [ratio for label, other in pairs for metric in COMPARED for ratio in self.compare(label, other, metric)]

    def compare(self, label: str, other: str, metric: str) -> list[RatioOf]:
        """One variant against another in one metric, for each shape that the metric has."""
        shapes: list[Shape | None] = [*self.config.shapes] if METRICS[metric].per_shape else [None]
        ratios = []
        for shape in shapes:
            ratio = paired_ratio(self.evidence(label, metric, shape), self.evidence(other, metric, shape))
            if ratio is not None:
                ratios.append(RatioOf(label, other, metric, ratio, *(shape or (None, None))))
        return ratios

    @property
    def measured_seconds(self) -> float:
        """Seconds that went into loads, trials and the bandwidth; the rest is starting, warming up, bookkeeping."""
        total = 0.0
        for run in self.runs:
            parts = ("load_seconds", "cold_load_seconds", "bandwidth_seconds")
            total += sum(run.result.get(part, 0) for part in parts)
            for measured in run.result.get("shapes", ()):
                for t in measured["trials"]:
                    decoded = measured["batch"] * (self.config.decode_tokens - 1)
                    total += t["ttft_seconds"] + decoded / t["decode_tps"]
        return total

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values: conditions, rows, comparisons, and every trial."""
        raw = {"format": FORMAT} | to_mapping(self)
        return raw | {
            "rows": [to_mapping(r) for r in self.rows],
            "comparisons": [to_mapping(c) for c in self.comparisons],
        }


def _median(values: Iterable[float]) -> float:
    summary = summarize(list(values))
    assert summary is not None
    return summary.median
