"""What to measure: the settings, and what each variant on the command line means. Imports no MLX.

A variant is `base`, an adapter reference (`sql`, `sql@500`, `./folder`, `user/repo`), a model (`demo`, a
folder, a Hub id) or `fuse:REF:BITS`, which is fused for the occasion. The same variant may be given twice:
comparing a model with itself shows how far the machine's noise reaches.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_adapters.config import DTYPES, require
from mlx_adapters.errors import AdapterError, ConfigError, NotFoundError, did_you_mean
from mlx_adapters.registry import names, parse_reference
from mlx_adapters.tensor_names import CONFIG_FILE

BASE, FUSE = "base", "fuse"
FUSE_BITS = ("keep", "none", "2", "3", "4", "5", "6", "8")


@dataclass(frozen=True)
class BenchmarkConfig:
    """How the measuring is done.

    Every variant runs once in each of `rounds` rounds, in a fresh process, in shuffled order. A process loads
    the model, warms up and measures each prompt length and batch size `trials` times. `cold_load` adds a load
    with the operating system's file cache dropped, where that is possible. Prompts come from the rows of `data`,
    else they are random tokens.
    """

    prompt_tokens: tuple[int, ...] = (128,)
    decode_tokens: int = 64
    batch: tuple[int, ...] = (1,)
    rounds: int = 5
    trials: int = 2
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


@dataclass(frozen=True)
class Variant:
    """One row of the report: a base model, maybe with an adapter on it.

    `fuse_bits` asks for fusing first; the fused folder then takes the place of both. `problem` says why the
    variant cannot be measured.
    """

    label: str
    base: str | None = None
    adapter: str | None = None
    fuse_bits: str | None = None
    problem: str | None = None


def parse_variant(text: str) -> Variant:
    """The variant that `text` spells. Raises ConfigError or NotFoundError."""
    if text == BASE:
        return Variant(text)
    head, _, rest = text.partition(":")
    if head == FUSE:
        reference, _, bits = rest.rpartition(":")
        if bits not in FUSE_BITS or not reference:
            raise ConfigError(f"'{text}' is no variant.", "write fuse:ADAPTER:BITS, for example fuse:sql:4.")
        parse_reference(reference)
        return Variant(text, adapter=reference, fuse_bits=bits)
    folder = Path(text).expanduser()
    if folder.is_dir() and ("/" in text or text.startswith((".", "~"))):
        is_adapter = (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
        return Variant(text, adapter=str(folder.absolute())) if is_adapter else Variant(text, base=text)
    kind = parse_reference(text).kind
    if text == "demo":
        return Variant(text, base=text)
    if kind == "hub":
        return Variant(text, adapter=text) if is_hub_adapter(text) else Variant(text, base=text)
    if kind == "name" and parse_reference(text).target not in names():
        near = did_you_mean(text, [*names(), BASE, "demo"], "'mlx-adapters list' shows the adapters.")
        raise NotFoundError(f"No adapter or model named '{text}'.", near)
    return Variant(text, adapter=text)


def is_hub_adapter(text: str) -> bool:
    """Whether a repository on the Hub (or in its cache) holds an adapter rather than a whole model."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    repo, _, revision = text.partition("@")
    if isinstance(try_to_load_from_cache(repo, CONFIG_FILE, revision=revision or None), str):
        return True
    if isinstance(try_to_load_from_cache(repo, "config.json", revision=revision or None), str):
        return False
    try:
        return file_exists(repo, CONFIG_FILE, revision=revision or None)
    except (OSError, ValueError):
        return False  # the download that follows says what is wrong


def parse_variants(texts: Sequence[str], base: str | None = None) -> list[Variant]:
    """All variants, with the base each stands on; repeated ones are numbered.

    `base` is what the word "base" means; by default the base that the first adapter was trained on. What is
    not there or not readable becomes the variant's `problem`. Raises ConfigError for what cannot be a variant,
    and when no variant can be measured the first one's error.
    """
    require(len(texts) > 0, "Name at least one variant.", "for example: benchmark base sql")
    variants, errors = [], []
    for text in texts:
        try:
            variants.append(_with_base(parse_variant(text), base))
        except ConfigError:
            raise
        except AdapterError as error:
            errors.append(error)
            variants.append(Variant(text, problem=error.message))
    if len(errors) == len(texts):
        raise errors[0]
    return _numbered(_with_common_base(variants, base))


def _with_common_base(variants: list[Variant], base: str | None) -> list[Variant]:
    """The variants, `base` among them standing on the common base."""
    found = base or next((v.base for v in variants if v.adapter and v.base), None)
    if found is None and any(v.base is None and not v.problem for v in variants):
        raise ConfigError("It is not known which model 'base' means.", "give --base, or an adapter among the variants.")
    return [replace(variant, base=variant.base or found) for variant in variants]


def _numbered(variants: list[Variant]) -> list[Variant]:
    """The variants with "(2)", "(3)", ... behind labels that come again."""
    seen: Counter[str] = Counter()
    result = []
    for variant in variants:
        seen[variant.label] += 1
        count = seen[variant.label]
        result.append(variant if count == 1 else replace(variant, label=f"{variant.label} ({count})"))
    return result


def _with_base(variant: Variant, base: str | None) -> Variant:
    if variant.adapter is None or variant.base is not None:
        return variant
    if base is not None:
        return replace(variant, base=base)
    from mlx_adapters.adapter import base_of, read_metadata
    from mlx_adapters.registry import locate

    name = base_of(read_metadata(locate(variant.adapter)[0])).get("name")
    require(bool(name), f"Adapter '{variant.adapter}' does not say what base it was made for.", "give --base.")
    return replace(variant, base=name)


def schedule(count: int, rounds: int, seed: int) -> list[tuple[int, int]]:
    """(round, variant) in the order of running: all variants once per round, each round shuffled anew."""
    order = random.Random(seed)
    plan = []
    for number in range(rounds):
        variants = list(range(count))
        order.shuffle(variants)
        plan += [(number, variant) for variant in variants]
    return plan
