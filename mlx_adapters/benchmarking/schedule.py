"""How a benchmark is done: its settings, and the order in which the processes run. Imports no MLX."""

import random
from dataclasses import dataclass

from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import DTYPES


def stretch(decode_tokens: int) -> int:
    """How many decode steps in a row are compared, the fastest of a trial."""
    return min(16, decode_tokens - 1)


@dataclass(frozen=True)
class BenchmarkConfig:
    """How the measuring is done: every variant runs once in each round, in a fresh process, in shuffled order.

    A process loads the model, warms up and measures each prompt length and batch size `trials` times.

    Args:
        prompt_tokens: lengths of the prompts.
        decode_tokens: tokens to write after each.
        batch: sequences at a time.
        rounds: processes for each variant.
        trials: measurements in each of them.
        warmup_tokens: written before anything is measured.
        dtype: to compute in.
        cold_load: also load with the system's file cache dropped, where that is possible.
        any_base: take adapters that were trained on another base.
        data: rows that prompts are made of; None: random tokens.
        seed: of prompts and order.

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.BenchmarkConfig(prompt_tokens=(128, 1024), batch=(1, 8)).shapes
        [(128, 1), (1024, 1), (128, 8), (1024, 8)]
    """

    prompt_tokens: tuple[int, ...] = (128,)
    decode_tokens: int = 64
    batch: tuple[int, ...] = (1,)
    rounds: int = 5
    trials: int = 3
    warmup_tokens: int = 8
    dtype: str = "auto"
    cold_load: bool = True
    any_base: bool = False
    data: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch"):
            values = getattr(self, name)
            require(len(values) > 0 and min(values) >= 1, f"{name} needs whole numbers of at least 1.")
        require(self.decode_tokens >= 2, f"decode_tokens must be at least 2, not {self.decode_tokens}.")
        require(self.rounds >= 1, f"rounds must be at least 1, not {self.rounds}.")
        require(self.trials >= 1, f"trials must be at least 1, not {self.trials}.")
        require(self.warmup_tokens >= 1, f"warmup_tokens must be at least 1, not {self.warmup_tokens}.")
        require(self.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not '{self.dtype}'.")

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
