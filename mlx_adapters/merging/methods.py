"""The ways to make one low-rank update out of several, as a table, each with its paper.

Each expert of a mixture-of-experts layer is a matrix of its own. Three places to do the arithmetic:

- stack: the factors side by side, [w₁s₁a₁ | w₂s₂a₂] · [b₁ ; b₂]. This *is* Σ wᵢ ΔWᵢ; ranks add up.
- factors: on all a and on all b separately, with √|wᵢsᵢ| on either side. Cheap, but (Σaᵢ)(Σbᵢ) has cross
  terms: it is not the weighted sum, and equal ranks are needed.
- update: on the full matrices ΔWᵢ, followed by a truncated SVD. Costs memory and O(in · out · rank).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mlx_adapters.errors import IncompatibleError
from mlx_adapters.merging import arithmetic
from mlx_adapters.merging.arithmetic import SignMethod
from mlx_adapters.merging.decomposition import Decomposition, decompose_matrix, decompose_product, join_decompositions
from mlx_adapters.models.low_rank import LowRankUpdate, Matrix, stack


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method prunes each matrix, whether it elects signs, where it works, and what it is for."""

    space: Literal["stack", "factors", "update"]
    prune: Literal["magnitude", "random"] | None
    elect: bool
    truncate: bool
    summary: str
    paper: str


_TASK, _TIES, _DARE = "arXiv 2212.04089", "arXiv 2306.01708", "arXiv 2311.03099"
_PEFT = "PEFT's add_weighted_adapter"
METHODS: dict[str, Method] = {
    "cat": Method("stack", None, False, False, "the exact weighted sum; ranks add up", _TASK),
    "svd": Method("stack", None, False, True, "the nearest update of a given rank to the exact sum", _TASK),
    "linear": Method("factors", None, False, False, "adds A and B apart: cross terms, not the sum", _PEFT),
    "ties": Method("factors", "magnitude", True, False, "prunes, elects signs, averages what agrees", _TIES),
    "dare-linear": Method("factors", "random", False, False, "drops at random, rescales, then linear", _DARE),
    "dare-ties": Method("factors", "random", True, False, "drops at random, rescales, elects signs", _DARE),
    "magnitude-prune": Method("factors", "magnitude", False, False, "keeps the largest, then linear", _PEFT),
    "ties-svd": Method("update", "magnitude", True, True, "so on full updates, then SVD", _TIES),
    "dare-linear-svd": Method("update", "random", False, True, "so on full updates, then SVD", _DARE),
    "dare-ties-svd": Method("update", "random", True, True, "so on full updates, then SVD", _DARE),
    "magnitude-prune-svd": Method("update", "magnitude", False, True, "so on full updates, then SVD", _PEFT),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a method may need beside the weights.

    `scale` is the one that a stack is to have; `rank` None means that the energy decides.
    """

    density: float = 1.0
    sign_method: SignMethod = "total"
    scale: float = 1.0
    rank: int | None = None
    energy: float = 0.99


def merge_updates(
    method: Method,
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float],
    options: Options,
    rng: np.random.Generator,
) -> LowRankUpdate | Decomposition:
    """Merge the updates of one layer. Methods that truncate return what the caller cuts.

    Raises IncompatibleError if the layers differ in shape, or in rank where the arithmetic needs equal ones.
    """
    shapes = {(update.a.shape[:-1], update.b.shape[:-2], update.b.shape[-1]) for update in updates}
    if len(shapes) > 1:
        raise IncompatibleError("the layers have different shapes.", "merge adapters of one base model.")
    if method.space == "stack":
        stacked = stack(updates, weights, options.scale)
        return decompose_product(np.float32(stacked.scale) * stacked.a, stacked.b) if method.truncate else stacked
    per_expert = _over_experts(updates)
    if method.space == "factors":
        merged = [_merge_factors(method, expert, weights, options, rng) for expert in per_expert]
        return LowRankUpdate(_join([m.a for m in merged], updates), _join([m.b for m in merged], updates))
    parts = [_merge_matrices(method, expert, weights, options, rng) for expert in per_expert]
    return join_decompositions(parts, experts=updates[0].a.ndim == 3)


Combine = Callable[[Sequence[Matrix], Sequence[float]], Matrix]


def _combiner(method: Method, options: Options, rng: np.random.Generator) -> Combine:
    def combine(tensors: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        if method.prune == "magnitude":
            tensors = [arithmetic.keep_largest(tensor, options.density) for tensor in tensors]
        elif method.prune == "random":
            tensors = [arithmetic.drop_at_random(tensor, options.density, rng) for tensor in tensors]
        if method.elect:
            return arithmetic.disjoint_mean(tensors, weights, options.sign_method)
        return arithmetic.weighted_sum(tensors, weights)

    return combine


def _merge_factors(
    method: Method,
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float],
    options: Options,
    rng: np.random.Generator,
) -> LowRankUpdate:
    if len({update.rank for update in updates}) > 1:
        ranks = ", ".join(str(update.rank) for update in updates)
        raise IncompatibleError(
            f"this method adds A and B entry by entry, but the ranks differ ({ranks}).",
            "use 'cat', 'svd' or a method that ends in '-svd'.",
        )
    strengths = [weight * update.scale for weight, update in zip(weights, updates, strict=True)]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    combine = _combiner(method, options, rng)
    a = combine([u.a for u in updates], [math.copysign(r, s) for r, s in zip(roots, strengths, strict=True)])
    return LowRankUpdate(a, combine([update.b for update in updates], roots))


def _merge_matrices(
    method: Method,
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float],
    options: Options,
    rng: np.random.Generator,
) -> Decomposition:
    combined = _combiner(method, options, rng)([update.matrix() for update in updates], weights)
    return decompose_matrix(combined, options.rank, options.energy)


def _over_experts(updates: Sequence[LowRankUpdate]) -> list[list[LowRankUpdate]]:
    if updates[0].a.ndim == 2:
        return [list(updates)]
    return [[LowRankUpdate(u.a[e], u.b[e], u.scale) for u in updates] for e in range(updates[0].a.shape[0])]


def _join(parts: list[Matrix], like: Sequence[LowRankUpdate]) -> Matrix:
    return parts[0] if like[0].a.ndim == 2 else np.stack(parts)
