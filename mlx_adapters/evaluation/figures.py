"""What an evaluation found, as data: the figures of each variant and their differences."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from mlx_adapters.evaluation.statistics import Mean, mean, weighted_mean
from mlx_adapters.evaluation.variants import short_names
from mlx_adapters.surgery.taps import perplexity


@dataclass(frozen=True)
class TokenFigures:
    """Sums over the judged tokens of each row; float64 arrays (rows,) in the order of the rows.

    `kl` and `same_top` are None without a reference.
    """

    tokens: np.ndarray
    loss: np.ndarray
    kl: np.ndarray | None = None
    same_top: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluation:
    """The figures of one variant. Loss and KL in nats per judged token, each with its standard error. `groups`: of rows
    whose scores are `placements`, which are good."""

    variant: str
    rows: int = 0
    tokens: int = 0
    loss: Mean | None = None
    kl: Mean | None = None
    same_top: Mean | None = None
    score: Mean | None = None
    error: str | None = None
    row_scores: tuple[float, ...] = field(default=(), repr=False)
    groups: tuple[bool, ...] = field(default=(), repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    figures: TokenFigures | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float | None:
        """e to the loss."""
        return None if self.loss is None else perplexity(self.loss.value)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the answers included."""
        return {
            "variant": self.variant,
            "error": self.error,
            "rows": self.rows,
            "tokens": self.tokens,
            "loss": _plain(self.loss),
            "perplexity": self.perplexity,
            "kl": _plain(self.kl),
            "same_top": _plain(self.same_top),
            "score": _plain(self.score),
            "row_scores": list(self.row_scores),
            "answers": list(self.answers),
        }


@dataclass(frozen=True)
class Difference:
    """`variant` minus `against`, row by row."""

    variant: str
    against: str
    loss: Mean
    score: Mean | None


@dataclass(frozen=True)
class Evaluations:
    """All evaluations of one call, on the same rows."""

    created: str
    data: dict[str, Any]
    score: str | None
    reference: str | None
    evaluations: tuple[Evaluation, ...]

    @property
    def readable(self) -> Self:
        """The same with short names for folders: what people read."""
        names = short_names(e.variant for e in self.evaluations)
        shown = tuple(replace(e, variant=names[e.variant]) for e in self.evaluations)
        return replace(self, evaluations=shown, reference=self.reference and names[self.reference])

    @property
    def source(self) -> str:
        """The data's name."""
        return Path(self.data["source"]).name

    @property
    def differences(self) -> list[Difference]:
        """Each variant against the first that could be evaluated."""
        fine = [e for e in self.evaluations if e.error is None]
        return [_difference(other, fine[0]) for other in fine[1:]]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        differences = [
            {"variant": d.variant, "against": d.against, "loss": _plain(d.loss), "score": _plain(d.score)}
            for d in self.differences
        ]
        return {
            "created": self.created,
            "data": self.data,
            "score": self.score,
            "reference": self.reference,
            "evaluations": [e.to_json() for e in self.evaluations],
            "differences": differences,
        }


def _difference(one: Evaluation, other: Evaluation) -> Difference:
    assert one.figures is not None and other.figures is not None
    with np.errstate(invalid="ignore"):  # of two that are infinite there is no difference
        apart = one.figures.loss - other.figures.loss
    loss = weighted_mean(list(apart), list(other.figures.tokens))
    scored = one.row_scores and other.row_scores
    score = mean(list(np.subtract(one.row_scores, other.row_scores)), one.groups) if scored else None
    return Difference(one.variant, other.variant, loss, score)


def _plain(value: Mean | None) -> dict[str, Any] | None:
    return None if value is None else {"value": value.value, "error": value.error, "count": value.count}
