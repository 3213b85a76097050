"""Objectives: from log-probabilities to a loss. Pure functions on float32 arrays of shape (B,), one value an example.

An objective is its settings (`config.training`) and a function here, which is given what the model and the reference
say of B answers, or B pairs of answers. It returns the loss of each example and the rewards of its answers. The loss
of an update is their mean over all its examples, however many batches and processes they are spread over; an objective
that learns the likelihood adds the cross entropy, the mean over all trained tokens. Plain fine-tuning is that alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_adapters.config.training import DPO, KTO, ORPO, Objective, SimPO
from mlx_adapters.optimization.log_probabilities import Arrays
from mlx_adapters.system.door import mx, nn

Figures = dict[str, mx.array]  # name -> (sum, number of values), whose quotient is the mean
Sums = dict[str, list[float]]  # the same as plain numbers


@dataclass(frozen=True)
class Answers:
    """What is known of B examples; float32 (B,) each.

    Log-probabilities are sums over an answer's tokens, in nats. Of labeled answers only the first of each two is there.
    `labels`: 1 for a desirable answer (or a pair), -1 for an undesirable one, 0 for padding. `kl`: a scalar, how much
    answers of other prompts gained on the reference, at least 0.
    """

    chosen: mx.array
    chosen_tokens: mx.array
    rejected: mx.array
    rejected_tokens: mx.array
    chosen_reference: mx.array
    rejected_reference: mx.array
    labels: mx.array
    kl: mx.array

    @property
    def means(self) -> tuple[mx.array, mx.array]:
        """Log-probabilities per token of both answers."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class Judgment:
    """Loss, rewards, and the log-probabilities that were compared; (B,) each. Of labeled answers there is no second."""

    loss: mx.array
    chosen_reward: mx.array
    rejected_reward: mx.array
    chosen: mx.array
    rejected: mx.array


def _smoothed(margin: mx.array, smoothing: float) -> mx.array:
    """-log σ(margin), of a pair that is the wrong way round with probability `smoothing`."""
    loss = -(1 - smoothing) * nn.log_sigmoid(margin)
    return loss - smoothing * nn.log_sigmoid(-margin) if smoothing else loss


def dpo(settings: DPO, a: Answers) -> Judgment:
    """arXiv 2305.18290, equation 7; "ipo": arXiv 2310.12036, equation 17, on means per token."""
    chosen, rejected = a.chosen - a.chosen_reference, a.rejected - a.rejected_reference
    margin = chosen - rejected
    if settings.length_normalization or settings.loss == "ipo":
        margin = chosen / a.chosen_tokens - rejected / a.rejected_tokens
    if settings.loss == "ipo":
        loss = mx.square(margin - 1 / (2 * settings.beta))
    elif settings.loss == "hinge":
        loss = mx.maximum(1 - settings.beta * margin, 0)
    else:
        loss = _smoothed(settings.beta * margin, settings.label_smoothing)
    return Judgment(loss, settings.beta * chosen, settings.beta * rejected, a.chosen, a.rejected)


def orpo(settings: ORPO, a: Answers) -> Judgment:
    """arXiv 2403.07691, equation 7: log odds p / (1 - p) of p, the answer's geometric mean over its tokens."""
    chosen, rejected = a.means
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    loss = -settings.beta * nn.log_sigmoid(log_odds)
    return Judgment(loss, settings.beta * chosen, settings.beta * rejected, chosen, rejected)


def _log1mexp(x: mx.array) -> mx.array:
    """log(1 - e^x) of x below 0. A certain answer (x = 0 in float32) is taken to be almost certain."""
    return mx.log(-mx.expm1(mx.minimum(x, -1e-7)))


def simpo(settings: SimPO, a: Answers) -> Judgment:
    """arXiv 2405.14734, equation 6."""
    chosen, rejected = a.means
    margin = settings.beta * (chosen - rejected) - settings.gamma
    loss = _smoothed(margin, settings.label_smoothing)
    return Judgment(loss, settings.beta * chosen, settings.beta * rejected, chosen, rejected)


def kto(settings: KTO, a: Answers) -> Judgment:
    """arXiv 2402.01306, equation 8, whose z_0 is `kl`: a constant of the step, without gradient."""
    gain, desirable = a.chosen - a.chosen_reference, a.labels > 0
    weight = mx.where(desirable, settings.desirable_weight, settings.undesirable_weight)
    loss = weight * (1 - mx.sigmoid(settings.beta * mx.where(desirable, gain - a.kl, a.kl - gain)))
    return Judgment(loss, settings.beta * gain, settings.beta * a.kl, a.chosen, a.chosen)


JUDGES: dict[type, Callable[[Any, Answers], Judgment]] = {DPO: dpo, ORPO: orpo, SimPO: simpo, KTO: kto}


@dataclass(frozen=True)
class Shares:
    """What the whole update, over all its batches and processes, gives each of its parts: scalars.

    `tokens`: 1 / trained tokens. `examples`: 1 / examples. `kl`: see `Answers`.
    """

    tokens: mx.array
    examples: mx.array
    kl: mx.array


def loss_of(objective: Objective, by_token: mx.array, batch: Arrays, shares: Shares) -> tuple[mx.array, Figures]:
    """A batch's part of the update's loss, and its figures.

    Args:
        objective: the settings.
        by_token: (n,) log-probabilities of the batch's trained tokens.
        batch: what they belong to.
        shares: what the update is divided by.
    """
    lines = batch.tokens.shape[0]
    line = batch.positions // (batch.tokens.shape[1] - 1)  # (n,) to which line each token belongs
    loss, figures = mx.array(0.0), {}
    if objective.likelihood:
        first = lines // 2 if objective.rows == "pairs" else lines
        loss = -(by_token * batch.weights * (line < first)).sum() * shares.tokens
    if batch.labels is not None:
        judgment, real = _judged(objective, by_token, line, batch, shares.kl)
        loss = loss + (judgment.loss * real).sum() * shares.examples
        figures = _figures(objective, judgment, batch.labels)
    return loss, figures


def _judged(
    objective: Objective, by_token: mx.array, line: mx.array, batch: Arrays, kl: mx.array
) -> tuple[Judgment, mx.array]:
    sums, counts = sums_of_lines(by_token, line, batch)
    pairs = objective.rows == "pairs"
    reference = mx.zeros_like(sums) if batch.reference is None else batch.reference
    halves = [mx.split(array, 2) if pairs else (array, array) for array in (sums, mx.maximum(counts, 1), reference)]
    (chosen, rejected), (chosen_tokens, rejected_tokens), (ours, theirs) = halves
    assert batch.labels is not None
    answers = Answers(chosen, chosen_tokens, rejected, rejected_tokens, ours, theirs, batch.labels, kl)
    return JUDGES[type(objective)](objective, answers), mx.abs(batch.labels)


def sums_of_lines(by_token: mx.array, line: mx.array, batch: Arrays) -> tuple[mx.array, mx.array]:
    """((lines,) sums over each line's answer, (lines,) its tokens). A product, since the order of a scattered sum
    is left to the device."""
    assert batch.answers is not None
    owns = mx.arange(batch.tokens.shape[0])[:, None] == line  # (lines, n)
    counted = mx.where(owns, batch.answers, 0.0)
    return mx.where(counted > 0, by_token, 0.0).sum(axis=1), counted.sum(axis=1)


def _figures(objective: Objective, j: Judgment, labels: mx.array) -> Figures:
    """Sums and counts of what people watch."""
    real, good, bad = mx.abs(labels), (labels > 0).astype(mx.float32), (labels < 0).astype(mx.float32)
    labeled = objective.rows == "labeled"
    rejected, sides = (j.chosen_reward, bad) if labeled else (j.rejected_reward, good)
    # Of labeled answers the second reward is the KL's. An untrained model, which sees no difference, is half right.
    right = 0.5 + 0.5 * mx.sign(j.chosen_reward - j.rejected_reward) * labels
    values = {
        "accuracy": (right, real),
        "chosen_reward": (j.chosen_reward, good),
        "rejected_reward": (rejected, sides),
        "chosen_log_probability": (j.chosen, good),
        "rejected_log_probability": (j.rejected, sides),
    }
    sums = {name: mx.stack([(value * which).sum(), which.sum()]) for name, (value, which) in values.items()}
    return {name: mx.stop_gradient(pair) for name, pair in sums.items()}


def with_sums(sums: Sums, more: Sums) -> Sums:
    """Both together."""
    before = {name: sums.get(name, [0.0, 0.0]) for name in more}
    return sums | {name: [a + b for a, b in zip(before[name], pair, strict=True)] for name, pair in more.items()}


def means(sums: Sums) -> dict[str, float]:
    """What the sums come to, and the margin between the rewards; what has no value is left out."""
    figures = {name: total / count for name, (total, count) in sums.items() if count}
    if {"chosen_reward", "rejected_reward"} <= figures.keys():
        return {"margin": figures["chosen_reward"] - figures["rejected_reward"], **figures}
    return figures
