"""How answers are written: the one definition that Python, the command line and the server share. Imports no MLX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from mlx_adapters.config.mapping import from_mapping, require
from mlx_adapters.config.settings import check, setting, settings


@settings
@dataclass(frozen=True)
class Sampling:
    """How long an answer may be, and how its tokens are chosen.

    The filters follow each other as in mlx-lm, on the probabilities at temperature 1: `top_p`, `min_p`, `top_k`.

    Raises ConfigError for a value out of range.

    Example:
        >>> wild = ma.Sampling(temperature=1.2, min_p=0.05, stop=("\\n\\n",))
        >>> answer = ma.load_model("demo").generate("List the Physics courses.", wild, max_tokens=8)
    """

    max_tokens: int = setting(256, "Longest answer", at_least=1)
    temperature: float = setting(0.0, "0: greedy", at_least=0)
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this mass", above=0, at_most=1)
    min_p: float = setting(
        0.0, "Sample from tokens at least this likely, relative to the likeliest", at_least=0, at_most=1
    )
    top_k: int = setting(0, "Sample from this many of the likeliest tokens; 0: from all", at_least=0)
    seed: int | None = setting(None, "Seed of the sampling", at_least=0, below=1 << 63)
    stop: tuple[str, ...] = setting((), "End the answer before this text", metavar="TEXT", repeated=True)

    def __post_init__(self) -> None:
        check(self)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        require(all(isinstance(word, str) and word for word in stop), "stop must be texts that are not empty.")
        object.__setattr__(self, "stop", stop)

    def changed(self, options: Mapping[str, Any]) -> "Sampling":
        """These settings but for `options`, by name. Raises ConfigError for an unknown name or a wrong value.

        Args:
            options: names and values.
        """
        stop = options.get("stop")
        given = from_mapping(Sampling, {**options, "stop": [stop]} if isinstance(stop, str) else options, "sampling")
        return replace(self, **{name: getattr(given, name) for name in options})


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as arguments of `generate`, for type checkers and editors."""

    max_tokens: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
