"""The precisions that weights are stored and computed in. Imports no MLX."""

import dataclasses
from typing import Any, Literal, get_args

from mlx_adapters.config.mapping import require
from mlx_adapters.config.settings import setting, settings
from mlx_adapters.errors import ConfigError, did_you_mean

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)


# What MLX can quantize to: mode -> (bits, group sizes). Checked against mlx 0.32.4.
QUANTIZATIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
MODES = tuple(QUANTIZATIONS)


def default_group_size(mode: str) -> int:
    """MLX's own of a mode: 64, or the only one there is."""
    sizes = QUANTIZATIONS.get(mode, QUANTIZATIONS["affine"])[1]
    return sizes[0] if len(sizes) == 1 else 64


def computing_dtype() -> Any:
    """The setting of the type that a model computes in."""
    return setting("auto", "Type to compute in", means="auto: float32 on a CPU, the model's on a GPU")


@settings
@dataclasses.dataclass(frozen=True)
class Quantization:
    """Weights of few bits, in groups that share a scale, in one of MLX's modes.

    Raises ConfigError for what MLX does not have.

    Example:
        >>> ma.Quantization(bits=4, group_size=32)
        Quantization(bits=4, group_size=32, mode='affine')
    """

    bits: int = setting(4, "Bits per weight", more="2, 3, 4, 5, 6 or 8 in mode affine, else what the mode's name says.")
    group_size: int = setting(
        64,
        "Weights that share a scale",
        more="32, 64 or 128 in mode affine, 32 in mxfp4 and mxfp8, 16 in nvfp4.",
    )
    mode: str = setting("affine", "Quantization mode", more="affine, mxfp4, mxfp8 or nvfp4.")

    def __post_init__(self) -> None:
        if self.mode not in QUANTIZATIONS:  # (a hint takes time, and this is made for every layer of a model)
            hint = did_you_mean(self.mode, QUANTIZATIONS, "modes: " + ", ".join(QUANTIZATIONS))
            raise ConfigError(f"There is no quantization mode '{self.mode}'.", hint)
        bits, group_sizes = QUANTIZATIONS[self.mode]
        require(
            self.bits in bits, f"Mode '{self.mode}' has no {self.bits} bits.", f"it has {', '.join(map(str, bits))}."
        )
        require(
            self.group_size in group_sizes,
            f"Mode '{self.mode}' has no group size {self.group_size}.",
            f"it has {', '.join(map(str, group_sizes))}.",
        )
