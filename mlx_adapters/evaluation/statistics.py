"""What repeated timings say, and what they do not.

Timings of one process have much in common (its memory layout, what else the machine did just then), so the
process, not the trial, is the unit of evidence: trials come in blocks, one block per process, and every
variant runs once in each round of blocks. Two variants are compared by the ratio within a round (of their
medians, where a round has several values), which cancels slow drift. The rounds' log ratios are resampled
(bootstrap) for the standard error; with few rounds the plain percentile interval is far too narrow, so the
interval is that error, corrected by √(n/(n-1)), times Student's t (Hesterberg, arXiv 1411.5279, section 3.2).
Two rounds that happen to agree would look like certainty, so below MIN_ROUNDS there is a ratio, but no
interval and no claim.

Pure functions on numbers; "blocks" are {round: [values of its trials]}.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Blocks = Mapping[int, Sequence[float]]

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)
RESAMPLES = 2000
MIN_ROUNDS = 3
NEGLIGIBLE = 0.0005  # 0.05 %, which is printed as 0.0: no difference, however exactly it repeats (memory does)


@dataclass(frozen=True)
class Summary:
    """Median, 5th and 95th percentile, extremes and number of the trials."""

    median: float
    p5: float
    p95: float
    minimum: float
    maximum: float
    count: int


def summarize(values: Sequence[float]) -> Summary | None:
    """The summary of a sample, None for an empty one. Percentiles interpolate between the values."""
    if not values:
        return None
    p5, median, p95 = np.percentile(np.asarray(values, float), [5, 50, 95])
    return Summary(float(median), float(p5), float(p95), min(values), max(values), len(values))


@dataclass(frozen=True)
class Ratio:
    """a / b with its 95 % interval; no interval (None) from fewer than MIN_ROUNDS rounds."""

    value: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1 and what is next to it: otherwise no difference was seen."""
        if self.low is None or self.high is None:
            return False
        return self.low > 1 + NEGLIGIBLE or self.high < 1 - NEGLIGIBLE


def student(degrees: float) -> float:
    """The 97.5 % quantile of Student's t."""
    degrees = max(1, int(degrees))
    return STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96 + 2.5 / degrees


def bootstrap_error(values: Sequence[float], seed: int = 0) -> float:
    """Standard error of the mean of `values` by resampling, corrected for their small number."""
    sample = np.asarray(values, float)
    n = len(sample)
    picks = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    return float(sample[picks].mean(axis=1).std() * math.sqrt(n / (n - 1)))


def log_medians(blocks: Blocks) -> dict[int, float]:
    """Round -> logarithm of the median of its trials."""
    return {number: math.log(statistics.median(values)) for number, values in blocks.items() if values}


def paired_ratio(a: Blocks, b: Blocks) -> Ratio | None:
    """a / b over the rounds that both have; None if there is none."""
    one, two = log_medians(a), log_medians(b)
    logs = [one[number] - two[number] for number in sorted(one.keys() & two.keys())]
    if not logs:
        return None
    center = statistics.fmean(logs)
    if len(logs) < MIN_ROUNDS:
        return Ratio(math.exp(center), None, None, len(logs))
    margin = student(len(logs) - 1) * bootstrap_error(logs)
    return Ratio(math.exp(center), math.exp(center - margin), math.exp(center + margin), len(logs))


def unpaired_ratio(a: Blocks, b: Blocks) -> Ratio | None:
    """a / b of two reports, whose rounds have nothing to do with each other (Welch's degrees).

    All rounds of a report are of one occasion, and the machine's state of another one (its clock, its neighbors)
    differs from it at least as one round does from the next. That does not average out over rounds: the variance
    of a report's mean is taken as s² + s² / n, not s² / n.
    """
    one, two = list(log_medians(a).values()), list(log_medians(b).values())
    if not one or not two:
        return None
    center = statistics.fmean(one) - statistics.fmean(two)
    rounds = min(len(one), len(two))
    if rounds < MIN_ROUNDS:
        return Ratio(math.exp(center), None, None, rounds)
    variances = [bootstrap_error(x, seed) ** 2 * (len(x) + 1) for seed, x in enumerate((one, two))]
    total = sum(variances)
    parts = sum(v**2 / (len(x) - 1) for v, x in zip(variances, (one, two), strict=True))
    margin = student(total**2 / parts if parts else 1) * math.sqrt(total)
    return Ratio(math.exp(center), math.exp(center - margin), math.exp(center + margin), rounds)


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error (None for a single value, and where it is infinite) and the number of values."""

    value: float
    error: float | None
    count: int

    @property
    def differs(self) -> bool:
        """Whether the 95 % interval of the mean excludes 0."""
        return self.error is not None and abs(self.value) > student(self.count - 1) * self.error


def mean(values: Sequence[float], groups: Sequence[bool] = ()) -> Mean:
    """The mean of independent values, such as one score for each row.

    With `groups` the values are `placements`, each of one group against the other: the errors of both add up (DeLong
    et al. 1988), and the count is of the smaller group, of so many pairs that share no row.
    """
    if not len(values):
        raise ValueError("no values")
    parts = [[v for v, g in zip(values, groups, strict=True) if g is k] for k in (True, False)] if groups else [values]
    count = min(map(len, parts))
    error = math.sqrt(sum(statistics.variance(part) / len(part) for part in parts)) if count > 1 else None
    return Mean(float(statistics.fmean(values)), error, count)


def placements(values: Sequence[float], groups: Sequence[bool]) -> list[float]:
    """Of each value of the first group (True) the share of the second group's that it exceeds, and of each of the
    second the share of the first's that exceed it; equal ones count half. The mean is the area under the ROC curve.

    Example:
        >>> placements([0.9, 0.2, 0.4, 0.1], [True, True, False, False])
        [1.0, 0.5, 0.5, 1.0]
    """
    own, first = np.asarray(values, float), np.asarray(groups, bool)
    places = np.empty(len(own))
    for group, others in ((first, np.sort(own[~first])), (~first, np.sort(own[first]))):
        below = sum(np.searchsorted(others, own[group], side) for side in ("left", "right"))
        places[group] = below / (2 * len(others))
    return np.where(first, places, 1 - places).tolist()


def weighted_mean(sums: Sequence[float], weights: Sequence[float]) -> Mean:
    """Σ sums / Σ weights, rows being the independent units (e.g. summed loss and tokens of each row).

    The error is the ratio estimator's: the spread of sum - value · weight over the mean weight.
    """
    value = sum(sums) / sum(weights)
    if len(sums) < 2 or not math.isfinite(value):
        return Mean(float(value), None, len(sums))
    residuals = [s - value * w for s, w in zip(sums, weights, strict=True)]
    spread = math.sqrt(math.fsum(r * r for r in residuals) / (len(sums) - 1))
    return Mean(float(value), float(spread / math.sqrt(len(sums)) / statistics.fmean(weights)), len(sums))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent trials (Wilson's): never a point, though all were alike."""
    z2 = 1.96**2
    center, denominator = share + z2 / (2 * count), 1 + z2 / count
    margin = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return max((center - margin) / denominator, 0.0), min((center + margin) / denominator, 1.0)
