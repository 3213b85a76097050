"""What a fuse can be asked for. Imports no MLX."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_adapters.config.mapping import require
from mlx_adapters.config.settings import check, of_kind, setting, settings


@settings
@dataclass(frozen=True)
class FuseOptions:
    """How to round and how to check.

    Raises ConfigError for a value out of range, or one that another option rules out.

    Example:
        >>> small = ma.FuseOptions(budget_bits=4.75, calibration="data/sql", thorough=False)
        >>> small.method
        'auto'
    """

    method: Literal["auto", "nearest", "calibrated"] = setting(
        "auto", "How to round", means="auto: calibrated under 8 bits if there is text"
    )
    calibration: str | Path | Any | None = setting(
        None,
        "Data folder, .jsonl or .txt",
        more="Text to calibrate and check on; any file of rows; from Python also rows, as for `train`.",
        means="the adapter's training data, else a general text",
        metavar="DIR|FILE",
    )
    calibration_rows: int = setting(128, "Rows to calibrate on", at_least=1)
    thorough: bool | None = setting(
        None,
        "Tune scales by gradient after rounding; quick: round row by row, in a third of the time",
        more="But for quick, a layer's rows cancel each other's errors, at about half its KL. Experts (each sees too "
        "few tokens to know how its outputs are felt together) and layers of over 16,384 outputs (whose moments would "
        "not fit) are rounded row by row all the same. Scales of experts and of the float modes are not tuned.",
        means="neither",
        off="quick",
    )
    check: bool = setting(True, "Compare with the adapter model on text kept aside")
    check_rows: int = setting(64, "Rows to check on", at_least=1)
    max_kl: float | None = setting(
        None, "More bits where they help most, until KL is at most this", more="In nats per token.", above=0
    )
    budget_bits: float | None = setting(
        None, "More bits where they help most, up to this many per weight", more="Of the whole model.", above=0
    )
    recipe: str | None = setting(
        None,
        "mlx-lm's recipe of mixed precision, such as mixed_4_6",
        more="In place of one number of bits; max_kl and budget_bits start from it.",
        metavar="NAME",
    )
    program: Literal["ollama", "lmstudio", "llama.cpp", "transformers", "vllm", "mlx-vlm"] | None = setting(
        None,
        "Write what this program opens, and say how",
        more="Ollama and llama.cpp get a GGUF file (Ollama a Modelfile too), transformers and vLLM hf, mlx-vlm the MLX "
        "format, LM Studio that on a Mac and GGUF elsewhere.",
    )
    format: Literal["auto", "mlx", "hf", "gguf"] = setting(
        "auto",
        "hf: the original checkpoint's names and types; gguf: one file for llama.cpp",
        more="hf is unquantized; gguf is f16, q8_0 at 8 bits, q5_1 at 5 and q4_1 at 4, with the codes that calibration "
        "found, and is not checked.",
        means="auto: mlx, or what the program opens",
    )
    force: bool = setting(False, "Keep the model even if `max_kl` cannot be held")
    seed: int = setting(0, "Seed of the choice of rows")

    def __post_init__(self) -> None:
        check(self)
        opens = opened_by(self.program)
        if self.format == "auto":
            object.__setattr__(self, "format", opens[0])
        require(
            self.format in opens,
            f"{self.program} does not open the format '{self.format}'.",
            f"leave --format out: {self.program} gets {opens[0]}.",
        )
        require(
            self.max_kl is None or self.budget_bits is None,
            "Give --max-kl (max_kl) or --budget-bits (budget_bits), not both.",
        )
        require(
            self.max_kl is None or self.check, "max_kl is a promise that has to be checked.", "leave out --no-check."
        )
        if self.mixed:
            require(self.method != "nearest", "Mixed precision needs the method 'calibrated'.", "leave --method out.")
        require(
            self.recipe is None or self.format == "mlx",
            "A recipe of mixed precision needs the MLX format.",
            "leave --format.",
        )

    @property
    def mixed(self) -> bool:
        """Whether layers may get more bits than they are asked for."""
        return self.max_kl is not None or self.budget_bits is not None


def with_calibration(options: FuseOptions, calibration: Any) -> FuseOptions:
    """The same options with the text that is given beside them; what can be read once only is read here."""
    options = of_kind(FuseOptions, options)
    text = options.calibration if calibration is None else calibration
    return replace(options, calibration=tuple(text) if isinstance(text, Iterator) else text)


def opened_by(program: str | None) -> tuple[str, ...]:
    """The formats that a program opens, the one that it gets first."""
    if program is None:
        return ("mlx", "hf", "gguf")
    if program == "lmstudio":
        return ("mlx", "gguf") if sys.platform == "darwin" else ("gguf", "mlx")
    return {"transformers": ("hf",), "vllm": ("hf",), "mlx-vlm": ("mlx",)}.get(program, ("gguf",))


DEFAULTS = FuseOptions()
