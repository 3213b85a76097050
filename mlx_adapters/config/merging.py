"""How adapters are merged. Imports no MLX."""

from dataclasses import dataclass
from typing import Literal

from mlx_adapters.config.quantization import Dtype
from mlx_adapters.config.settings import check, setting, settings

MergeMethod = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "dare-linear",
    "dare-ties",
    "magnitude-prune",
    "ties-svd",
    "dare-linear-svd",
    "dare-ties-svd",
    "magnitude-prune-svd",
]


@settings
@dataclass(frozen=True)
class MergeSettings:
    """The method and what it needs; what None stands for depends on the method.

    Raises ConfigError for a value out of range.
    """

    method: MergeMethod = setting(
        "cat", "How to merge", more="Methods that end in -svd work on full updates.", metavar="METHOD"
    )
    rank: int | Literal["auto"] | None = setting(
        None, "Rank of the result, for svd and *-svd", means="the largest", at_least=1, metavar="R|auto"
    )
    energy: float | None = setting(None, "With `rank` auto: share of ‖ΔW‖² to keep", means="0.99", above=0, at_most=1)
    density: float | None = setting(
        None, "Share of entries that pruning keeps (ties, dare, magnitude-prune)", above=0, at_most=1
    )
    seed: int | None = setting(None, "Seed of random pruning (dare)", means="0", at_least=0)
    sign_method: Literal["total", "frequency"] | None = setting(None, "How signs are elected (ties)", means="total")
    dtype: Dtype = setting("auto", "Type of the result", means="auto: float32 unless a smaller one is exact")
    any_base: bool = setting(False, "Merge adapters of different bases")

    def __post_init__(self) -> None:
        check(self)
