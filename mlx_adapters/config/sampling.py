"""How answers are written. Imports no MLX."""

from dataclasses import dataclass

from mlx_adapters.config.settings import check, setting, settings


@settings
@dataclass(frozen=True)
class Sampling:
    """How long an answer may be, and how its tokens are chosen.

    Raises ConfigError for a value out of range.
    """

    max_tokens: int = setting(256, "Longest answer", at_least=1)
    temperature: float = setting(0.0, "0: greedy", at_least=0)
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this mass", above=0, at_most=1)
    seed: int | None = setting(None, "Seed of the sampling", at_least=0, below=1 << 63)

    def __post_init__(self) -> None:
        check(self)
