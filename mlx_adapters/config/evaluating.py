"""How variants are judged. Imports no MLX."""

from dataclasses import dataclass
from typing import Literal

from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.quantization import CacheQuantization, Dtype, bits_of_cache, computing_dtype, groups_of_cache
from mlx_adapters.config.settings import setting, settings


@settings
@dataclass(frozen=True)
class EvaluationConfig(DataConfig):
    """Which rows are judged, and how.

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.EvaluationConfig(score="sqlite", max_rows=100).max_tokens
        256
    """

    split: Literal["test", "valid", "train"] | None = setting(None, "Rows to judge", means="test, else valid")
    score: str | None = setting(
        None,
        "exact, regex:PATTERN, sqlite[:FILE] or command:COMMAND; of preferences, preference or reward",
        more="preference: the share of pairs whose chosen answer is likelier per token; reward: of those whose chosen "
        "answer gained more on the reference (the base). Of answers with a label: how often a good one is likelier "
        "than a bad one; how many gained if good, or lost if bad. None: of preferences the first, else losses alone.",
        metavar="SCORE",
    )
    reference: str | None = setting(
        None,
        "Take KL against this variant",
        means="the first adapter",
        more="If there are several variants.",
        metavar="VARIANT",
    )
    max_rows: int | None = setting(None, "Judge only so many rows, evenly spaced", at_least=1)
    max_seq_length: int = setting(2048, "Longest row", more="In tokens.", at_least=2)
    max_tokens: int = setting(256, "Longest answer", at_least=1)
    batch_size: int = setting(8, "Answers at a time", at_least=1)
    kv_bits: int | None = bits_of_cache()
    kv_group_size: int = groups_of_cache()
    dtype: Dtype = computing_dtype()
    any_base: bool = setting(False, "Use the adapter on a base it was not trained on")

    def __post_init__(self) -> None:
        super().__post_init__()
        CacheQuantization(self.kv_bits, self.kv_group_size)  # raises for what MLX does not have
