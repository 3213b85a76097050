"""What a fuse can be asked for."""

from dataclasses import dataclass
from typing import Literal

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import did_you_mean

METHODS = ("auto", "nearest", "calibrated")
FORMATS = ("mlx", "hf", "gguf")
BITS = ("keep", "none", "2", "3", "4", "5", "6", "8")


@dataclass(frozen=True)
class FuseOptions:
    """How to round and how to check.

    Args:
        method: "nearest", "calibrated", or "auto": calibrated under 8 bits, if there is text.
        calibration: text to calibrate and check on: a data folder, a .jsonl, .parquet or .txt file; None: the adapter's
            training data, else a general text.
        calibration_rows: rows to calibrate on.
        check: compare with the adapter model on text kept aside.
        check_rows: rows to check on.
        max_kl: give layers more bits where they help most, until KL is at most this (nats per token).
        budget_bits: likewise, up to this many bits per weight of the whole model.
        force: keep the output even if KL is above `max_kl`.
        seed: of the choice of rows.
        thorough: let the rows of a layer cancel each other's errors too: about half the KL for three times the rounding
            time. Experts (each sees too few tokens to know how its outputs are felt together) and layers of over 16,384
            outputs (whose moments would not fit) are rounded row by row all the same.
        format: "mlx"; "hf": unquantized, with the names, types and config of the original checkpoint; "gguf": one file,
            f16 (or q8_0 at 8 bits), not checked.

    Raises ConfigError for a value out of range, or one that another option rules out.

    Example:
        >>> small = ma.FuseOptions(budget_bits=4.75, calibration="data/sql", thorough=False)
        >>> small.method
        'auto'
    """

    method: Literal["auto", "nearest", "calibrated"] = "auto"
    calibration: str | None = None
    calibration_rows: int = 128
    check: bool = True
    check_rows: int = 64
    max_kl: float | None = None
    budget_bits: float | None = None
    force: bool = False
    seed: int = 0
    thorough: bool = True
    format: Literal["mlx", "hf", "gguf"] = "mlx"

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"There is no method '{self.method}'.", did_you_mean(self.method, METHODS))
        require(self.calibration_rows >= 1 and self.check_rows >= 1, "calibration and check need at least 1 row.")
        require(self.max_kl is None or self.max_kl > 0, f"max_kl must be above 0, not {self.max_kl}.")
        require(
            self.max_kl is None or self.budget_bits is None,
            "Give --max-kl (max_kl) or --budget-bits (budget_bits), not both.",
        )
        require(
            self.max_kl is None or self.check, "max_kl is a promise that has to be checked.", "leave out --no-check."
        )
        require(self.format in FORMATS, f"There is no format '{self.format}'.", did_you_mean(self.format, FORMATS))
        if self.budget_bits is not None or self.max_kl is not None:
            require(self.method != "nearest", "Mixed precision needs the method 'calibrated'.", "leave --method out.")


DEFAULTS = FuseOptions()
