"""How a benchmark is done: its settings, and the order in which the processes run. Imports no MLX."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_adapters.config.mapping import is_whole, require
from mlx_adapters.config.quantization import Dtype, computing_dtype
from mlx_adapters.config.settings import check, setting, settings


def stretch(decode_tokens: int) -> int:
    """How many decode steps in a row are compared, the fastest of a trial."""
    return min(16, decode_tokens - 1)


@settings
@dataclass(frozen=True)
class BenchmarkConfig:
    """How the measuring is done: every variant runs once in each round, in a fresh process, in shuffled order.

    A process loads the model, warms up and measures each prompt length and batch size `trials` times.

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.BenchmarkConfig(prompt_tokens=(128, 1024), batch=(1, 8)).shapes
        [(128, 1), (1024, 1), (128, 8), (1024, 8)]
    """

    prompt_tokens: tuple[int, ...] = setting((128,), "Prompt lengths: 128,512,2048")
    decode_tokens: int = setting(64, "Tokens to write", at_least=2)
    batch: tuple[int, ...] = setting((1,), "Batch sizes: 1,4")
    rounds: int = setting(
        5, "Fresh processes per variant, in shuffled rounds; fewer than 3 show no difference", at_least=1
    )
    trials: int = setting(3, "Trials per process", at_least=1)
    warmup_tokens: int = setting(8, "Tokens to write before anything is measured", at_least=1)
    dtype: Dtype = computing_dtype()
    cold_load: bool = setting(True, "Also load with the file cache dropped", more="Where that is possible.")
    any_base: bool = setting(False, "Use the adapter on a base it was not trained on")
    data: str | None = setting(None, "Take the prompts from this data", means="random tokens", metavar="DIR")
    seed: int = setting(0, "Of the order and of the random prompts")

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch"):
            if is_whole(one := getattr(self, name)):  # a single length is as good as a tuple of it
                object.__setattr__(self, name, (int(one),))
        check(self)
        for name in ("prompt_tokens", "batch"):
            values = getattr(self, name)
            require(len(values) > 0 and min(values) >= 1, f"{name} needs whole numbers of at least 1.")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(prompt tokens, batch) of each measurement."""
        return [(prompt, batch) for batch in self.batch for prompt in self.prompt_tokens]


def schedule(count: int, rounds: int, seed: int) -> list[tuple[int, int]]:
    """(round, variant) in the order of running: all variants once per round, each round shuffled anew."""
    order = random.Random(seed)
    plan = []
    for number in range(rounds):
        variants = list(range(count))
        order.shuffle(variants)
        plan += [(number, variant) for variant in variants]
    return plan


# Passes over text that a calibrated fuse makes, in passes forward: three and a gradient to calibrate, three to check.
CALIBRATING, CHECKING = 4.5, 3.0


@dataclass(frozen=True)
class Pace:
    """How fast a machine is with a base and an adapter, from one short process, and forecasts from it, in seconds.

    Args:
        overhead_seconds: of a process that measures nothing: to start, import, load and end.
        load_seconds: of the model alone.
        prompt_seconds: to read a prompt of `prompt_tokens`.
        token_seconds: to write a token.
        rounded_per_second: weights that a calibrated fuse rounds, roughly.
    """

    overhead_seconds: float
    load_seconds: float
    prompt_seconds: float
    token_seconds: float
    prompt_tokens: int
    rounded_per_second: float

    @classmethod
    def of(cls, result: Mapping[str, Any], config: BenchmarkConfig, rounded_per_second: float) -> "Pace":
        """From what a process gave that measured one prompt once, with `config`."""
        (shape,) = result["shapes"]
        (trial,) = shape["trials"]
        prompt, token = trial["ttft_seconds"], 1 / trial["decode_tps"]
        measured = 2 * prompt + (config.warmup_tokens + config.decode_tokens) * token
        overhead = max(0.0, result["process_seconds"] - measured)
        return cls(overhead, result["load_seconds"], prompt, token, shape["prompt_tokens"], rounded_per_second)

    def reading(self, tokens: float) -> float:
        """To read so many tokens of text."""
        return tokens * self.prompt_seconds / self.prompt_tokens

    def process(self, config: BenchmarkConfig) -> float:
        """One of a benchmark's processes."""
        seconds = self.overhead_seconds + self.load_seconds * config.cold_load
        for prompt, batch in config.shapes:
            once = self.reading(prompt * batch)
            seconds += once + config.warmup_tokens * self.token_seconds
            seconds += config.trials * (once + config.decode_tokens * self.token_seconds)
        return seconds

    def fusing(self, calibrated: bool, weights: int, calibration_tokens: float, check_tokens: float) -> float:
        """One fuse, checked."""
        seconds = self.load_seconds + self.reading(CHECKING * check_tokens)
        if calibrated:
            seconds += self.reading(CALIBRATING * calibration_tokens) + weights / self.rounded_per_second
        return seconds
