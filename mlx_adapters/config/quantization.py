"""The precisions that weights are stored and computed in. Imports no MLX."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mlx_adapters.config.mapping import converted, from_mapping, hints_of, is_whole, require, shown, to_mapping
from mlx_adapters.config.settings import check, setting, settings
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


def bits_of_cache() -> Any:
    """The setting of the bits that keys and values are kept in."""
    what = "Keep keys and values of what was read in so many bits"
    return setting(None, what, means="as computed", more="2, 3, 4, 5, 6 or 8.")


def groups_of_cache() -> Any:
    """The setting of how many of them share a scale."""
    return setting(64, "Keys and values that share a scale there", more="32, 64 or 128.")


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
        check(self)
        if self.mode not in QUANTIZATIONS:  # (a hint takes time, and this is made for every layer of a model)
            hint = did_you_mean(self.mode, QUANTIZATIONS, "modes: " + ", ".join(QUANTIZATIONS))
            raise ConfigError(f"There is no quantization mode {shown(self.mode)}.", hint)
        accepted = QUANTIZATIONS[self.mode]
        for name, what, known in zip(("bits", "group_size"), ("{} bits", "group size {}"), accepted, strict=True):
            if (value := getattr(self, name)) not in known:
                said = f"Mode '{self.mode}' has no {what.format(shown(value))}."
                raise ConfigError(said, f"it has {', '.join(map(str, known))}.")


BITS = ("keep", "none", *map(str, QUANTIZATIONS["affine"][0]))  # as they are spelled on a command line
ACCEPTED = (
    f"give a number of bits ({', '.join(BITS[2:])}), 'keep', 'none', a Quantization, or a mapping such as "
    "{'bits': 4, 'group_size': 32, 'mode': 'affine'}."
)


@dataclasses.dataclass(frozen=True)
class Precision:
    """What the layers of a fused model are to be stored in, from the command line to the file.

    Args:
        bits: of each weight; "keep": each layer as in the base, "none": unquantized.
        group_size: weights that share a scale; None: the base's own, if it has as many bits, else MLX's default.
        mode: as of a `Quantization`; None: the base's own likewise, else "affine".

    Raises ConfigError for what MLX does not have.
    """

    bits: int | Literal["keep", "none"]
    group_size: int | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            object.__setattr__(self, name, converted(getattr(self, name), hint, name))
        if isinstance(self.bits, str):
            have = ", ".join(map(str, QUANTIZATIONS.get(self.mode or "affine", QUANTIZATIONS["affine"])[0]))
            require(
                self.group_size is None and self.mode is None,
                f"bits {self.bits} takes no group size and no mode.",
                f"say how many bits with --bits: {have}.",
            )
        else:
            self.like(None)  # raises for what MLX does not have

    @classmethod
    def of(cls, given: object, name: str = "quantization") -> "Precision":
        """The one way in: what people give for a precision, as `name`. Raises ConfigError for everything else."""
        if isinstance(given, Precision):
            return given
        if isinstance(given, Quantization):
            return cls(given.bits, given.group_size, given.mode)
        if isinstance(given, Mapping) and "bits" in given:
            return from_mapping(cls, given, name)
        if is_whole(given) or (isinstance(given, str) and given in ("keep", "none")):
            return cls(given)  # type: ignore[arg-type]
        raise ConfigError(f"{name} cannot be {shown(given)}.", ACCEPTED)

    @classmethod
    def spelled(cls, bits: str, group_size: int | None = None, mode: str | None = None) -> "Precision":
        """As it is spelled on a command line: one of BITS, with the group size and mode that may be given."""
        return cls(int(bits) if bits.isdecimal() else bits, group_size, mode)  # type: ignore[arg-type]

    @property
    def quantization(self) -> Quantization | None:
        """The quantization of the layers; None for "keep" and "none"."""
        return None if isinstance(self.bits, str) else self.like(None)

    def like(self, own: Quantization | None) -> Quantization:
        """Its bits in the groups and the mode that it says, else in those of `own`, else in MLX's default."""
        if own is not None and own.bits == self.bits and self.group_size is None and self.mode in (None, own.mode):
            return own
        require(not isinstance(self.bits, str), f"This takes a number of bits, not '{self.bits}'.")
        mode = "affine" if self.mode is None else self.mode
        size = default_group_size(mode) if self.group_size is None else self.group_size
        return Quantization(self.bits, size, mode)  # type: ignore[arg-type]

    def settled(self, own: Quantization | None) -> "Precision":
        """The same for a base that is quantized like `own`, with nothing left open; the base's own is "keep"."""
        if isinstance(self.bits, str):
            return self
        quantization = self.like(own)
        return KEEP if quantization == own else Precision.of(quantization)

    def to_json(self) -> str | dict[str, Any]:
        """As recipes keep it: "keep", "none", or a mapping."""
        return self.bits if isinstance(self.bits, str) else to_mapping(self)


KEEP, UNQUANTIZED = Precision("keep"), Precision("none")
PrecisionLike = Precision | Quantization | int | str | Mapping[str, Any]  # what `Precision.of` takes


@settings
@dataclasses.dataclass(frozen=True)
class CacheQuantization:
    """Keys and values of what was read in few bits: long texts take less memory, and answers change a little.

    Raises ConfigError for what MLX does not have.

    Example:
        >>> few = ma.CacheQuantization(kv_bits=8, quantized_kv_start=0)  # for load_model(..., kv=few)
        >>> few.kv_group_size
        64
    """

    kv_bits: int | None = bits_of_cache()
    kv_group_size: int = groups_of_cache()
    quantized_kv_start: int = setting(5000, "Begin with that when a text has so many tokens", at_least=0)

    def __post_init__(self) -> None:
        check(self)
        bits, sizes = QUANTIZATIONS["affine"]
        for name, known in (("kv_bits", (None, *bits)), ("kv_group_size", sizes)):
            value = getattr(self, name)
            require(value in known, f"{name} is one of {', '.join(map(str, filter(None, known)))}, not {shown(value)}.")
