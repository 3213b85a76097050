"""The precisions that weights are stored and computed in. Imports no MLX."""

import dataclasses

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ConfigError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")


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


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Weights of few bits, in groups that share a scale, in one of MLX's modes.

    Args:
        bits: of each weight: 2, 3, 4, 5, 6 or 8 for "affine", else what the mode's name says.
        group_size: weights that share a scale: 32, 64 or 128 for "affine", 32 for mxfp4 and mxfp8, 16 for nvfp4.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".

    Raises ConfigError for what MLX does not have.

    Example:
        >>> ma.Quantization(bits=4, group_size=32)
        Quantization(bits=4, group_size=32, mode='affine')
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

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
